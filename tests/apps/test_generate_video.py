"""generate.py with a model of videos: files, what they say of themselves, and what else is written."""

import json

import mlx.core as mx
import numpy as np
import pytest
from helpers import smooth
from PIL import Image
from safetensors.numpy import load_file

from mlx_deepcache.apps import generate
from mlx_deepcache.generation import record
from mlx_deepcache.generation.declared import options_of
from mlx_deepcache.generation.options import VIDEO, Options
from mlx_deepcache.media import video
from mlx_deepcache.media.latents import write_latents

SHORT = ["--steps", "3", "--frames", "3", "--height", "64", "--width", "96", "--cache-interval", "2"]


@pytest.fixture
def draw(video_checkpoint, tmp_path, monkeypatch, capfd):
    """Run generate.py in an empty folder that has a picture in it."""
    monkeypatch.chdir(tmp_path)
    smooth(64, 96).save("in.png")

    def run(*flags):
        code = generate.main_generate(["--model", str(video_checkpoint), "--image", "in.png", *SHORT, *map(str, flags)])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out

    return run


@pytest.mark.parametrize("output", ["a.mp4", "a.gif", "a.webp", "a.png", "a"])
def test_every_kind_of_file(draw, output, tmp_path):
    out = draw("--output", output)
    assert f"wrote {output}\n" in out
    draw("--output", output)  # which leaves the first
    assert (tmp_path / output.replace("a", "a-2")).exists()


def test_several_seeds_are_several_files(draw, tmp_path):
    draw("--output", "a.gif", "--seed", 1, 2, "--stats", "s.json")
    assert {file.name for file in tmp_path.glob("a*")} == {"a-1.gif", "a-2.gif"}
    stats = json.loads((tmp_path / "s.json").read_text())
    assert stats["pictures"] == ["a-1.gif", "a-2.gif"] and stats["steps"] == ["full", "cached", "full"]


@pytest.mark.parametrize("output", ["a.mp4", "a.webp", "a.png"])
def test_settings_go_with_the_video_and_back(draw, output, tmp_path):
    draw("--output", output, "--fps", 9, "--noise-aug", 0.1, "--seed", 4, "--save-latents", "a.safetensors")
    settings, unknown = record.read(tmp_path / output)
    assert not unknown
    of_videos = {o.key: settings[o.key] for o in options_of(Options) if o.group == VIDEO and "videos" in o.only}
    assert of_videos == {
        "frames": 3,
        "fps": 9,
        "motion_bucket": 127,
        "noise_aug": 0.1,
        "min_guidance_scale": 1.0,
        "decode_chunk": None,
    }
    assert generate.main_generate(["--from-image", output, "--output", "b.gif", "--save-latents", "b.safetensors"]) == 0
    a, b = (load_file(tmp_path / name)["latents"] for name in ("a.safetensors", "b.safetensors"))
    assert a.shape == (1, 3, 4, 8, 12) and np.array_equal(a, b)


def test_without_metadata(draw, tmp_path):
    draw("--output", "a.mp4", "--no-metadata")
    assert video.read_comment(tmp_path / "a.mp4") is None


def test_a_grid_a_comparison_and_a_preview(draw, tmp_path):
    out = draw("--output", "a.gif", "--grid", "--compare", "--preview", "p.png", "--save-steps", "steps")
    assert "PSNR to the uncached video: " in out
    assert Image.open("a-grid.png").size == (2 * 96, 2 * 64)
    with Image.open("a-compare.gif") as compared:
        assert compared.n_frames == 3 and compared.width >= 2 * 96
    assert Image.open("p.png").size == (96, 64)  # the middle frame
    assert len(list((tmp_path / "steps").iterdir())) == 3


def test_noise_from_a_file_decides_frames_and_size(draw, tmp_path, video_pipeline):
    latents = np.random.default_rng(0).standard_normal((1, 2, 8, 8, 4)).astype(np.float32)
    write_latents(tmp_path / "noise.safetensors", mx.array(latents))
    flags = ["--image", "in.png", "--steps", "3", "--latents", "noise.safetensors", "--save-latents", "a.safetensors"]
    model = ["--model", str(video_pipeline.checkpoint.source.path)]
    assert generate.main_generate([*model, *flags, "--output", "a.gif"]) == 0
    drawn = load_file("a.safetensors")["latents"]
    assert drawn.shape == (1, 2, 4, 8, 8)
    options = {"image": "in.png", "steps": 3, "height": 64, "width": 64, "frames": 2}
    again = video_pipeline(latents=latents, **options)
    assert np.array_equal(np.moveaxis(np.array(again.latents), -1, 2), drawn)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "a.jpg"], "--output should end in .png, .mp4, .gif, .webp or be a folder, got 'a.jpg'"),
        (["--output", "a.mp4"], "an .mp4 file needs PyAV"),
    ],
)
def test_a_video_that_cannot_be_written_is_known_beforehand(draw, monkeypatch, capfd, flags, words):
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    monkeypatch.setattr(generate, "_draw_all", lambda args: pytest.fail("work was done"))
    assert_usage(["--image", "in.png", *flags], words, capfd)


def test_a_model_of_pictures_writes_png(checkpoint, draw, capfd):
    model = ["--model", str(checkpoint("sd15")), "--prompt", ""]
    assert_usage([*model, "--output", "a.gif"], "--output of a model of pictures should end in .png", capfd)


def assert_usage(flags, words, capfd):
    try:
        code = generate.main_generate([*flags, "--quiet"])
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert code == 2 and out == "" and words in err and err.count("\n") == 1
