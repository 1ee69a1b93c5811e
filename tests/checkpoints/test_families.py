"""The table of families against diffusers' pipelines."""

import inspect

import diffusers
import pytest

from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.checkpoints.families import FAMILIES, PIPELINES, REFINER, SD1, SD2, SDXL, SVD


def default(name, option):
    """What a pipeline of diffusers does if an option is not given."""
    return inspect.signature(getattr(diffusers, name).__call__).parameters[option].default


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.text], ids=lambda family: family.name)
def test_defaults_are_those_of_diffusers(family):
    text = f"{family.pipeline}{'Img2Img' if family.refines else ''}Pipeline"
    assert family.guidance_scale == default(text, "guidance_scale")
    assert family.steps == default(text, "num_inference_steps")
    assert family.strength == default(f"{family.pipeline}Img2ImgPipeline", "strength")
    assert family.inpainting_strength == default(f"{family.pipeline}InpaintPipeline", "strength")
    assert family.second_prompt == ("prompt_2" in inspect.signature(getattr(diffusers, text).__call__).parameters)


def test_defaults_of_videos_are_those_of_diffusers():
    name = f"{SVD.pipeline}Pipeline"
    assert SVD.guidance_scale == default(name, "max_guidance_scale")
    assert SVD.steps == default(name, "num_inference_steps")
    assert SVD.size == (default(name, "height"), default(name, "width"))


def test_scores_are_those_of_diffusers():
    name = "StableDiffusionXLImg2ImgPipeline"
    for wanted, option in ((True, "aesthetic_score"), (False, "negative_aesthetic_score")):
        assert REFINER.time_ids(64, 96, wanted) == (64, 96, 0, 0, default(name, option))


def test_pipelines_are_diffusers():
    assert all(issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline) for name in PIPELINES)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *[("sd15", SD1), ("bk-tiny", SD1), ("inpaint", SD1), ("sd21", SD2), ("sd21-base", SD2)],
        *[("sdxl", SDXL), ("inpaint-xl", SDXL), ("refiner", REFINER)],
    ],
)
def test_a_checkpoint_is_told_by_its_configs(checkpoint, kind, family):
    found = Checkpoint.open(str(checkpoint(kind)))
    assert found.family == family
    parts = {path.name for path in checkpoint(kind).iterdir() if path.is_dir()}
    assert parts == {"unet", "vae", "scheduler", *family.encoders.keys(), *family.encoders.values()}
