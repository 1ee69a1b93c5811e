"""Convolutions, norms, activations and attention by device: the one place that knows what a backend is fast at.

On a GPU, and wherever a graph is recorded, they are MLX's own. On the CPU they are those of cpu.py, which compute at
once and in float32, also for half precision, whose products are slow there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from ..errors import UsageError
from . import cpu

# Head sizes that MLX's fused attention kernels take; others make it fall back to storing every score.
FUSED_HEAD_DIMS = (64, 80, 128)

_recording = False


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def at_once() -> bool:
    """Whether operations are done when they return; else the device may be busy with one step while Python goes on."""
    return not on_gpu() and not _recording


@contextmanager
def recording() -> Iterator[None]:
    """Here MLX records a graph, so nothing may be computed."""
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before


def _in_float32(kernel: Callable[..., mx.array | None], x: mx.array, *arrays: mx.array | None, **how) -> mx.array:
    """What a CPU kernel makes of these, in x's type."""
    x32, *arrays = (a if a is None or a.dtype == mx.float32 else a.astype(mx.float32) for a in (x, *arrays))
    out = kernel(x32, *arrays, **how)
    return out if out is None or x.dtype == mx.float32 else out.astype(x.dtype)


# Activations


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return _in_float32(cpu.activation, x, name="silu") if at_once() else nn.silu(x)


def gelu(x: mx.array) -> mx.array:
    """x * Phi(x), the exact GELU."""
    return _in_float32(cpu.activation, x, name="gelu") if at_once() else nn.gelu(x)


def gated_gelu(value: mx.array, gate: mx.array) -> mx.array:
    """value * gelu(gate)."""
    return _in_float32(cpu.activation, gate, value, name="gelu") if at_once() else value * nn.gelu(gate)


def quick_gelu(x: mx.array) -> mx.array:
    """OpenAI's approximation of GELU."""
    return _in_float32(cpu.activation, x, name="quick_gelu") if at_once() else x * mx.sigmoid(1.702 * x)


# Norms


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Ba et al. 2016: over the last axis."""
    if at_once():
        return _in_float32(cpu.layer_norm, x, weight, bias, eps=eps)
    return mx.fast.layer_norm(x, weight, bias, eps)


def group_norm(
    x: mx.array, weight: mx.array, bias: mx.array, group_size: int, eps: float, *, then_silu: bool = False
) -> mx.array:
    """Wu and He 2018, with statistics in float32; x: (B, H, W, C), weight and bias: (C,)."""
    if at_once():
        name = "silu" if then_silu else None
        return _in_float32(cpu.group_norm, x, weight, bias, group_size=group_size, eps=eps, name=name)
    B, H, W, C = x.shape
    groups = C // group_size
    grouped = x.reshape(B, H * W, groups, -1).swapaxes(1, 2).reshape(B, groups, -1)
    normed = mx.fast.layer_norm(grouped, None, None, eps)
    normed = normed.reshape(B, groups, H * W, -1).swapaxes(1, 2).reshape(B, H, W, C) * weight + bias
    return nn.silu(normed) if then_silu else normed


# Products


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x weight^T + bias; weight: (O, C)."""
    if at_once() and x.dtype != mx.float32:
        return _in_float32(_linear, x, weight, bias)
    return _linear(x, weight, bias)


def _linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def conv2d(
    x: mx.array, weight: mx.array, bias: mx.array | None = None, *, stride: int = 1, padding: int = 0
) -> mx.array:
    """x: (B, H, W, C), weight: (O, kh, kw, C), padding: zeros all round -> (B, H', W', O)."""
    if at_once():
        return _in_float32(cpu.conv2d, x, weight, bias, stride=stride, padding=padding)
    out = mx.conv2d(x, weight, stride=stride, padding=padding)
    return out if bias is None else out + bias


def conv2d_doubled(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array | None:
    """A 3x3 convolution over a picture twice as large, each pixel read as 2x2: (B, H, W, C) -> (B, 2H, 2W, O), or None
    where it is faster to fold the weights."""
    return _in_float32(cpu.conv2d_doubled, x, weight, bias) if at_once() else None


def pad_heads(x: mx.array) -> mx.array:
    """x: (B, heads, S, D) -> the same with zeros up to a head size that the GPU's fused attention takes, if there is
    one. SD 1.x's 40 becomes 64; its 160 has none, but occurs only where there are few positions."""
    D = x.shape[-1]
    if not on_gpu() or D in FUSED_HEAD_DIMS:
        return x
    larger = [dim for dim in FUSED_HEAD_DIMS if dim > D]
    return mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, larger[0] - D)]) if larger else x


def attention(q: mx.array, k: mx.array, v: mx.array, *, causal: bool = False) -> mx.array:
    """softmax(q k^T / sqrt(D)) v; q: (B, heads, S, D), k and v: (B, heads, T, D or as `pad_heads` left them); causal: a
    position sees itself and those before."""
    if not at_once():
        return _attention(q, k, v, causal)
    many = q.shape[0] * q.shape[1] >= MANY and q.shape[2] * k.shape[2] <= SHORT
    return _in_float32(_attention if many else cpu.attention, q, k, v, causal=causal)


# So many problems of so few scores each, as over a video's frames, MLX does faster than NumPy can be asked to
MANY, SHORT = 256, 1024


def _attention(q: mx.array, k: mx.array, v: mx.array, causal: bool) -> mx.array:
    D, mask = q.shape[-1], "causal" if causal else None
    return mx.fast.scaled_dot_product_attention(pad_heads(q), k, v, scale=D**-0.5, mask=mask)[..., :D]


DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def dtype_of(name: str) -> mx.Dtype:
    """An MLX type by name; "auto" is float16 on a GPU, float32 on the CPU, where half precision is slow.

    Raises:
        UsageError: the name is not known.
    """
    if name == "auto":
        return mx.float16 if mx.default_device() == mx.gpu else mx.float32
    if name not in DTYPES:
        raise UsageError(f"dtype should be auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
