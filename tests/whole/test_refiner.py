"""SDXL's refiner against diffusers, and the defaults of models made for few steps."""

import json
import shutil

import oracle
import pytest
from helpers import PICTURE, compare_from_picture, error, to_torch_layout
from tiny import write_controlnet

from mlx_deepcache import Control, StableDiffusion
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.checkpoints.families import FewStep, few_step
from mlx_deepcache.errors import CheckpointError, UsageError


@pytest.fixture(scope="module")
def refined(checkpoint):
    """SDXL with its refiner, kept loaded."""
    return StableDiffusion.from_pretrained(str(checkpoint("sdxl")), "float32", refiner=str(checkpoint("refiner")))


CASES = [
    # scheduler, steps, share, interval, branch, negative prompt
    (None, 6, 0.8, 1, 0, None),
    (None, 10, 0.7, 2, 1, "blurry"),
    ("ddim", 5, 0.5, 3, 0, ""),
    ("euler-a", 6, 0.6, 2, 4, None),
    ("dpm++2m-karras", 8, 0.8, 2, 0, None),
    ("unipc", 8, 0.6, 3, 8, "blurry"),
    ("pndm", 8, 0.7, 2, 1, None),
]


@pytest.mark.parametrize(("scheduler", "steps", "share", "interval", "branch", "negative"), CASES)
def test_picture_is_that_of_diffusers(checkpoint, refined, scheduler, steps, share, interval, branch, negative):
    """Two pictures: base to refiner in latent space, each starting with a full step."""
    options = {"steps": steps, "guidance_scale": 3.0, "scheduler": scheduler, "negative_prompt": negative}
    options |= {"height": 64, "width": 96}
    expected = oracle.refined(
        checkpoint("sdxl"), checkpoint("refiner"), "a cat", share, [3, 4], interval=interval, branch=branch, **options
    )
    done = []
    result = refined(
        "a cat",
        refiner_start=share,
        seeds=[3, 4],
        cache_interval=interval,
        cache_branch=branch,
        on_step=done.append,
        **options,
    )
    assert [step.full for step in done for _ in range(step.calls)] == expected["full"]
    assert [step.index for step in done] == list(range(len(done)))
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4


@pytest.mark.parametrize(("interval", "branch"), [(1, 0), (2, 1)])
def test_a_controlnet_steers_the_base_alone(checkpoint, refined, tmp_path, interval, branch):
    net = write_controlnet("sdxl", tmp_path)
    options = {"steps": 6, "guidance_scale": 3.0, "height": 64, "width": 64}
    folders = checkpoint("sdxl"), checkpoint("refiner")
    expected, plain = (
        oracle.refined(*folders, "a cat", 0.6, [3], interval=interval, branch=branch, control=control, **options)
        for control in ((net, PICTURE), None)
    )
    result = refined(
        "a cat",
        controls=[Control(str(net), PICTURE)],
        control_every_step=True,
        refiner_start=0.6,
        seeds=[3],
        cache_interval=interval,
        cache_branch=branch,
        **options,
    )
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4
    assert error(plain["latents"], expected["latents"]) > 0.01


def test_heun_hands_over_between_steps(refined):
    """diffusers stops within a step of Heun's there, and its refiner takes that step a second time."""
    settings = refined.settings("a cat", steps=8, scheduler="heun", refiner_start=0.6)
    last, first = settings.legs[0].plan.steps[-1], settings.legs[1].plan.steps[0]
    assert last.there.t == first.here.t
    assert len(settings.legs[0].plan.steps) + len(settings.legs[1].plan.steps) == 8


def test_a_refiner_alone_from_a_picture(checkpoint, pipeline):
    compare_from_picture(
        checkpoint, pipeline, "refiner", steps=6, guidance_scale=3.0, strength=0.5, interval=2, branch=1
    )


def test_multiply_adds_are_those_of_both(refined, pipeline):
    options = {"steps": 5, "height": 64, "width": 64, "guidance_scale": 1.0, "cache_interval": 1}
    both = refined("a cat", refiner_start=0.6, **options).stats
    base = pipeline("sdxl")("a cat", **options).stats
    alone = pipeline("refiner")("a cat", image=PICTURE, strength=1.0, **options).stats
    assert both["unet_macs"] == base["unet_macs"] * 3 // 5 + alone["unet_macs"] * 2 // 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refiner_start": 0.0}, "between 0 and 1, got 0.0"),
        ({"refiner_start": 1.0}, "between 0 and 1, got 1.0"),
        ({"refiner_start": 0.999, "steps": 5}, "leaves the refiner no steps"),
        ({"refiner_start": 0.001, "steps": 5, "image": PICTURE}, "leaves the base model no steps"),
        ({"image": PICTURE, "mask": PICTURE}, "a mask and a refiner do not go together"),
    ],
)
def test_settings_that_cannot_be(refined, options, message):
    with pytest.raises(UsageError, match=message):
        refined.settings("a cat", **options)


def test_models_that_do_not_go_together(checkpoint, pipeline):
    with pytest.raises(UsageError, match="refiner_start has no meaning without a refiner"):
        pipeline("sdxl").settings("a cat", refiner_start=0.8)
    with pytest.raises(UsageError, match="this model refines pictures"):
        pipeline("refiner").settings("a cat")
    with pytest.raises(UsageError, match="a refiner goes with SDXL only"):
        StableDiffusion.from_pretrained(str(checkpoint("sd15")), refiner=str(checkpoint("refiner")))


def test_flags(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(checkpoint("sdxl")), "--refiner", str(checkpoint("refiner")), "--prompt", "a cat"]
    assert main_generate([*flags, "--steps", "5", "--refiner-start", "0.6", "--stats", "s.json"]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["full_steps"] == 5


# ---------------------------------------------------------------------------------------------------- few-step models

EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
ANCESTRAL = EULER | {"_class_name": "EulerAncestralDiscreteScheduler"}
LEADING = EULER | {"timestep_spacing": "leading"}


@pytest.mark.parametrize(
    ("names", "scheduler", "told", "steps", "guidance"),
    [
        (["models--stabilityai--sdxl-turbo"], ANCESTRAL, False, 4, 1.0),
        (["a"], ANCESTRAL, False, 4, 1.0),  # whatever it is called
        (["sd-turbo"], EULER, False, 4, 1.0),
        (["SDXL_Lightning_8step"], LEADING, False, 8, 1.0),
        (["mine", "ByteDance/Hyper-SD 2-steps"], EULER, False, 2, 1.0),
        (["a"], EULER | {"prediction_type": "sample"}, False, 4, 1.0),  # Lightning for one step
        (["a"], {"_class_name": "LCMScheduler"}, False, 4, 1.0),
        (["LCM_Dreamshaper_v7"], {"_class_name": "LCMScheduler"}, True, 4, 8.5),
    ],
)
def test_few_step_models(names, scheduler, told, steps, guidance):
    found = few_step(names, scheduler, told)
    assert isinstance(found, FewStep)
    assert (found.steps, found.guidance_scale) == (steps, guidance)


@pytest.mark.parametrize(
    ("names", "scheduler"),
    [
        (["stable-diffusion-xl-base-1.0"], LEADING),
        (["a"], EULER | {"prediction_type": "v_prediction"}),
        (["a"], EULER | {"rescale_betas_zero_snr": True}),
        (["a"], {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}),
        (["turbofan-pictures", "nocturbo", "step", "50 steps"], LEADING),
    ],
)
def test_ordinary_models(names, scheduler):
    assert few_step(names, scheduler, False) is None


def test_defaults_follow(checkpoint, tmp_path, monkeypatch, capfd):
    """Steps, no guidance and no cache, from a folder's files alone; flags override each. Held against diffusers."""
    folder = shutil.copytree(checkpoint("sdxl"), tmp_path / "mine")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ANCESTRAL))
    file = folder / "model_index.json"  # which diffusers goes by
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scheduler": ["diffusers", ANCESTRAL["_class_name"]]}))
    pipe = StableDiffusion.from_pretrained(str(folder), "float32")
    settings = pipe.settings("a cat")
    assert (settings.steps, settings.guidance_scale, settings.cache.when.interval) == (4, 1.0, 1)
    assert pipe.settings("a cat", steps=20).cache.when.interval == 1
    over = pipe.settings("a cat", steps=20, guidance_scale=5.0, cache_interval=3)
    assert (over.steps, over.guidance_scale, over.cache.when.interval) == (20, 5.0, 3)
    result = pipe("a cat", seeds=[7], height=64, width=64)
    expected = oracle.generate(folder, "a cat", steps=4, guidance_scale=0.0, height=64, width=64, seed=[7])
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4

    monkeypatch.chdir(tmp_path)
    assert main_generate(["--model", str(folder), "--prompt", "a cat", "--height", "64", "--width", "64"]) == 0
    assert (
        "cache: off, as this is a few-step model (its scheduler starts at the last timestep)" in capfd.readouterr().out
    )


def test_names_in_files_count(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("sdxl"), tmp_path / "mine")
    assert (found := Checkpoint.open(str(folder))).few_step is None
    assert (found.steps, found.guidance_scale) == (50, 5.0)
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": "ByteDance/SDXL-Lightning-2step"}))
    opened = Checkpoint.open(str(folder))
    assert opened.few_step == FewStep(2, 1.0, "its name says lightning")
    assert (opened.steps, opened.guidance_scale) == (2, 1.0)


def test_a_refiner_lacking_its_encoder(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("refiner"), tmp_path / "mine")
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(CheckpointError, match="lacks the folder text_encoder_2"):
        Checkpoint.open(str(folder))
