"""Prompt files, several seeds, quantizing at load and low memory: other ways to pictures that are tested elsewhere."""

import io
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import error, same
from PIL import Image

import mlx_deepcache
from mlx_deepcache import StableDiffusion
from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.apps.generate import main_generate

STEPS = ["--steps", "4", "--quiet", "--dtype", "float32"]


def draw(tmp_path, *args, name="out.png"):
    assert main_generate([*STEPS, "--overwrite", "--output", str(tmp_path / name), *map(str, args)]) == 0


def pixels(file):
    return np.asarray(Image.open(file))


def test_prompt_file_and_seeds_draw_what_single_calls_draw(checkpoint, tmp_path, monkeypatch):
    model = ["--model", checkpoint("sd15")]
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog at night \n")
    draw(tmp_path, *model, "--prompt-file", tmp_path / "prompts.txt", "--seed", 3, 8, "--stats", tmp_path / "s.json")
    assert len(json.loads((tmp_path / "s.json").read_text())) == 2
    for i, (prompt, seed) in enumerate([("a cat", 3), ("a cat", 8), ("a dog at night", 3), ("a dog at night", 8)], 1):
        draw(tmp_path, *model, "--prompt", prompt, "--seed", seed, name="one.png")
        alone, together = (pixels(tmp_path / name).astype(int) for name in ("one.png", f"out-{i}.png"))
        assert np.abs(alone - together).max() <= 1
        said = json.loads(Image.open(tmp_path / f"out-{i}.png").text["mlx_deepcache"])
        assert (said["prompt"], said["seed"]) == (prompt, seed)
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\n"))
    draw(tmp_path, *model, "--prompt-file", "-", "--seed", 3, name="stdin.png")
    assert np.abs(pixels(tmp_path / "stdin.png").astype(int) - pixels(tmp_path / "out-1.png")).max() <= 1


@pytest.mark.parametrize(
    "args, message",
    [
        (["--prompt-file", "none.txt"], "cannot read none.txt"),
        (["--prompt-file", "EMPTY"], "has no prompts"),
        (["--prompt-file", "BINARY"], "expected text in UTF-8"),
        (["--prompt", "a", "--seed", "1", "2", "--num-images", "2"], "--num-images counts on from one --seed"),
        (["--prompt", "a", "--prompt-2", "b"], "only one"),
    ],
)
def test_bad_input(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("\n \n")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00")
    assert main_generate([*STEPS, *args]) in (1, 2)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(tmp_path, closed):
    """The next file opened takes their numbers, and MLX holds number 0 for a failure."""
    flags = f"--prompt apple --steps 1 --output {tmp_path}/out.png"
    command = f"{sys.executable} {Path(mlx_deepcache.__file__).parents[1]}/generate.py {flags} {closed}"
    assert subprocess.run(["sh", "-c", command], capture_output=True).returncode == 0
    assert pixels(tmp_path / "out.png").shape == (64, 64, 3)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_at_load_is_quantizing_at_conversion(checkpoint, tmp_path, bits):
    folder = checkpoint("sdxl")
    assert main_convert(["--model", str(folder), "--output", str(tmp_path / "q"), "--quantize", str(bits)]) == 0
    latents = [
        StableDiffusion.from_pretrained(str(model), "float32", **options)("a cat", steps=3).latents
        for model, options in ((tmp_path / "q", {}), (folder, {"quantize": bits}), (folder, {}))
    ]
    assert mx.array_equal(latents[0], latents[1])
    assert error(latents[2], latents[1]) > 1e-4
    assert main_generate([*STEPS, "--prompt", "a", "--model", str(tmp_path / "q"), "--quantize", "8"]) == 2


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("cache", [None, "adaptive", "pab", "tgate:step=3", "guidance:end=0.5"])
def test_low_memory_changes_nothing_but_memory(checkpoint, pipeline, kind, cache):
    frugal = StableDiffusion.from_pretrained(str(checkpoint(kind)), "float32", low_memory=True)
    options = {"steps": 6, "seeds": [1, 2], "height": 64, "width": 64}
    options |= {"cache": cache, "cache_interval": 2 if cache is None else None}
    assert same(frugal("a cat", **options).latents, pipeline(kind)("a cat", **options).latents)
    assert not [part for part in frugal.models[0].held if not part.startswith("tokenizer")]  # nothing is kept


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_picture_is_the_same_to_the_bit_whatever_is_drawn_with_it(pipeline, kind, size):
    """A user's seed is drawn again, alone or among others; so do several machines."""
    pipe, options = pipeline(kind), {"steps": 4, "cache_interval": 2, "height": size, "width": size}
    together = pipe("a cat", seeds=[1, 2, 3], **options)
    for row, seed in enumerate([1, 2, 3]):
        alone = pipe("a cat", seeds=[seed], **options)
        assert same(alone.latents[0], together.latents[row])
        assert same(alone.images[0], together.images[row])
