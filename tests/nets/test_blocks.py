"""What is computed otherwise than it is defined, against PyTorch's plain form."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import error, to_mlx, to_torch_layout
from mlx.nn import LayerNorm
from oracle import shared
from torch.nn import functional as F

from mlx_deepcache.backend import ops
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.nets.blocks import ResnetBlock2D, Upsample2D
from mlx_deepcache.nets.layers import GroupNorm


def lively(module, seed=0):
    """The same module with random parameters of about the size that trained ones have."""
    from mlx.utils import tree_map_with_path

    rng = np.random.default_rng(seed)

    def draw(name, p):
        values = rng.standard_normal(p.shape, dtype=np.float32) * (0.3 if p.ndim == 1 else p[0].size ** -0.5)
        return mx.array(values + ("norm" in name and name.endswith("weight")))

    module.update(tree_map_with_path(draw, module.parameters()))
    return module


def normal(*shape, seed=1, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("scale", [0.1, 1, 5, 40])
def test_activations(scale):
    x = normal(3, 1000, scale=scale)
    for ours, theirs in ((ops.silu, F.silu), (ops.gelu, F.gelu)):
        expected = theirs(torch.tensor(x, dtype=torch.float64)).numpy()
        assert np.abs(np.array(ours(mx.array(x))) - expected).max() < 1e-6 * max(scale, 1)


@pytest.mark.parametrize("scale", [0.1, 1, 6])  # the last makes some weights almost 1 and others vanish
@pytest.mark.parametrize(("positions", "tokens", "size"), [(64, 64, 40), (9, 77, 160), (30, 30, 8)])
def test_attention(positions, tokens, size, scale):
    q, k, v = (
        normal(2, 3, n, size, seed=i, scale=s)
        for i, (n, s) in enumerate([(positions, scale), (tokens, scale), (tokens, 1)])
    )
    expected = F.scaled_dot_product_attention(*(torch.tensor(a, dtype=torch.float64) for a in (q, k, v)))
    assert error(ops.attention(mx.array(q), mx.array(k), mx.array(v)), expected) < 3e-6


@pytest.mark.parametrize(("problems", "frames"), [(300, 14), (300, 25), (2, 25), (300, 40)])
def test_attention_over_frames(problems, frames):
    """Many short problems, which another kernel does, and what lies beside them."""
    q, k, v = (normal(problems, 2, frames, 8, seed=i) for i in range(3))
    expected = F.scaled_dot_product_attention(*(torch.tensor(a, dtype=torch.float64) for a in (q, k, v)))
    assert error(ops.attention(mx.array(q), mx.array(k), mx.array(v)), expected) < 3e-6


HEADS = (8, 40, 64, 72, 80, 96, 128, 160)
METAL = (64, 64, 64, 72, 80, 96, 128, 160)
M5 = (64, 64, 64, 96, 96, 96, 128, 160)  # half precision


@pytest.mark.parametrize(
    ("architecture", "darwin", "cuda", "dtype", "padded"),
    [
        ("applegpu_g14s", "25.2.0", False, mx.float16, METAL),
        ("applegpu_g17s", "25.1.0", False, mx.float16, METAL),
        ("applegpu_g17s", "25.2.0", False, mx.float16, M5),
        ("applegpu_g17s", "25.2.0", False, mx.float32, METAL),
        ("applegpu_g17p", "26.0.0", False, mx.bfloat16, METAL),  # an iPhone's, which got them a generation later
        ("applegpu_g18p", "26.0.0", False, mx.bfloat16, M5),
        ("sm_90", "", True, mx.float16, HEADS),
        ("x86_64", "", False, mx.float16, METAL),  # the CPU, where a test takes it for a GPU
    ],
)
def test_attention_pads_heads_where_the_fused_kernels_want_it(
    gpu_branch, monkeypatch, architecture, darwin, cuda, dtype, padded
):
    """As on a GPU, whose public operations the CPU has too; sizes as in has_fused_kernel of MLX 0.32.2."""
    monkeypatch.setattr(mx, "device_info", lambda device: {"architecture": architecture})
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)
    # Pythons that were built before macOS 26 are told that it is macOS 16 (python/cpython#135675)
    monkeypatch.setattr("platform.mac_ver", lambda: ("16.0", ("", "", ""), ""))
    monkeypatch.setattr("platform.release", lambda: darwin)
    for size, expected_size in zip(HEADS, padded, strict=True):
        q, k, v = (mx.array(normal(1, 2, 20, size, seed=i)).astype(dtype) for i in range(3))
        k_, v_ = ops.pad_heads(k), ops.pad_heads(v)
        assert k_.shape[-1] == v_.shape[-1] == expected_size
        expected = F.scaled_dot_product_attention(*(torch.tensor(np.array(a.astype(mx.float32))) for a in (q, k, v)))
        ours = ops.attention(q, k_, v_)
        assert ours.shape == q.shape
        assert error(ours.astype(mx.float32), expected) < {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("size", [None, (10, 14), (9, 14), (10, 13), (12, 17)])
def test_upsampling(size):
    """Exact doubling is folded into one convolution; other sizes, from odd skips, are not."""
    up, x = lively(Upsample2D(6)), normal(2, 6, 5, 7)
    weight = torch.tensor(to_torch_layout(up.conv.weight))
    doubled = F.interpolate(torch.tensor(x), size=size or (10, 14), mode="nearest")
    expected = F.conv2d(doubled, weight, torch.tensor(np.array(up.conv.bias)), padding=1)
    assert error(to_torch_layout(up(to_mlx(x), size)), expected) < 3e-6
    up.conv.weight = up.conv.weight * 2  # new weights, as from a LoRA, are not answered from the old fold
    up.conv.bias = up.conv.bias * 2
    assert error(to_torch_layout(up(to_mlx(x), size)), 2 * expected) < 3e-6


@pytest.mark.parametrize(
    ("features", "skip", "out", "groups"),
    [(32, 32, 32, 8), (64, 32, 32, 32), (40, 24, 16, 4), (20, 12, 32, 4), (30, 66, 32, 8), (80, 40, 48, 8)],
)
def test_the_fixed_part_of_a_resnet(features, skip, out, groups):
    """[features, skip] at once, or the features' share first; with borders inside groups and without a shortcut."""
    block = lively(ResnetBlock2D(features + skip, out, 16, groups, 1e-5))
    f, s, temb = normal(2, 6, 5, features), normal(2, 6, 5, skip, seed=2), mx.array(normal(1, 16))
    whole = block(mx.array(np.concatenate([f, s], axis=-1)), temb)
    assert error(block.join(block.fixed_part(mx.array(f)), mx.array(s), temb), whole) < 3e-6


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_norms_have_the_epsilons_of_diffusers(checkpoint, kind, part):
    """They differ by kind of norm, and show only where a picture is almost flat."""
    net = getattr(shared(str(checkpoint(kind))), part)
    kinds = torch.nn.GroupNorm | torch.nn.LayerNorm
    expected = {name: module.eps for name, module in net.named_modules() if isinstance(module, kinds)}
    ours = Checkpoint.open(str(checkpoint(kind))).module(part).named_modules()
    assert {name: module.eps for name, module in ours if isinstance(module, GroupNorm | LayerNorm)} == expected
    assert part == "vae" or set(expected.values()) == {1e-5, 1e-6}
