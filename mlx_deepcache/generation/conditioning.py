"""From prompts to what the U-Net reads."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..nets.clip import CLIPTextModel
from ..nets.unet_parts import Conditioning
from .prompts import chunked, chunks_needed, emphasise, tokenize

GOOD_SCORE, BAD_SCORE = 6.0, 2.5  # of LAION's aesthetic scores, 1-10: what diffusers asks the refiner for and not for


def encode(
    tokenizers: list,
    encoders: Sequence[CLIPTextModel],
    prompts: Sequence[str],
    negatives: Sequence[str | None] | None,
    *,
    size: tuple[int, int],
    zeros_for_none: bool,
    prompt_2: str | None = None,
    negative_2: str | None = None,
    weighted: bool = False,
    long: bool = False,
    refiner: bool = False,
) -> Conditioning:
    """What the U-Net reads for these prompts; with `negatives`, they come first in a batch of twice the size.

    One encoder (SD 1.x and 2.x): its last hidden states. Two (SDXL; Podell et al. 2023): the penultimate ones of both,
    side by side, the second's pooled text, and `size`, (height, width) in pixels, as original and target size.
    zeros_for_none: a negative prompt of None is all zeros (SDXL base) and not the encoding of ""; prompt_2, negative_2:
    what SDXL's second encoder reads instead; weighted, long: see `tokenize`. Of a long text in chunks the encodings are
    put one after the other, and the first one's pooled text is used. refiner: SDXL's, with the second encoder alone, is
    told how good the picture should be in place of the target size.
    """
    texts = [(negative or "", negative_2) for negative in negatives or ()] + [(text, prompt_2) for text in prompts]
    distinct = list(dict.fromkeys(texts))  # a text is encoded once, however many pictures use it
    xl = refiner or len(encoders) == 2
    tokens = []
    for i, tokenizer in enumerate(tokenizers):
        own = [second if (i == 1 or refiner) and second is not None else first for first, second in distinct]
        tokens.append([tokenize(tokenizer, text, weighted=weighted, long=long) for text in own])
    chunks = max(chunks_needed(*both) for both in zip(tokenizers, tokens, strict=True))
    states, pooled = [], None
    for tokenizer, encoder, texts_tokens in zip(tokenizers, encoders, tokens, strict=True):
        ids, weights = chunked(tokenizer, texts_tokens, chunks)
        hidden, pooled = encoder(ids.reshape(-1, ids.shape[-1]), penultimate=xl)
        hidden = hidden.reshape(*ids.shape, -1)
        if not (weights == 1).all().item():
            hidden = emphasise(hidden, weights, keep_mean=not xl)
        states.append(hidden.reshape(len(ids), -1, hidden.shape[-1]))
    rows = mx.array([distinct.index(text) for text in texts])
    context = mx.concatenate(states, axis=-1)[rows]
    if not xl:
        return Conditioning(context)
    pooled = pooled.reshape(len(distinct), chunks, -1)[:, 0][rows]
    if negatives is not None and zeros_for_none:
        keep = mx.array([negative is not None for negative in negatives] + [True] * len(prompts)).astype(context.dtype)
        context, pooled = context * keep[:, None, None], pooled * keep[:, None]
    height, width = size
    last = [[BAD_SCORE]] * (len(texts) - len(prompts)) + [[GOOD_SCORE]] * len(prompts)
    rest = last if refiner else [[height, width]] * len(texts)
    time_ids = mx.array([[height, width, 0, 0, *ids] for ids in rest], dtype=mx.float32)
    return Conditioning(context, pooled, time_ids)
