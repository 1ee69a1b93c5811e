"""From prompts, or a picture, to what the U-Net reads, which is the family's to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..checkpoints.families import Family
from ..nets.clip_vision import CLIPVisionModelWithProjection, clip_pixels
from ..nets.labels import LabelEmbedding
from ..nets.unet_parts import Conditioning
from .prompts import chunked, chunks_needed, emphasise, tokenize

Texts = list[tuple[str, str | None, int]]
"""Each with what the last text encoder reads in its place, if that is another, and how many layers are skipped."""


def encode(
    tokenizers: Sequence,
    encoders: Sequence[Callable[..., tuple[mx.array, mx.array]]],
    prompts: Sequence[str],
    negatives: Sequence[str | None] | None,
    *,
    family: Family,
    size: tuple[int, int],
    zeros_for_none: bool,
    prompt_2: str | None = None,
    negative_2: str | None = None,
    weighted: bool = False,
    long: bool = False,
    clip_skip: int = 0,
) -> Conditioning:
    """What the U-Net reads for these prompts; with `negatives`, they come first in a batch of twice the size.

    tokenizers, encoders: the family's, see `CLIPTextModel`; size: (height, width) in pixels; zeros_for_none: a negative
    prompt of None is all zeros (SDXL base) and not the encoding of ""; prompt_2, negative_2: what SDXL's last encoder
    reads instead; weighted, long: see `tokenize`; clip_skip: the prompts' hidden states are from so many layers before
    the ones that the family reads, and not the negatives', as in diffusers' pipelines.
    """
    negatives = negatives or ()
    texts = [(negative or "", negative_2, 0) for negative in negatives]
    texts += [(text, prompt_2, clip_skip) for text in prompts]
    distinct = list(dict.fromkeys(texts))  # a text is encoded once, however many pictures use it
    rows = mx.array([distinct.index(text) for text in texts])
    context, pooled = (read[rows] for read in _read(family, tokenizers, encoders, distinct, weighted, long))
    if family.time_ids is None:
        return Conditioning(context)
    shown = [negative is not None or not zeros_for_none for negative in negatives] + [True] * len(prompts)
    if not all(shown):
        factor = mx.array(shown).astype(context.dtype)
        context, pooled = context * factor[:, None, None], pooled * factor[:, None]
    return at_size(Conditioning(context, pooled), family, size, len(prompts))


def at_size(cond: Conditioning, family: Family, size: tuple[int, int], prompts: int) -> Conditioning:
    """The same for pictures of another (height, width), which some U-Nets are told; prompts: how many there are beside
    negatives."""
    if family.time_ids is None:
        return cond
    wanted = [False] * (len(cond.context) - prompts) + [True] * prompts
    time_ids = mx.array([family.time_ids(*size, good) for good in wanted], dtype=mx.float32)
    return replace(cond, time_ids=time_ids)


def label(embedding: LabelEmbedding, number: int, pictures: int, *, guided: bool) -> Conditioning:
    """What a class-conditional U-Net reads for so many pictures of a class; if guided, first as many of none."""
    without = [embedding.config.without] * pictures if guided else []
    return Conditioning(embedding(mx.array([*without, *[number] * pictures])))


def nothing(pictures: int, dtype: mx.Dtype) -> Conditioning:
    """What an unconditional U-Net reads: no tokens."""
    return Conditioning(mx.zeros((pictures, 0, 0), dtype))


def see(
    encoder: CLIPVisionModelWithProjection,
    picture: np.ndarray,
    videos: int,
    *,
    guided: bool,
    fps: int,
    motion_bucket: int,
    noise_aug: float,
) -> Conditioning:
    """What the U-Net reads of a picture (H, W, 3) in 0-255 for so many videos of it; if guided, first as many that are
    of none. The rest is what it is told in numbers: the network was trained with frames a second less one."""
    pixels = clip_pixels(picture, encoder.config.image_size)
    seen = encoder(pixels.astype(encoder.visual_projection.weight.dtype))[:, None]
    context = mx.repeat(seen, videos, axis=0)
    if guided:
        context = mx.concatenate([mx.zeros_like(context), context])
    told = mx.array([[fps - 1, motion_bucket, noise_aug]], dtype=mx.float32)
    return Conditioning(context, time_ids=mx.repeat(told, len(context), axis=0))


def _read(
    family: Family, tokenizers: Sequence, encoders: Sequence[Callable], texts: Texts, weighted: bool, long: bool
) -> tuple[mx.array, mx.array]:
    """The encoders' hidden states side by side, (N, S, C), and the last one's pooled texts, (N, P).

    Of a long text in chunks the hidden states are put one after the other, and the first one's pooled text is used.
    """
    tokens = []
    for i, tokenizer in enumerate(tokenizers):
        second = family.second_prompt and i == len(tokenizers) - 1
        own = [other if second and other is not None else text for text, other, _ in texts]
        tokens.append([tokenize(tokenizer, text, weighted=weighted, long=long) for text in own])
    chunks = max(map(chunks_needed, tokenizers, tokens))
    states, skip = [], None
    if any(layers for *_, layers in texts):
        skip = [layers for *_, layers in texts for _ in range(chunks)]
    for tokenizer, encoder, own in zip(tokenizers, encoders, tokens, strict=True):
        ids, weights = chunked(tokenizer, own, chunks)
        hidden, pooled = encoder(ids.reshape(-1, ids.shape[-1]), penultimate=family.penultimate, skip=skip)
        hidden = hidden.reshape(*ids.shape, -1)
        if not (weights == 1).all().item():
            hidden = emphasise(hidden, weights, restore_mean=not family.penultimate)
        states.append(hidden.reshape(len(ids), -1, hidden.shape[-1]))
    return mx.concatenate(states, axis=-1), pooled.reshape(len(texts), chunks, -1)[:, 0]
