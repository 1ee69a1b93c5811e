"""The U-Net against diffusers, call by call, and the cut that DeepCache makes in it."""

import copy

import mlx.core as mx
import numpy as np
import oracle
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers import UNet2DConditionModel as Reference
from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import CrossFrameAttnProcessor
from helpers import at, conditioning, error, to_mlx, to_torch_layout, unet_inputs
from oracle import unet_cached_call, unet_call
from tiny import KINDS, UNETS

from mlx_deepcache.cache.deepcache import DeepCache
from mlx_deepcache.checkpoints.folder import Part
from mlx_deepcache.errors import UsageError
from mlx_deepcache.nets.attend import Attend, Do
from mlx_deepcache.nets.blocks import ResnetBlock2D
from mlx_deepcache.nets.unet_parts import Conditioning, UNetConfig
from mlx_deepcache.unet import UNet2DConditionModel


def prepared(pipeline, kind, size=(16, 16), seed=0):
    unet = pipeline(kind).component("unet")
    x, context, added = unet_inputs(unet.config, size, seed=seed)
    return unet, unet.prepare(conditioning(context, added)), x, context, added


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (9, 13), (8, 24)])
def test_a_call_is_that_of_diffusers(checkpoint, pipeline, kind, size):
    unet, prompt, x, context, added = prepared(pipeline, kind, size)
    for t in (1, 500, 981):
        out, _ = unet(to_mlx(x), at(unet, prompt, t), prompt)
        assert error(to_torch_layout(out), unet_call(checkpoint(kind), x, t, context, added)) < 1e-5


def branches(kind):
    return range(9 if kind in ("sdxl", "bk-tiny") else 12)


@pytest.mark.parametrize(("kind", "branch"), [(kind, branch) for kind in KINDS for branch in branches(kind)])
def test_a_cached_call_is_that_of_deepcache(checkpoint, pipeline, kind, branch):
    """The full call before it is on other latents at another time, so that stale and fresh layers differ."""
    unet, prompt, x, context, added = prepared(pipeline, kind, (9, 13))
    later = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    expected = unet_cached_call(checkpoint(kind), branch, (x, 901), (later, 501), context, added)
    _, features = unet(to_mlx(x), at(unet, prompt, 901), prompt, branch=branch)
    cached, same = unet(to_mlx(later), at(unet, prompt, 501), prompt, branch=branch, reused=features)
    assert same is features
    assert error(to_torch_layout(cached), expected) < 1e-5
    full, _ = unet(to_mlx(later), at(unet, prompt, 501), prompt, branch=branch)
    assert error(to_torch_layout(full), expected) > 1e-3  # or the test could not tell them apart


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_cached_step_equals_a_full_one_on_the_same_input(pipeline, kind):
    unet, prompt, x, *_ = prepared(pipeline, kind)
    for branch in branches(kind):
        full, features = unet(to_mlx(x), at(unet, prompt, 500), prompt, branch=branch)
        cached, _ = unet(to_mlx(x), at(unet, prompt, 500), prompt, branch=branch, reused=features)
        assert mx.allclose(full, cached, atol=1e-5)


@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_the_deep_part_runs_on_full_steps_only(pipeline, monkeypatch, interval):
    """Counted at the middle block's first resnet."""
    pipe = pipeline("sd15")
    deep, count = pipe.component("unet").mid_block.resnets[0], 0
    plain = ResnetBlock2D.__call__

    def counted(self, *args, **kwargs):
        nonlocal count
        count += self is deep
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(ResnetBlock2D, "__call__", counted)
    pipe("a cat", steps=11, height=64, width=64, scheduler="ddim", cache_interval=interval)
    assert count == sum(DeepCache(interval).full_steps(11)) == -(-11 // interval)


@pytest.mark.parametrize("interval", range(1, 13))
@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_first_step_is_full_whatever_the_interval(interval, n):
    full = DeepCache(interval).full_steps(n)
    assert full[0] and len(full) == n and [i for i, f in enumerate(full) if f] == list(range(0, n, interval))


@pytest.mark.parametrize(("kind", "branch"), [("sd15", 12), ("sd15", -1), ("sdxl", 9), ("bk-tiny", 9)])
def test_no_such_branch(pipeline, kind, branch):
    unet, prompt, x, *_ = prepared(pipeline, kind)
    with pytest.raises(UsageError, match=r"cache branch must be in \[0, (12|9)\)"):
        unet(to_mlx(x), at(unet, prompt, 1), prompt, branch=branch)


def test_a_unet_that_is_told_the_guidance_scale(tmp_path):
    """LCM's full models: an embedding of the scale joins that of the time."""
    torch.manual_seed(0)
    up = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    config = UNETS["sd15"] | {"time_cond_proj_dim": 24}
    config["up_block_types"] = tuple(up[kind] for kind in reversed(config["down_block_types"]))
    reference = Reference(**config).eval().requires_grad_(False)
    torch.nn.init.normal_(reference.time_embedding.cond_proj.weight, std=0.5)
    reference.save_pretrained(tmp_path)
    unet = Part.of(tmp_path).load(UNet2DConditionModel(UNetConfig.from_dict(dict(reference.config))), None)
    x, context, _ = unet_inputs(unet.config)
    outputs = []
    for scale in (1.5, 8.0):
        w = StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.full((2,), scale - 1), 24)
        expected = reference(torch.tensor(x), 500, torch.tensor(context), timestep_cond=w).sample.numpy()
        prompt = unet.prepare(Conditioning(mx.array(context), guidance=mx.full((2,), scale)))
        out, _ = unet(to_mlx(x), at(unet, prompt, 500), prompt)
        assert error(to_torch_layout(out), expected) < 1e-4  # sines of up to 7000 radians in float32
        outputs.append(expected)
    assert error(*outputs) > 1e-4  # or the scale would not have mattered


def test_attention_functions_compose(checkpoint, pipeline):
    """Text2Video-Zero's, by which all frames attend to the first, inside of a cache: against diffusers' processor."""
    reference = copy.deepcopy(oracle.shared(str(checkpoint("sd15"))).unet)
    reference.set_attn_processor(CrossFrameAttnProcessor(batch_size=2))
    unet = pipeline("sd15").component("unet")
    x, context, _ = unet_inputs(unet.config, batch=6)  # two halves of guidance, three frames each
    with torch.no_grad():
        expected = reference(torch.tensor(x), 500, torch.tensor(context)).sample.numpy()
    run = []

    def first_frame(layer, x, keys_values=None):
        run.append(layer)
        if keys_values is None:
            frames = x.reshape(2, 3, *x.shape[1:])
            keys_values = layer.keys_values(mx.broadcast_to(frames[:, :1], frames.shape).reshape(x.shape))
        return layer(x, keys_values)

    cond = unet.prepare(conditioning(context, None))
    temb, attends = at(unet, cond, 500), [Attend((Do.KEEP, Do.KEEP), inner=first_frame) for _ in range(3)]

    def call(attends):
        skips = unet.shallow(to_mlx(x), temb, cond, 1, attend=attends[0])
        features = unet.deep(skips[-1], temb, cond, 1, attend=attends[1])
        return unet.finish(skips, features, temb, cond, 1, attend=attends[2])

    out = call(attends)
    assert error(to_torch_layout(out), expected) < 1e-5
    assert error(unet_call(checkpoint("sd15"), x, 500, context), expected) > 1e-3  # the frames see each other
    layers = len(run)
    again = call([Attend((Do.REUSE, Do.REUSE), attend.kept, first_frame) for attend in attends])
    assert mx.array_equal(out, again)
    assert len(run) == layers == sum(len(kept) for attend in attends for kept in attend.kept) > 0
