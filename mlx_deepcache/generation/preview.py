"""Seeing a picture come into being: what each step's estimate of the clean latents looks like, cheaply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointError, called
from ..media.pictures import to_uint8

INDEX_KEY = (
    "latent_rgb"  # in model_index.json: {"factors": a row of red, green, blue for each channel, "bias": one row}
)

Decode = Callable[[mx.array], np.ndarray]
"""Latents (N, h, w, C), which have been computed, -> pictures (N, H, W, 3) in 0-255."""


@dataclass(frozen=True)
class LatentRGB:
    """Colours as a linear function of the latents: no net, no pixels finer than a latent.

    factors: (C, 3); bias: 3; the result is in [-1, 1]. scale: pixels along one side of a latent.
    """

    factors: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...] = (0.0, 0.0, 0.0)
    scale: int = 8

    def __call__(self, latents: mx.array) -> np.ndarray:
        colours = np.array(latents.astype(mx.float32)) @ np.array(self.factors, np.float32) + np.array(self.bias)
        small = to_uint8(np.nan_to_num(colours))
        size = (small.shape[2] * self.scale, small.shape[1] * self.scale)
        return np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BILINEAR)) for one in small])


def latent_rgb(checkpoint: Checkpoint) -> LatentRGB | None:
    """A model's map: its own, if model_index.json has one, or its family's; None if that has none, see `fitted`.

    Raises:
        CheckpointError: what model_index.json has is no such map, or there is none for the model's latents.
    """
    channels, scale = checkpoint.vae_config.latent_channels, checkpoint.vae_config.factor
    own = checkpoint.index.get(INDEX_KEY)
    if own is None:
        if not (own := checkpoint.family.colours):
            return None
        if channels != len(own["factors"]):
            raise CheckpointError(
                f"no colours are known for latents of {channels} channels; see {called('preview_vae')}"
            )
    try:
        factors, bias = np.array(own["factors"], np.float64), np.array(own.get("bias", (0, 0, 0)), np.float64)
    except (KeyError, TypeError, ValueError, AttributeError):
        factors = bias = np.empty(0)
    if factors.shape != (channels, 3) or bias.shape != (3,) or not np.isfinite([*factors.flat, *bias]).all():
        raise CheckpointError(
            f"model_index.json: {INDEX_KEY} should be "
            f'{{"factors": {channels} rows of 3 numbers, "bias": 3 numbers}}, got {str(own)[:80]}'
        )
    return LatentRGB(tuple(map(tuple, factors.tolist())), tuple(bias.tolist()), scale)


SAMPLES = 64  # for a map of four numbers a colour
FLAT = 4  # latents along a side of each


def fitted(vae: nn.Module) -> LatentRGB:
    """A map for latents of which none is known: fitted to the colours that the model's own VAE makes of flat ones."""
    channels, dtype = vae.config.latent_channels, vae.decoder.conv_in.weight.dtype
    flat = np.random.default_rng(0).standard_normal((SAMPLES, channels))
    latents = mx.array(np.tile(flat[:, None, None], (1, FLAT, FLAT, 1)).astype(np.float32)).astype(dtype)
    colours = np.array(vae.decode(latents).astype(mx.float32)).mean(axis=(1, 2))
    *factors, bias = np.linalg.lstsq(np.column_stack([flat, np.ones(SAMPLES)]), colours, rcond=None)[0].tolist()
    return LatentRGB(tuple(map(tuple, factors)), tuple(bias), vae.config.factor)


def through(vae: nn.Module, dtype: mx.Dtype) -> Decode:
    """Decode with a VAE, such as TAESD; one picture at a time."""

    def decode(latents: mx.array) -> np.ndarray:
        rows = [vae.decode(latents[i : i + 1].astype(dtype)).astype(mx.float32) for i in range(len(latents))]
        return to_uint8(np.nan_to_num(np.concatenate([np.array(row) for row in rows])))

    return decode
