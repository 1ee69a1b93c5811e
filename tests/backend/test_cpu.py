"""The CPU's kernels against PyTorch: shapes that fit their blocks and shapes that do not, in any layout, on any number
of cores."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mlx_deepcache.backend import cpu, ops

pytestmark = pytest.mark.skipif(ops.on_gpu(), reason="these are for the CPU")


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact(function, *arrays, **how):
    """PyTorch's answer in float64; arrays of four axes are channels-last, and filters are (C_out, kh, kw, C)."""

    def given(a):
        tensor = torch.tensor(np.asarray(a), dtype=torch.float64)
        return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor

    out = function(*(None if a is None else given(a) for a in arrays), **how)
    return (out.permute(0, 2, 3, 1) if out.ndim == 4 else out).numpy()


def error(ours, expected):
    assert ours.shape == expected.shape
    return np.abs(np.array(ours.astype(mx.float32)) - expected).max()


def filters(c_out, k, c_in):
    return normal(c_out, k, k, c_in, seed=1, scale=(k * k * c_in) ** -0.5)


CONVOLUTIONS = {  # (B, H, W, C), C_out, size, stride, padding
    "tiles": ((2, 64, 64, 32), 48, 3, 1, 1),
    "tiles that do not fit": ((3, 37, 61, 17), 5, 3, 1, 1),
    "one row of tiles": ((1, 3, 300, 16), 16, 3, 1, 1),
    "few tiles": ((2, 8, 8, 32), 32, 3, 1, 1),
    "few channels": ((1, 64, 64, 4), 320, 3, 1, 1),
    "stride": ((2, 65, 64, 32), 16, 3, 2, 1),
    "stride, unpadded": ((1, 65, 65, 32), 16, 3, 2, 0),
    "2x2": ((1, 33, 32, 32), 16, 2, 1, 1),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case, bias, monkeypatch):
    shape, c_out, size, stride, padding = CONVOLUTIONS[case]
    x, w, b = normal(*shape), filters(c_out, size, shape[-1]), normal(c_out, seed=2) if bias else None
    expected = exact(F.conv2d, x, w, b, stride=stride, padding=padding)
    given = [a if a is None else mx.array(a) for a in (x, w, b)]
    assert error(ops.conv2d(*given, stride=stride, padding=padding), expected) < 3e-5
    monkeypatch.setattr(cpu, "LARGE", 1)  # as for maps that are too large for MLX's way
    monkeypatch.setattr(cpu, "FILTERS", 36 * 32 * 8)  # as for filters that do not fit at once
    assert error(ops.conv2d(*given, stride=stride, padding=padding), expected) < 3e-5


def test_convolution_of_slices():
    """As the fixed part of a resnet makes them: some channels of an input and of the filters."""
    x, w = normal(2, 40, 33, 64), filters(48, 3, 64)
    ours = ops.conv2d(mx.array(x)[..., 20:], mx.array(w)[..., 20:], padding=1)
    assert error(ours, exact(F.conv2d, x[..., 20:], w[..., 20:], padding=1)) < 3e-5


def test_rounding_errors_of_tiles_are_small():
    """At SD's widest level, unit variance in and out: the usual points leave 8e-5."""
    x, w = normal(1, 64, 64, 320), filters(320, 3, 320)
    assert error(ops.conv2d(mx.array(x), mx.array(w), padding=1), exact(F.conv2d, x, w, padding=1)) < 3e-5


@pytest.mark.parametrize("shape", [(2, 16, 16, 32), (1, 5, 7, 6), (1, 33, 20, 17)])
def test_convolution_of_a_doubled_picture(shape):
    x, w, b = normal(*shape), filters(12, 3, shape[-1]), normal(12, seed=2)
    expected = exact(lambda x, w, b: F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, padding=1), x, w, b)
    assert error(ops.conv2d_doubled(*map(mx.array, (x, w, b))), expected) < 3e-5


@pytest.mark.parametrize("scale", [0.1, 1, 30])  # the last needs the maximum taken off
@pytest.mark.parametrize(
    ("S", "T", "D", "causal"),
    [
        (77, 77, 64, False),
        (77, 77, 64, True),
        (2500, 2500, 40, False),
        (2500, 2500, 40, True),
        (300, 77, 160, False),
        (1, 5, 7, False),
    ],
)
def test_attention(S, T, D, causal, scale):
    q, k, v = normal(1, 2, S, D, scale=scale), normal(1, 2, T, D, seed=1, scale=scale), normal(1, 2, T, D, seed=2)
    tensors = (torch.tensor(a, dtype=torch.float64) for a in (q, k, v))
    expected = F.scaled_dot_product_attention(*tensors, is_causal=causal).numpy()
    assert error(ops.attention(*map(mx.array, (q, k, v)), causal=causal), expected) < 3e-6 * max(scale**2, 1)


def test_attention_of_views():
    """As a net gives them: heads cut out of one matrix."""
    x = normal(2, 100, 3, 5, 16)
    q, k, v = (mx.array(x)[:, :, i].swapaxes(1, 2) for i in range(3))
    tensors = (torch.tensor(x[:, :, i]).transpose(1, 2) for i in range(3))
    assert error(ops.attention(q, k, v), F.scaled_dot_product_attention(*tensors).numpy()) < 3e-6


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("mean", [0, 30])
@pytest.mark.parametrize("shape", [(2, 9, 7, 24), (1, 96, 100, 48)])
def test_norms(shape, mean, dtype):
    x = mx.array(normal(*shape, scale=3) + mean).astype(dtype)
    weight, bias = normal(shape[-1], seed=1), normal(shape[-1], seed=2)
    limit = 2e-5 if dtype == mx.float32 else 0.02 if dtype == mx.float16 else 0.15  # roundings of outputs up to 10
    given = np.array(x.astype(mx.float32))
    expected = exact(lambda x, w, b: F.silu(F.group_norm(x, 8, w, b, 1e-5)), given, weight, bias)
    parameters = mx.array(weight).astype(dtype), mx.array(bias).astype(dtype)
    ours = ops.group_norm(x, *parameters, shape[-1] // 8, 1e-5, then_silu=True)
    assert error(ours, expected) < limit
    flat = torch.tensor(given, dtype=torch.float64)
    expected = F.layer_norm(flat, shape[-1:], *map(torch.tensor, map(np.float64, (weight, bias))), 1e-5).numpy()
    assert error(ops.layer_norm(x, *parameters, 1e-5), expected) < limit


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_activations_of_anything(name):
    x = np.concatenate([np.linspace(-100, 100, 40001), [1e4, -1e4, 3e38, np.inf, -np.inf, np.nan]]).astype(np.float32)
    expected = getattr(F, name)(torch.tensor(x, dtype=torch.float64)).numpy()
    ours = np.array(getattr(ops, name)(mx.array(x)))
    finite = np.isfinite(x)
    assert np.abs(ours[finite] - expected[finite]).max() < 1e-5
    assert not np.isfinite(ours[[-3, -1]]).any()


def test_gates():
    value, gate = normal(3, 50, 64), normal(3, 50, 64, seed=1)
    both = mx.array(np.concatenate([value, gate], axis=-1))
    expected = value * F.gelu(torch.tensor(gate)).numpy()
    assert error(ops.gated_gelu(*mx.split(both, 2, axis=-1)), expected) < 1e-6


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_products(dtype):
    """Half precision through float32, packed weights unpacked."""
    x, w, b = (mx.array(a).astype(dtype) for a in (normal(2, 9, 128), normal(64, 128, seed=1), normal(64, seed=2)))
    expected = F.linear(*(torch.tensor(np.array(a.astype(mx.float32)), dtype=torch.float64) for a in (x, w, b))).numpy()
    assert error(ops.linear(x, w, b), expected) < (1e-4 if dtype == mx.float32 else 0.05)
    packed = mx.quantize(w, 64, 8)
    whole = [a if a.dtype == mx.uint32 else a.astype(mx.float32) for a in packed]
    theirs = mx.quantized_matmul(x.astype(mx.float32), *whole, transpose=True, group_size=64, bits=8) + b
    ours = ops.quantized_linear(x, packed, b, group_size=64, bits=8)
    assert error(ours, np.array(theirs.astype(mx.float32))) < 0.05


def everything():
    x, w = mx.array(normal(2, 40, 40, 64)), mx.array(filters(64, 3, 64))
    heads = x.reshape(2, 1600, 4, 16).swapaxes(1, 2)
    ones = mx.ones(64)
    yield ops.conv2d(x, w, padding=1)
    yield ops.conv2d_doubled(x, w, ones)
    yield ops.conv2d(x, w, stride=2, padding=1)
    yield ops.attention(heads, heads, heads)
    yield ops.group_norm(x, ones, ones, 8, 1e-5, then_silu=True)
    yield ops.layer_norm(x, ones, ones, 1e-5)
    yield ops.gelu(x)


@pytest.mark.parametrize("cores", [1, 3, 7])
def test_any_number_of_cores_gives_the_same(cores, monkeypatch):
    expected = list(map(np.array, everything()))
    monkeypatch.setattr(cpu, "cores", lambda: cores)
    cpu._workers.cache_clear()
    try:
        for ours, theirs in zip(everything(), expected, strict=True):
            assert np.abs(np.array(ours) - theirs).max() < 2e-5
    finally:
        cpu._workers.cache_clear()


def test_without_a_blas_to_call(monkeypatch):
    """As on macOS, where NumPy brings the fast one."""
    expected = list(map(np.array, everything()))
    monkeypatch.setattr(cpu, "_sgemm", lambda: None)
    for ours, theirs in zip(everything(), expected, strict=True):
        assert np.abs(np.array(ours) - theirs).max() < 2e-5


def test_an_error_in_a_worker_is_raised(monkeypatch):
    monkeypatch.setattr(cpu, "cores", lambda: 2)

    def job(number):
        if number == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        cpu._in_parallel(job, ((n,) for n in range(8)), 10**9)


def test_what_is_taken_beside_arrays_is_counted():
    """A convolution's transformed filters alone take four times its weights."""
    x, w = mx.array(normal(1, 32, 32, 128)), mx.array(filters(128, 3, 128))
    mx.eval(x, w)
    before = mx.get_active_memory()
    cpu.peak_memory = 0
    out = ops.conv2d(x, w, padding=1)
    assert cpu.peak_memory - before > out.nbytes + 4 * w.nbytes
