"""VAE decoding in tiles: bounded memory for pictures of any size.

As diffusers does it (`AutoencoderKL.tiled_decode`): tiles overlap by a quarter and each fades into the next. What a
tile cannot know is the rest of the picture, which group normalisation and the VAE's one attention layer look at, so the
result differs a little from an untiled one. Unlike there, a last tile that would lie within the overlap is left out.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..backend import ops
from .autoencoder import AutoencoderKL, VAEConfig

TILE = 64  # latents a side, as in diffusers for SD


OVERLAP = 1 / 4
SHARE = 3 / 4  # of the memory, to plan with


def tiled(tiling: str, config: VAEConfig, size: tuple[int, int], itemsize: int, room: int) -> bool:
    """Whether to decode in tiles latents of this (height, width): "auto" does if the whole would take over `SHARE` of
    the `room`, in bytes, that there is beside the weights.
    """
    if config.factor == 1 or max(size) <= TILE:
        return False
    whole = decoding_bytes(config, size, itemsize)
    return tiling == "on" or (tiling == "auto" and whole > SHARE * room)


def decoding_bytes(config: VAEConfig, size: tuple[int, int], itemsize: int) -> int:
    """About what decoding one picture from latents of this (height, width) takes."""
    height, width = size
    # At full size the widest layer has the second level's channels. With SD's VAE, five maps of it are alive at once
    # along the graph that a GPU is given (512 and 1024 px); on the CPU 12 bytes for each of its numbers were measured
    # in float32, and 16 in half precision (256 and 384 px).
    number = 5 * itemsize if ops.on_gpu() else 16
    return height * width * config.factor**2 * max(config.block_out_channels[:2]) * number


def decode_tiled(vae: AutoencoderKL, latents: mx.array, tile: int = TILE) -> np.ndarray:
    """latents: (1, h, w, C); tile: its side in latents -> (1, f*h, f*w, 3) float32, about [-1, 1]."""
    factor = vae.config.factor
    stride, fade = int(tile * (1 - OVERLAP)), int(tile * factor * OVERLAP)
    _, h, w, _ = latents.shape
    tops, lefts = (range(0, max(side - (tile - stride), 1), stride) for side in (h, w))
    picture = np.empty((1, h * factor, w * factor, vae.config.out_channels), np.float32)
    above: list[np.ndarray] = []
    for top in tops:
        row = []
        for column, left in enumerate(lefts):
            part = np.array(vae.decode(latents[:, top : top + tile, left : left + tile]).astype(mx.float32))
            if above:
                _fade(above[column], part, fade, axis=1)
            if row:
                _fade(row[-1], part, fade, axis=2)
            row.append(part)
            y, x = top * factor, left * factor  # the next tiles write over what they share with this one
            picture[:, y : y + part.shape[1], x : x + part.shape[2]] = part
        above = row
    return picture


def _fade(before: np.ndarray, after: np.ndarray, length: int, axis: int) -> None:
    """Blend the start of `after` with the end of `before`, in place."""
    length = min(length, before.shape[axis], after.shape[axis])
    weight = (np.arange(length, dtype=np.float32) / length).reshape([-1 if a == axis else 1 for a in range(4)])
    start = [slice(None)] * axis + [slice(0, length)]
    end = [slice(None)] * axis + [slice(before.shape[axis] - length, None)]
    after[tuple(start)] = before[tuple(end)] * (1 - weight) + after[tuple(start)] * weight
