"""The blocks that the U-Net and the VAE are made of, named as in diffusers' checkpoints.

Arrays are channels-last: B pictures, H x W positions, C channels, S tokens. A 1x1 convolution is a linear layer here.
Resnets and transformers take (B, F, H, W, C) too, videos of F frames, each of which they look at by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..backend.ops import attention, conv2d, conv2d_doubled, gated_gelu, linear, pad_heads, silu
from .attend import PLAIN, Attend, Kind
from .layers import Conv2d, GroupNorm, LayerNorm, Linear, by_frame


def timestep_embedding(t: mx.array, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> mx.array:
    """Sinusoidal embedding in float32 (Ho et al. 2020, section B).

    t: (B,) training timesteps, 0-999, possibly fractional -> (B, dim), cosines first if `flip_sin_to_cos`.
    """
    half = dim // 2
    frequencies = mx.exp(-math.log(10000) / (half - freq_shift) * mx.arange(half, dtype=mx.float32))
    angles = t.astype(mx.float32)[:, None] * frequencies
    sin, cos = mx.sin(angles), mx.cos(angles)
    return mx.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], axis=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers over an embedding; `cond_proj` adds a second input before them (LCM's guidance scale)."""

    def __init__(self, dim_in: int, dim: int, cond_dim: int | None = None, *, dim_out: int | None = None):
        super().__init__()
        self.linear_1 = Linear(dim_in, dim)
        self.linear_2 = Linear(dim, dim if dim_out is None else dim_out)
        if cond_dim is not None:
            self.cond_proj = Linear(cond_dim, dim_in, bias=False)

    def __call__(self, x: mx.array, cond: mx.array | None = None) -> mx.array:
        if cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(silu(self.linear_1(x)))


class Features(NamedTuple):
    """What a resnet makes of an input that stays the same from step to step; see `ResnetBlock2D.fixed_part`.

    conv: (B, H, W, C_out), shortcut: (B, H, W, C_out, or C without a shortcut convolution), straddling: (B, H, W, the
    channels that `conv` leaves over): normalised as far as their groups are whole, then as they are.
    """

    conv: mx.array
    shortcut: mx.array
    straddling: mx.array


FAST_CHANNELS = 32  # MLX's Winograd convolution for Metal takes multiples of it


def _joined(parts: list[mx.array]) -> mx.array:
    """Side by side in the last axis; without a copy where only one has any channels."""
    filled = [part for part in parts if part.shape[-1]] or parts[:1]
    return filled[0] if len(filled) == 1 else mx.concatenate(filled, axis=-1)


class ResnetBlock2D(nn.Module):
    """Two convolutions with the time embedding added between them."""

    def __init__(self, c_in: int, c_out: int, temb_dim: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        if temb_dim is not None:
            self.time_emb_proj = Linear(temb_dim, c_out)
        self.norm2 = GroupNorm(groups, c_out, eps)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = Linear(c_in, c_out)
        self._halves = None  # no parameter: made from the weights when first used

    def __call__(self, x: mx.array, temb: mx.array | None = None) -> mx.array:
        """x: (B, H, W, C_in), temb: (B, temb_dim) after its activation -> (B, H, W, C_out)."""
        h = self._second_half(by_frame(self.conv1, by_frame(self.norm1, x, then_silu=True)), temb)
        return h + (self.conv_shortcut(x) if "conv_shortcut" in self else x)

    def fixed_part(self, x: mx.array) -> Features:
        """The work on an input [x, skip] that `x` alone decides: done once while it stays the same.

        Group normalisation looks at each group by itself, and convolutions are sums over channels. So the groups that
        lie wholly inside x, their share of `conv1`, and x's share of the shortcut are fixed; the channels of a group
        that straddles the border are kept for `join`, and so are some before them, see `split`. x: (B, H, W, C).
        """
        C = x.shape[-1]
        inside, (ours, _) = self._inside(C), self.split(C)
        cut = ours.shape[-1]
        h = by_frame(self.norm1, x[..., :inside], then_silu=True)
        conv = by_frame(conv2d, h[..., :cut], ours, padding=1)
        shortcut = linear(x, self.conv_shortcut.weight[:, :C]) if "conv_shortcut" in self else x
        return Features(conv, shortcut, _joined([h[..., cut:], x[..., inside:]]))

    def join(self, features: Features, skip: mx.array, temb: mx.array) -> mx.array:
        """What the block gives for [x, skip], from `fixed_part(x)`; skip: (B, H, W, C_skip)."""
        C = self.norm1.weight.size - skip.shape[-1]
        inside, (ours, others) = self._inside(C), self.split(C)
        normed = inside - ours.shape[-1]
        x = _joined([features.straddling[..., normed:], skip])
        h = _joined([features.straddling[..., :normed], by_frame(self.norm1, x, start=inside, then_silu=True)])
        h = by_frame(conv2d, h, others, padding=1) + (features.conv + self.conv1.bias)
        h = self._second_half(h, temb)
        if "conv_shortcut" not in self:
            return h + mx.concatenate([features.shortcut, skip], axis=-1)
        shortcut = linear(skip, self.conv_shortcut.weight[:, -skip.shape[-1] :])
        return h + (shortcut + (features.shortcut + self.conv_shortcut.bias))

    def made_for(self, skip: int) -> tuple[mx.array, mx.array]:
        """What `fixed_part` and `join` make of weights alone, for a skip of so many channels."""
        return self.split(self.norm1.weight.size - skip)

    def _inside(self, C: int) -> int:
        """Of the first C input channels those in groups that lie wholly among them."""
        return C - C % self.norm1.group_size

    def split(self, C: int) -> tuple[mx.array, mx.array]:
        """`conv1`'s weights for the input channels that are fixed with the first C, and for the others; kept for as
        long as the weights stay the same. They are cut at a multiple of 32, which Metal's fastest convolution needs."""
        weight = self.conv1.weight
        if self._halves is None or self._halves[0] is not weight or self._halves[1] != C:
            inside = self._inside(C)
            cut = inside - inside % FAST_CHANNELS or inside
            halves = mx.split(weight, [cut], axis=-1)
            # Flattening copies them, as mx.contiguous does, with which MLX cannot record a graph
            self._halves = weight, C, tuple(mx.flatten(half).reshape(half.shape) for half in halves)
        return self._halves[2]

    def _second_half(self, h: mx.array, temb: mx.array | None) -> mx.array:
        if temb is not None:
            h = h + mx.expand_dims(self.time_emb_proj(temb), tuple(range(1, h.ndim - 1)))
        return by_frame(self.conv2, by_frame(self.norm2, h, then_silu=True))


class Downsample2D(nn.Module):
    """Halve the sides with a stride-2 convolution. Stable Diffusion's U-Nets pad all round, those of DDPM and all VAEs
    bottom and right only."""

    def __init__(self, dims: int, *, pad_all_round: bool = True):
        super().__init__()
        self.conv = Conv2d(dims, dims, 3, stride=2, padding=1 if pad_all_round else 0)
        self.pad_all_round = pad_all_round

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(x if self.pad_all_round else mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling, then a convolution.

    Doubling a picture and convolving it with 3x3 taps reads each small pixel several times: an output pixel sees only
    2x2 of them, through sums of taps that depend on its parity. So one 2x2 convolution with four times the outputs on
    the small picture, interleaved, does the same with 4 products in place of 9.
    """

    def __init__(self, dims: int):
        super().__init__()
        self.conv = Conv2d(dims, dims, 3, padding=1)
        self._folded = None  # no parameter: made from the weights when first used

    def __call__(self, x: mx.array, size: tuple[int, int] | None = None) -> mx.array:
        """(B, H, W, C) -> (B, 2H, 2W, C), or to `size` where a halving was not exact."""
        B, H, W, C = x.shape
        if size is not None and size != (2 * H, 2 * W):  # pixel i comes from floor(i * H / size), as in PyTorch
            rows, columns = (mx.arange(n) * source // n for n, source in zip(size, (H, W), strict=True))
            return self.conv(x[:, rows][:, :, columns])
        doubled = conv2d_doubled(x, self.conv.weight, self.conv.bias)
        if doubled is not None:
            return doubled
        y = conv2d(x, self.fold(), padding=1)  # (B, H + 1, W + 1, 4C): of each place four parities, rows first
        row, column = (W + 1) * 4 * C, 4 * C  # an odd one's output lies a place further on, and one or two C further in
        steps = ((H + 1) * row, row, row + 2 * C, column, column + C, 1)
        return (mx.as_strided(y, (B, H, 2, W, 2, C), steps) + self.conv.bias).reshape(B, 2 * H, 2 * W, C)

    def fold(self) -> mx.array:
        """The convolution's weights for the small picture, kept for as long as the weights stay the same."""
        if self._folded is None or self._folded[0] is not self.conv.weight:
            self._folded = (self.conv.weight, fold_upsampling(self.conv.weight))
        return self._folded[1]


def fold_upsampling(weight: mx.array) -> mx.array:
    """(C_out, 3, 3, C_in) taps over a doubled picture -> (4 C_out, 2, 2, C_in) over the small one, a parity at a time.

    Of an even pixel's three taps one falls on the small pixel before and two on its own; of an odd one's, two on its
    own and one on the next.
    """

    def parities(taps: mx.array, axis: int) -> list[mx.array]:
        a, b, c = mx.split(taps, 3, axis=axis)
        return [mx.concatenate([a, b + c], axis=axis), mx.concatenate([a + b, c], axis=axis)]

    phases = [phase for rows in parities(weight.astype(mx.float32), 1) for phase in parities(rows, 2)]
    return mx.concatenate(phases).astype(weight.dtype)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017). `to_out` is a list because diffusers' is."""

    def __init__(self, dims: int, heads: int, context_dims: int | None = None, *, bias: bool = False):
        super().__init__()
        self.heads = heads
        context_dims = dims if context_dims is None else context_dims
        self.to_q = Linear(dims, dims, bias=bias)
        self.to_k = Linear(context_dims, dims, bias=bias)
        self.to_v = Linear(context_dims, dims, bias=bias)
        self.to_out = [Linear(dims, dims)]

    def keys_values(self, context: mx.array) -> tuple[mx.array, mx.array]:
        """context: (B, S, context_dims) -> keys and values, (B, heads, S, dims / heads) each, perhaps padded."""
        return pad_heads(self._split(self.to_k(context))), pad_heads(self._split(self.to_v(context)))

    def __call__(self, x: mx.array, keys_values: tuple[mx.array, mx.array] | None = None) -> mx.array:
        """x: (B, S, dims) attends to `keys_values`, or to itself; of (B, F, S, dims), a video's, each of the F by
        itself, and all to the same `keys_values`."""
        B, *_, S, dims = x.shape
        rows = x.reshape(-1, S, dims) if keys_values is None else x.reshape(B, -1, dims)
        k, v = self.keys_values(rows) if keys_values is None else keys_values
        out = attention(self._split(self.to_q(rows)), k, v)
        return self.to_out[0](out.swapaxes(1, 2).reshape(x.shape))

    def _split(self, x: mx.array) -> mx.array:
        B, S, _ = x.shape
        return x.reshape(B, S, self.heads, -1).swapaxes(1, 2)


class AttentionBlock(Attention):
    """Self-attention over the positions of a feature map, added to its input; `heads` share the channels."""

    def __init__(self, dims: int, heads: int, groups: int, eps: float):
        super().__init__(dims, heads, bias=True)
        self.group_norm = GroupNorm(groups, dims, eps)

    def prepare(self, context: mx.array) -> list:
        """Nothing: it does not look at the context."""
        return []

    def __call__(self, x: mx.array, own: Sequence = (), attend: Attend = PLAIN) -> mx.array:
        """x: (B, H, W, C); own: what `prepare` returned; attend: runs the attention layer."""
        return x + attend(Kind.SPATIAL, super().__call__, self._normed, x).reshape(x.shape)

    def _normed(self, x: mx.array) -> mx.array:
        return self.group_norm(x).flatten(-3, -2)


class GEGLU(nn.Module):
    """A linear layer gated by its own second half (Shazeer 2020)."""

    def __init__(self, dims: int, inner: int):
        super().__init__()
        self.proj = Linear(dims, 2 * inner)

    def __call__(self, x: mx.array) -> mx.array:
        value, gate = mx.split(self.proj(x), 2, axis=-1)
        return gated_gelu(value, gate)


class FeedForward(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        # diffusers has a dropout between the two, which keeps its place in the names
        self.net = [GEGLU(dims, 4 * dims), nn.Identity(), Linear(4 * dims, dims)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each on a normalised copy and added back."""

    looks_at = Kind.SPATIAL

    def __init__(self, dims: int, heads: int, context_dims: int):
        super().__init__()
        self.norm1 = LayerNorm(dims)
        self.attn1 = Attention(dims, heads)
        self.norm2 = LayerNorm(dims)
        self.attn2 = Attention(dims, heads, context_dims)
        self.norm3 = LayerNorm(dims)
        self.ff = FeedForward(dims)

    def __call__(self, x: mx.array, prompt: tuple[mx.array, mx.array], attend: Attend = PLAIN) -> mx.array:
        """x: (B, S, dims); prompt: keys and values of `attn2`; attend: runs the attention layers."""
        x = x + attend(self.looks_at, self.attn1, self.norm1, x)
        x = x + attend(Kind.CROSS, self.attn2, self.norm2, x, prompt)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the positions of a feature map."""

    def __init__(self, dims: int, heads: int, context_dims: int, layers: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, dims, eps=1e-6)
        self.proj_in = Linear(dims, dims)
        self.transformer_blocks = [BasicTransformerBlock(dims, heads, context_dims) for _ in range(layers)]
        self.proj_out = Linear(dims, dims)

    def prepare(self, context: mx.array) -> list[tuple[mx.array, mx.array]]:
        """The prompt's keys and values for each transformer block, the same at every step; context: (B, S, dims)."""
        return [block.attn2.keys_values(context) for block in self.transformer_blocks]

    def __call__(self, x: mx.array, prompt: list[tuple[mx.array, mx.array]], attend: Attend = PLAIN) -> mx.array:
        """x: (B, H, W, C); prompt: what `prepare` returned; attend: runs the attention layers."""
        h = self.proj_in(by_frame(self.norm, x).flatten(-3, -2))
        for block, keys_values in zip(self.transformer_blocks, prompt, strict=True):
            h = block(h, keys_values, attend)
        return x + self.proj_out(h).reshape(x.shape)
