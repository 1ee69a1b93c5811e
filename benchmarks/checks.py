"""What our nets are made of against NumPy in float64, and whole nets on one device against another: errors and limits.

Each piece is given numbers that float16 holds, so that one reference serves float32 and float16. An error is the root
mean square of the difference over that of what is right; the largest single difference may be `WORST` times the limit,
so that one wrong row among thousands is found too. See first_run.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from benchmarks.speed.models import SD15, mlx_unet
from mlx_deepcache import StableDiffusion
from mlx_deepcache.backend import ops
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.nets.blocks import Upsample2D
from mlx_deepcache.nets.unet_parts import Conditioning
from mlx_deepcache.unet import UNet2DConditionModel

DTYPES = {"float32": mx.float32, "float16": mx.float16}
WORST = 10  # rounding errors of millions of numbers stay below, as most are smaller than five deviations
HEAD_DIMS = (40, 64, 80, 96, 128, 160, 512)  # SD 1.x has 40, 80 and 160, SD 2.x and SDXL 64, the VAE 512
LIMITS = {"float32": 1e-5, "float16": 2e-3}
CONVOLUTION_LIMITS = {"float32": 5e-5, "float16": 2e-3}  # float32: the CPU's Winograd convolution
WINOGRAD_LIMITS = {"float32": 5e-5, "float16": 1e-2}  # Metal's keeps its transforms in the arrays' type
# float16: twice or more what 0.7% of noise at each 3x3 convolution comes to, 0.9% of a call and 2.3% of a run
NET_LIMITS = {"float32": 1e-4, "float16": 3e-2}
RUN_LIMITS = {"float32": 2e-3, "float16": 5e-2}
PROMPT = "a red apple"


# Where a piece is computed


Ways = dict[str, Callable[[], AbstractContextManager]]


def ways() -> Ways:
    """On the GPU and on the CPU; without a GPU on the CPU and, "plain", by MLX's own operations, as for a GPU."""
    return {"gpu": nullcontext, "cpu": on_cpu} if ops.on_gpu() else {"cpu": nullcontext, "plain": plain}


@contextmanager
def plain() -> Iterator[None]:
    """MLX's activations are compiled functions, which on the CPU would take a compiler."""
    mx.disable_compile()
    try:
        with ops.recording():
            yield
    finally:
        mx.enable_compile()


@contextmanager
def on_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(before)


# NumPy's references, which take and give float64


def exact_attention(q, k, v):
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ v / weights.sum(-1, keepdims=True)


def exact_norm(x, axes, eps):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def exact_layer_norm(x, weight, bias, eps=1e-5):
    return exact_norm(x, -1, eps) * weight + bias


def exact_group_norm(x, weight, bias, group_size, eps=1e-5):
    grouped = x.reshape(*x.shape[:3], -1, group_size)
    return exact_norm(grouped, (1, 2, 4), eps).reshape(x.shape) * weight + bias


def exact_silu(x):
    return x / (1 + np.exp(-x))


def exact_gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def exact_linear(x, weight, bias):
    return x @ weight.T + bias


def exact_conv(x, weight, bias, stride=1, padding=1):
    """A sum over the filter's taps, each a product of matrices."""
    x = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    _, rows, columns, _ = weight.shape
    height, width = ((side - taps) // stride + 1 for side, taps in zip(x.shape[1:3], (rows, columns), strict=True))
    out = np.zeros((len(x), height, width, len(weight))) + bias
    for i in range(rows):
        for j in range(columns):
            seen = x[:, i : i + stride * height : stride, j : j + stride * width : stride]
            out += seen @ weight[:, i, j].T
    return out


def exact_upsampling(x, weight, bias):
    return exact_conv(x.repeat(2, axis=1).repeat(2, axis=2), weight, bias)


# The pieces


class Piece(NamedTuple):
    """`ours` takes MLX arrays and `exact` the same numbers in float64; draw: makes them, float32."""

    name: str
    draw: Callable[[np.random.Generator], list[np.ndarray]]
    ours: Callable[..., mx.array]
    exact: Callable[..., np.ndarray]
    limits: dict[str, float] = LIMITS


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
    """Normal values that float16 holds."""
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale) + np.float32(mean)
    return values.astype(np.float16).astype(np.float32)


def attention(dim: int, heads: int, positions: int, keys: int | None = None) -> Piece:
    """Self-attention, or attention to the `keys` of a prompt."""

    def draw(rng):
        return [normal(rng, 1, heads, n, dim) for n in (positions, keys or positions, keys or positions)]

    def ours(q, k, v):
        return ops.attention(q, ops.pad_heads(k), ops.pad_heads(v))

    to = "" if keys is None else f" to {keys}"
    return Piece(f"attention, heads of {dim}, {positions}{to} positions", draw, ours, exact_attention)


def group_norm(side: int, channels: int, group_size: int) -> Piece:
    """Followed by SiLU. Each group has its own mean, three deviations off."""

    def draw(rng):
        means = np.repeat(normal(rng, channels // group_size, scale=3), group_size)
        x = normal(rng, 2, side, side, channels) + means
        return [x.astype(np.float16).astype(np.float32), normal(rng, channels, mean=1), normal(rng, channels)]

    def ours(x, weight, bias):
        return ops.group_norm(x, weight, bias, group_size, 1e-5, then_silu=True)

    def exact(x, weight, bias):
        return exact_silu(exact_group_norm(x, weight, bias, group_size))

    return Piece(f"group norm and SiLU, {side}x{side} of {channels}", draw, ours, exact)


def weights(rng, c_out: int, c_in: int, taps: int | None = None) -> list[np.ndarray]:
    """Of unit-variance outputs, with a bias; taps: the side of a convolution's filters."""
    shape = (c_out, c_in) if taps is None else (c_out, taps, taps, c_in)
    return [normal(rng, *shape, scale=math.prod(shape[1:]) ** -0.5), normal(rng, c_out, scale=0.3)]


def conv(name: str, sides: tuple[int, int], c_in: int, c_out: int, *, limits=CONVOLUTION_LIMITS, **how) -> Piece:
    def draw(rng):
        return [normal(rng, 2, *sides, c_in), *weights(rng, c_out, c_in, 3)]

    def ours(x, weight, bias):
        return ops.conv2d(x, weight, bias, **{"padding": 1, **how})

    def exact(x, weight, bias):
        return exact_conv(x, weight, bias, **how)

    name = f"3x3 convolution{name}, {sides[0]}x{sides[1]}, {c_in} to {c_out}"
    return Piece(name, draw, ours, exact, limits)


def upsampling(side: int, channels: int) -> Piece:
    def draw(rng):
        return [normal(rng, 1, side, side, channels), *weights(rng, channels, channels, 3)]

    def ours(x, weight, bias):
        up = Upsample2D(channels)
        up.conv.weight, up.conv.bias = weight, bias
        return up(x)

    return Piece(f"upsampling, {side}x{side} of {channels}", draw, ours, exact_upsampling, CONVOLUTION_LIMITS)


def linear(rows: int, c_in: int, c_out: int) -> Piece:
    def draw(rng):
        return [normal(rng, rows, c_in), *weights(rng, c_out, c_in)]

    return Piece(f"linear, {rows} of {c_in} to {c_out}", draw, ops.linear, exact_linear)


def pieces(quick: bool) -> list[Piece]:
    """SD 1.5's at 512 px, or small ones."""
    share = 4 if quick else 1
    side, wide, rows = 64 // share, 320 // share, 4096 // share**2

    def layer_norm(x, weight, bias):
        return ops.layer_norm(x, weight, bias, 1e-5)

    def activation(rng):
        return [normal(rng, 4 * rows, 8, scale=3)]

    def normed(rng):
        return [normal(rng, rows, wide, mean=3), normal(rng, wide, mean=1), normal(rng, wide)]

    positions = {40: rows, 160: max(rows // 16, 64)}
    return [
        *(attention(dim, 2, positions.get(dim, rows // 4)) for dim in HEAD_DIMS),
        *(attention(dim, 2, rows // 4, 77) for dim in HEAD_DIMS[:-1]),
        group_norm(side, wide, wide // 32 if not quick else 5),
        Piece(f"layer norm, {rows} of {wide}", normed, layer_norm, exact_layer_norm),
        Piece("SiLU", activation, ops.silu, exact_silu),
        Piece("GELU", activation, ops.gelu, exact_gelu),
        conv("", (side, side), wide, wide, limits=WINOGRAD_LIMITS),
        conv("", (side // 2, side // 2), 2 * wide, 2 * wide),  # too few positions for it on Metal
        conv(" on odd sides", (side - 3, side + 1), 160 // share, 128 // share, limits=WINOGRAD_LIMITS),
        conv(" of latents", (side, side), 4, wide),
        conv(" to latents", (side, side), wide, 4),
        conv(" of stride 2", (side, side), wide, wide, stride=2),
        conv(" of stride 2, not padded", (side + 1, side + 1), wide, wide, stride=2, padding=0),
        upsampling(side // 2, 2 * wide),
        linear(2 * rows, wide, 8 * wide),
    ]


# Whole nets


class Net(NamedTuple):
    """`load` reads or makes it, in float32; `run` has it compute arrays by name, in a type; an array that is named with
    `COMPILED` should be as the one without."""

    name: str
    load: Callable[[], Any]
    run: Callable[[Any, mx.Dtype], dict[str, mx.array]]
    limits: dict[str, float]


COMPILED = ", compiled"


def unet_net(name: str, load: Callable[[], UNet2DConditionModel], side: int) -> Net:
    """A full and a cached step for one picture with guidance."""

    def run(unet, dtype):
        rng = np.random.default_rng(0)
        unet.set_dtype(dtype)
        x = mx.array(normal(rng, 2, side, side, 4)).astype(dtype)
        context = mx.array(normal(rng, 2, 77, unet.config.cross_attention_dim)).astype(dtype)
        found = {}
        for kind, net in {"": unet, **({COMPILED: unet.compiled()} if ops.on_gpu() else {})}.items():
            cond = net.prepare(Conditioning(context))
            first, second = (net.time_embed(mx.array([t]), cond)[0] for t in (701, 681))
            found["full step" + kind], features = net(x, first, cond)
            found["cached step" + kind], _ = net(x * 0.9, second, cond, reused=features)
        return found

    return Net(name, load, run, NET_LIMITS)


def bundled_run(steps: int) -> Net:
    """The bundled model, drawing."""

    def run(checkpoint, dtype):
        pipe = StableDiffusion(checkpoint, str(dtype).removeprefix("mlx.core."))
        result = pipe(PROMPT, seeds=[1], steps=steps, cache_interval=3)
        return {"latents": result.latents, "picture": mx.array(np.array(result.images[0], np.float32))}

    return Net(f"the bundled model, {steps} steps", lambda: Checkpoint.open(None), run, RUN_LIMITS)


def nets(quick: bool) -> list[Net]:
    def bundled():
        return Checkpoint.open(None).load("unet", mx.float32)

    def widest():
        """SD 1.5's two widest levels."""
        down, up = SD15["down_block_types"], SD15["up_block_types"]
        levels = {"block_out_channels": [320, 640], "down_block_types": down[:2], "up_block_types": up[-2:]}
        return mlx_unet(SD15 | levels)

    return [
        unet_net("the bundled U-Net", bundled, 16),
        unet_net("SD 1.5's widest levels", widest, 8 if quick else 64),
        bundled_run(12 if quick else 50),
    ]


# Errors


def error(found: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Root mean square and maximum of the difference, over the root mean square of what is right."""
    scale = math.sqrt(np.mean(np.square(right)))
    difference = found - right
    return math.sqrt(np.mean(np.square(difference))) / scale, float(np.abs(difference).max()) / scale


def row(name: str, dtype: str, limit: float, errors: dict[str, tuple[float, float]]) -> dict:
    """errors: by way; those above the limit, or NaN, are named in `failed`."""
    failed = [way for way, (rms, most) in errors.items() if not (rms <= limit and most <= WORST * limit)]
    rms, most = ({way: pair[i] for way, pair in errors.items()} for i in (0, 1))
    return {"piece": name, "dtype": dtype, "error": rms, "worst": most, "limit": limit, "failed": failed}


def computed(run: Callable[[], mx.array], where: AbstractContextManager) -> np.ndarray:
    with where:
        return np.array(run().astype(mx.float32), np.float64)


def check_piece(piece: Piece, ways: Ways) -> Iterator[dict]:
    """A row for each type."""
    drawn = piece.draw(np.random.default_rng(0))
    right = piece.exact(*(array.astype(np.float64) for array in drawn))
    for name, dtype in DTYPES.items():
        arrays = [mx.array(array).astype(dtype) for array in drawn]
        mx.eval(arrays)
        found = {way: computed(lambda: piece.ours(*arrays), where()) for way, where in ways.items()}  # noqa: B023
        yield row(piece.name, name, piece.limits[name], {way: error(array, right) for way, array in found.items()})


def check_net(net: Net, ways: Ways) -> Iterator[dict]:
    """A row for each type and output. What is right is the CPU's in float32."""
    loaded, right = net.load(), {}
    for dtype_name, dtype in DTYPES.items():
        errors: dict[str, dict] = {}
        for way, where in sorted(ways.items()):  # the CPU first
            with where():
                found = {name: np.array(a.astype(mx.float32), np.float64) for name, a in net.run(loaded, dtype).items()}
            if not right:
                right = found
                continue
            for name, array in found.items():
                errors.setdefault(name, {})[way] = error(array, right[name.removesuffix(COMPILED)])
        for name, by_way in errors.items():
            yield row(f"{net.name}: {name}", dtype_name, net.limits[dtype_name], by_way)
