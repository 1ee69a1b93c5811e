"""The two commands, each flag doing what it says."""

import json
import os
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import oracle
import pytest
from helpers import error
from PIL import Image
from running import SMALL, exit_code, final_latents, left, pixels, recorded, script
from safetensors.numpy import load_file, save_file

import mlx_deepcache
from mlx_deepcache.apps.generate import main_generate

# ----------------------------------------------------------------------------------------------------------- output


def test_default_output(draw, capfd):
    assert draw("--steps", 2) == 0
    assert left() == ["out.png"]
    with Image.open("out.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
    out, err = capfd.readouterr()
    assert "wrote out.png" in out
    assert re.search(r"3 full and 0 cached steps, [\d.]+ of [\d.]+ G multiply-adds", out)  # PLMS takes one more
    assert re.search(r"load [\d.]+ s, encode [\d.]+ s, denoise [\d.]+ s, decode [\d.]+ s, peak memory \d+ MiB", out)
    assert "full" in err  # the bar


def test_output_in_another_folder(draw, tmp_path):
    folder = tmp_path / "pictures of mine"
    folder.mkdir()
    assert draw("--steps", 1, "--output", folder / "cat.png") == 0
    assert os.listdir(folder) == ["cat.png"]
    assert left() == []


def test_long_name(draw):
    name = "x" * 251 + ".png"  # as long as a file's name may be
    assert draw("--steps", 1, "--output", name) == 0
    assert left() == [name]


def test_output_replaces_a_file(draw):
    Path("out.png").write_text("old")
    assert draw("--steps", 1) == 0
    assert pixels().shape == (64, 64, 3)


def test_native_size(draw, checkpoint):
    assert exit_code(main_generate, ["--model", checkpoint("sd15"), "--prompt", "a cat", "--steps", 1]) == 0
    assert pixels().shape == (128, 128, 3)


def test_height_and_width(draw):
    assert draw("--steps", 1, "--height", 56, "--width", 72) == 0
    assert pixels().shape == (56, 72, 3)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_picture_is_that_of_diffusers(draw, checkpoint, kind):
    flags = ["--steps", 11, "--seed", 7, "--negative-prompt", "a dog", "--guidance-scale", 4, "--cache-branch", 1]
    assert draw(*flags, "--dtype", "float32", model=checkpoint(kind)) == 0
    reference = oracle.generate(
        checkpoint(kind), "a cat", "a dog", 11, 4.0, 64, 64, interval=3, branch=1, seed=7
    )  # three is the default interval from ten steps on
    difference = np.abs(pixels() - reference["image"][0])
    assert difference.mean() < 1
    assert reference["image"].std() > 10  # there is something in the picture


@pytest.mark.parametrize("scheduler", ["pndm", "euler-a"])
def test_num_images(draw, scheduler):
    flags = ["--scheduler", scheduler, "--dtype", "float32"]
    assert draw(*flags, "--num-images", 3, "--seed", 5) == 0
    assert left() == ["out-1.png", "out-2.png", "out-3.png"]
    for i in range(3):
        assert draw(*flags, "--seed", 5 + i, "--output", "alone.png") == 0
        difference = np.abs(pixels("alone.png") - pixels(f"out-{i + 1}.png"))
        assert difference.max() <= 1  # the order of additions depends on the batch
    assert np.abs(pixels("out-1.png") - pixels("out-2.png")).mean() > 5


def test_quiet(draw, capfd):
    assert draw("--steps", 2, "--quiet") == 0
    assert capfd.readouterr() == ("", "")
    assert left() == ["out.png"]


def test_metadata(draw):
    assert draw("--negative-prompt", "a dog", "--seed", 3, "--num-images", 2, "--cache-interval", 2) == 0
    with Image.open("out-2.png") as image:
        text, settings = image.text["parameters"], json.loads(image.text["mlx_deepcache"])
    first, second, last = text.split("\n")
    assert (first, second) == ("a cat", "Negative prompt: a dog")
    assert last.startswith("Steps: 3, Sampler: PLMS, CFG scale: 7.5, Seed: 4, Size: 64x64, Model: ")
    assert "DeepCache interval: 2, DeepCache branch: 0" in last
    expected = {
        "prompt": "a cat",
        "negative_prompt": "a dog",
        "seed": 4,
        "steps": 3,
        "guidance_scale": 7.5,
        "height": 64,
        "width": 64,
        "scheduler": "pndm",
        "rng": "torch",
        "cache_interval": 2,
        "cache_branch": 0,
    }
    assert expected.items() <= settings.items()


def test_no_metadata(draw):
    assert draw("--steps", 1, "--no-metadata") == 0
    with Image.open("out.png") as image:
        assert not image.text
    assert b"a cat" not in Path("out.png").read_bytes()


# ---------------------------------------------------------------------------------------------------------- latents


def test_latents_round_trip(draw, checkpoint):
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 6), dtype=np.float32)
    save_file({"latents": noise}, "noise.safetensors")
    flags = ["--latents", "noise.safetensors", "--save-latents", "final.safetensors", "--dtype", "float32"]
    model = ["--model", checkpoint("sd15"), "--prompt", "a cat", "--steps", 3]
    assert exit_code(main_generate, [*model, *flags, "--cache-interval", 2]) == 0  # number and size are the file's
    assert left() == ["final.safetensors", "noise.safetensors", "out-1.png", "out-2.png"]
    assert pixels("out-1.png").shape == (64, 48, 3)

    final = load_file("final.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in final.items()} == {"latents": (np.float32, (2, 4, 8, 6))}
    reference = oracle.generate(checkpoint("sd15"), "a cat", steps=3, height=64, width=48, interval=2, latents=noise)
    assert error(final["latents"], reference["latents"]) < 1e-3
    for i in range(2):
        assert np.abs(pixels(f"out-{i + 1}.png") - reference["image"][i]).mean() < 1


@pytest.mark.parametrize("scheduler", ["heun", "unipc", "lcm"])
def test_save_latents_from_a_seed(draw, checkpoint, scheduler):
    flags = ["--scheduler", scheduler, "--seed", 9, "--guidance-scale", 3]
    assert draw(*flags, "--dtype", "float32", "--save-latents", "final.safetensors", "--quiet") == 0
    reference = oracle.generate(checkpoint("sd15"), "a cat", None, 3, 3.0, 64, 64, scheduler, seed=9)
    assert error(load_file("final.safetensors")["latents"], reference["latents"]) < 1e-3


# ------------------------------------------------------------------------------------------------------------ stats


@pytest.mark.parametrize(("scheduler", "steps", "interval"), [("pndm", 12, 3), ("heun", 5, 2), ("ddim", 4, 1)])
def test_stats(draw, checkpoint, scheduler, steps, interval):
    flags = ["--scheduler", scheduler, "--steps", steps, "--cache-interval", interval, "--guidance-scale", 1]
    assert draw(*flags, "--stats", "stats.json") == 0
    stats = json.loads(Path("stats.json").read_text())
    calls = oracle.full_calls(checkpoint("sd15"), steps, interval, scheduler)
    per_step = calls[::2] if scheduler == "heun" else calls  # Heun calls the U-Net twice a step, decided once
    assert stats["steps"] == ["full" if full else "cached" for full in per_step]
    assert (stats["full_steps"], stats["cached_steps"]) == (per_step.count(True), per_step.count(False))
    if interval == 1:
        assert stats["unet_macs"] == stats["unet_macs_uncached"] > 0
    else:
        share = calls.count(True) / len(calls)
        assert share < stats["unet_macs"] / stats["unet_macs_uncached"] < 1
    assert list(stats["seconds"]) == ["load", "encode", "denoise", "decode"]
    assert all(0 < seconds < 600 for seconds in stats["seconds"].values())
    assert 2**20 < stats["peak_memory_bytes"] < 2**33
    assert "(cpu)" in stats["device"] or "(gpu)" in stats["device"]
    assert stats["dtype"] == ("float16" if mx.default_device() == mx.gpu else "float32")
    assert stats["versions"].keys() == {"mlx_deepcache", "mlx", "python", "system"}
    assert stats["versions"]["mlx_deepcache"] == mlx_deepcache.__version__


def test_stats_count_batch_and_guidance(draw):
    macs = []
    for flags in (["--guidance-scale", 1], ["--guidance-scale", 2], ["--guidance-scale", 2, "--num-images", 2]):
        assert draw("--scheduler", "ddim", "--steps", 1, "--stats", "s.json", *flags) == 0
        macs.append(json.loads(Path("s.json").read_text())["unet_macs"])
    assert macs == [macs[0], 2 * macs[0], 4 * macs[0]]


# --------------------------------------------------------------------------------------------------- the other dials


def test_rng(draw):
    drawn = {rng: final_latents(draw, "--steps", 1, "--rng", rng) for rng in ("torch", "torch-cuda", "mlx")}
    again = {rng: final_latents(draw, "--steps", 1, "--rng", rng) for rng in drawn}
    assert all(np.array_equal(drawn[rng], again[rng]) for rng in drawn)
    assert np.array_equal(drawn["torch"], final_latents(draw, "--steps", 1))
    assert min(error(drawn["mlx"], drawn["torch"]), error(drawn["torch-cuda"], drawn["torch"])) > 0.1


@pytest.mark.parametrize("rng", ["torch", "torch-cuda", "mlx"])
@pytest.mark.parametrize("seed", [-1, 2**32 - 1, 2**64 - 1, 2**80 + 7])
def test_any_seed(draw, rng, seed):
    """Generators look at 64 bits of it; the picture keeps all of it."""
    drawn = final_latents(draw, "--steps", 1, "--rng", rng, "--seed", seed, seed % 2**64, 0)
    assert error(drawn[0], drawn[1]) < 1e-5
    assert error(drawn[0], drawn[2]) > 0.1
    assert [recorded(f"out-{i}.png")["seed"] for i in (1, 2, 3)] == [seed, seed % 2**64, 0]


def test_seed(draw):
    assert np.array_equal(final_latents(draw, "--steps", 1), final_latents(draw, "--steps", 1, "--seed", 0))
    assert error(final_latents(draw, "--steps", 1, "--seed", 1), final_latents(draw, "--steps", 1)) > 0.1


@pytest.mark.parametrize("flags", [("--negative-prompt", "dog"), ("--guidance-scale", 2), ("--prompt", "a red house")])
def test_flag_changes_the_picture(draw, flags):
    assert error(final_latents(draw, *flags), final_latents(draw)) > 1e-2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(draw, dtype):
    exact = final_latents(draw)
    rough = final_latents(draw, "--dtype", dtype, "--stats", "s.json")
    assert json.loads(Path("s.json").read_text())["dtype"] == dtype
    assert 1e-5 < error(rough, exact) < (0.05 if dtype == "float16" else 0.4)


def test_cache_turns_off_below_ten_steps(draw, capfd):
    assert draw("--steps", 9, "--stats", "s.json") == 0
    assert "cache: off below 10 steps; --cache-interval turns it on" in capfd.readouterr().out
    assert json.loads(Path("s.json").read_text())["cached_steps"] == 0
    assert draw("--steps", 9, "--stats", "s.json", "--cache-interval", 3) == 0
    assert "cache:" not in capfd.readouterr().out
    assert json.loads(Path("s.json").read_text())["cached_steps"] == 6
    assert draw("--steps", 10, "--stats", "s.json") == 0
    assert "cache:" not in capfd.readouterr().out
    assert json.loads(Path("s.json").read_text())["steps"][:4] == ["full", "cached", "cached", "full"]


def test_cache_branch(draw):
    flags = ["--steps", 4, "--cache-interval", 2, "--stats", "s.json"]
    macs = []
    for branch in (0, 5, 11):
        assert draw(*flags, "--cache-branch", branch) == 0
        macs.append(json.loads(Path("s.json").read_text())["unet_macs"])
    assert macs[0] < macs[1] < macs[2]


def test_long_prompt_warns(draw, capfd):
    assert draw("--steps", 1, "--prompt", " ".join(["cat"] * 80)) == 0
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning: " in line]
    assert len(warnings) == 1
    assert "75 tokens" in warnings[0]
    assert "'cat cat cat cat cat'" in warnings[0]


@pytest.mark.parametrize("prompt", ["", " ", "猫 🐱 naïve café\u202e", '"quoted", \\ and {braces}\nover two lines'])
def test_odd_prompts(draw, prompt):
    assert draw("--steps", 1, "--prompt", prompt) == 0
    with Image.open("out.png") as image:
        assert json.loads(image.text["mlx_deepcache"])["prompt"] == prompt


# -------------------------------------------------------------------------------------------- the scripts themselves


def test_scripts(checkpoint, tmp_path):
    done = script("convert.py", "--model", checkpoint("sd15"), "--output", "model", folder=tmp_path)
    assert (done.returncode, os.listdir(tmp_path)) == (0, ["model"]), done.stderr
    assert "wrote model" in done.stdout
    done = script("generate.py", "--model", "model", "--prompt", "a cat", *SMALL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["model", "out.png"]


def test_script_fails_clearly(tmp_path):
    done = script("generate.py", "--model", "no such model", "--prompt", "a cat", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"(note: .*\n)?error: no model 'no such model': .*\n", done.stderr)


# --------------------------------------------------------------------------------------------------- from a picture


def test_picture_and_mask(draw):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
    mask = np.zeros((70, 90), np.uint8)
    mask[20:50, 30:60] = 255
    Image.fromarray(picture).save("in.png")
    Image.fromarray(mask).save("mask.png")
    flags = ["--image", "in.png", "--mask", "mask.png", "--fit", "crop", "--cache-interval", 2]
    assert draw(*flags, "--strength", 0.7, "--scheduler", "ddim", "--height", 64, "--width", 80) == 0
    inside = np.asarray(Image.fromarray(mask).resize((82, 64), Image.Resampling.LANCZOS).crop((1, 0, 81, 64))) > 127
    kept = np.asarray(Image.fromarray(picture).resize((82, 64), Image.Resampling.LANCZOS).crop((1, 0, 81, 64)))
    assert np.array_equal(pixels()[~inside], kept[~inside])
    assert (pixels()[inside] != kept[inside]).any(axis=-1).mean() > 0.9
    with Image.open("out.png") as image:
        settings, text = json.loads(image.text["mlx_deepcache"]), image.text["parameters"]
    assert {"image": "in.png", "mask": "mask.png", "strength": 0.7, "fit": "crop"}.items() <= settings.items()
    assert "Denoising strength: 0.7" in text
