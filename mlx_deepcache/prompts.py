"""From text to `Conditioning`: tokenize, encode, and put together what each family's U-Net reads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from .clip import CLIPTextModel
from .emphasis import parse
from .errors import CheckpointError
from .unet import Conditioning

GOOD_SCORE, BAD_SCORE = 6.0, 2.5  # of LAION's aesthetic scores, 1-10: what diffusers asks the refiner for and not for
POSITIONS = 77  # what every CLIP text encoder here reads


class PromptWarning(UserWarning):
    """A part of a prompt is not used."""


def load_tokenizer(folder: Path):
    """transformers' CLIPTokenizer from a checkpoint's tokenizer folder.

    Raises:
        CheckpointError: the folder holds no tokenizer.
    """
    from transformers import CLIPTokenizer  # slow to import, and needed only once there is text
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing; expected a tokenizer there")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer.model_max_length = min(tokenizer.model_max_length, POSITIONS)  # a config may leave it out
        return tokenizer
    except Exception as error:  # the library raises whatever the broken file led to
        raise CheckpointError(f"{folder} holds no usable CLIP tokenizer: {str(error).splitlines()[0]}") from None


def tokenize(tokenizer, text: str, *, weighted: bool = False, long: bool = False) -> list[tuple[int, float]]:
    """Token ids with their weights, without those that begin and end a text.

    weighted: read the syntax of `emphasis`; without `long`, a text is cut at what fits into one chunk, with a warning
    that shows what is lost.
    """
    room = tokenizer.model_max_length - 2
    pieces = parse(text) if weighted else [(text, 1.0)]
    tokens = [(token, weight) for piece, weight in pieces for token in tokenizer(piece)["input_ids"][1:-1]]
    if len(tokens) <= room or long:
        return tokens
    lost = tokenizer.decode([token for token, _ in tokens[room:]])
    warnings.warn(
        f"the prompt is longer than {room} tokens; not used: {lost!r}; --long-prompt uses all of it",
        PromptWarning,
        stacklevel=3,
    )
    return tokens[:room]


def chunked(
    tokenizer, texts: Sequence[list[tuple[int, float]]], chunks: int | None = None
) -> tuple[mx.array, mx.array]:
    """Ids and weights, (N, chunks, 77) each, of texts from `tokenize`: each chunk begins, ends and is padded as a text
    of its own. chunks: as many as the longest text needs, if not given."""
    room = tokenizer.model_max_length - 2
    chunks = chunks_needed(tokenizer, texts) if chunks is None else chunks
    first, last, pad = ((token, 1.0) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, _pad(tokenizer)))
    rows = []
    for tokens in texts:
        parts = (tokens[room * i : room * (i + 1)] for i in range(chunks))
        rows.append([[first, *part, last, *[pad] * (room - len(part))] for part in parts])
    both = np.array(rows)
    return mx.array(both[..., 0].astype(np.int32)), mx.array(both[..., 1].astype(np.float32))


def chunks_needed(tokenizer, texts: Sequence[list[tuple[int, float]]]) -> int:
    return max(1, *(math.ceil(len(tokens) / (tokenizer.model_max_length - 2)) for tokens in texts))


def _pad(tokenizer) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def emphasise(hidden: mx.array, weights: mx.array, *, keep_mean: bool) -> mx.array:
    """Weigh the encoded tokens, as A1111 does it; hidden: (N, chunks, 77, C); weights: (N, chunks, 77).

    keep_mean: scale each chunk so that its mean stays what it was. For SDXL, whose encoding has a mean near zero, that
    would not end well, and A1111's "no norm" is used.
    """
    old = hidden.astype(mx.float32)
    new = old * weights[..., None]
    if keep_mean:
        new = new * (old.mean(axis=(2, 3), keepdims=True) / new.mean(axis=(2, 3), keepdims=True))
    return new.astype(hidden.dtype)


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
