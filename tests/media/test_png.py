"""Pictures: rounding as diffusers rounds, and settings that others can read back."""

import json
import os
import re

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from mlx_deepcache.diffusion.schedulers import SCHEDULERS
from mlx_deepcache.errors import Failure
from mlx_deepcache.generation.record import parameters_text, save_png
from mlx_deepcache.media.pictures import to_uint8

SETTINGS = {
    "prompt": "a cat",
    "negative_prompt": None,
    "model": "sd15",
    "seed": 0,
    "steps": 20,
    "guidance_scale": 7.5,
    "height": 64,
    "width": 48,
    "scheduler": "pndm",
    "rng": "torch",
    "cache_interval": 3,
    "cache_branch": 0,
    "dtype": "float16",
    "latents": None,
    "version": "mlx_deepcache 0.1.0",
}
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)


def read_a1111(text):
    """The web UI's own way to read `parameters` (parse_generation_parameters): prompt, negative prompt, settings."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    settings = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    prompt, negative, part = [], [], None
    for line in lines:
        if line.startswith("Negative prompt:"):
            part, line = negative, line.removeprefix("Negative prompt:").strip()
        (prompt if part is None else part).append(line)
    return "\n".join(prompt), "\n".join(negative), settings


def test_rounding_is_that_of_diffusers():
    middles = (np.arange(256, dtype=np.float32) + 0.5) / 255 * 2 - 1  # on the edge between two grey levels
    near = np.concatenate([np.nextafter(middles, -2), middles, np.nextafter(middles, 2)])
    rest = np.random.default_rng(0).normal(0, 1, 3 * 64 * 64 - near.size).astype(np.float32)  # a third is clipped
    images = np.concatenate([near, rest]).reshape(1, 3, 64, 64)
    reference = VaeImageProcessor().postprocess(torch.from_numpy(images), output_type="pil")[0]
    ours = to_uint8(images.transpose(0, 2, 3, 1))
    assert ours.dtype == np.uint8
    assert np.array_equal(ours[0], np.asarray(reference))


def test_parameters_text():
    assert parameters_text(SETTINGS) == (
        "a cat\n"
        "Steps: 20, Sampler: PLMS, CFG scale: 7.5, Seed: 0, Size: 48x64, Model: sd15, RNG: CPU, "
        "DeepCache interval: 3, DeepCache branch: 0, Version: mlx_deepcache 0.1.0"
    )
    with_negative = parameters_text(SETTINGS | {"negative_prompt": "a dog"})
    assert with_negative.startswith("a cat\nNegative prompt: a dog\nSteps: 20, ")


@pytest.mark.parametrize("model", ["owner/name", "a, b: c", 'the "best" one', "C:\\models\\a, b", "two\nlines", "貓"])
def test_parameters_quote(model):
    _, _, settings = read_a1111(parameters_text(SETTINGS | {"model": model}))
    assert settings["Model"] == model
    assert (settings["Steps"], settings["Version"]) == ("20", "mlx_deepcache 0.1.0")


@pytest.mark.parametrize("prompt", ["", "one, two: three", "two\nlines", 'a "quoted" <lora:x:1>', "猫 🐱"])
def test_parameters_prompt(prompt):
    text = parameters_text(SETTINGS | {"prompt": prompt, "negative_prompt": prompt and "not " + prompt})
    positive, negative, settings = read_a1111(text)
    assert (positive, negative) == (prompt, prompt and "not " + prompt)
    assert settings["Size"] == "48x64"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_has_a_name_for_others(scheduler):
    _, _, settings = read_a1111(parameters_text(SETTINGS | {"scheduler": scheduler}))
    assert settings["Sampler"]


@pytest.mark.parametrize("rng", ["torch", "torch-cuda", "mlx"])
def test_every_generator_has_a_name_for_others(rng):
    _, _, settings = read_a1111(parameters_text(SETTINGS | {"rng": rng}))
    assert settings["RNG"] == {"torch": "CPU", "torch-cuda": "NV", "mlx": "MLX"}[rng]


@pytest.mark.parametrize("prompt", ["a cat", "", "猫 🐱 \u202e", 'quote " back \\ slash\nnew line', "x" * 5000])
def test_round_trip(tmp_path, prompt):
    settings = SETTINGS | {"prompt": prompt, "guidance_scale": 0.1 + 0.2}
    save_png(tmp_path / "a.png", PICTURE, settings)
    assert os.listdir(tmp_path) == ["a.png"]
    with Image.open(tmp_path / "a.png") as image:
        assert json.loads(image.text["mlx_deepcache"]) == settings
        assert image.text["parameters"] == parameters_text(settings)
        assert np.array_equal(np.asarray(image), PICTURE)


def test_no_settings(tmp_path):
    save_png(tmp_path / "a.png", PICTURE, None)
    with Image.open(tmp_path / "a.png") as image:
        assert (image.text, image.info) == ({}, {})
        assert np.array_equal(np.asarray(image), PICTURE)


def test_unwritable(tmp_path):
    with pytest.raises(Failure, match="cannot write .*a.png: No such file or directory"):
        save_png(tmp_path / "nowhere" / "a.png", PICTURE, None)
    (tmp_path / "a.png").mkdir()
    with pytest.raises(Failure, match="cannot write .*a.png: Is a directory"):
        save_png(tmp_path / "a.png", PICTURE, None)
    assert os.listdir(tmp_path) == ["a.png"]
