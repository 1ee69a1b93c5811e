"""AutoencoderKLTemporalDecoder, Stable Video Diffusion's VAE: pictures are encoded as in AutoencoderKL, and those of a
video decoded with an eye on the frames before and after."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..backend.ops import compiled
from .autoencoder import EPS, AutoencoderKL, VAEConfig
from .blocks import AttentionBlock, Upsample2D
from .layers import Conv2d, GroupNorm, by_frame
from .spatiotemporal import SpatioTemporalResBlock, TemporalConv
from .tiling import decoding_bytes

TEMPORAL_EPS = 1e-5  # of the norms over frames


@dataclass(frozen=True)
class TemporalVAEConfig(VAEConfig):
    """AutoencoderKLTemporalDecoder's config.json."""

    use_post_quant_conv: bool = False


def _resnet(c_in: int, c_out: int, groups: int) -> SpatioTemporalResBlock:
    return SpatioTemporalResBlock(c_in, c_out, None, groups, EPS, temporal_eps=TEMPORAL_EPS, swapped=True)


class TemporalDecoder(nn.Module):
    """(B, F, h, w, latent_channels) -> (B, F, f*h, f*w, 3) in about [-1, 1]."""

    def __init__(self, config: TemporalVAEConfig):
        super().__init__()
        channels, groups, n = config.block_out_channels[::-1], config.norm_num_groups, config.layers_per_block
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = nn.Module()
        self.mid_block.resnets = [_resnet(channels[0], channels[0], groups) for _ in range(n)]
        self.mid_block.attentions = [AttentionBlock(channels[0], 1, groups, EPS)]
        self.up_blocks = []
        for level, c_out in enumerate(channels):
            c_in, block = channels[max(level - 1, 0)], nn.Module()
            block.resnets = [_resnet(c_out if i else c_in, c_out, groups) for i in range(n + 1)]
            if level < len(channels) - 1:
                block.upsamplers = [Upsample2D(c_out)]
            self.up_blocks.append(block)
        self.conv_norm_out = GroupNorm(groups, channels[-1], EPS)
        self.conv_out = Conv2d(channels[-1], config.out_channels, 3, padding=1)
        self.time_conv_out = TemporalConv(config.out_channels, config.out_channels)

    def __call__(self, x: mx.array) -> mx.array:
        first, *others = self.mid_block.resnets
        x = first(by_frame(self.conv_in, x))
        for attention, resnet in zip(self.mid_block.attentions, others, strict=False):  # one pair, as in diffusers
            x = resnet(by_frame(attention, x))
        for block in self.up_blocks:
            for resnet in block.resnets:
                x = resnet(x)
            for upsampler in block.get("upsamplers", []):
                x = by_frame(upsampler, x)
        x = by_frame(self.conv_out, by_frame(self.conv_norm_out, x, then_silu=True))
        return self.time_conv_out(x.reshape(*x.shape[:2], -1, x.shape[-1])).reshape(x.shape)


class AutoencoderKLTemporalDecoder(AutoencoderKL):
    """Pictures (B, H, W, 3) are encoded, and videos (B, F, h, w, latent_channels) decoded."""

    def __init__(self, config: TemporalVAEConfig):
        super().__init__(config)
        self.decoder = TemporalDecoder(config)

    def compiled(self) -> AutoencoderKLTemporalDecoder:
        """This VAE with its decoder compiled, with the weights that it has now and the folds of upsampling computed."""
        mx.eval([layer.fold() for layer in self.decoder.modules() if isinstance(layer, Upsample2D)])
        vae = copy.copy(self)
        vae.decode = compiled(self.decode)
        return vae


def frames_together(config: TemporalVAEConfig, latents: tuple[int, ...], itemsize: int, room: int) -> int:
    """How many frames to decode together, where nobody says: all, or what takes half of the `room`, in bytes, beside
    the weights; latents: (F, h, w). The more, the less they flicker."""
    frames, height, width = latents
    return min(max(room // (2 * decoding_bytes(config, (height, width), itemsize)), 1), frames)


def decode_frames(vae: AutoencoderKLTemporalDecoder, latents: mx.array, chunk: int) -> np.ndarray:
    """latents: (F, h, w, C) -> frames (F, f*h, f*w, 3) float32, about [-1, 1]; chunk: frames that are decoded together
    and see each other, as in diffusers."""
    parts = (latents[None, start : start + chunk] for start in range(0, len(latents), chunk))
    return np.concatenate([np.array(vae.decode(part)[0].astype(mx.float32)) for part in parts])
