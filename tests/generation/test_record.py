"""A picture drawn again from the settings in it, ours or those of A1111's web UI."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.errors import Failure
from mlx_deepcache.generation import record as metadata

NOWHERE = Path("a.png")


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(*flags): generate.py's exit code, in an empty folder."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")

    def run(*flags):
        try:
            return main_generate([str(flag) for flag in ["--quiet", *flags]])
        except SystemExit as stop:
            return stop.code

    return run


def write(file="a.png", **texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def settings(file):
    return json.loads(Image.open(file).text["mlx_deepcache"])


def one_error(capfd):
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("note")]
    assert len(lines) == 1
    assert re.match(r"(generate\.py: )?error: ", lines[0])
    return lines[0]


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("sd15", ["--steps", 11, "--seed", 5, "--num-images", 2, "--cache-branch", 2, "--guidance-scale", 3]),
        ("sd21", ["--steps", 2, "--negative-prompt", "-a dog", "--rng", "mlx"]),
        ("sdxl", ["--steps", 2, "--prompt-2", "a bird", "--plain-prompt"]),
        (
            "sdxl",
            [
                "--steps",
                4,
                "--scheduler",
                "euler-a",
                "--cache",
                "deepcache:interval=2,branch=1",
                "--cache",
                "tgate:step=2",
            ],
        ),
    ],
)
def test_same_pixels(draw, checkpoint, kind, flags):
    model = ["--model", checkpoint(kind), "--height", 64, "--width", 72]
    assert draw("--prompt", "a (cat:1.2)\nin rain", *model, *flags, "--output", "a.png") == 0
    file = "a-2.png" if "--num-images" in flags else "a.png"
    assert draw("--from-image", file) == 0
    assert settings("out.png") == settings(file)
    batch = int("--num-images" in flags)  # of two pictures, sums come out in another order
    assert np.abs(pixels("out.png") - pixels(file)).max() <= batch


def test_given_flags_override(draw, checkpoint):
    assert draw("--model", checkpoint("sd15"), "--prompt", "a cat", "--steps", 10, "--height", 64, "--width", 64) == 0
    before = settings("out.png")
    flags = ["--seed", 3, 4, "--steps", 2, "--cache", "deepcache:interval=2", "--output", "b.png"]
    assert draw("--from-image", "out.png", "--prompt", "a dog", *flags) == 0
    after = settings("b-2.png")
    assert (after["prompt"], after["seed"], after["steps"], after["cache_interval"]) == ("a dog", 4, 2, 2)
    assert {k for k in before if before[k] != after[k]} == {"prompt", "seed", "steps", "cache_interval", "cache"}
    Path("prompts").write_text("a bird\n")
    assert draw("--from-image", "out.png", "--prompt-file", "prompts", "--steps", 1, "--output", "c.png") == 0
    assert settings("c.png")["prompt"] == "a bird"


def test_picture_that_it_started_from(draw, checkpoint, tmp_path, capfd):
    """It is known by its name, and looked for here and beside the picture."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save("photo.png")
    flags = [
        "--model",
        checkpoint("sd15"),
        "--prompt",
        "a cat",
        "--steps",
        4,
        "--image",
        "photo.png",
        "--strength",
        0.5,
    ]
    assert draw(*flags, "--output", "a.png") == 0
    assert draw("--from-image", "a.png") == 0
    assert np.array_equal(pixels("out.png"), pixels("a.png"))
    Path("photo.png").rename(tmp_path / "photo.png")
    Path("a.png").rename(tmp_path / "a.png")
    assert draw("--from-image", tmp_path / "a.png") == 0
    assert np.array_equal(pixels("out.png"), pixels(tmp_path / "a.png"))
    (tmp_path / "photo.png").unlink()
    assert draw("--from-image", tmp_path / "a.png") == 2
    assert "photo.png, which is neither here nor beside it; name it with --image" in one_error(capfd)


@pytest.mark.parametrize("folder", ["{elsewhere}", ".."])
@pytest.mark.parametrize(
    "named",
    [
        lambda file: {"image": file},
        lambda file: {"image": "a.png", "mask": file},
        lambda file: {"latents": file},
        lambda file: {"controls": [{"model": "net", "image": file, "scale": 1, "start": 0, "end": 1}]},
    ],
    ids=["image", "mask", "latents", "control"],
)
def test_a_picture_cannot_name_files_elsewhere(draw, tmp_path, capfd, folder, named):
    """Who hands a picture on does not decide what is read."""
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.png")
    write(mlx_deepcache=json.dumps({"prompt": "x", **named(folder.format(elsewhere=tmp_path) + "/secret.png")}))
    assert draw("--from-image", "a.png") == 2
    assert "drawn from secret.png, which is neither here nor beside it" in one_error(capfd)


def test_every_setting_is_read(draw, checkpoint):
    assert draw("--model", checkpoint("sd15"), "--prompt", "a cat", "--steps", 1, "--height", 64, "--width", 64) == 0
    assert set(settings("out.png")) == {"prompt", "version", *(option.key for option in metadata.recorded())}


def test_a_picture_cannot_name_files_to_write(draw):
    """Who hands a picture on does not decide what is overwritten."""
    write(mlx_deepcache=json.dumps({"prompt": "a cat", "steps": 1, "output": "x.png", "stats": "s.json", "grid": True}))
    assert draw("--from-image", "a.png") == 0
    assert sorted(p.name for p in Path().iterdir()) == ["a.png", "out.png"]


A1111 = """a castle, (moat:1.2)
at night
Negative prompt: fog, rain
and snow
Steps: 30, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 3715684121, Size: 64x72, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Clip skip: 2, Lora hashes: "ink: 0123, detail: 4567", Version: v1.6.0"""


def test_a1111():
    found, unknown = metadata.from_a1111(A1111, NOWHERE)
    assert found == {
        "prompt": "a castle, (moat:1.2)\nat night",
        "negative_prompt": "fog, rain\nand snow",
        "steps": "30",
        "scheduler": "dpm++2m-karras",
        "guidance_scale": "6.5",
        "seed": "3715684121",
        "width": "64",
        "height": "72",
    }
    assert unknown == ["Model hash", "Model", "Clip skip", "Lora hashes", "Version"]


@pytest.mark.parametrize(
    ("line", "scheduler"),
    [
        ("Sampler: Euler a", "euler-a"),
        ("Sampler: Euler a, Schedule type: Automatic", "euler-a"),
        ("Sampler: DPM++ 2M, Schedule type: Karras", "dpm++2m-karras"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpm++2m-karras"),
        ("Sampler: DPM++ 2M", "dpm++2m"),
        ("Sampler: DDIM, Schedule type: Uniform", "ddim"),
        ("Sampler: UniPC", "unipc"),
        ("Sampler: PLMS", "pndm"),
        ("Sampler: Restart", "Restart"),
        ("Sampler: Euler, Schedule type: Exponential", "Euler Exponential"),
    ],
)
def test_a1111_samplers(line, scheduler):
    assert metadata.from_a1111(f"x\nSteps: 2, {line}", NOWHERE) == (
        {"prompt": "x", "steps": "2", "scheduler": scheduler},
        [],
    )


@pytest.mark.parametrize(("name", "rng"), [("CPU", "torch"), ("NV", "torch-cuda"), ("MLX", "mlx")])
def test_a1111_random_numbers(name, rng):
    found, unknown = metadata.from_a1111(f"x\nSteps: 2, RNG: {name}", NOWHERE)
    assert (found["rng"], unknown) == (rng, [])


def test_a1111_picture(draw, capfd):
    """Drawn as by these flags; what is not used is told in one line."""
    write(parameters="a rocket\nSteps: 2, Sampler: Euler, CFG scale: 4, Seed: 9, Size: 64x64, Model: toon, ENSD: 3")
    assert main_generate(["--from-image", "a.png"]) == 0
    assert "note: a.png: not used: Model, ENSD\n" in capfd.readouterr().err
    flags = ["--scheduler", "euler", "--guidance-scale", 4, "--seed", 9, "--height", 64, "--width", 64]
    assert draw("--prompt", "a rocket", "--steps", 2, *flags, "--output", "b.png") == 0
    assert np.array_equal(pixels("out.png"), pixels("b.png"))


@pytest.mark.parametrize(
    ("texts", "code", "words"),
    [
        ({}, 1, "carries no settings"),
        ({"mlx_deepcache": "{"}, 1, "damaged"),
        ({"mlx_deepcache": "[1]"}, 1, "damaged"),
        ({"mlx_deepcache": '{"steps": 2}'}, 2, "no prompt"),
        ({"mlx_deepcache": '{"prompt": "x", "steps": -2}'}, 2, "the settings in a.png: argument --steps"),
        ({"mlx_deepcache": '{"prompt": "x", "lora": 3}'}, 2, "lora = 3 should be a list"),
        ({"mlx_deepcache": '{"prompt": "x", "controls": [{}]}'}, 2, "controls"),
        ({"mlx_deepcache": '{"prompt": "x", "lora": ["no.safetensors:1"]}'}, 1, "no.safetensors"),
        ({"mlx_deepcache": '{"prompt": "x", "model": "gone/dir/x"}'}, 1, "a.png was drawn with this model; --model"),
        ({"mlx_deepcache": '{"prompt": "x", "latents": "n.safetensors"}'}, 2, "--latents"),
        ({"parameters": "only a prompt"}, 1, "begins with Steps"),
        ({"parameters": "x\nSteps: 2, Sampler: Restart"}, 2, "'Restart'"),
    ],
)
def test_refused(draw, capfd, texts, code, words):
    write(**texts)
    assert draw("--from-image", "a.png") == code
    assert words in one_error(capfd)
    assert [p.name for p in Path().iterdir()] == ["a.png"]


def test_no_picture(draw, capfd, tmp_path):
    assert draw("--from-image", "gone.png") == 1
    assert "gone.png" in one_error(capfd)
    Path("a.png").write_text("text")
    assert draw("--from-image", "a.png") == 1
    assert "no picture" in one_error(capfd)
    Image.new("RGB", (8, 8)).save("a.jpg")
    with pytest.raises(Failure, match="JPEG"):
        metadata.read(Path("a.jpg"))


def test_unusable_sampler_can_be_overridden(draw):
    write(parameters="a rocket\nSteps: 1, Sampler: Restart")
    assert draw("--from-image", "a.png", "--scheduler", "ddim") == 0
    assert settings("out.png")["scheduler"] == "ddim"
