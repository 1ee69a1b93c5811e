"""Whole pictures against diffusers with the pip package DeepCache: every kind of model, schedulers and branches."""

import inspect
import json
import shutil

import diffusers
import mlx.core as mx
import numpy as np
import pytest
from helpers import error, to_torch_layout
from oracle import SCHEDULERS, generate
from tiny import KINDS

from mlx_deepcache import StableDiffusion

STEPS = {1: 4, 2: 4, 3: 5, 5: 6}  # of an interval: two full ones, cached ones between them, and all of PLMS's orders


def cases():
    """Every kind x interval x at least four branches; schedulers (None is the own one), guidance and negative prompts
    take turns, so that each meets several kinds and intervals."""
    names, count = [None, *SCHEDULERS], 0
    for kind in KINDS:
        last = 8 if kind in ("sdxl", "bk-tiny") else 11
        for interval in (1, 2, 3, 5):
            for branch in (0, 1, 2, last // 2, last):
                name = names[count % len(names)]
                guidance = 1.5 if name == "lcm" else (7.5, 1.0, 3.0)[count % 3]
                yield kind, interval, branch, name, guidance, (None, "blurry", "")[count // 2 % 3]
                count += 1


@pytest.mark.parametrize(("kind", "interval", "branch", "scheduler", "guidance", "negative"), list(cases()))
def test_picture_is_that_of_diffusers_and_deepcache(
    checkpoint, pipeline, kind, interval, branch, scheduler, guidance, negative
):
    """Two pictures of 104 x 72 pixels, whose latents do not halve exactly."""
    size = {"height": 72, "width": 104}
    options = {"steps": STEPS[interval], "guidance_scale": guidance, "scheduler": scheduler} | size
    expected = generate(
        checkpoint(kind),
        "a small red cat",
        negative_prompt=negative,
        interval=interval,
        branch=branch,
        seed=[3, 4],
        num_images=2,
        **options,
    )
    steps = []
    result = pipeline(kind)(
        "a small red cat",
        negative_prompt=negative,
        cache_interval=interval,
        cache_branch=branch,
        seeds=[3, 4],
        on_step=steps.append,
        **options,
    )
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4
    images = np.stack([np.asarray(image) for image in result.images]).astype(float)
    assert np.abs(images - expected["image"]).mean() < 0.1  # grey levels
    assert [step.full for step in steps for _ in range(step.calls)] == expected["full"]


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noise_in_ddims_steps(checkpoint, pipeline, eta):
    """ddim is taken without being asked for."""
    options = {"steps": 6, "guidance_scale": 3.0, "height": 64, "width": 64}
    more = {"scheduler": "ddim", "options": {"eta": eta}, "num_images": 2}
    expected = generate(checkpoint("sd15"), "a cat", interval=2, branch=1, seed=[3, 4], **more, **options)
    result = pipeline("sd15")("a cat", seeds=[3, 4], cache_interval=2, cache_branch=1, eta=eta, **options)
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_twenty_steps_with_every_scheduler(checkpoint, pipeline, kind, name):
    options = {"steps": 20, "guidance_scale": 2.0, "height": 64, "width": 64, "scheduler": name}
    expected = generate(checkpoint(kind), "a bird", interval=3, branch=1, seed=[5], **options)
    result = pipeline(kind)("a bird", seeds=[5], cache_interval=3, cache_branch=1, **options)
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-3


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("kind", "file", "values", "scheduler"),
    [
        ("sdxl", SCHEDULER, {"clip_sample": True}, "ddim"),
        ("sd15", SCHEDULER, {"clip_sample": True, "steps_offset": 0}, None),  # as first published
        ("sd15", SCHEDULER, {"clip_sample": True, "steps_offset": 0}, "ddim"),
        ("sd15", SCHEDULER, {"clip_sample": None, "steps_offset": None}, "ddim"),
        ("sdxl", "model_index.json", {"force_zeros_for_empty_prompt": None}, None),
        ("sdxl", "model_index.json", {"force_zeros_for_empty_prompt": False}, None),
    ],
)
def test_configs_are_read_as_diffusers_reads_them(checkpoint, tmp_path, kind, file, values, scheduler):
    """With its defaults for what is left out, and its corrections."""
    folder = shutil.copytree(checkpoint(kind), tmp_path / "model")
    config = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    options = {"steps": 6, "guidance_scale": 3.0, "height": 64, "width": 64, "scheduler": scheduler}
    expected = generate(folder, "a cat", seed=[5], **options)
    result = StableDiffusion.from_pretrained(str(folder), "float32")("a cat", seeds=[5], cache_interval=1, **options)
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4


@pytest.mark.parametrize(("interval", "guidance"), [(1, None), (2, 1.5)])
def test_a_unet_that_is_told_the_guidance_scale(checkpoint, pipeline, interval, guidance):
    """A latent consistency model's whole picture, with its pipeline's own defaults: no second half of the batch."""
    defaults = inspect.signature(diffusers.LatentConsistencyModelPipeline.__call__).parameters
    scale = defaults["guidance_scale"].default if guidance is None else guidance
    steps = defaults["num_inference_steps"].default
    size, prompt = {"height": 72, "width": 104}, "a small red cat"
    more = {"steps": steps, "guidance_scale": scale, "interval": interval, "seed": [3, 4], "num_images": 2}
    expected = generate(checkpoint("lcm"), prompt, **size, **more)
    result = pipeline("lcm")(prompt, seeds=[3, 4], cache_interval=interval, guidance_scale=guidance, **size)
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4
    assert len(result.stats["steps"]) == steps


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_default_guidance_is_that_of_diffusers(pipeline, kind):
    theirs = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[kind]
    scale = inspect.signature(theirs.__call__).parameters["guidance_scale"].default
    assert pipeline(kind).settings("a cat").guidance_scale == scale


def test_interval_1_is_bit_equal_to_a_loop_without_cache_code(pipeline):
    """The plain loop below knows nothing of features, branches or schedules."""
    from mlx_deepcache.diffusion.levels import Prediction, split

    pipe = pipeline("sd15")
    settings = pipe.settings("a cat", steps=5, height=64, width=64, seeds=[1, 2], cache_interval=1, scheduler="ddim")
    *_, last = pipe.denoise(settings)

    run, scale = pipe.denoise(settings), settings.legs[0].guidance_scale
    unet, x = pipe.component("unet"), run.noise()
    prompt = unet.prepare(run.encode())
    temb = unet.time_embed(mx.array([step.here.t for step in settings.legs[0].plan.steps]), prompt)
    for i, step in enumerate(settings.legs[0].plan.steps):

        def denoise(x, level, i=i):
            out, _ = unet(mx.concatenate([x, x]), temb[i], prompt)
            without, given = mx.split(out, 2)
            out = without + scale * (given - without)
            return Prediction(out, *split("epsilon", out, x, level), x)

        x, _ = settings.legs[0].plan.solver(denoise, x, step, None, run.noise)
    assert mx.array_equal(x, last.latents)


def test_nothing_survives_a_generation(pipeline):
    """After a picture of another size, interval and branch, a pipeline draws what a fresh one draws."""
    pipe = pipeline("sd15")
    first = pipe("a cat", steps=5, height=64, width=64, seeds=[7], cache_interval=5)
    pipe("a dog", steps=4, height=128, width=64, seeds=[8], cache_interval=3, cache_branch=7)
    steps = pipe.denoise(pipe.settings("a dog", steps=4, height=64, width=64, cache_interval=4))
    next(steps), next(steps), steps.close()  # cancelled on a cached step
    again = pipe("a cat", steps=5, height=64, width=64, seeds=[7], cache_interval=5)
    fresh = StableDiffusion(pipe.checkpoint, "float32")(
        "a cat", steps=5, height=64, width=64, seeds=[7], cache_interval=5
    )
    assert np.array_equal(first.latents, again.latents)
    assert np.array_equal(first.latents, fresh.latents)


def test_float16_stays_close_to_float32(pipeline, checkpoint):
    """Half precision end to end: closer to the float32 picture than another seed's by far."""
    options = {"steps": 6, "height": 64, "width": 64, "guidance_scale": 3.0}
    exact = pipeline("sd15")("a cat", **options)
    half = StableDiffusion.from_pretrained(str(checkpoint("sd15")), "float16")("a cat", **options)
    assert error(half.latents, exact.latents) < 0.05
    assert error(pipeline("sd15")("a cat", seeds=[1], **options).latents, exact.latents) > 0.5


@pytest.mark.parametrize(("kind", "force_upcast"), [("sd15", False), ("sdxl", True), ("sdxl", False)])
def test_the_vae_stays_in_float32_where_its_config_asks_for_it(checkpoint, pipeline, tmp_path, kind, force_upcast):
    """Real ones of SDXL overflow in float16. Seen by the picture of given latents being that of float32, or not."""
    folder = shutil.copytree(checkpoint(kind), tmp_path / "model")
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"force_upcast": force_upcast}))
    half = StableDiffusion.from_pretrained(str(folder), "float16")
    latents = mx.random.normal((1, 16, 16, 4), key=mx.random.key(0))
    same = np.array_equal(half.decode(latents), pipeline(kind).decode(latents))
    assert same == (kind == "sdxl" and force_upcast)
