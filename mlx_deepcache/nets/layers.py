"""MLX's layers with the backend's operations in them, and group normalisation, which MLX does without half precision's
guard. Arrays are channels-last."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..backend.ops import conv2d, group_norm, layer_norm, linear, quantized_linear


def by_frame(layer: Callable[..., mx.array], x: mx.array, *more, **options) -> mx.array:
    """What a layer of pictures makes of each one: (B, ..., H, W, C), with frames or without, -> (B, ..., H', W', O)."""
    out = layer(x.reshape(-1, *x.shape[-3:]), *more, **options)
    return out.reshape(*x.shape[:-3], *out.shape[1:])


class Linear(nn.Linear):
    """(..., C) -> (..., O)."""

    def __call__(self, x: mx.array) -> mx.array:
        return linear(x, self.weight, self.get("bias"))

    def to_quantized(self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **_):
        """What `nn.quantize` puts in its place."""
        return QuantizedLinear.from_linear(self, group_size, bits, mode)


class QuantizedLinear(nn.QuantizedLinear):
    """The same with its weights packed."""

    def __call__(self, x: mx.array) -> mx.array:
        packed = self.weight, self.scales, self.biases
        return quantized_linear(x, packed, self.get("bias"), group_size=self.group_size, bits=self.bits)


class Conv2d(nn.Conv2d):
    """(B, H, W, C) -> (B, H', W', O); stride and padding are the same for both axes."""

    def __call__(self, x: mx.array) -> mx.array:
        return conv2d(x, self.weight, self.get("bias"), stride=self.stride[0], padding=self.padding[0])


class LayerNorm(nn.LayerNorm):
    """Over the last axis."""

    def __call__(self, x: mx.array) -> mx.array:
        return layer_norm(x, self.weight, self.bias, self.eps)


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He 2018) over (B, H, W, C), with statistics in float32."""

    def __init__(self, groups: int, dims: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = mx.ones((dims,))
        self.bias = mx.zeros((dims,))

    @property
    def group_size(self) -> int:
        return self.weight.size // self.groups

    def __call__(self, x: mx.array, *, start: int = 0, then_silu: bool = False) -> mx.array:
        """x: (B, H, W, C), all channels or whole groups of them, from channel `start` on."""
        weight, bias = (p[start : start + x.shape[-1]] for p in (self.weight, self.bias))
        return group_norm(x, weight, bias, self.group_size, self.eps, then_silu=then_silu)
