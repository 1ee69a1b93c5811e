"""Stable Video Diffusion's U-Net against diffusers, call by call, and the cut that DeepCache makes in it."""

import mlx.core as mx
import numpy as np
import pytest
import torch
import video_oracle
from diffusers import UNetSpatioTemporalConditionModel
from helpers import at, error
from mlx.utils import tree_flatten

from mlx_deepcache.backend import cpu
from mlx_deepcache.checkpoints.folder import Part
from mlx_deepcache.errors import CheckpointError
from mlx_deepcache.nets.layers import GroupNorm, LayerNorm
from mlx_deepcache.nets.spatiotemporal import TemporalConv
from mlx_deepcache.nets.unet_parts import Conditioning, UNetConfig
from mlx_deepcache.unet import UNet2DConditionModel


@pytest.fixture(scope="module")
def unet(video_checkpoint):
    part = Part.of(video_checkpoint / "unet")
    return part.load(UNet2DConditionModel(UNetConfig.from_dict(part.config)), None)


def inputs(size, frames, batch=2, seed=0):
    """x, context and micro-conditioning of a batch, other for each video."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, frames, 8, *size)).astype(np.float32)
    context = rng.standard_normal((batch, 1, 24)).astype(np.float32)
    ids = np.array([[6, 127, 0.02], [11, 40, 0.3]], np.float32)[:batch]
    return x, context, ids


def conditioned(unet, context, ids):
    return unet.prepare(Conditioning(mx.array(context), time_ids=mx.array(ids)))


def channels_last(x):
    return mx.array(np.moveaxis(x, 2, -1))


def channels_first(x):
    return np.moveaxis(np.array(x), -1, 2)


@pytest.mark.parametrize(("size", "frames"), [((16, 16), 5), ((9, 13), 3), ((8, 24), 1)])
def test_a_call_is_that_of_diffusers(video_checkpoint, unet, size, frames):
    x, context, ids = inputs(size, frames)
    cond = conditioned(unet, context, ids)
    for t in (1.6378, -0.1, -1.5537):
        out, _ = unet(channels_last(x), at(unet, cond, t), cond)
        assert error(channels_first(out), video_oracle.unet_call(video_checkpoint, x, t, context, ids)) < 1e-5


def test_frames_see_each_other_and_videos_do_not(unet):
    x, context, ids = inputs((8, 8), 3)
    cond = conditioned(unet, context, ids)
    out, _ = unet(channels_last(x), at(unet, cond, 0.5), cond)
    x[0, 2] += 1
    other, _ = unet(channels_last(x), at(unet, cond, 0.5), cond)
    assert error(other[0, 0], out[0, 0]) > 1e-3
    assert mx.array_equal(other[1], out[1])


@pytest.mark.parametrize("branch", range(12))
def test_a_cached_call_is_that_of_deepcache(video_checkpoint, unet, branch):
    """The full call before it is on other latents at another time, so that stale and fresh layers differ."""
    x, context, ids = inputs((9, 13), 3)
    later = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    expected = video_oracle.unet_cached_call(video_checkpoint, branch, (x, 1.2), (later, 0.3), context, ids)
    cond = conditioned(unet, context, ids)
    _, features = unet(channels_last(x), at(unet, cond, 1.2), cond, branch=branch)
    assert all(part.shape[:2] == (2, 3) for part in features)  # videos, then frames
    cached, _ = unet(channels_last(later), at(unet, cond, 0.3), cond, branch=branch, reused=features)
    assert error(channels_first(cached), expected) < 1e-5
    full, _ = unet(channels_last(later), at(unet, cond, 0.3), cond, branch=branch)
    assert error(channels_first(full), expected) > 1e-3  # or the test could not tell them apart


def test_norms_have_the_epsilons_of_diffusers(video_checkpoint, unet):
    """Each kind of block has its own, which show only where a picture is almost flat."""
    kinds = torch.nn.GroupNorm | torch.nn.LayerNorm
    theirs = video_oracle.shared(str(video_checkpoint)).unet
    expected = {name: module.eps for name, module in theirs.named_modules() if isinstance(module, kinds)}
    assert {n: m.eps for n, m in unet.named_modules() if isinstance(m, GroupNorm | LayerNorm)} == expected


def test_at_full_size_it_has_as_many_parameters_as_diffusers_counts():
    with torch.device("meta"):
        expected = sum(p.numel() for p in UNetSpatioTemporalConditionModel().parameters())
    config = UNetConfig.from_dict({"_class_name": "UNetSpatioTemporalConditionModel", "sample_size": None})
    ours = sum(p.size for _, p in tree_flatten(UNet2DConditionModel(config).parameters()))
    assert ours == expected == 1_524_623_082


def test_blocks_of_pictures_and_of_videos_do_not_mix():
    kinds = ["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlock2D"]
    with pytest.raises(CheckpointError, match="blocks of pictures and of videos in one net"):
        UNetConfig.from_dict({"_class_name": "UNetSpatioTemporalConditionModel", "down_block_types": kinds})


def test_its_three_parts_compile(unet):
    x, context, ids = inputs((9, 13), 3)
    cond, compiled = conditioned(unet, context, ids), unet.compiled()
    plain, features = unet(channels_last(x), at(unet, cond, 1.2), cond, branch=1)
    out, its = compiled(channels_last(x), at(unet, cond, 1.2), cond, branch=1)
    assert error(out, plain) < 1e-5
    cached, _ = compiled(channels_last(x), at(unet, cond, 0.3), cond, branch=1, reused=its)
    assert error(cached, unet(channels_last(x), at(unet, cond, 0.3), cond, branch=1, reused=features)[0]) < 1e-5


@pytest.mark.parametrize("positions", [30, 300])  # more than one block of the CPU's
@pytest.mark.parametrize("large", [0, cpu.LARGE])
def test_a_convolution_over_frames(monkeypatch, positions, large):
    """Both ways that the CPU has, which it takes by how much the filters see."""
    monkeypatch.setattr(cpu, "LARGE", large)
    theirs, ours = torch.nn.Conv3d(6, 10, (3, 1, 1), padding=(1, 0, 0)), TemporalConv(6, 10)
    ours.weight = mx.array(theirs.weight.detach().numpy()[..., 0, 0].swapaxes(1, 2))
    ours.bias = mx.array(theirs.bias.detach().numpy())
    x = torch.randn(2, 6, 5, positions, 1)
    expected = theirs(x)[..., 0].permute(0, 2, 3, 1).detach().numpy()
    assert error(ours(mx.array(x[..., 0].permute(0, 2, 3, 1).numpy())), expected) < 1e-6
