"""Kernels for the CPU, through NumPy and the BLAS, on all cores.

MLX's CPU backend takes numbers one at a time in most operations (9 ns for an exp, NumPy's vectors 0.3), stores every
score of an attention layer, and convolves by writing out all that the filters see. Here work is cut into blocks that
stay near a core, and what MLX's arrays hold is read and written in place. It is done when a function returns: nothing
here is lazy, and nothing can be traced.

All arrays are float32.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial

import mlx.core as mx
import numpy as np
from numpy.lib.stride_tricks import as_strided
from threadpoolctl import ThreadpoolController

BLOCK = 1 << 17  # numbers in a block of simple operations: 512 KiB; smaller ones wait for each other's Python
SCORES = 1 << 20  # in a block of attention
SAFE = 60.0  # scores up to here need not have their maximum taken off: the sum of their exponentials stays finite


# Running on all cores


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(1)
def _workers() -> tuple[ThreadPoolExecutor, ThreadpoolController]:
    return ThreadPoolExecutor(max(cores() - 1, 1), "mlx_deepcache"), ThreadpoolController()


def _in_parallel(job: Callable[..., None], parts: Iterable[tuple], numbers: int) -> None:
    """`job(*part)` of each part: every core takes the next one when it is done with its last, and has a BLAS of one
    thread. So many numbers are passed over in all: where they are few, waking the others takes longer than the work."""
    waiting = deque(parts)

    def work() -> None:
        with np.errstate(all="ignore"):  # infinities and NaN are found at the end of a run, in words
            while waiting:
                try:
                    part = waiting.popleft()
                except IndexError:  # another core was faster
                    break
                job(*part)

    if numbers < BLOCK or _busy(waiting) == 1:
        work()
        return
    pool, blas = _workers()
    with blas.limit(limits=1, user_api="blas"):
        others = [pool.submit(work) for _ in range(_busy(waiting) - 1)]
        work()
        for other in others:
            other.result()


def _busy(parts: Sequence) -> int:
    """How many of these are worked on at a time."""
    return min(len(parts), cores())


def _spans(n: int, step: int) -> list[tuple[int, int]]:
    """[0, n) in pieces of at most `step`, or of one."""
    step = max(step, 1)
    return [(start, min(start + step, n)) for start in range(0, n, step)]


# Arrays


def _view(x: mx.array) -> np.ndarray:
    """What it holds, in place."""
    return np.array(x, copy=False)


def _new(shape: Sequence[int], inputs: Sequence[mx.array | None], room: int = 0) -> tuple[mx.array, np.ndarray | None]:
    """An array, and a view through which to fill it from `inputs`, which can be read now; room: numbers that this takes
    beside them. While plans are made there is no view: what stands for the array tells the graph all that."""
    given = [array for array in inputs if array is not None]
    if _planning:
        return mx.depends([mx.broadcast_to(mx.array(0.0), size) for size in (shape, (room,))], given)[0], None
    made = mx.zeros(shape)
    mx.eval(made, *given)
    global peak_memory
    peak_memory = max(peak_memory, mx.get_active_memory() + 4 * room)
    return made, _view(made)


_planning = False
peak_memory = 0  # most bytes of MLX's arrays and of what is taken beside them here; set it to 0 to count anew


@contextmanager
def planning() -> Iterator[None]:
    """Here nothing is computed: an array that is asked for stands in MLX's graph as what `mx.depends` returns."""
    global _planning
    _planning = True
    try:
        yield
    finally:
        _planning = False


_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112  # cblas.h


@lru_cache(1)
def _sgemm() -> Callable | None:
    """The BLAS that MLX uses, see host.py. NumPy's own does half as much where it does not know a processor's widest
    vectors."""
    sgemm = getattr(ctypes.CDLL(None), "cblas_sgemm", None)
    if sgemm is not None:
        i, f, p = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
        sgemm.argtypes, sgemm.restype = [i, i, i, i, i, i, f, p, i, p, i, f, p, i], None
    return sgemm


def _matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> np.ndarray:
    """a @ b into `out`, whose rows' numbers lie side by side; so do those of a and b, or of their transposes."""
    sgemm = _sgemm()
    if sgemm is None:
        return np.matmul(a, b, out=out)
    (m, k), n = a.shape, b.shape[1]
    (how_a, step_a), (how_b, step_b) = (_layout(x) for x in (a, b))
    at_a, at_b, at_out = (x.ctypes.data for x in (a, b, out))
    step = max(out.strides[0] // 4, n)
    sgemm(_ROW_MAJOR, how_a, how_b, m, n, k, 1.0, at_a, step_a, at_b, step_b, 0.0, at_out, step)
    return out


def _layout(x: np.ndarray) -> tuple[int, int]:
    """How a matrix lies, and numbers from one row (or column) to the next."""
    rows, columns = x.shape
    if x.strides[1] == 4 or columns == 1:
        return _AS_IT_IS, max(x.strides[0] // 4, columns)
    return _TRANSPOSED, max(x.strides[1] // 4, rows)


# OpenBLAS takes other kernels for products of up to 100 x 100 x 100, which round otherwise with other rows beside them.
# Above, a picture has the same bits whatever is drawn with it.
SMALL = 100**3
MANY = 64  # more are no pictures, but places in a video


def linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    """x weight^T + bias; x: (B, ..., C), weight: (O, C)."""
    run = partial(_linear, weight=weight.T, bias=bias)
    return _each(run, x, x.size // len(x) * len(weight))


def _linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    return x @ weight if bias is None else mx.addmm(bias, x, weight)


def _each(run: Callable[[mx.array], mx.array], x: mx.array, products: int) -> mx.array:
    """`run` of x, (B, ...), or of each of the B by itself where so few multiply-adds are one's."""
    if not 1 < len(x) <= MANY or products > SMALL:
        return run(x)
    return mx.concatenate([run(x[i : i + 1]) for i in range(len(x))])


# Activations: of x into `out`; room: as large as x


def _silu(x: np.ndarray, out: np.ndarray, room: np.ndarray, slope: float = 1) -> None:
    """x * sigmoid(slope x)."""
    np.multiply(x, np.float32(-slope), out=room)
    np.exp(room, out=room)
    room += 1
    np.divide(x, room, out=out)


def _quick_gelu(x: np.ndarray, out: np.ndarray, room: np.ndarray) -> None:
    """OpenAI's approximation of GELU."""
    _silu(x, out, room, 1.702)


def _gelu(x: np.ndarray, out: np.ndarray, room: np.ndarray) -> None:
    """x * Phi(x), with erfc to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26)."""
    size, t = np.abs(x), room
    np.multiply(size, np.float32(0.3275911 * 0.5**0.5), out=t)
    t += 1
    np.reciprocal(t, out=t)
    positive = np.maximum(x, 0)
    series = t * np.float32(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series += np.float32(coefficient)
        series *= t
    series *= size
    np.multiply(size, size, out=t)
    t *= np.float32(-0.5)
    np.exp(t, out=t)
    series *= t
    series *= np.float32(0.5)
    np.subtract(positive, series, out=out)


ACTIVATIONS = {"silu": _silu, "gelu": _gelu, "quick_gelu": _quick_gelu}


def activation(x: mx.array, gated: mx.array | None = None, *, name: str) -> mx.array:
    """One of `ACTIVATIONS`, (..., C); gated: of the same shape, multiplied by it."""
    made, out = _new(x.shape, (x, gated))
    if out is None:
        return made
    C = x.shape[-1]
    given, out = _view(x).reshape(-1, C), out.reshape(-1, C)
    values = None if gated is None else _view(gated).reshape(-1, C)

    def job(start: int, stop: int) -> None:
        here = out[start:stop]
        ACTIVATIONS[name](given[start:stop], here, np.empty_like(here))
        if values is not None:
            here *= values[start:stop]

    _in_parallel(job, _spans(len(given), BLOCK // C), x.size)
    return made


# Norms


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """(..., C), each row by itself."""
    made, out = _new(x.shape, (x, weight, bias))
    if out is None:
        return made
    C = x.shape[-1]
    given, out, scale, shift = _view(x).reshape(-1, C), out.reshape(-1, C), _view(weight), _view(bias)
    share = np.full(C, 1 / C, np.float32)

    def job(start: int, stop: int) -> None:
        rows, here = given[start:stop], out[start:stop]
        np.subtract(rows, np.vecdot(rows, share)[:, None], out=here)
        here *= 1 / np.sqrt(np.vecdot(here, here) / C + np.float32(eps))[:, None]
        here *= scale
        here += shift

    _in_parallel(job, _spans(len(given), BLOCK // C), x.size)
    return made


def group_norm(
    x: mx.array, weight: mx.array, bias: mx.array, group_size: int, eps: float, name: str | None = None
) -> mx.array:
    """(B, ..., C), each group of channels of each picture by itself; name: of the activation that follows."""
    made, out = _new(x.shape, (x, weight, bias))
    if out is None:
        return made
    B, C = x.shape[0], x.shape[-1]
    given, out = _view(x).reshape(B, -1, C), out.reshape(B, -1, C)
    spans = _spans(given.shape[1], BLOCK // C)
    parts = [(b, i, *span) for b in range(B) for i, span in enumerate(spans)]
    means, squares = (np.empty((B, len(spans), C), np.float32) for _ in range(2))

    def look(b: int, i: int, start: int, stop: int) -> None:
        rows, ones = given[b, start:stop], np.ones(stop - start, np.float32)
        means[b, i] = ones @ rows / len(rows)
        off = rows - means[b, i]
        off *= off
        squares[b, i] = ones @ off

    _in_parallel(look, parts, x.size)
    # Of each block's channels the mean and the squared distance from it; from these a group's (Chan et al. 1979, 2.1)
    counts = np.array([stop - start for start, stop in spans], np.float64)[:, None, None]
    means, squares = (a.astype(np.float64).reshape(B, len(spans), -1, group_size) for a in (means, squares))
    total = counts.sum() * group_size
    mean = (counts * means).sum(axis=(1, 3), keepdims=True) / total
    variance = (squares + counts * (means - mean) ** 2).sum(axis=(1, 3), keepdims=True) / total
    mean, rate = (np.repeat(a[:, 0, :, 0], group_size, axis=1) for a in (mean, 1 / np.sqrt(variance + eps)))
    scale = rate * _view(weight)
    shift = (_view(bias) - mean * scale).astype(np.float32)
    scale = scale.astype(np.float32)

    def apply(b: int, i: int, start: int, stop: int) -> None:
        here = out[b, start:stop]
        np.multiply(given[b, start:stop], scale[b], out=here)
        here += shift[b]
        if name is not None:
            ACTIVATIONS[name](here, here, np.empty_like(here))

    _in_parallel(apply, parts, x.size)
    return made


# Attention


def attention(q: mx.array, k: mx.array, v: mx.array, causal: bool = False) -> mx.array:
    """softmax(q k^T / sqrt(D)) v; q: (B, heads, S, D), k and v: (B, heads, T, D); causal: a position sees those up to
    itself.

    So many rows at a time that their scores stay near the core; the softmax's division comes last. Its sum is one more
    column of v where the head size leaves room in a vector.
    """
    (B, heads, S, D), T = q.shape, k.shape[2]
    width = -(-D // 16) * 16
    rows = max(min(SCORES // T, 1024), 16)
    parts = [(b, h, *span) for b in range(B) for h in range(heads) for span in _spans(S, rows * -(-1024 // rows))]
    made, out = _new((B, S, heads, D), (q, k, v), _busy(parts) * (rows * (T + width) + T * (D + width)))
    if out is None:
        return made.swapaxes(1, 2)
    Q, K, V = map(_view, (q, k, v))

    def job(b: int, h: int, first: int, last: int) -> None:
        values = np.zeros((T, width), np.float32)
        values[:, :D] = V[b, h]
        if width > D:
            values[:, D] = 1
        keys = np.ascontiguousarray(K[b, h].T)
        longest = np.sqrt(np.vecdot(K[b, h], K[b, h]).max())
        scores, room = np.empty((rows, T), np.float32), np.empty((rows, width), np.float32)
        for start, stop in ((first + i, first + j) for i, j in _spans(last - first, rows)):
            x = Q[b, h, start:stop] * np.float32(D**-0.5)
            s, o = scores[: len(x)], room[: len(x)]
            _matmul(x, keys, s)
            if causal:
                s[np.arange(T) > np.arange(start, stop)[:, None]] = -np.inf
            if not np.sqrt(np.vecdot(x, x).max()) * longest < SAFE:
                s -= s.max(axis=1, keepdims=True)
            np.exp(s, out=s)
            _matmul(s, values, o)
            np.divide(
                o[:, :D], o[:, D : D + 1] if width > D else s.sum(axis=1, keepdims=True), out=out[b, start:stop, h]
            )

    _in_parallel(job, parts, B * heads * S * T)
    return made.swapaxes(1, 2)


# Convolutions

# Winograd's F(4 x 4, 3 x 3) (Lavin and Gray 2016): a tile of 4 x 4 outputs from 36 products in place of 144. As
# matrices: outputs = AFTER ((FILTER w) * (BEFORE x)), of tiles of 6 x 6 inputs. Interpolated at 0, +-3/4, +-3/2 and
# infinity, where rounding errors are half of what they are at the usual 0, +-1, +-2 and infinity.
TILE, POINTS = 4, (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2)


def _winograd(points: Sequence[float], taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices of one axis for as many points, and infinity (Toom and Cook's)."""
    n = len(points) + 1
    after = np.array([[*(p**i for p in points), i == n - taps] for i in range(n - taps + 1)], float)
    filters, before = np.zeros((n, taps)), np.zeros((n, n))
    for i, p in enumerate(points):
        others = [q for q in points if q != p]
        filters[i] = [p**j / np.prod([p - q for q in others]) for j in range(taps)]
        before[i, : n - 1] = np.poly(others)[::-1]
    filters[-1, -1] = 1
    before[-1] = np.poly(points)[::-1]
    return after, filters, before


_AFTER, _FILTER, _BEFORE = _winograd(POINTS, 3)
# Of a doubled picture a tile sees 4 small pixels, of which the inner two twice
_DOUBLED = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
AFTER, FILTER, BEFORE, BEFORE_DOUBLED = (
    np.kron(m, m).astype(np.float32) for m in (_AFTER, _FILTER, _BEFORE, _BEFORE @ _DOUBLED)
)
TILES = 128  # in a block
POSITIONS = 256  # in a block, of convolutions without tiles
FILTERS = 1 << 24  # numbers that transformed filters take
LARGE = 1 << 24  # numbers: more than that MLX should not write out of what the filters see


def conv2d(x: mx.array, weight: mx.array, bias: mx.array | None, stride: int, padding: int) -> mx.array:
    """x: (B, H, W, C), weight: (C_out, kh, kw, C), padding: zeros all round -> (B, H', W', C_out)."""
    (_, H, W, C), (_, kh, kw, _) = x.shape, weight.shape
    height, width = ((n + 2 * padding - k) // stride + 1 for n, k in ((H, kh), (W, kw)))
    if (kh, kw, stride, padding) == (3, 3, 1, 1) and C >= 16 and _tiles(height, width) >= 64:
        return _by_tiles(x, weight, bias, height, width, TILE, BEFORE)
    if height * width * kh * kw * C >= LARGE:
        return _unfolded(x, weight, bias, height, width, stride, padding)
    out = _each(lambda x: mx.conv2d(x, weight, stride=stride, padding=padding), x, height * width * weight.size)
    return out if bias is None else out + bias


def conv2d_doubled(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """A 3x3 convolution over a picture twice as large, each pixel read as 2x2: (B, H, W, C) -> (B, 2H, 2W, C_out)."""
    _, H, W, _ = x.shape
    return _by_tiles(x, weight, bias, 2 * H, 2 * W, TILE // 2, BEFORE_DOUBLED)


def _tiles(height: int, width: int) -> int:
    return -(-height // TILE) * -(-width // TILE)


def _by_tiles(
    x: mx.array, weight: mx.array, bias: mx.array | None, height: int, width: int, step: int, before: np.ndarray
) -> mx.array:
    """Winograd's; step: pixels of x between tiles; before: the matrix for all that a tile sees.

    The transformed filters take four times the weights' memory. They are made at every call, which takes 1 to 5% of its
    time on the widest maps and up to 20% on the smallest, and given back.
    """
    (B, _, _, C), c_out, n = x.shape, len(weight), len(FILTER)
    down, across, size = -(-height // TILE), -(-width // TILE), int(before.shape[1] ** 0.5)
    block = max(min(TILES, down * across // cores()), 16)  # for each core one of each picture, or of all together
    if block * C * c_out > SMALL:
        block = max(min(TILES, B * down * across // cores()), 16)
    parts = [
        (b, *rows, *columns)
        for b in range(B)
        for rows in _spans(down, max(block // across, 1))
        for columns in _spans(across, block)
    ]
    # A block's inputs are transformed anew for each share of the filters that fits
    shares = _spans(c_out, max(FILTERS // (n * C), 32))
    most = shares[0][1]
    in_block = max(block // across, 1) * min(across, block)
    room = n * most * C + _busy(parts) * in_block * ((n + size * size) * C + (n + TILE * TILE) * most)
    made, out = _new((B, height, width, c_out), (x, weight, bias), room)
    if out is None:
        return made
    given, taps, shift = _view(x), _view(weight), np.zeros(c_out, np.float32) if bias is None else _view(bias)
    all_filters = np.empty((n, most, C), np.float32)
    whole = None if height % TILE or width % TILE else out.reshape(B, down, TILE, across, TILE, c_out)

    def transform(start: int, stop: int) -> None:
        here = np.ascontiguousarray(taps[first + start : first + stop].reshape(stop - start, 9, C).swapaxes(0, 1))
        _matmul(FILTER, here.reshape(9, -1), filters[:, start:stop].reshape(n, -1))

    def job(b: int, top: int, bottom: int, left: int, right: int) -> None:
        rows, columns = bottom - top, right - left
        seen = _seen(given[b], step * top - 1, step * left - 1, (rows, columns), (size, size), step)
        seen = np.ascontiguousarray(seen.transpose(2, 3, 0, 1, 4)).reshape(size * size, -1)
        inputs = _matmul(before, seen, np.empty((n, seen.shape[1]), np.float32)).reshape(n, -1, C)
        products = np.empty((n, rows * columns, last - first), np.float32)
        for its_inputs, its_filters, product in zip(inputs, filters, products, strict=True):
            _matmul(its_inputs, its_filters.T, product)
        products = products.reshape(n, -1)
        outputs = _matmul(AFTER, products, np.empty((len(AFTER), products.shape[1]), np.float32))
        outputs = outputs.reshape(TILE, TILE, rows, columns, -1).transpose(2, 0, 3, 1, 4)
        if whole is not None:
            np.add(outputs, shift[first:last], out=whole[b, top:bottom, :, left:right, :, first:last])
        else:
            here = out[b, TILE * top : TILE * bottom, TILE * left : TILE * right, first:last]
            outputs = outputs.reshape(TILE * rows, TILE * columns, -1)
            np.add(outputs[: here.shape[0], : here.shape[1]], shift[first:last], out=here)

    for first, last in shares:
        filters = all_filters[:, : last - first]
        _in_parallel(transform, _spans(last - first, 32), n * (last - first) * C)
        _in_parallel(job, parts, n * B * down * across * (C + last - first))
    return made


def _unfolded(
    x: mx.array, weight: mx.array, bias: mx.array | None, height: int, width: int, stride: int, padding: int
) -> mx.array:
    """Any convolution: what the filters see is written out a block at a time."""
    B, (c_out, kh, kw, C) = len(x), weight.shape
    step = max(POSITIONS // width, 1)
    parts = [(b, *rows) for b in range(B) for rows in _spans(height, step)]
    room = weight.size + _busy(parts) * step * width * kh * kw * C
    made, out = _new((B, height, width, c_out), (x, weight, bias), room)
    if out is None:
        return made
    given, shift = _view(x), 0 if bias is None else _view(bias)
    filters = np.ascontiguousarray(_view(weight)).reshape(c_out, -1).T

    def job(b: int, top: int, bottom: int) -> None:
        seen = _seen(given[b], stride * top - padding, -padding, (bottom - top, width), (kh, kw), stride)
        here = out[b, top:bottom].reshape(-1, c_out)
        _matmul(np.ascontiguousarray(seen).reshape(len(here), -1), filters, here)
        here += shift

    _in_parallel(job, parts, x.size * kh * kw)
    return made


def _seen(x: np.ndarray, top: int, left: int, count: tuple[int, int], size: tuple[int, int], step: int) -> np.ndarray:
    """x: (H, W, C), around which there are zeros -> a view (rows, columns, height, width, C) of `count` windows of this
    `size`, the first at (top, left), the next a `step` away."""
    height, width = (step * (n - 1) + k for n, k in zip(count, size, strict=True))
    H, W, C = x.shape
    inside = x[max(top, 0) : top + height, max(left, 0) : left + width]
    if inside.shape[:2] != (height, width):
        padded = np.zeros((height, width, C), np.float32)
        start = max(-top, 0), max(-left, 0)
        padded[start[0] : start[0] + inside.shape[0], start[1] : start[1] + inside.shape[1]] = inside
        inside = padded
    down, across, along = inside.strides
    return as_strided(inside, (*count, *size, C), (step * down, step * across, down, across, along), writeable=False)
