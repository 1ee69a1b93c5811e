"""Convolutions, norms, activations and attention by device: the one place that knows what a backend is fast at.

On a GPU, and wherever a graph is recorded, they are MLX's own. On the CPU they are those of cpu.py, which compute at
once and in float32, also where weights are in half precision, whose products are slow there.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from ..errors import Failure, UsageError
from . import cpu

# Before it, Metal's Winograd convolution could run out of memory and give zeros without an error
OLDEST = "0.32.2"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


if _numbers(mx.__version__) < _numbers(OLDEST):
    raise Failure(f"MLX should be {OLDEST} or newer, got {mx.__version__}; try pip install --upgrade mlx")

# Head sizes for which MLX has fused attention kernels; at others it stores every score. (At 192 and 256 Metal has some
# too, but goes another way.)
FUSED_HEADS = {
    "metal": (64, 72, 80, 96, 128),
    "neural": (64, 96, 128),  # the kernels for half precision that use an M5's matrix units, which the others do not
    "cuda": tuple(range(8, 129, 8)),
}

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


def compiled(function: Callable) -> Callable:
    """It through `mx.compile`: a graph for each shape that it is given."""

    def traced(*inputs):
        with recording():
            return function(*inputs)

    return mx.compile(traced)


def done(x: mx.array) -> mx.array:
    """x, once a GPU has computed it, so that nothing that led to it is held; in a graph that is recorded, as it is."""
    if not (at_once() or _recording):
        mx.eval(x)
    return x


def _in_float32(kernel: Callable[..., mx.array], *arrays: mx.array | None, **how) -> mx.array:
    """What a CPU kernel makes of these. It stays in float32: half precision is for weights there, and large maps would
    only be converted to and fro."""
    return kernel(*(a if a is None else a.astype(mx.float32) for a in arrays), **how)


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
    normed = mx.fast.layer_norm(grouped, None, None, eps).reshape(B, groups, H * W, -1).swapaxes(1, 2)
    # The rest reads that view and writes in the order of x, so that no copy need do it
    normed = normed * weight.reshape(groups, -1) + bias.reshape(groups, -1)
    return (nn.silu(normed) if then_silu else normed).reshape(B, H, W, C)


# Products


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x weight^T + bias; weight: (O, C)."""
    if at_once():
        return _in_float32(cpu.linear, x, weight, bias)
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def quantized_linear(
    x: mx.array, packed: tuple[mx.array, mx.array, mx.array], bias: mx.array | None, *, group_size: int, bits: int
) -> mx.array:
    """The same with weights, scales and biases of `mx.quantize`; the CPU unpacks them, as its product of packed ones
    takes a hundred times as long."""
    if at_once():
        return linear(x, mx.dequantize(*packed, group_size=group_size, bits=bits), bias)
    out = mx.quantized_matmul(x, *packed, transpose=True, group_size=group_size, bits=bits)
    return out if bias is None else out + bias


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
    taken = FUSED_HEADS[_kernels(x.dtype)] if on_gpu() else ()
    return _padded(x, min((size for size in taken if size >= D), default=D))


def _padded(x: mx.array, size: int) -> mx.array:
    D = x.shape[-1]
    return x if size == D else mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, size - D)])


def _kernels(dtype: mx.Dtype) -> str:
    """Whose fused attention this GPU runs, see `FUSED_HEADS`: told as in is_nax_available, of MLX's device.cpp. Matrix
    units take float32 too, but rounded, which host.py forbids."""
    if mx.cuda.is_available():
        return "cuda"
    architecture = str(mx.device_info(mx.default_device()).get("architecture", ""))
    found = re.fullmatch(r"applegpu_g(\d+)([a-z])", architecture)
    new = (
        found is not None
        and int(found[1]) >= (18 if found[2] == "p" else 17)
        and _numbers(platform.release()) >= [25, 2]  # Darwin's, of macOS 26.2, which an older Python is told is a 16
    )
    return "neural" if new and dtype != mx.float32 else "metal"


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
    return mx.fast.scaled_dot_product_attention(_padded(q, k.shape[-1]), k, v, scale=D**-0.5, mask=mask)[..., :D]


DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def dtype_of(name: str) -> mx.Dtype:
    """An MLX type by name; "auto" is float16 on a GPU, float32 on the CPU, where half precision is slow.

    Raises:
        UsageError: the name is not known.
    """
    if name == "auto":
        return mx.float16 if on_gpu() else mx.float32
    if name not in DTYPES:
        raise UsageError(f"dtype should be auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
