"""What a GPU is asked to do, done by the CPU: it has all of MLX's operations, if not their kernels."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import error, primitives, to_torch_layout

from mlx_deepcache.backend import ops
from mlx_deepcache.nets.blocks import ResnetBlock2D, Upsample2D

pytestmark = pytest.mark.usefixtures("gpu_branch")
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def normal(*shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).astype(dtype)


@pytest.mark.parametrize("then_silu", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_group_norm_has_the_bits_of_its_definition(tmp_path, dtype, then_silu):
    """Weight, bias and SiLU are applied before the channels are put back in their order, so that this takes no copy."""
    x, weight, bias = normal(2, 5, 7, 24, dtype=dtype), normal(24, dtype=dtype, seed=1), normal(24, dtype=dtype, seed=2)
    mx.eval(x, weight, bias)
    grouped = x.reshape(2, 35, 4, 6).swapaxes(1, 2).reshape(2, 4, -1)
    normed = mx.fast.layer_norm(grouped, None, None, 1e-5).reshape(2, 4, 35, 6).swapaxes(1, 2).reshape(2, 5, 7, 24)
    defined = normed * weight + bias
    ours = ops.group_norm(x, weight, bias, 6, 1e-5, then_silu=then_silu)
    assert mx.array_equal(ours, defined * mx.sigmoid(defined) if then_silu else defined)
    plain = torch.nn.functional.group_norm(torch.tensor(to_torch_layout(x.astype(mx.float32))), 4, eps=1e-5)
    unit = ops.group_norm(x, mx.ones(24, dtype), mx.zeros(24, dtype), 6, 1e-5).astype(mx.float32)
    assert error(to_torch_layout(unit), plain) < {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7, 6), (1, 1, 1, 6), (2, 8, 3, 6)])
def test_interleaving_has_the_bits_of_stacking(tmp_path, shape, dtype, compiled):
    up, (B, H, W, C) = Upsample2D(6), shape
    up.set_dtype(dtype)
    up.conv.bias = normal(6, dtype=dtype)
    x = normal(*shape, dtype=dtype)
    y = ops.conv2d(x, up.fold(), padding=1).reshape(B, H + 1, W + 1, 2, 2, C)
    rows = [mx.stack([y[:, a : a + H, b : b + W, a, b] for b in (0, 1)], axis=3) for a in (0, 1)]
    stacked = mx.stack(rows, axis=2).reshape(B, 2 * H, 2 * W, C) + up.conv.bias
    mx.eval(x, up.parameters(), up.fold())
    ours = (mx.compile(lambda x: up(x)) if compiled else up)(x)
    steps = primitives(tmp_path, ours)
    assert sum(steps.values()) - steps["Broadcast"] <= 5  # it convolves, looks at that in its order, adds and is done
    assert mx.array_equal(ours, stacked)


def test_a_cut_leaves_channels_in_blocks_of_32():
    """SD 1.5's at branch 2: groups of 30 in 640 + 320 channels; Metal's Winograd takes multiples of 32."""
    resnet = ResnetBlock2D(960, 320, 16, 32, 1e-5)
    ours, others = resnet.split(640)
    assert (ours.shape[-1], others.shape[-1]) == (608, 352)
    assert mx.array_equal(mx.concatenate([ours, others], axis=-1), resnet.conv1.weight)
    assert resnet.split(640)[0] is ours  # made once
    f, s, temb = normal(1, 3, 4, 640), normal(1, 3, 4, 320, seed=1), normal(1, 16, seed=2)
    features = resnet.fixed_part(f)
    assert features.straddling.shape == (1, 3, 4, 32)
    assert error(resnet.join(features, s, temb), resnet(mx.concatenate([f, s], axis=-1), temb)) < 2e-6
    resnet.conv1.weight = resnet.conv1.weight * 2  # as from a LoRA
    assert mx.array_equal(resnet.split(640)[1], 2 * others)
