"""Activations and attention, chosen by device: the one place that knows what a backend is fast at.

On a GPU they are MLX's own. On the CPU, MLX computes exp and erf one number at a time, at 14 and 31 ns each, so that
they take longer than the matrix products; sums and products take 0.3 ns, and the same functions are built from those.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..errors import UsageError

# Head sizes that MLX's fused attention kernels take; others make it fall back to storing every score.
FUSED_HEAD_DIMS = (64, 80, 128)


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def exp8(y: mx.array) -> mx.array:
    """e^(8y) on the CPU, for float32 in [-2.5, 2.5]: the (3, 3) Pade approximant of e^y, to the eighth power.

    Relative error below 2e-6 for |8y| < 5; where the result is tiny beside 1 it grows, to 5% at 8y = -20.
    """
    y2 = y * y
    even, odd = y2 * 0.1 + 1, (y2 * (1 / 120) + 0.5) * y
    r = (even + odd) / (even - odd)
    r = r * r
    r = r * r
    return r * r


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    if on_gpu() or x.dtype != mx.float32:
        return nn.silu(x)
    return x / (exp8(mx.clip(x * -0.125, -2.5, 2.5)) + 1)


def gelu(x: mx.array) -> mx.array:
    """x * Phi(x), the exact GELU; on the CPU with erfc to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26)."""
    if on_gpu() or x.dtype != mx.float32:
        return nn.gelu(x)
    size = mx.abs(x)
    t = 1 / (size * (0.3275911 * 0.5**0.5) + 1)
    series = t * (t * (t * (t * (t * 1.061405429 - 1.453152027) + 1.421413741) - 0.284496736) + 0.254829592)
    erfc = series * exp8(mx.maximum(x * x * -0.0625, -2.5))
    return mx.maximum(x, 0) - size * erfc * 0.5


def pad_heads(x: mx.array) -> mx.array:
    """x: (B, heads, S, D) -> the same with zeros up to a head size that the GPU's fused attention takes, if there is
    one. SD 1.x's 40 becomes 64; its 160 has none, but occurs only where there are few positions."""
    D = x.shape[-1]
    if not on_gpu() or D in FUSED_HEAD_DIMS:
        return x
    larger = [dim for dim in FUSED_HEAD_DIMS if dim > D]
    return mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, larger[0] - D)]) if larger else x


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """softmax(q k^T / sqrt(D)) v; q: (B, heads, S, D), k and v: (B, heads, T, D or as `pad_heads` left them)."""
    D = q.shape[-1]
    if on_gpu() or q.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(pad_heads(q), k, v, scale=D**-0.5)[..., :D]
    B, heads = q.shape[:2]
    q, k = q * (D**-0.5 / 8), k.swapaxes(2, 3)
    v = mx.concatenate([v, mx.ones((*v.shape[:3], 1))], axis=-1)  # its last column will be the sum of the weights
    # one head at a time, so that its scores stay in the processor's cache
    out = mx.stack([mx.stack([_weighted(q[b, h], k[b, h], v[b, h]) for h in range(heads)]) for b in range(B)])
    return out[..., :-1] / out[..., -1:]


def _weighted(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """One head's values, weighted but not yet normalised; q: (S, D), an eighth of its usual size; k: (D, T)."""
    scores = q @ k
    return exp8(mx.maximum(scores - scores.max(axis=-1, keepdims=True), -2.5)) @ v


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
