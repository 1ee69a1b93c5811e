"""From text to `Conditioning`: tokenize, encode, and put together what each family's U-Net reads."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from .clip import CLIPTextModel
from .errors import CheckpointError
from .unet import Conditioning

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


def tokenize(tokenizer, texts: Sequence[str]) -> mx.array:
    """(N, 77) token ids, padded with the tokenizer's own padding token, cut with a warning that shows what is lost."""
    length = tokenizer.model_max_length
    ids = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)["input_ids"]
    for whole in tokenizer(list(dict.fromkeys(texts)))["input_ids"]:
        if len(whole) > length:
            lost = tokenizer.decode(whole[length - 1 : -1])
            warnings.warn(
                f"the prompt is longer than {length - 2} tokens; not used: {lost!r}", PromptWarning, stacklevel=3
            )
    return mx.array(ids)


def encode(
    tokenizers: list,
    encoders: list[CLIPTextModel],
    prompts: Sequence[str],
    negatives: Sequence[str | None] | None,
    *,
    size: tuple[int, int],
    zeros_for_none: bool,
) -> Conditioning:
    """What the U-Net reads for these prompts; with `negatives`, they come first in a batch of twice the size.

    One encoder (SD 1.x and 2.x): its last hidden states. Two (SDXL; Podell et al. 2023): the penultimate ones of both,
    side by side, the second's pooled text, and `size`, (height, width) in pixels, as original and target size.
    zeros_for_none: a negative prompt of None is all zeros (SDXL base) and not the encoding of "".
    """
    texts = [*(negative or "" for negative in negatives or ()), *prompts]
    distinct = list(dict.fromkeys(texts))  # a text is encoded once, however many pictures use it
    xl = len(encoders) == 2
    encoded = []
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        ids, vocabulary = tokenize(tokenizer, distinct), len(encoder.embeddings.token_embedding.weight)
        if ids.max().item() >= vocabulary:  # MLX would read past the table
            raise CheckpointError(
                f"the tokenizer gives token {ids.max().item()} to a text encoder that knows {vocabulary}; "
                "they are not of one checkpoint"
            )
        encoded.append(encoder(ids, penultimate=xl))
    rows = mx.array([distinct.index(text) for text in texts])
    context = mx.concatenate([hidden for hidden, _ in encoded], axis=-1)[rows]
    if not xl:
        return Conditioning(context)
    pooled = encoded[1][1][rows]
    if negatives is not None and zeros_for_none:
        keep = mx.array([negative is not None for negative in negatives] + [True] * len(prompts)).astype(context.dtype)
        context, pooled = context * keep[:, None, None], pooled * keep[:, None]
    height, width = size
    time_ids = mx.array([[height, width, 0, 0, height, width]] * len(texts), dtype=mx.float32)
    return Conditioning(context, pooled, time_ids)
