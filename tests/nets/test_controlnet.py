"""ControlNet against diffusers: single calls, whole pictures with and without the cache, files and flags."""

import json

import diffusers
import mlx.core as mx
import numpy as np
import oracle
import pytest
import torch
from cache_oracle import Calls, drop, fresh
from helpers import PICTURE, at, conditioning, error, smooth, to_mlx, to_torch_layout, unet_inputs
from safetensors.numpy import load_file, save_file
from tiny import write_controlnet
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mlx_deepcache import Control, DeepCache, GuidanceInterval, StableDiffusion
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.checkpoints.part import load_controlnet
from mlx_deepcache.errors import CheckpointError, UsageError

OTHER = smooth(64, 96, seed=5)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """net(kind, seed): a tiny ControlNet's folder, built once."""
    built = {}

    def folder(kind, seed=0, **config):
        key = (kind, seed, *config)
        if key not in built:
            built[key] = write_controlnet(kind, tmp_path_factory.mktemp("net"), seed, **config)
        return str(built[key])

    return folder


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl", "bk-base"])
def test_one_call(net, pipeline, kind, order):
    """All residuals; and the first ones alone, as a cached step asks for them."""
    folder = net(kind, controlnet_conditioning_channel_order=order)
    ours = load_controlnet(folder, pipeline(kind).checkpoint.unet_config, 8, mx.float32)
    x, context, added = unet_inputs(ours.config, (9, 13), batch=2)
    picture = np.asarray(PICTURE, np.float32).transpose(2, 0, 1)[None] / 255
    expected = oracle.controlnet_call(folder, x, 501, context, picture.repeat(2, 0), added)
    prompt = ours.prepare(conditioning(context, added))
    temb, hint = at(ours, prompt, 501), ours.embed_picture(to_mlx(picture))
    residuals = ours(to_mlx(x), temb, prompt, hint)
    assert len(residuals) == len(expected)
    for a, b in zip(residuals, expected, strict=True):
        assert error(to_torch_layout(a), b) < 1e-4
    first = ours(to_mlx(x), temb, prompt, hint, cut=3)
    assert len(first) == 4
    assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(first, residuals, strict=False))


CASES = [
    # kind, scheduler, interval, branch, every step, scale and window of each net
    ("sd15", None, 1, 0, False, [(1.0, 0.0, 1.0)]),
    ("sd15", "heun", 2, 1, True, [(0.7, 0.0, 1.0)]),
    ("sd15", "euler-a", 2, 4, False, [(0.8, 0.0, 1.0), (0.5, 0.0, 1.0)]),
    ("sd15", "ddim", 1, 0, False, [(1.0, 0.0, 0.6), (0.5, 0.4, 1.0)]),
    ("sd15", None, 3, 11, False, [(0.8, 0.0, 1.0)]),
    ("sdxl", None, 1, 0, False, [(1.0, 0.0, 0.7)]),
    ("sdxl", "dpm++2m", 2, 0, True, [(0.8, 0.0, 1.0), (0.6, 0.0, 1.0)]),
    ("sdxl", "unipc", 3, 2, False, [(0.8, 0.0, 1.0)]),
]


@pytest.mark.parametrize(("kind", "scheduler", "interval", "branch", "every_step", "nets"), CASES)
def test_picture_is_that_of_diffusers(checkpoint, pipeline, net, kind, scheduler, interval, branch, every_step, nets):
    folders, images = [net(kind, seed) for seed in range(len(nets))], [PICTURE, OTHER][: len(nets)]
    options = {"steps": 5, "guidance_scale": 3.0, "scheduler": scheduler, "height": 64, "width": 96}
    expected = oracle.controlled(
        checkpoint(kind),
        "a small red cat",
        folders,
        images,
        [scale for scale, *_ in nets],
        [window for _, *window in nets],
        every_step,
        interval=interval,
        branch=branch,
        seed=[3],
        **options,
    )
    controls = [Control(f, i, *rest) for f, i, rest in zip(folders, images, nets, strict=True)]
    result = pipeline(kind)(
        "a small red cat",
        controls=controls,
        control_every_step=every_step,
        seeds=[3],
        cache_interval=interval,
        cache_branch=branch,
        **options,
    )
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4
    without = pipeline(kind)("a small red cat", seeds=[3], cache_interval=interval, cache_branch=branch, **options)
    assert error(without.latents, result.latents) > 0.05  # the ControlNets have a say


def test_it_runs_on_full_steps_only(pipeline, net, monkeypatch):
    from mlx_deepcache.nets.controlnet import ControlNetModel

    calls, run = [], ControlNetModel.__call__

    def counted(self, *args, cut=None, **more):
        calls.append(cut)
        return run(self, *args, cut=cut, **more)

    options = {"controls": [Control(net("sd15"), PICTURE)], "steps": 5, "cache_interval": 2, "scheduler": "ddim"}
    pipe = pipeline("sd15")
    pipe.estimate(pipe.settings("a cat", height=64, width=64, **options))  # which calls it too, once
    monkeypatch.setattr(ControlNetModel, "__call__", counted)
    pipeline("sd15")("a cat", height=64, width=64, **options)
    assert calls == [None, None, None]
    calls.clear()
    pipeline("sd15")("a cat", height=64, width=64, control_every_step=True, cache_branch=3, **options)
    assert calls == [None, 3, None, 3, None]


def test_stats_count_its_multiply_adds(pipeline, net):
    """PyTorch counts its own; a multiply-add is two of its operations. Two full steps, and up to skip 3 in two more."""
    folder = net("sd15")
    theirs = diffusers.ControlNetModel.from_pretrained(folder)
    x, context, _ = unet_inputs(theirs.config, (8, 8), batch=1)
    picture = torch.zeros(1, 3, 64, 64)
    with FlopCounterMode(display=False, depth=10) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        theirs(torch.tensor(x), 500, torch.tensor(context), picture)
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    full = flops["Global"] - flops["ControlNetModel.controlnet_cond_embedding"]
    once = {"controls": [Control(folder, PICTURE)], "steps": 4, "cache_interval": 2, "cache_branch": 3}
    once |= {"height": 64, "width": 64, "scheduler": "ddim", "guidance_scale": 3.0}
    alone, twice = (
        pipeline("sd15")("a cat", control_every_step=every, **once).stats["controlnet_macs"] for every in (False, True)
    )
    assert abs(alone / (2 * 2 * full / 2) - 1) < 1e-3  # two steps, both halves of guidance
    assert alone < twice < 2 * alone


def test_compiled_it_is_the_same(pipeline, net):
    """Both kinds of step are compiled with the residuals that they read, and a run without any comes in between."""
    compiled = StableDiffusion(pipeline("sd15").checkpoint, "float32", compile="on")
    options = {"steps": 3, "cache_interval": 2, "scheduler": "ddim", "height": 64, "width": 64}
    for controls in ([Control(net("sd15"), PICTURE)], [], [Control(net("sd15"), PICTURE, 0.5)]):
        expected = pipeline("sd15")("a cat", controls=controls, **options)
        assert error(compiled("a cat", controls=controls, **options).latents, expected.latents) < 1e-4


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("interval", [1, 4])
def test_it_follows_a_batch_that_halves(checkpoint, pipeline, net, kind, interval):
    """In diffusers both halves always run, and after half of the steps the unconditional one is not looked at. With
    interval 4 the step after that is a cached one, with residuals of both; those that branch 2 reads know prompts."""
    options = {"steps": 6, "guidance_scale": 4.0, "negative_prompt": "a red house", "scheduler": "ddim"}
    options |= {"height": 64, "width": 64}
    base = fresh(checkpoint(kind), "ddim")
    Calls(base, lambda call, t, out: out if call < 3 else drop(out))
    net = net(kind)
    given = [checkpoint(kind), "a cat", [net], [PICTURE], [1.0], [(0, 1)], False, base]
    expected = oracle.controlled(*given, interval=interval, branch=2, seed=[1], **options)
    cache, controls = [DeepCache(interval, 2), GuidanceInterval(0, 0.5)], [Control(net, PICTURE)]
    result = pipeline(kind)("a cat", cache=cache, controls=controls, seeds=[1], **options)
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4
    assert result.stats["unet_macs"] <= 0.75 * result.stats["unet_macs_uncached"]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_low_memory_changes_nothing(checkpoint, net, kind):
    """Guidance's halves run one after the other there."""
    options = {"steps": 4, "guidance_scale": 4.0, "negative_prompt": "a red house", "height": 64, "width": 64}
    net = net(kind)
    given = [checkpoint(kind), "a cat", [net], [PICTURE], [1.0], [(0, 1)], False]
    expected = oracle.controlled(*given, interval=2, num_images=2, seed=[1, 2], **options)
    frugal = StableDiffusion.from_pretrained(str(checkpoint(kind)), "float32", low_memory=True)
    result = frugal("a cat", controls=[Control(net, PICTURE)], cache_interval=2, seeds=[1, 2], **options)
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4


def test_proportions_are_those_of_the_picture(pipeline, net):
    """At the model's number of pixels."""
    pipe = pipeline("sd15")
    settings = pipe.settings("a cat", controls=[Control(net("sd15"), PICTURE)])
    height, width = pipe.checkpoint.native_size
    assert settings.width / settings.height == pytest.approx(104 / 72, rel=0.1)
    assert settings.width * settings.height == pytest.approx(height * width, rel=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": float("nan")}, "scale should be a number, got nan"),
        ({"start": 0.5, "end": 0.5}, "start before it ends"),
        ({"start": -0.1}, "start should be a share of the steps, from 0 to 1, got -0.1"),
        ({"end": 1.1}, "end should be a share of the steps, from 0 to 1, got 1.1"),
    ],
)
def test_settings_that_cannot_be(pipeline, net, values, message):
    with pytest.raises(UsageError, match=message):
        pipeline("sd15").settings("a cat", controls=[Control(net("sd15"), PICTURE, **values)])


def test_bad_files(pipeline, net, checkpoint, tmp_path):
    model = pipeline("sd15").checkpoint.unet_config
    for folder, message in (
        (net("sdxl"), "for another kind of model: its block_out_channels"),
        (net("sd21"), r"its cross_attention_dim is 48, the model's 32"),
        (str(checkpoint("sd15")), "a whole model; expected a ControlNet"),
        (str(tmp_path), "config.json is missing"),
        (f"{net('sd15')}/config.json", "is a file; expected a ControlNet, a folder"),
        ("no such net", "no model 'no such net': expected a folder or a hub id like owner/name$"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_controlnet(folder, model, 8, mx.float32)
    with pytest.raises(CheckpointError, match="no model 'no such net'"):  # before anything is loaded
        pipeline("sd15").settings("a cat", controls=[Control("no such net", PICTURE)])
    for change, message in (
        ({"_class_name": "ControlNetUnionModel"}, "a ControlNetUnionModel, which is not supported"),
        (
            {"conditioning_embedding_out_channels": [8, 8, 12]},
            "makes 4 pixels of its picture into one",
        ),
        ({"global_pool_conditions": True}, "global_pool_conditions"),
        ({"controlnet_conditioning_channel_order": "gbr"}, "'rgb' or 'bgr', got 'gbr'"),
    ):
        folder = write_controlnet("sd15", tmp_path / message[:9].strip())
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(CheckpointError, match=message):
            load_controlnet(str(folder), model, 8, mx.float32)
    folder = write_controlnet("sd15", tmp_path / "short")
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["controlnet_mid_block.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="lacks controlnet_mid_block.weight"):
        load_controlnet(str(folder), model, 8, mx.float32)


def test_flags(checkpoint, pipeline, net, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    PICTURE.save("edges.png")
    folder = net("sd15")
    flags = ["--model", str(checkpoint("sd15")), "--prompt", "a cat", "--steps", "3", "--dtype", "float32"]
    flags += ["--scheduler", "ddim", "--save-latents", "out.safetensors"]
    control = ["--controlnet", folder, "--control-image", "edges.png"]
    assert main_generate([*flags, *control, *control, "--control-scale", "0.6"]) == 0
    twice = load_file("out.safetensors")["latents"]
    result = pipeline("sd15")("a cat", controls=[Control(folder, PICTURE, 1.2)], steps=3, scheduler="ddim")
    assert error(to_torch_layout(result.latents), twice) < 1e-4
    capfd.readouterr()
    for wrong, words in (
        (["--controlnet", folder], "each --controlnet needs a --control-image, got 1 and 0"),
        ([*control, "--control-end", "0.5", "--control-end", "0.6"], "--control-end should be given once"),
        (["--control-scale", "0.5"], "--control-scale has no meaning without a --controlnet"),
        (["--control-image", "edges.png"], "--control-image has no meaning without a --controlnet"),
        (["--control-end", "0.5"], "--control-end has no meaning without a --controlnet"),
    ):
        assert main_generate([*flags, *wrong]) == 2
        assert words in capfd.readouterr().err
