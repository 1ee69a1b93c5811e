"""AutoencoderTiny: Ollin Boer Bohan's TAESD, a small distilled VAE, named as in diffusers' checkpoints.

All convolutions and ReLU, a hundredth of AutoencoderKL's work: made for previews, good enough for drafts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..backend.ops import compiled
from ..errors import CheckpointError
from .config import build_config, per_level
from .layers import Conv2d


@dataclass(frozen=True)
class TinyVAEConfig:
    """AutoencoderTiny's config.json (TAESD). `latent_magnitude` and `latent_shift` are for storing latents as bytes,
    which nothing here does."""

    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    act_fn: str = "relu"
    upsampling_scaling_factor: int = 2
    scaling_factor: float = 1.0
    shift_factor: float | None = 0.0
    force_upcast: bool = False
    spreads: ClassVar[bool] = False  # the encoder gives latents, and not their distribution

    @classmethod
    def from_dict(cls, data: dict) -> TinyVAEConfig:
        """Raises CheckpointError for a value that this VAE cannot honour."""
        config = build_config(cls, data, {"act_fn": ("relu",), "upsample_fn": ("nearest",)})
        for kind in ("encoder", "decoder"):
            per_level(getattr(config, f"num_{kind}_blocks"), len(getattr(config, f"{kind}_block_out_channels")), kind)
            if len(set(getattr(config, f"{kind}_block_out_channels"))) > 1:
                raise CheckpointError(f"{kind}_block_out_channels should all be equal in an AutoencoderTiny")
        if 2 ** (len(config.num_encoder_blocks) - 1) != config.factor:
            raise CheckpointError("an AutoencoderTiny's encoder and decoder should scale by the same factor")
        if not config.scaling_factor:
            raise CheckpointError("scaling_factor = 0 is not supported in a VAE")
        return config

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """The decoder's, by the name that AutoencoderKL's config has for them."""
        return self.decoder_block_out_channels

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""
        return self.upsampling_scaling_factor ** (len(self.decoder_block_out_channels) - 1)


CLAMP = 3.0  # latents are squashed smoothly into (-3, 3) before they are decoded


class TinyBlock(nn.Module):
    """Three convolutions with ReLU between them, added to their input, and ReLU."""

    def __init__(self, dims: int):
        super().__init__()
        convs = [Conv2d(dims, dims, 3, padding=1) for _ in range(3)]
        self.conv = [convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2]]

    def __call__(self, x: mx.array) -> mx.array:
        y = x
        for layer in self.conv:
            y = layer(y)
        return nn.relu(y + x)


class Layers(nn.Module):
    """One after the other."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = layers

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


def _encoder(config: TinyVAEConfig) -> Layers:
    """(B, H, W, 3) in [0, 1] -> (B, H/f, W/f, latent_channels)."""
    layers = []
    for level, (dims, blocks) in enumerate(
        zip(config.encoder_block_out_channels, config.num_encoder_blocks, strict=True)
    ):
        if level == 0:
            layers.append(Conv2d(config.in_channels, dims, 3, padding=1))
        else:
            layers.append(Conv2d(dims, dims, 3, stride=2, padding=1, bias=False))
        layers += [TinyBlock(dims) for _ in range(blocks)]
    return Layers([*layers, Conv2d(dims, config.latent_channels, 3, padding=1)])


def _decoder(config: TinyVAEConfig) -> Layers:
    """(B, h, w, latent_channels) -> (B, f*h, f*w, 3) in about [0, 1]."""
    channels, counts = config.decoder_block_out_channels, config.num_decoder_blocks
    layers = [Conv2d(config.latent_channels, channels[0], 3, padding=1), nn.ReLU()]
    for dims, blocks in zip(channels[:-1], counts[:-1], strict=True):
        layers += [TinyBlock(dims) for _ in range(blocks)]
        layers += [nn.Upsample(config.upsampling_scaling_factor), Conv2d(dims, dims, 3, padding=1, bias=False)]
    layers += [TinyBlock(channels[-1]) for _ in range(counts[-1])]
    return Layers([*layers, Conv2d(channels[-1], config.out_channels, 3, padding=1)])


class AutoencoderTiny(nn.Module):
    """Latents here are the sampler's, as for `AutoencoderKL`; TAESD was trained on those, so it scales by 1."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)

    def encode(self, image: mx.array, noise: mx.array | None = None) -> mx.array:
        """image: (B, H, W, 3) in [-1, 1] -> latents (B, H/f, W/f, latent_channels); they have no spread for `noise`."""
        return (self.encoder((image + 1) / 2) - (self.config.shift_factor or 0)) * self.config.scaling_factor

    def decode(self, latents: mx.array) -> mx.array:
        """latents: (B, h, w, latent_channels) -> (B, f*h, f*w, 3), about [-1, 1]."""
        z = latents / self.config.scaling_factor + (self.config.shift_factor or 0)
        return self.decoder(mx.tanh(z / CLAMP) * CLAMP) * 2 - 1

    def compiled(self) -> AutoencoderTiny:
        """This VAE with its decoder compiled, with the weights that it has now."""
        vae = copy.copy(self)
        vae.decode = compiled(self.decode)
        return vae
