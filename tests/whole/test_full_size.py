"""The real architectures at full width and depth, with random weights, against diffusers; small latents."""

import gc

import mlx.core as mx
import pytest
import torch
from helpers import at, conditioning, error, to_mlx, to_torch_layout, unet_inputs
from mlx.utils import tree_flatten

from benchmarks.speed import models
from benchmarks.speed.models import UNETS, mlx_unet, torch_unet
from mlx_deepcache.cache.macs import unet_macs
from mlx_deepcache.nets.unet_parts import UNetConfig
from mlx_deepcache.unet import UNet2DConditionModel


@pytest.fixture
def drawn(monkeypatch):
    """Each weight that PyTorch's net was given and ours was not yet: drawing them takes longer than both calls."""
    draw, kept = models.tensor, {}

    def tensor(name, shape):
        if name in kept:
            return kept.pop(name).reshape(shape)
        kept[name] = draw(name, shape)
        return kept[name]

    monkeypatch.setattr(models, "tensor", tensor)
    return kept


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_call_is_that_of_diffusers(drawn, name):
    """One net after the other: SDXL's takes 10 GB."""
    x, context, added = unet_inputs(UNetConfig.from_dict(UNETS[name]), (16, 16), batch=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    unet = torch_unet(UNETS[name])
    kwargs = {"added_cond_kwargs": added and {k: torch.tensor(v) for k, v in added.items()}}
    expected = unet(torch.tensor(x), 500, torch.tensor(context), **kwargs).sample.numpy()
    torch.set_num_threads(threads)
    del unet
    gc.collect()

    unet = mlx_unet(UNETS[name])
    assert not drawn
    prompt = unet.prepare(conditioning(context, added))
    out, _ = unet(to_mlx(x), at(unet, prompt, 500), prompt)
    assert error(to_torch_layout(out), expected) < 1e-4
    del unet
    gc.collect()
    mx.clear_cache()


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("sd15", 859_520_964, 686), ("sd21", 865_910_724, 686), ("sdxl", 2_567_463_684, 1_680)],
)
def test_published_parameter_counts(name, parameters, tensors):
    flat = tree_flatten(UNet2DConditionModel(UNetConfig.from_dict(UNETS[name])).parameters())
    assert (sum(p.size for _, p in flat), len(flat)) == (parameters, tensors)


@pytest.mark.parametrize(
    ("name", "size", "full", "cached"),
    [  # giga multiply-adds for branches 0, 1 and 3, counted on diffusers' nets
        ("sd15", 64, 401.6, {0: 31.6, 1: 90.1, 3: 188.7}),
        ("sd21", 96, 1074.6, {0: 101.3, 1: 293.2, 3: 579.2}),
        ("sdxl", 128, 3380.6, {0: 49.0, 1: 127.9, 3: 435.9}),
    ],
)
def test_multiply_adds(name, size, full, cached):
    unet = UNet2DConditionModel(UNetConfig.from_dict(UNETS[name]))
    for branch, expected in cached.items():
        ours = unet_macs(unet, (size, size), branch, 77)
        assert ours[0] / 1e9 == pytest.approx(full, rel=2e-3)
        assert ours[1] / 1e9 == pytest.approx(expected, rel=5e-3)
