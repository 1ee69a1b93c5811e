"""Pictures while they come into being, side by side, and beside the same without the cache."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from helpers import error, to_torch_layout
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from mlx_deepcache import StableDiffusion
from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.errors import CheckpointError
from mlx_deepcache.generation.preview import latent_rgb, through
from mlx_deepcache.media.sheets import captioned, psnr

SMALL = ["--height", "64", "--width", "64", "--steps", "3"]


@pytest.fixture
def draw(checkpoint, tmp_path, monkeypatch):
    """draw(*flags): generate.py's exit code, in an empty folder."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")

    def run(*flags):
        flags = [
            "--model",
            checkpoint("sd15"),
            "--prompt",
            "a cat",
            *SMALL,
            "--dtype",
            "float32",
            "--overwrite",
            *flags,
        ]
        return main_generate([str(flag) for flag in flags])

    return run


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def test_estimates_end_at_the_picture(pipeline):
    """Each step tells what clean latents the U-Net expects; Euler's method ends at the last of them."""
    pipe = pipeline("sd15")
    settings = pipe.settings("a cat", steps=4, height=64, width=64, scheduler="euler")
    steps = list(pipe.denoise(settings))
    assert error(steps[-1].denoised, steps[-1].latents) < 1e-5
    assert error(steps[0].denoised, steps[0].latents) > 0.1
    level = settings.legs[0].plan.steps[1].here  # the estimate and its noise make up the latents
    x, here = np.array(steps[0].latents), settings.legs[0].plan.steps[2].here
    eps = (x - level.alpha * np.array(steps[1].denoised)) / level.sigma
    assert error(here.alpha * np.array(steps[1].denoised) + here.sigma * eps, steps[1].latents) < 1e-5


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_published_colours(checkpoint, kind):
    """ComfyUI's factors, in its own formula for a preview: ((latents @ factors + bias) + 1) / 2."""
    first, bias = {
        "sd15": ((0.3512, 0.2297, 0.3227), 0),
        "sdxl": ((0.3651, 0.4232, 0.4341), (0.1084, -0.0175, -0.0011)),
    }[kind]
    latents = np.zeros((1, 2, 3, 4), np.float32)
    latents[..., 0] = 0.7
    image = latent_rgb(Checkpoint.open(str(checkpoint(kind))))(mx_array(latents))
    assert image.shape == (1, 16, 24, 3)
    assert np.abs(image - 255 * (0.7 * np.array(first) + bias + 1) / 2).max() <= 0.51


def mx_array(x):
    import mlx.core as mx

    return mx.array(x)


def test_bundled_models_colours(tmp_path):
    """Its own map, for a prompt that it was not fitted to, comes near the VAE's colours; a converted model keeps it."""
    result = (pipe := StableDiffusion.from_pretrained(None, "float32"))("a ladybug", steps=8)
    small = np.asarray(result.images[0].reduce(4), float)
    guess = np.asarray(Image.fromarray(latent_rgb(pipe.checkpoint)(result.latents)[0]).reduce(4), float)
    assert ((guess - small) ** 2).sum() < 0.5 * ((small - small.mean((0, 1))) ** 2).sum()
    assert main_convert(["--model", str(pipe.checkpoint.source.path), "--output", str(tmp_path / "new")]) == 0
    assert latent_rgb(Checkpoint.open(str(tmp_path / "new"))) == latent_rgb(pipe.checkpoint)


@pytest.mark.parametrize(
    "value", [3, {}, {"factors": [[1, 2, 3]] * 3}, {"factors": [[1, 2, None]] * 4}, {"factors": "x"}]
)
def test_colours_that_cannot_be(checkpoint, tmp_path, value):
    model = shutil.copytree(checkpoint("sd15"), tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text()) | {"latent_rgb": value}
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="latent_rgb should be"):
        latent_rgb(Checkpoint.open(str(model)))


def test_preview_through_taesd_is_that_of_diffusers(pipeline, taesd):
    pipe = pipeline("sd15")
    progress = next(pipe.denoise(pipe.settings("a cat", steps=2, height=64, width=64, seeds=(1, 2))))
    with torch.no_grad():
        latents = torch.tensor(to_torch_layout(progress.denoised)) / 1.3
        expected = AutoencoderTiny.from_pretrained(taesd).decode(latents).sample.permute(0, 2, 3, 1)
    expected = ((expected / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    assert np.abs(through(*pipe.other_vae(str(taesd)))(progress.denoised).astype(int) - expected).max() <= 1


def test_files_of_the_steps(draw, taesd):
    """The preview is left as the last step was; several pictures lie side by side."""
    assert draw("--preview", "now.png", "--save-steps", "steps", "--scheduler", "euler", "--num-images", 2) == 0
    assert sorted(os.listdir()) == ["now.png", "out-1.png", "out-2.png", "steps"]
    assert sorted(os.listdir("steps")) == ["step-001.png", "step-002.png", "step-003.png"]
    assert pixels("now.png").shape == (64, 128, 3)
    assert np.array_equal(pixels("now.png"), pixels("steps/step-003.png"))
    assert not np.array_equal(pixels("steps/step-001.png"), pixels("steps/step-002.png"))
    # with the VAE that decodes, Euler's last preview is the picture
    assert draw("--save-steps", "steps", "--preview-vae", taesd, "--vae", taesd, "--scheduler", "euler") == 0
    assert np.abs(pixels("steps/step-003.png") - pixels("out.png")).max() <= 1


def test_preview_is_whole_at_every_moment(draw, monkeypatch):
    """It is replaced by renaming, after each step."""
    replaced = []

    def replace(source, target, rename=os.replace):
        if Path(target).name == "now.png":
            Image.open(source).load()
            replaced.append(source)
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert draw("--preview", "now.png", "--scheduler", "ddim") == 0
    assert len(replaced) == 3


def test_grid(draw):
    assert draw("--num-images", 3, "--grid", "--output", "a.png", "--steps", 1) == 0
    sheet = pixels("a-grid.png")
    assert sheet.shape == (128, 128, 3)
    for i, (y, x) in enumerate([(0, 0), (0, 64), (64, 0)]):
        assert np.array_equal(sheet[y : y + 64, x : x + 64], pixels(f"a-{i + 1}.png"))
    assert (sheet[64:, 64:] == 255).all()


def test_compare(draw, capsys):
    """With the cache on the left, without on the right, and something written under them."""
    assert draw("--cache-interval", 3, "--compare") == 0
    told = re.search(r"PSNR to the uncached picture: ([\d.]+) dB", capsys.readouterr().out)
    sheet, cached = pixels("out-compare.png"), pixels("out.png")
    assert np.array_equal(sheet[:64, :64], cached)
    assert draw("--cache-interval", 1) == 0
    assert np.array_equal(sheet[:64, 64:128], pixels("out.png"))
    assert sheet[64:].min() < 100
    assert not np.array_equal(cached, pixels("out.png"))
    assert float(told[1]) == pytest.approx(psnr(cached, pixels("out.png")), abs=0.06)
    assert psnr(cached, pixels("out.png")) == pytest.approx(
        peak_signal_noise_ratio(pixels("out.png"), cached, data_range=255)
    )


def test_caption_is_not_cut():
    image = np.zeros((8, 30, 3), np.uint8)
    sheet = captioned(image, ["a line that is much longer than thirty pixels", "x"])
    assert sheet.shape[1] > 100
    assert (sheet[:, -4:] == 255).all()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--grid"], 2, "--num-images"),
        (["--compare"], 2, "--cache-interval"),
        (["--preview", "now.jpg"], 2, "should end in .png"),
        (["--preview", "out.png"], 2, "name the same file"),
        (["--preview-vae", "some/vae"], 2, "--preview"),
        (["--preview", "now.png", "--preview-vae", "nowhere"], 1, "nowhere"),
        (["--preview", "no/folder/now.png"], 1, "no folder"),
        (["--save-steps", "no/folder"], 1, "cannot make the folder"),
        (["--save-steps", __file__], 1, "cannot make the folder"),
        (["--vae", "nowhere"], 1, "nowhere"),
    ],
)
def test_refused(draw, capfd, flags, code, words):
    assert draw(*flags) == code
    lines = [line for line in capfd.readouterr().err.splitlines() if re.match("(generate.py: )?error", line)]
    assert len(lines) == 1
    assert words in lines[0]
    assert os.listdir() == []


def test_several_batches(draw, checkpoint):
    """A prompt file's pictures each have steps of their own, and one grid and one comparison show them all."""
    Path("prompts").write_text("a cat\na dog\n")
    flags = ["--model", checkpoint("sd15"), "--prompt-file", "prompts", *SMALL, "--steps", 2, "--cache-interval", 2]
    flags += ["--save-steps", "steps", "--grid", "--compare"]
    assert main_generate([str(flag) for flag in flags]) == 0
    assert sorted(os.listdir("steps")) == [
        f"{b}-step-00{i}.png" for b in (1, 2) for i in (1, 2, 3)
    ]  # PLMS takes one more
    assert pixels("out-grid.png").shape == (64, 128, 3)
    sheet = pixels("out-compare.png")
    assert np.array_equal(sheet[:64, :64], pixels("out-1.png"))
    below = next(y for y in range(65, 128) if np.array_equal(sheet[y : y + 64, :64], pixels("out-2.png")))
    assert sheet[64:below].min() < 100  # a line under each pair
