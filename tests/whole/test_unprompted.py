"""Whole pictures of models that read no prompt, against diffusers with the pip package DeepCache."""

import functools
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch
import unprompted_oracle as oracle
from helpers import error, to_torch_layout

from mlx_deepcache import DeepCache, StableDiffusion
from mlx_deepcache.backend import ops
from mlx_deepcache.checkpoints.checkpoint import BUNDLED
from mlx_deepcache.diffusion.levels import Prediction, split

INTERVALS = {1: 4, 2: 5, 3: 5, 5: 6}  # and steps: two full ones or more, and cached ones between them
SEEDS = [3, 4]


def compare(result, steps, expected, tolerance=1e-4, words=0.0):
    """words: the share of pixels that may differ, as of two nearly equally near codewords either may be taken."""
    x, pictures, full = expected
    assert error(to_torch_layout(result.latents), x) < tolerance
    assert [step.full for step in steps for _ in range(step.calls)] == full
    off = np.abs(np.stack([np.asarray(image) for image in result.images]).astype(int) - pictures).max(axis=-1)
    assert (off > 1).mean() <= words


def drawn(pipe, **options):
    steps = []
    return pipe(seeds=SEEDS, on_step=steps.append, **options), steps


def ddpm_cases():
    """Every interval at six branches; schedulers, clipping and noise take turns."""
    turns = [
        ("ddpm", None, {}, {}),
        ("ddpm", "ddpm", {"clip": "off"}, {"clip_sample": False}),
        ("ddpm", "ddim", {"eta": 0.5}, {}),
        ("ddpm", "ddim", {"clip": "off"}, {"clip_sample": False}),
        ("ddpm-6", None, {"clip": "on", "eta": 1.0}, {"clip_sample": True}),
        ("ddpm-6", "ddpm", {}, {}),
        ("ddpm", "dpm++2m", {}, {}),
    ]
    count = 0
    for interval in INTERVALS:
        for branch in (0, 1, 3, 5, 8, 11):
            yield interval, branch, *turns[count % len(turns)]
            count += 1


@pytest.mark.parametrize(("interval", "branch", "kind", "scheduler", "ours", "config"), list(ddpm_cases()))
def test_ddpm_is_that_of_diffusers_and_deepcache(unprompted, interval, branch, kind, scheduler, ours, config):
    folder, pipe = unprompted(kind)
    ddim = kind == "ddpm-6" and scheduler is None  # DDPMPipeline runs any scheduler that it is given
    more = {"eta": ours.get("eta", 0.0)} if scheduler == "ddim" or ddim else {}
    name = "DDIMPipeline" if more else "DDPMPipeline"
    count = INTERVALS[interval]
    expected = oracle.generate(folder, name, SEEDS, count, interval, branch, scheduler, config=config, **more)
    result, steps = drawn(pipe, steps=count, cache_interval=interval, cache_branch=branch, scheduler=scheduler, **ours)
    compare(result, steps, expected)
    assert result.images[0].size == (32, 32) if kind == "ddpm" else (64, 64)
    assert error(result.latents[0], result.latents[1]) > 0.05


def test_the_bundled_ddpm():
    """Its weights are stored in float16; both compute in float32."""
    folder = BUNDLED.with_name("emoji-ddpm")
    expected = oracle.generate(folder, "DDPMPipeline", SEEDS, 10, 3, 1, "ddim")
    pipe = StableDiffusion.from_pretrained("emoji-ddpm", "float32")
    result, steps = drawn(pipe, steps=10, cache_interval=3, cache_branch=1, scheduler="ddim")
    compare(result, steps, expected)


def test_the_pipeline_that_a_repository_names_says_how_it_is_sampled(unprompted, tmp_path):
    """DDIMPipeline takes a DDPMScheduler's config for DDIM, in 50 steps; DDPMPipeline takes 1000."""
    folder = shutil.copytree(unprompted("ddpm")[0], tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "DDIMPipeline"}))
    pipe = StableDiffusion.from_pretrained(str(folder), "float32")
    settings = pipe.settings()
    assert (settings.steps, settings.scheduler) == (50, "ddim")
    expected = oracle.generate(folder, "DDIMPipeline", SEEDS, 6)
    compare(*drawn(pipe, steps=6, cache_interval=1), expected)
    settings = unprompted("ddpm")[1].settings()
    assert (settings.steps, settings.scheduler) == (1000, "ddpm")


def test_twenty_steps_of_small_variances(unprompted, tmp_path):
    """Of the larger nets' repositories."""
    folder, pipe = unprompted("ddpm-6")
    config = {"variance_type": "fixed_small", "clip_sample": True}
    expected = oracle.generate(folder, "DDPMPipeline", SEEDS, 20, 3, 2, "ddpm", config=config)
    compare(*drawn(pipe, steps=20, cache_interval=3, cache_branch=2, scheduler="ddpm", clip="on"), expected)


@pytest.mark.parametrize(
    ("timesteps", "steps", "eta", "clip", "cache"),
    [
        ("quad", 12, 0.0, "off", DeepCache(1)),
        ("quad", 40, 0.0, "off", DeepCache(5, 3)),  # some of the last timesteps are the same
        ("quad", 40, 0.7, "auto", DeepCache(3, 1)),
        ("uniform", 10, 1.0, "off", DeepCache(2, 4)),
        ("uniform", 15, 0.0, "auto", DeepCache(2)),  # 16 of them
        ("quad", 40, 0.0, "off", DeepCache(5, 3, center=10, power=1.2)),
        ("quad", 40, 0.0, "off", DeepCache(3, 1, power=1.5)),
    ],
)
def test_timesteps_of_ddims_own_code(unprompted, timesteps, steps, eta, clip, cache):
    """With the paper's non-uniform schedules too; ddim is taken without being asked for."""
    folder, pipe = unprompted("ddpm")
    taken = len(pipe.settings(steps=steps, timesteps=timesteps).legs[0].plan.steps)
    assert taken == (16 if steps == 15 else steps)
    full = {i for i, full in enumerate(cache.full_steps(taken)) if full}
    bound = 1.0 if clip == "auto" else None
    expected = oracle.as_ddims_code(folder, SEEDS, steps, timesteps, eta, branch=cache.branch, full=full, clip=bound)
    options = {"steps": steps, "timesteps": timesteps, "eta": eta, "clip": clip}
    compare(*drawn(pipe, cache=[cache], **options), expected)


@pytest.mark.parametrize("scheduler", ["pndm", "unipc", "dpm++2m-karras"])
def test_ldm_with_other_schedulers(unprompted, scheduler):
    """Not euler or heun, for which LDMPipeline scales the noise before it sets the timesteps."""
    folder, pipe = unprompted("ldm")
    expected = oracle.generate(folder, "LDMPipeline", SEEDS, 8, 2, 1, scheduler)
    options = {"steps": 8, "cache_interval": 2, "cache_branch": 1, "scheduler": scheduler}
    compare(*drawn(pipe, **options), expected, words=0.01)


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("branch", [0, 1, 4, 8, 11])
def test_ldm_is_that_of_diffusers_and_deepcache(unprompted, interval, branch):
    folder, pipe = unprompted("ldm")
    steps = INTERVALS[interval]
    expected = oracle.generate(folder, "LDMPipeline", SEEDS, steps, interval, branch)
    compare(*drawn(pipe, steps=steps, cache_interval=interval, cache_branch=branch), expected, words=0.01)


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("branch", [0, 1, 2, 6, 11])
def test_classes_are_those_of_diffusers_parts_and_deepcache(unprompted, interval, branch):
    folder, pipe = unprompted("class")
    scale = (3.0, 1.5, 1.0)[(interval + branch) % 3]
    steps = INTERVALS[interval]
    expected = oracle.of_class(folder, 207, SEEDS, steps, scale, interval, branch)
    options = {"steps": steps, "guidance_scale": scale, "cache_interval": interval, "cache_branch": branch}
    compare(*drawn(pipe, class_label="Golden Retriever", **options), expected, words=0.01)


def test_classes_on_the_papers_non_uniform_schedule(unprompted):
    """20 steps, 1:3, without a centre; and noise in each step."""
    folder, pipe = unprompted("class")
    cache = DeepCache(3, power=1.5)
    full = {i for i, full in enumerate(cache.full_steps(20)) if full}
    expected = oracle.of_class(folder, 3, SEEDS, 20, 1.5, branch=0, full=full, eta=0.3)
    options = {"steps": 20, "guidance_scale": 1.5, "eta": 0.3}
    compare(*drawn(pipe, class_label=3, cache=[cache], **options), expected, words=0.01)
    other, _ = drawn(pipe, class_label=1000, cache=[cache], **options)
    assert error(to_torch_layout(other.latents), expected[0]) > 0.05  # the class says what is drawn


def test_defaults_are_those_of_the_models(unprompted):
    for kind, told in (("ldm", {}), ("class", {"class_label": 1})):
        settings = unprompted(kind)[1].settings(**told)
        scale = 3.0 if told else 1.0
        assert (settings.steps, settings.scheduler, settings.guidance_scale) == (50, "ddim", scale)
        assert (settings.height, settings.width, settings.cache_interval) == (64, 64, 3)


def test_interval_1_is_bit_equal_to_a_loop_without_cache_code(unprompted):
    """The plain loop below knows nothing of features, branches or schedules."""
    for kind, told in (("ddpm", {"eta": 0.5}), ("class", {"class_label": 5, "guidance_scale": 2.0})):
        pipe = unprompted(kind)[1]
        settings = pipe.settings(steps=5, seeds=SEEDS, cache_interval=1, **told)
        *_, last = pipe.denoise(settings)
        run, scale = pipe.denoise(settings), settings.legs[0].guidance_scale
        unet, plan, x = pipe.component("unet"), settings.legs[0].plan, run.noise()
        cond = unet.prepare(run.encode())
        temb = unet.time_embed(mx.array([step.here.t for step in plan.steps]), cond)
        for i, step in enumerate(plan.steps):

            def denoise(x, level, i=i, unet=unet, temb=temb, cond=cond, plan=plan, scale=scale):
                out, _ = unet(x if scale is None else mx.concatenate([x, x]), temb[i], cond)
                if scale is not None:
                    without, given = mx.split(out, 2)
                    out = without + scale * (given - without)
                x0, eps = split("epsilon", out, x, level)
                return Prediction(out, x0 if plan.clip is None else mx.clip(x0, -plan.clip, plan.clip), eps, x)

            x, _ = plan.solver(denoise, x, step, None, run.noise)
        assert mx.array_equal(x, last.latents)


@pytest.mark.parametrize("kind", ["ddpm", "ldm", "class"])
def test_a_gpus_operations_give_the_same(unprompted, monkeypatch, kind):
    """With each part compiled, in float32; and guidance's halves in turn."""
    told = {"class_label": 3, "guidance_scale": 2.0} if kind == "class" else {}
    options = {"steps": 6, "seeds": SEEDS, "scheduler": "ddim", "cache_interval": 2, "cache_branch": 2} | told
    expected = unprompted(kind)[1](**options)
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    for how in ({"compile": "on"}, {"compile": "off", "low_memory": True}):
        found = StableDiffusion.from_pretrained(str(unprompted(kind)[0]), "float32", **how)(**options)
        assert error(found.latents, expected.latents) < 1e-4


def test_latents_in_and_out(unprompted):
    """Starting noise of unit variance, (N, H, W, 3), and the picture before clamping."""
    pipe = unprompted("ddpm")[1]
    noise = [torch.randn((3, 32, 32), generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    options = {"steps": 5, "scheduler": "ddim", "clip": "off", "cache_interval": 1}
    given = pipe(latents=torch.stack(noise).permute(0, 2, 3, 1).numpy(), seeds=[1, 2], **options)
    assert error(given.latents, pipe(seeds=SEEDS, **options).latents) < 1e-5
    latents = np.array(given.latents)
    assert (np.abs(latents) > 1).any()
    pixels = np.clip((latents + 1) / 2, 0, 1) * 255
    assert np.abs(np.stack([np.asarray(image) for image in given.images]) - pixels).max() <= 0.5 + 1e-3


@pytest.fixture(scope="module")
def uncached(unprompted):
    """uncached(kind, steps, seeds, ...): what that model draws with DDIM, drawn once."""

    @functools.cache
    def whole(kind, steps, seeds, **told):
        return unprompted(kind)[1](steps=steps, seeds=list(seeds), scheduler="ddim", cache_interval=1, **told)

    return whole


@pytest.mark.parametrize(
    "cache",
    [
        ["deepcache:interval=3,branch=2", "taylorseer"],
        ["deepcache:interval=3", "spectrum", "pab:spatial_window=0..1000"],
        ["adaptive:threshold=0.2,branch=1", "taylorseer:order=2"],
    ],
)
@pytest.mark.parametrize("kind", ["ddpm", "ldm"])
def test_other_caches_save_work(unprompted, uncached, kind, cache):
    whole, other = (uncached(kind, 20, seeds) for seeds in ((3, 4), (5, 6)))
    cached = unprompted(kind)[1](cache=cache, steps=20, seeds=SEEDS, scheduler="ddim")
    assert cached.stats["unet_macs"] < 0.98 * whole.stats["unet_macs"] == 0.98 * whole.stats["unet_macs_uncached"]
    assert 1e-4 < error(cached.latents, whole.latents) < 0.7 * error(other.latents, whole.latents)


@pytest.mark.parametrize("kind", ["ddpm", "ldm"])
def test_a_cache_that_never_reuses_changes_nothing(unprompted, uncached, kind):
    alike = unprompted(kind)[1](cache=["adaptive:threshold=0"], steps=20, seeds=SEEDS, scheduler="ddim")
    assert mx.array_equal(alike.latents, uncached(kind, 20, (3, 4)).latents)


@pytest.mark.parametrize("cache", ["tgate:step=8", "fastercache", "guidance:end=0.5", "pab", "adaptive:threshold=0.2"])
def test_all_caches_serve_for_classes(unprompted, uncached, cache):
    told = {"class_label": 9, "guidance_scale": 1.5}
    whole = uncached("class", 16, (0,), **told)
    cached = unprompted("class")[1](cache=[cache], steps=16, seeds=[0], scheduler="ddim", **told)
    assert cached.stats["unet_macs"] < whole.stats["unet_macs"]
    assert 1e-5 < error(cached.latents, whole.latents) < 1
