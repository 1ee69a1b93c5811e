"""generate.py with models that read no prompt: files, settings in pictures, previews, and what is refused."""

import json
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import error, smooth
from PIL import Image
from safetensors.numpy import load_file, save_file

from mlx_deepcache.apps import generate
from mlx_deepcache.backend.ops import on_gpu
from mlx_deepcache.cache.deepcache import CacheWarning
from mlx_deepcache.checkpoints.names import BUNDLED_NAME
from mlx_deepcache.errors import UsageError
from mlx_deepcache.generation import record
from mlx_deepcache.generation.labels import imagenet, number_of
from mlx_deepcache.generation.pipeline import StableDiffusion
from mlx_deepcache.nets.labels import LabelConfig

IMAGENET = LabelConfig(1001, 8)
FLAGS = {
    "ddpm": ["--steps", "6", "--cache-interval", "2"],
    "ldm": ["--steps", "4"],
    "class": ["--steps", "4", "--class-label", "golden retriever"],
}


@pytest.fixture
def run(unprompted, tmp_path, monkeypatch, capfd):
    """run(kind, *flags): generate.py in an empty folder -> exit code, what it said and what it complained of."""
    monkeypatch.chdir(tmp_path)

    def run(kind, *flags):
        try:
            flags = ["--model", unprompted(kind)[0], *FLAGS[kind], *flags]
            code = generate.main_generate([str(flag) for flag in flags])
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


@pytest.mark.parametrize("kind", FLAGS)
def test_settings_go_with_the_picture_and_back(run, kind, tmp_path):
    more = ["--eta", "0.4", "--clip"] + (["--timesteps", "quad"] if kind == "ddpm" else [])
    more += ["--guidance-scale", "2"] if kind == "class" else []
    code, _, err = run(kind, *more, "--seed", 5, "--output", "a.png", "--save-latents", "x.safetensors")
    assert code == 0, err
    settings, unknown = record.read(tmp_path / "a.png")
    assert not unknown and settings["prompt"] == ""
    assert settings["class_label"] == (207 if kind == "class" else None)
    assert (settings["eta"], settings["clip"], settings["scheduler"]) == (0.4, "on", "ddim")
    assert settings["timesteps"] == ("quad" if kind == "ddpm" else None)
    assert generate.main_generate(["--from-image", "a.png", "--output", "b.png"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert load_file("x.safetensors")["latents"].shape == ((1, 3, 32, 32) if kind == "ddpm" else (1, 3, 16, 16))


def test_a_classs_name_is_its_number(run, tmp_path):
    for name, output in (("207", "a.png"), ("Golden Retriever", "b.png"), ("1000", "c.png")):
        assert run("class", "--class-label", name, "--output", output)[0] == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert (pixels("a.png") != pixels("c.png")).any()


@pytest.mark.parametrize("kind", FLAGS)
def test_many_in_batches(run, kind, tmp_path, monkeypatch):
    """As many at once as fit; each is what it is alone."""
    monkeypatch.setattr(StableDiffusion, "together", lambda self, settings: 3)
    code, out, err = run(kind, "--num-images", 7, "--grid", "--stats", "s.json")
    assert code == 0, err
    assert "7 pictures, 3 at a time" in out
    stats = json.loads((tmp_path / "s.json").read_text())
    assert [len(batch["seeds"]) for batch in stats] == [3, 3, 1]
    side = 32 if kind == "ddpm" else 64
    assert Image.open("out-grid.png").size == (3 * side, 3 * side)
    assert np.array_equal(pixels("out-grid.png")[side : 2 * side, :side], pixels("out-4.png"))
    assert run(kind, "--seed", 3, "--output", "alone.png")[0] == 0
    assert np.abs(pixels("alone.png") - pixels("out-4.png")).mean() < 0.5


def test_previews_of_pixels_are_the_picture(run, tmp_path):
    flags = ["--scheduler", "ddim", "--save-steps", "steps", "--preview", "p.png"]
    assert run("ddpm", *flags)[0] == 0
    last = pixels("steps/step-006.png")
    assert np.array_equal(last, pixels("p.png"))
    assert np.abs(last - pixels("out.png")).max() <= 1  # DDIM ends at what it takes for the clean picture


def test_previews_of_other_latents_are_near_the_picture(run, unprompted):
    """In colours that are fitted to what the VAE makes of flat latents."""
    pipe = unprompted("ldm")[1]
    made = pipe.colours()
    flat = mx.broadcast_to(mx.array([0.4, -0.3, 0.7]), (1, 4, 4, 3))
    expected = pipe.decode(flat)[0].mean(axis=(0, 1))
    assert made(flat).shape == (1, 16, 16, 3)
    assert np.abs(made(flat)[0, 0, 0] - expected).mean() < 40  # grey levels; a codeword stands for many latents
    for kind in ("ldm", "class"):
        assert run(kind, "--save-steps", f"{kind}-steps")[0] == 0
        assert pixels(f"{kind}-steps/step-004.png").shape == (64, 64, 3)


def test_latents_from_a_file(run, tmp_path):
    noise = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    save_file({"latents": noise}, "n.safetensors")
    options = ["--scheduler", "ddim", "--save-latents", "x.safetensors"]
    assert run("ddpm", "--latents", "n.safetensors", *options)[0] == 0
    both = load_file("x.safetensors")["latents"]
    assert both.shape == (2, 3, 32, 32) and error(both[:1], both[1:]) > 0.1
    save_file({"latents": noise[:1]}, "n.safetensors")
    assert run("ddpm", "--latents", "n.safetensors", *options)[0] == 0
    assert error(load_file("x.safetensors")["latents"], both[:1]) < 1e-4


@pytest.mark.parametrize("kind", ["ldm", "class"])
def test_from_a_picture(run, kind):
    """Latent models have an encoder: with little strength the picture is hardly another than its own decoding."""
    smooth(64, 64).save("in.png")
    for strength in ("0.05", "0.9"):
        flags = ["--image", "in.png", "--steps", "20", "--strength", strength, "--output", f"{strength}.png"]
        assert run(kind, *flags)[0] == 0
    smooth(64, 64, seed=1).save("in.png")
    assert run(kind, "--image", "in.png", "--steps", "20", "--strength", "0.05", "--output", "other.png")[0] == 0
    Image.fromarray(np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (0, 32)))).save("mask.png")
    flags = ["--image", "in.png", "--mask", "mask.png", "--steps", "20", "--strength", "0.9"]
    assert run(kind, *flags, "--output", "half.png")[0] == 0
    off = np.abs(pixels("half.png") - pixels("in.png"))
    assert off[:, 32:].max() == 0 and off[:, :32].mean() > 5
    near, far, other = (pixels(file).ravel() for file in ("0.05.png", "0.9.png", "other.png"))
    assert np.abs(near - far).mean() > 5 and np.abs(near - other).mean() > 5


def test_compared_with_the_uncached_picture(run):
    code, out, err = run("ddpm", "--compare")
    assert code == 0, err
    assert "PSNR to the uncached picture" in out and "wrote out-compare.png" in out


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("ddpm", ["--prompt", "a cat"], "DDPM reads no prompt: leave the prompt out"),
        ("ddpm", ["--prompt-file", "prompts"], "DDPM reads no prompt"),
        ("ddpm", ["--negative-prompt", "x"], "--negative-prompt has no meaning for DDPM, which draws pictures without"),
        ("ddpm", ["--guidance-scale", "2"], "--guidance-scale has no meaning for DDPM"),
        ("ldm", ["--guidance-scale", "2"], "--guidance-scale has no meaning for LDM"),
        ("ddpm", ["--vae", "ldm"], "DDPM draws pixels, which need no --vae; leave it out"),
        ("ddpm", ["--vae-tiling", "on"], "DDPM has no VAE: leave --vae-tiling on out"),
        ("ddpm", ["--image", "in.png"], "DDPM draws from noise alone: leave --image out"),
        ("ddpm", ["--image", "in.png", "--mask", "in.png"], "DDPM draws from noise alone"),
        ("ddpm", ["--frames", "4"], "--frames has no meaning for DDPM"),
        ("ddpm", ["--class-label", "3"], "--class-label has no meaning for DDPM"),
        (
            "ddpm",
            ["--lora", "a.safetensors"],
            "LoRAs and embeddings are for models that read a prompt, and this one",
        ),
        ("ddpm", ["--controlnet", "c", "--control-image", "in.png"], "has no meaning for DDPM"),
        ("ddpm", ["--refiner-start", "0.5", "--refiner", "emoji"], "a refiner goes with SDXL only"),
        ("ddpm", ["--cache", "tgate"], "tgate is for models that read a prompt or a class, and this one reads nothing"),
        ("ldm", ["--cache", "fastercache"], "fastercache is for models that read a prompt or a class"),
        ("ddpm", ["--cache", "guidance:end=0.5"], "has no meaning where guidance is off"),
        ("ddpm", ["--scheduler", "euler", "--eta", "0.5"], "--eta goes with a scheduler of ddim, and this is euler"),
        (
            "ddpm",
            ["--scheduler", "unipc", "--timesteps", "quad"],
            "--timesteps goes with a scheduler of ddim, ddpm, and",
        ),
        (
            "ddpm",
            ["--scheduler", "unipc", "--clip", "on"],
            "--clip goes with a scheduler of ddim, heun, lcm, ddpm, and",
        ),
        ("ddpm", ["--eta", "2"], "expected a number from 0 to 1, got '2'"),
        ("ddpm", ["--timesteps", "quick"], "expected one of uniform, quad, got 'quick'"),
        ("ddpm", ["--height", "36"], "--height should be a positive multiple of 8 pixels, got 36; try 32"),
        ("ddpm", ["--cache-interval", "2", "--cache-branch", "12"], "cache branch must be in [0, 12)"),
        (
            "class",
            ["--class-label", "golden retreiver"],
            "no class called 'golden retreiver'; did you mean golden retriever?",
        ),
        (
            "class",
            ["--class-label", "1001"],
            "--class-label should be from 0 to 999, or 1000 for none of them, got 1001",
        ),
        ("class", ["--class-label", "-1"], "--class-label"),
        ("class", ["--prompt", "a cat"], "LDM-4-G reads no prompt: leave the prompt out"),
        ("class", ["--steps", "1001"], "steps should be from 1 to 1000, got 1001"),
    ],
)
def test_what_cannot_be_is_one_line(run, unprompted, kind, flags, words):
    smooth(64, 64).save("in.png")
    Path("prompts").write_text("a cat\na dog\n")
    save_file({"a": np.zeros(2, np.float32)}, "a.safetensors")
    flags = [str(unprompted("ldm")[0]) if flag == "ldm" else flag for flag in flags]
    code, out, err = run(kind, *flags, "--quiet")
    assert code == 2 and out == "" and words in err and err.count("\n") == 1


def test_a_class_that_lacks(unprompted, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(unprompted("class")[0]), "--quiet"]
    for more, words in (([], "its number or name\n"), (["--prompt", "a cat"], "its number or name, and no prompt\n")):
        assert generate.main_generate([*flags, *more]) == 2
        assert capfd.readouterr().err.endswith(f"LDM-4-G draws one of 1000 classes: give --class-label, {words}")
    with pytest.raises(SystemExit):
        generate.main_generate(["--model", BUNDLED_NAME])
    assert "expected --prompt TEXT" in capfd.readouterr().err


def test_classes_are_listed(unprompted, capfd):
    assert generate.main_generate(["--model", str(unprompted("class")[0]), "--list-prompts"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 1000 and lines[207] == "207: golden retriever"


def test_names_of_classes():
    """ImageNet's, as published with the data set's own numbers."""
    names = imagenet()
    assert len(names) == len(set(names)) == 1000
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 388: "giant panda", 963: "pizza"}
    assert {number: names[number] for number in known} == known
    assert [number_of(name, IMAGENET) for name in names] == list(range(1000))
    assert number_of("cardigan", IMAGENET) != number_of("Cardigan", IMAGENET) == number_of("CARDIGAN", IMAGENET)
    with pytest.raises(UsageError, match="this model's classes have no names here"):
        number_of("pizza", LabelConfig(11, 8))
    assert number_of(10, LabelConfig(11, 8)) == 10


@pytest.mark.skipif(on_gpu(), reason="estimates are fitted to the CPU's measured peaks")
@pytest.mark.parametrize("kind", FLAGS)
def test_the_estimate_by_phase(unprompted, kind):
    mx.synchronize()
    before = mx.get_active_memory()  # what other tests hold
    pipe = StableDiffusion.from_pretrained(str(unprompted(kind)[0]), "float32", keep=False)
    told = {"class_label": 1} if kind == "class" else {}
    stats = pipe(steps=3, seeds=range(4), cache_interval=1, **told).stats
    estimated = stats["estimated_memory_bytes_by_phase"]
    for phase in ("load", "denoise", *["decode"] * (kind != "ddpm")):
        measured = stats["peak_memory_bytes_by_phase"][phase] - before
        assert 0.75 < estimated[phase] / measured < 1.25, (phase, estimated[phase], measured)


def test_papers_schedule_of_latent_diffusion_is_allowed_to_end_early(unprompted):
    """Its last full step of 250 lies in the last third."""
    pipe = unprompted("class")[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        for interval, full in ((2, 120), (5, 49), (10, 25), (20, 13)):
            cache = [f"deepcache:interval={interval},power=1.5"]
            settings = pipe.settings(class_label=1, steps=250, cache=cache)
            assert sum(settings.cache.when.full_steps(250)) == full
