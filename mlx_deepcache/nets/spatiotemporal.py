"""Blocks of Stable Video Diffusion (Blattmann et al. 2023), named as in diffusers' checkpoints: each layer of a picture
net is followed by one that looks along time, and a learned share of both goes on.

B videos of F frames: arrays are (B, F, H, W, C) between blocks. What looks at one frame has frames folded into its
batch.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..backend.ops import conv2d
from .attend import PLAIN, Attend, Kind
from .blocks import (
    BasicTransformerBlock,
    Features,
    FeedForward,
    ResnetBlock2D,
    TimestepEmbedding,
    timestep_embedding,
)
from .layers import GroupNorm, LayerNorm, Linear, by_frame


class TemporalConv(nn.Conv1d):
    """A convolution over three frames, zeros around them: (B, F, S, C) -> (B, F, S, O)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        frames = mx.pad(x, [(0, 0), (1, 1), (0, 0), (0, 0)])
        return conv2d(frames, self.weight[:, :, None], self.bias)


class TemporalResnetBlock(nn.Module):
    """Two convolutions over frames with the time embedding added between them; norms look at all frames."""

    def __init__(self, dims: int, temb_dim: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = GroupNorm(groups, dims, eps)
        self.conv1 = TemporalConv(dims, dims)
        if temb_dim is not None:
            self.time_emb_proj = Linear(temb_dim, dims)
        self.norm2 = GroupNorm(groups, dims, eps)
        self.conv2 = TemporalConv(dims, dims)

    def __call__(self, x: mx.array, temb: mx.array | None) -> mx.array:
        """x: (B, F, H, W, C), temb: (B or 1, temb_dim) after its activation."""
        h = self.conv1(self.norm1(x.reshape(*x.shape[:2], -1, x.shape[-1]), then_silu=True))
        if temb is not None:
            h = h + self.time_emb_proj(temb)[:, None, None, :]
        return x + self.conv2(self.norm2(h, then_silu=True)).reshape(x.shape)


class AlphaBlender(nn.Module):
    """A learned share of what pictures give, and the rest of what time gives."""

    def __init__(self):
        super().__init__()
        self.mix_factor = mx.zeros((1,))

    def __call__(self, spatial: mx.array, temporal: mx.array) -> mx.array:
        share = mx.sigmoid(self.mix_factor)
        return share * spatial + (1 - share) * temporal


class SpatioTemporalResBlock(nn.Module):
    """A resnet for each frame, then one over frames.

    temporal_eps: of the latter's norms, if other; swapped: the learned share is that of the latter, as in the VAE.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        temb_dim: int | None,
        groups: int,
        eps: float,
        *,
        temporal_eps: float | None = None,
        swapped: bool = False,
    ):
        super().__init__()
        self.spatial_res_block = ResnetBlock2D(c_in, c_out, temb_dim, groups, eps)
        self.temporal_res_block = TemporalResnetBlock(c_out, temb_dim, groups, temporal_eps or eps)
        self.time_mixer = AlphaBlender()
        self.swapped = swapped

    def __call__(self, x: mx.array, temb: mx.array | None = None) -> mx.array:
        """x: (B, F, H, W, C_in), temb: (B or 1, temb_dim) after its activation -> (B, F, H, W, C_out)."""
        return self._over_frames(self.spatial_res_block(x, temb), temb)

    def fixed_part(self, x: mx.array) -> Features:
        """See `ResnetBlock2D.fixed_part`: that of the frames' resnet. What comes after it looks at the skip too."""
        return self.spatial_res_block.fixed_part(x)

    def made_for(self, skip: int) -> tuple[mx.array, mx.array]:
        """See `ResnetBlock2D.made_for`."""
        return self.spatial_res_block.made_for(skip)

    def join(self, features: Features, skip: mx.array, temb: mx.array) -> mx.array:
        """What the block gives for [x, skip], from `fixed_part(x)`; skip: (B, F, H, W, C_skip)."""
        return self._over_frames(self.spatial_res_block.join(features, skip, temb), temb)

    def _over_frames(self, x: mx.array, temb: mx.array | None) -> mx.array:
        both = x, self.temporal_res_block(x, temb)
        return self.time_mixer(*reversed(both)) if self.swapped else self.time_mixer(*both)


class TemporalBasicTransformerBlock(BasicTransformerBlock):
    """A transformer block over the frames of each position, with a feed-forward layer before it."""

    looks_at = Kind.TEMPORAL

    def __init__(self, dims: int, heads: int, context_dims: int):
        super().__init__(dims, heads, context_dims)
        self.norm_in = LayerNorm(dims)
        self.ff_in = FeedForward(dims)

    def __call__(self, x: mx.array, prompt: tuple[mx.array, mx.array], attend: Attend = PLAIN) -> mx.array:
        """x: (B, positions, F, dims); prompt: keys and values of `attn2`; attend: runs the attention layers."""
        return super().__call__(x + self.ff_in(self.norm_in(x)), prompt, attend)


class TransformerSpatioTemporalModel(nn.Module):
    """Transformer blocks over the positions of each frame, each followed by one over the frames of each position."""

    def __init__(self, dims: int, heads: int, context_dims: int, layers: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, dims, eps=1e-6)
        self.proj_in = Linear(dims, dims)
        self.transformer_blocks = [BasicTransformerBlock(dims, heads, context_dims) for _ in range(layers)]
        self.temporal_transformer_blocks = [
            TemporalBasicTransformerBlock(dims, heads, context_dims) for _ in range(layers)
        ]
        self.time_pos_embed = TimestepEmbedding(dims, 4 * dims, dim_out=dims)
        self.time_mixer = AlphaBlender()
        self.proj_out = Linear(dims, dims)

    def prepare(self, context: mx.array) -> list[tuple[tuple[mx.array, mx.array], ...]]:
        """The context's keys and values for each pair of blocks, the same at every step; context: (B, S, dims)."""
        pairs = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        return [tuple(block.attn2.keys_values(context) for block in pair) for pair in pairs]

    def __call__(self, x: mx.array, prompt: list, attend: Attend = PLAIN) -> mx.array:
        """x: (B, F, H, W, C); prompt: what `prepare` returned; attend: runs the attention layers, of frames and
        over them in turn."""
        B, F, H, W, C = x.shape
        h = self.proj_in(by_frame(self.norm, x).reshape(B, F, H * W, C))
        places = self.time_pos_embed(timestep_embedding(mx.arange(F), C).astype(x.dtype))[:, None]
        blocks = zip(self.transformer_blocks, self.temporal_transformer_blocks, prompt, strict=True)
        for spatial, temporal, (its_keys_values, other_keys_values) in blocks:
            h = spatial(h, its_keys_values, attend)
            over_frames = temporal((h + places).swapaxes(1, 2), other_keys_values, attend).swapaxes(1, 2)
            h = self.time_mixer(h, over_frames)
        return x + self.proj_out(h).reshape(x.shape)
