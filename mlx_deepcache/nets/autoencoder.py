"""AutoencoderKL: pictures to latents and back (Rombach et al. 2022), named as in diffusers' checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..backend.ops import compiled, done
from ..errors import CheckpointError
from .blocks import AttentionBlock, Downsample2D, ResnetBlock2D, Upsample2D
from .config import build_config, check_split
from .layers import Conv2d, GroupNorm, Linear


@dataclass(frozen=True)
class VAEConfig:
    """AutoencoderKL's config.json."""

    block_out_channels: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    sample_size: int = 512
    force_upcast: bool = True
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    spreads: ClassVar[bool] = True  # the encoder gives a distribution of latents

    @classmethod
    def from_dict(cls, data: dict) -> VAEConfig:
        """Raises CheckpointError for a value that this VAE cannot honour."""
        config = build_config(cls, data, {"act_fn": ("silu",)})
        for name, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            kinds = data.get(name, [])
            if not isinstance(kinds, list) or any(kind != only for kind in kinds):
                raise CheckpointError(f"{name} = {kinds!r} is not supported in a VAE, only {only!r}")
        check_split(
            config.block_out_channels, (config.norm_num_groups,) * len(config.block_out_channels), "norm_num_groups"
        )
        if not config.scaling_factor:
            raise CheckpointError("scaling_factor = 0 is not supported in a VAE")
        return config

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)


EPS = 1e-6  # of every group normalisation in the VAE


class MidBlock(nn.Module):
    """Two resnets with, in all but the smallest VAEs, an attention layer between them."""

    def __init__(self, dims: int, config: VAEConfig):
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = [ResnetBlock2D(dims, dims, None, groups, EPS) for _ in range(2)]
        if config.mid_block_add_attention:
            self.attentions = [AttentionBlock(dims, 1, groups, EPS)]

    def __call__(self, x: mx.array) -> mx.array:
        first, second = self.resnets
        x = first(x)
        for attention in self.get("attentions", []):
            x = attention(x)
        return second(x)


def _block(c_in: int, c_out: int, layers: int, groups: int) -> nn.Module:
    block = nn.Module()
    block.resnets = [ResnetBlock2D(c_out if i else c_in, c_out, None, groups, EPS) for i in range(layers)]
    return block


class Encoder(nn.Module):
    """(B, H, W, 3) in [-1, 1] -> (B, H/f, W/f, 2 * latent_channels): means and log variances; or the latents
    themselves, where the config says that they do not spread."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = []
        for level, c_out in enumerate(channels):
            block = _block(channels[max(level - 1, 0)], c_out, config.layers_per_block, groups)
            if level < len(channels) - 1:
                block.downsamplers = [Downsample2D(c_out, pad_all_round=False)]
            self.down_blocks.append(block)
        self.mid_block = MidBlock(channels[-1], config)
        self.conv_norm_out = GroupNorm(groups, channels[-1], EPS)
        self.conv_out = Conv2d(channels[-1], (1 + config.spreads) * config.latent_channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            for layer in [*block.resnets, *block.get("downsamplers", [])]:
                x = layer(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x), then_silu=True))


class Decoder(nn.Module):
    """(B, h, w, latent_channels) -> (B, f*h, f*w, 3) in about [-1, 1]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], config)
        self.up_blocks = []
        for level, c_out in enumerate(channels):
            block = _block(channels[max(level - 1, 0)], c_out, config.layers_per_block + 1, groups)
            if level < len(channels) - 1:
                block.upsamplers = [Upsample2D(c_out)]
            self.up_blocks.append(block)
        self.conv_norm_out = GroupNorm(groups, channels[-1], EPS)
        self.conv_out = Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        for layers in self.stages():
            for layer in layers:
                x = layer(x)
            x = done(x)  # maps are large here, and a GPU is asked for several operations ahead
        return x

    def stages(self) -> list[list[Callable[[mx.array], mx.array]]]:
        """Its layers, up to the last one of each size."""
        ups = ([*block.resnets, *block.get("upsamplers", [])] for block in self.up_blocks)
        return [[self.conv_in, self.mid_block], *ups, [self._end]]

    def _end(self, x: mx.array) -> mx.array:
        return self.conv_out(self.conv_norm_out(x, then_silu=True))


def _one_after_another(layers: list[Callable[[mx.array], mx.array]], x: mx.array) -> mx.array:
    for layer in layers:
        x = layer(x)
    return x


class AutoencoderKL(nn.Module):
    """Latents here are the sampler's: scaled (and shifted, if the config says so) to about unit variance."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = Linear(2 * config.latent_channels, 2 * config.latent_channels)
        if config.use_post_quant_conv:
            self.post_quant_conv = Linear(config.latent_channels, config.latent_channels)

    def encode(self, image: mx.array, noise: mx.array | None = None) -> mx.array:
        """image: (B, H, W, 3) in [-1, 1] -> latents, (B, H/f, W/f, latent_channels): the mean of what the encoder says
        that they may be, or a draw from it with `noise`, standard normal, of the latents' shape or of more pictures."""
        moments = self.encoder(image)
        if "quant_conv" in self:
            moments = self.quant_conv(moments)
        latents, log_variance = mx.split(moments, 2, axis=-1)
        if noise is not None:
            latents = latents + mx.exp(mx.clip(log_variance, -30, 20) / 2) * noise
        mean, std = self._statistics()
        return (latents - mean) / std * self.config.scaling_factor

    def decode(self, latents: mx.array) -> mx.array:
        """latents: (B, h, w, latent_channels) -> (B, f*h, f*w, 3), about [-1, 1]."""
        mean, std = self._statistics()
        z = (latents / self.config.scaling_factor * std + mean).astype(latents.dtype)  # as the weights are
        return self.decoder(self.post_quant_conv(z) if "post_quant_conv" in self else z)

    def compiled(self) -> AutoencoderKL:
        """This VAE with each stage of the decoder compiled by itself, with the weights that it has now; the folds of
        upsampling are computed first, as in the U-Net."""
        mx.eval([layer.fold() for layer in self.decoder.modules() if isinstance(layer, Upsample2D)])
        vae, decoder = copy.copy(self), copy.copy(self.decoder)
        stages = [[compiled(partial(_one_after_another, layers))] for layers in self.decoder.stages()]
        vae.decoder, decoder.stages = decoder, lambda: stages
        return vae

    def _statistics(self):
        """Mean and deviation that the config takes out of the raw latents: a channel's, or a shift for all."""
        config = self.config
        if config.latents_mean is not None and config.latents_std is not None:
            return mx.array(config.latents_mean), mx.array(config.latents_std)
        return config.shift_factor or 0.0, 1.0
