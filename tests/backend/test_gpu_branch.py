"""What a GPU is asked to do, done by the CPU: it has all of MLX's operations, if not their kernels."""

import shutil
from collections import Counter
from dataclasses import replace
from functools import reduce

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import error, primitives, to_torch_layout

from mlx_deepcache import StableDiffusion
from mlx_deepcache.backend import ops
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.checkpoints.part import OtherVAE
from mlx_deepcache.generation.components import Components
from mlx_deepcache.nets.autoencoder import AutoencoderKL
from mlx_deepcache.nets.blocks import ResnetBlock2D, Upsample2D

pytestmark = pytest.mark.usefixtures("gpu_branch")
runs_gpp = pytest.mark.skipif(
    not ops.on_gpu() and shutil.which("g++") is None, reason="on the CPU, mx.compile runs g++"
)
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


@pytest.fixture(scope="module")
def vae():
    return Checkpoint.open(None).load("vae", mx.float32)


def cost(graph: Counter) -> int:
    """Operations that compute or move something."""
    views = "Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Squeeze", "Transpose", "Unflatten"
    return sum(graph.values()) - sum(graph[name] for name in views)


def test_a_stage_of_the_vae_is_done_before_the_next_begins(vae, monkeypatch, tmp_path):
    """Else a GPU would be asked for operations on the largest maps while it still holds the last ones."""
    waiting, stages = [], vae.decoder.stages()

    def watch(x):
        waiting.append(primitives(tmp_path, x))
        return x

    monkeypatch.setattr(vae.decoder, "stages", lambda: [[watch, *layers] for layers in stages])
    picture = vae.decode(normal(1, 4, 4, 4))
    assert len(waiting) == 2 + len(vae.decoder.up_blocks) == 5
    assert not any(waiting[1:]) and not primitives(tmp_path, picture)


def test_folds_are_no_part_of_the_compiled_vae(vae, tmp_path):
    """Stage by stage, it has fewer operations, and nothing that is made of weights alone."""
    x, compiled = normal(1, 4, 4, 64), vae.compiled()
    for layers, (stage,) in zip(vae.decoder.stages()[1:], compiled.decoder.stages()[1:], strict=True):
        mx.eval(x)
        plain = reduce(lambda x, layer: layer(x), layers, x)
        before, after = primitives(tmp_path, plain), primitives(tmp_path, stage(x))
        assert cost(after) < 0.7 * cost(before)
        assert after["Split"] == after["Concatenate"] == 0
        assert after["Convolution"] == before["Convolution"] > 0
        x = plain


def test_what_is_compiled(gpu_branch):
    for compile, expected in (("auto", True), ("on", True), ("off", False)):
        components = Components(Checkpoint.open(None), mx.float32, compile=compile, keep=False)
        for name in ("unet", "vae"):
            assert (components.to_run(name) is not components.network(name)) == expected
            assert components.to_run(name) is components.to_run(name)
        components.release("unet", "vae")
        assert not components.held


def test_latents_keep_their_type(vae):
    """The statistics that a config may hold are float32, and would carry the whole decoder there."""
    config = replace(vae.config, latents_mean=(0.1, 0.2, 0.3, 0.4), latents_std=(1.0, 2.0, 1.0, 2.0))
    other, latents = AutoencoderKL(config), normal(1, 4, 4, 4)
    other.update(vae.parameters())
    shifted = latents * mx.array(config.latents_std) + vae.config.scaling_factor * mx.array(config.latents_mean)
    assert error(other.decode(latents), vae.decode(shifted)) < 1e-5
    other.set_dtype(mx.float16)
    assert other.decode(latents.astype(mx.float16)).dtype == mx.float16


@runs_gpp
@pytest.mark.parametrize("tiny", [False, True], ids=["kl", "tiny"])
def test_a_compiled_vae_decodes_the_same(vae, taesd, tiny):
    net = OtherVAE.open(str(taesd), None).load(mx.float32) if tiny else vae
    compiled = net.compiled()
    for shape in ((1, 8, 12, 4), (2, 5, 4, 4)):
        latents = normal(*shape)
        assert error(compiled.decode(latents), net.decode(latents)) < 1e-5


@runs_gpp
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-2)])
def test_a_whole_run_is_the_cpus(monkeypatch, dtype, tolerance):
    """The bundled model, compiled, full and cached steps, against the CPU's own kernels in float32. On Metal itself
    float16 is coarser: Winograd's F(6x6, 3x3) keeps its transforms in half precision, which is 0.8% of an output on
    random numbers (simulated), so a parity test in float16 should allow a percent at each convolution there."""
    options = {"steps": 7, "cache_interval": 3, "cache_branch": 2, "seeds": [3], "height": 64, "width": 64}
    with monkeypatch.context() as patch:
        patch.setattr(ops, "on_gpu", lambda: False)
        expected = StableDiffusion.from_pretrained(None, "float32")("a red apple", **options)
    pipe = StableDiffusion.from_pretrained(None, dtype)
    ours = pipe("a red apple", **options)
    assert pipe.models[0].compile
    assert ours.stats["steps"] == expected.stats["steps"]
    assert error(ours.latents, expected.latents) < tolerance
    assert np.abs(np.asarray(ours.images[0], float) - np.asarray(expected.images[0], float)).mean() < 255 * tolerance
