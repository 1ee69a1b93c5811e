"""A picture drawn again from the settings in it, ours or those of A1111's web UI."""

import hashlib
import json
import re
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load_file, save_file
from tiny import Hub

from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.errors import Failure
from mlx_deepcache.generation import record as metadata
from mlx_deepcache.generation.kinds import KINDS

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
        lambda file: {"controls": [{"model": ".", "image": file, "scale": 1, "start": 0, "end": 1}]},
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


@pytest.mark.filterwarnings("ignore:it does not say whose random numbers")
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
        "rng": "torch-cuda",
        "clip_skip": 1,  # which counts the last layer too there
    }
    assert unknown == ["Model hash", "Model", "Lora hashes", "Version"]


@pytest.mark.parametrize(
    ("line", "scheduler"),
    [
        ("Sampler: Euler a", "euler-a"),
        ("Sampler: Euler a, Schedule type: Automatic", "euler-a"),
        ("Sampler: DPM++ 2M, Schedule type: Karras", "dpm++2m-karras"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpm++2m-karras"),
        ("Sampler: DPM++ 2M", "dpm++2m"),
        ("Sampler: DPM++ 2M SDE", "dpm++2m-sde"),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", "DPM++ 2M SDE Exponential"),
        ("Sampler: DDIM, Schedule type: Uniform", "ddim"),
        ("Sampler: UniPC", "unipc"),
        ("Sampler: PLMS", "pndm"),
        ("Sampler: Restart", "Restart"),
        ("Sampler: Euler, Schedule type: Exponential", "Euler Exponential"),
    ],
)
def test_a1111_samplers(line, scheduler):
    assert metadata.from_a1111(f"x\nSteps: 2, {line}, RNG: CPU", NOWHERE) == (
        {"prompt": "x", "steps": "2", "scheduler": scheduler, "rng": "torch"},
        [],
    )


@pytest.mark.parametrize(
    ("line", "rng", "assumed"),
    [
        ("RNG: CPU", "torch", False),
        ("RNG: NV", "torch-cuda", False),
        ("RNG: GPU", "torch-cuda", False),
        ("RNG: cuda", "torch-cuda", False),
        ("RNG: MLX", "mlx", False),
        ("Seed: 4", "torch-cuda", True),
        ("Version: f2.0.1v1.10.1", "torch-cuda", True),
        ("Version: ComfyUI", "torch", False),
    ],
)
def test_a1111_random_numbers(line, rng, assumed):
    """A1111 and Forge leave out what is their default, which is the GPU's."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found, _ = metadata.from_a1111(f"x\nSteps: 2, {line}", NOWHERE)
    assert found["rng"] == rng
    assert [" --rng torch-cuda" in str(note.message) for note in told] == [True] * assumed


FORGE = """
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5, Seed: 1, Size: 832x1216, Model hash: 67ab2fd8ec, \
Model: pony, Denoising strength: 0.3, Hires upscale: 1.5, ADetailer prompt: "a face, \\"big\\": eyes", \
Hashes: {"vae": "235745af8d", "lora:ink": "0a1b", "model": "67ab"}, Civitai resources: [{"type":"lora","weight":0.8, \
"modelName":"Seed: 5, Steps: 3"}], Beta schedule alpha: 0.6, Version: f2.0.1v1.10.1-previous-313-g8a04293
Template: a {red|green} apple"""


@pytest.mark.filterwarnings("ignore:it does not say whose random numbers")
def test_forge():
    """Nothing but settings and a line after them; JSON among the pairs, and values with commas."""
    found, unknown = metadata.from_a1111(FORGE, NOWHERE)
    assert found == {
        "prompt": "",
        "steps": "20",
        "scheduler": "dpm++2m-karras",
        "guidance_scale": "5",
        "seed": "1",
        "width": "832",
        "height": "1216",
        "rng": "torch-cuda",
        "hires_scale": "1.5",
        "hires_strength": "0.3",
    }
    others = ["ADetailer prompt", "Hashes", "Civitai resources"]
    assert unknown == ["Model hash", "Model", *others, "Beta schedule alpha", "Version", "Template"]


@pytest.mark.parametrize(
    ("line", "pairs"),
    [
        ('A: "x, y: z", B: 1', {"A": "x, y: z", "B": "1"}),
        ("A: 1, B: {, C: [1, 2]", {"A": "1", "B": "{", "C": "[1, 2]"}),
        ('A: "x, B: 2', {"A": '"x', "B": "2"}),
        (", ,A:1,,B:", {"A": "1", "B": ""}),
        ("words only", {}),
        ("", {}),
        ("A: " + "[" * 20_000, {"A": "[" * 20_000}),
    ],
)
def test_pairs(line, pairs):
    assert metadata._pairs(line) == pairs


LORA = "mid_block_attentions_0_proj_in"


@pytest.fixture
def ink():
    """A LoRA here, for the tiny SD 1.5."""
    shapes = {"down": (2, 48, 1, 1), "up": (48, 2, 1, 1)}
    rng = np.random.default_rng(0)
    tensors = {f"lora_unet_{LORA}.lora_{k}.weight": rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    save_file(tensors, "ink.safetensors", {"ss_output_name": "ink"})


def test_a1111_loras(draw, checkpoint, capfd, ink, tmp_path):
    """Named in a prompt; taken out of it, and used if such a file is here or beside the picture."""
    Path("ink.safetensors").rename(tmp_path / "ink.safetensors")
    prompt = "a cat <lora:ink:0.5>\nin rain <lora:gone:1> <hypernet:old:0.2><lora:../../ink:0.5:1>"
    text = (
        f"{prompt}\nNegative prompt: dogs <lora:x>\nSteps: 2, Sampler: DDIM, Size: 64x64, RNG: CPU, Lora hashes: i: 0"
    )
    write(tmp_path / "a.png", parameters=text)
    model = ["--model", checkpoint("sd15")]
    assert main_generate(["--from-image", str(tmp_path / "a.png"), *map(str, model)]) == 0
    told = "LoRA gone (1), hypernetwork old (0.2), LoRA ../../ink (0.5:1), LoRA x (1)\n"
    assert f"a.png: not used: {told}" in capfd.readouterr().err
    assert settings("out.png")["prompt"] == "a cat \nin rain"
    flags = ["--steps", 2, "--scheduler", "ddim", "--height", 64, "--width", 64, "--negative-prompt", "dogs"]
    for name, lora in (("b", ["--lora", f"{tmp_path / 'ink.safetensors'}:0.5"]), ("c", [])):
        assert draw(*model, "--prompt", "a cat \nin rain", *flags, *lora, "--output", f"{name}.png") == 0
    assert np.array_equal(pixels("out.png"), pixels("b.png"))
    assert not np.array_equal(pixels("out.png"), pixels("c.png"))


def test_our_loras_are_told_as_a1111_does(draw, checkpoint, ink):
    """By name and scale behind the prompt, and by the hash that it has for them; which is also read back."""
    flags = ["--model", checkpoint("sd15"), "--steps", 1, "--height", 64, "--width", 64]
    assert draw(*flags, "--prompt", "a cat", "--lora", "ink.safetensors:0.5", "--negative-prompt", "a dog") == 0
    text = Image.open("out.png").text["parameters"]
    content = Path("ink.safetensors").read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert text.startswith("a cat <lora:ink:0.5>\nNegative prompt: a dog\nSteps: 1, ")
    assert f', Lora hashes: "ink: {digest[:12]}", Version: ' in text
    found, unknown = metadata.from_a1111(text, NOWHERE)
    assert (found["prompt"], found["lora"]) == ("a cat", ["ink.safetensors:0.5"])
    assert "Lora hashes" not in unknown
    assert draw("--from-image", "out.png", "--output", "b.png") == 0
    assert np.array_equal(pixels("out.png"), pixels("b.png"))
    assert Image.open("b.png").text["parameters"] == text
    tensors = load_file("ink.safetensors")
    save_file(tensors, "ink.safetensors", {"sshs_model_hash": "ab" * 32})
    assert metadata.lora_hash(Path("ink.safetensors")) == "ab" * 6


def test_a1111_picture(draw, capfd):
    """Drawn as by these flags; what is not used is told in one line."""
    write(parameters="a rocket\nSteps: 2, Sampler: Euler, CFG scale: 4, Seed: 9, Size: 64x64, Model: toon, ENSD: 3")
    assert main_generate(["--from-image", "a.png"]) == 0
    notes = capfd.readouterr().err
    assert "note: a.png: not used: Model, ENSD\n" in notes
    assert "note: a.png: it does not say whose random numbers it was drawn with (RNG)" in notes
    flags = [
        "--rng",
        "torch-cuda",
        "--scheduler",
        "euler",
        "--guidance-scale",
        4,
        "--seed",
        9,
        "--height",
        64,
        "--width",
        64,
    ]
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


# ------------------------------------------------------------------------------------ what a picture tells and asks for

SMALL = ["--prompt", "a cat", "--steps", 1, "--height", 64, "--width", 64]


def test_no_whole_paths(draw, checkpoint, tmp_path):
    """Files are told by the way from here, or by their names; hub ids and short names as they are."""
    shutil.copytree(checkpoint("sd15"), "mm")
    shutil.copytree(checkpoint("sd15"), "emoji")
    for model, told in (("./mm", "./mm"), (Path("mm").resolve(), "./mm"), ("./emoji", "./emoji")):
        assert draw(*SMALL, "--model", model, "--output", "a.png", "--overwrite") == 0
        assert settings("a.png")["model"] == told
        assert str(tmp_path).encode() not in Path("a.png").read_bytes()
    assert draw(*SMALL, "--model", checkpoint("sd15"), "--output", "a.png", "--overwrite") == 0
    assert settings("a.png")["model"].startswith("../")
    assert [KINDS["Model"].record(text) for text in ("sd15", "owner/name@v1")] == ["sd15", "owner/name@v1"]
    assert KINDS["Model"].record("/bin") == "./bin"  # with nothing in common but the root
    assert KINDS["Lora"].record((Path("/gone/secret/x.safetensors"), 0.5)) == "x.safetensors:0.5"
    assert KINDS["Embedding"].record((Path("mm").resolve(), "word")) == "./mm:word"


def test_a_folder_named_emoji(draw, checkpoint):
    """Is not taken for the bundled model, neither as a flag nor from a picture."""
    assert draw("--prompt", "a red apple", "--steps", 1, "--output", "a.png") == 0
    Path("emoji").mkdir()
    assert draw("--prompt", "a red apple", "--steps", 1, "--model", "emoji", "--output", "b.png") == 0
    assert draw("--from-image", "a.png", "--output", "c.png") == 0
    assert settings("a.png") == settings("b.png") == settings("c.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png")) and np.array_equal(pixels("a.png"), pixels("c.png"))
    shutil.rmtree("emoji")
    shutil.copytree(checkpoint("sd15"), "emoji")
    assert draw(*SMALL, "--model", "./emoji", "--output", "d.png") == 0
    assert draw("--from-image", "d.png", "--output", "e.png") == 0
    assert np.array_equal(pixels("d.png"), pixels("e.png")) and settings("e.png")["height"] == 64


def test_loras_and_models_beside_the_picture(draw, checkpoint, tmp_path, capfd):
    """A picture that is moved with what it was drawn with is drawn again from there."""
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    rng = np.random.default_rng(0)
    lora = {f"{layer}.lora_A.weight": rng.standard_normal((2, 48)), f"{layer}.lora_B.weight": np.ones((48, 2))}
    Path("loras").mkdir()
    save_file({name: tensor.astype("f") for name, tensor in lora.items()}, "loras/ink.safetensors")
    save_file({"<word>": rng.standard_normal((1, 32)).astype("f")}, "word.safetensors")
    shutil.copytree(checkpoint("sd15"), "mm")
    flags = ["--model", "mm", "--lora", "loras/ink.safetensors:0.5", "--embedding", "word.safetensors:wug"]
    assert draw(*SMALL, *flags, "--prompt", "a wug cat", "--output", "a.png") == 0
    assert settings("a.png")["lora"] == ["./loras/ink.safetensors:0.5"]
    assert draw("--from-image", "a.png", "--output", "b.png") == 0
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("a.png", "mm", "loras/ink.safetensors", "word.safetensors"):
        shutil.move(name, moved)
    assert draw("--from-image", moved / "a.png", "--output", "c.png") == 0
    assert np.array_equal(pixels("b.png"), pixels("c.png"))
    (moved / "ink.safetensors").unlink()
    capfd.readouterr()
    assert draw("--from-image", moved / "a.png", "--output", "d.png") == 1
    assert "was drawn with this lora; --lora names another" in one_error(capfd)


@pytest.mark.parametrize(
    ("named", "flag"),
    [
        ({"model": "owner/name"}, "--model owner/name does"),
        ({"model": "owner/name@main"}, "--model owner/name@main does"),
        ({"model": "sd15"}, "--model sd15 does"),
        ({"vae": "owner/vae"}, "--vae owner/vae does"),
        ({"refiner": "owner/name"}, "--refiner owner/name does"),
        ({"lora": ["owner/name:x.safetensors:0.5"]}, "--lora owner/name:x.safetensors:0.5 does"),
        ({"embedding": ["owner/name"]}, "--embedding owner/name does"),
        ({"controls": [{"model": "o/n", "image": "a.png", "scale": 1, "start": 0, "end": 1}]}, "--controlnet o/n does"),
    ],
)
def test_a_picture_asks_nothing_of_the_hub(draw, capfd, monkeypatch, tmp_path, named, flag):
    """Not even for what is cached: who draws names it."""
    hub = Hub(monkeypatch, tmp_path / "cache")
    write(mlx_deepcache=json.dumps({"prompt": "x", **named}))
    assert draw("--from-image", "a.png") == 2
    assert flag in one_error(capfd)
    assert hub.calls == []


@pytest.mark.parametrize(
    "settings",
    [
        {"\x1b[31mred\x07": 1, "\u202eevil": 2, "x" * 10000: 3},
        {"model": "\x1b]0;title\x07/x/y"},
        {"model": "n" * 90000},
        {"steps": "\x1b[2J"},
        {"lora": ["\x1b[2J.safetensors"]},
        {"image": "\x1b[2J"},
        {"cache": ["\x1b[2J"]},
        {"cache": ["list"]},
        {"scheduler": "\x9b31m" * 20000},
    ],
    ids=str,
)
def test_nothing_of_a_picture_steers_the_terminal(draw, capfd, settings):
    write(mlx_deepcache=json.dumps({"prompt": "x", **settings}))
    assert draw("--from-image", "a.png", "--no-such-flag" if len(settings) > 1 else "--quiet") != 0
    out, err = capfd.readouterr()
    text = re.sub(r"\r[^\r\n]*", "", out + err)  # the bar
    assert all(c.isprintable() or c == "\n" for c in text), text[:300]
    assert len(text) < 3000


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "iTXt compressed", "many"])
def test_bombs_of_text(draw, capfd, kind):
    info, big = PngInfo(), "x" * 5_000_000
    if kind == "tEXt":
        info.add_text("parameters", big)
    elif kind == "many":
        for i in range(90):
            info.add_text(f"a{i}", "x" * 1_000_000, zip=True)
    else:
        add = info.add_itxt if kind.startswith("iTXt") else info.add_text
        add("mlx_deepcache", json.dumps({"prompt": big}), zip=kind != "iTXt")
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=info)
    assert draw("--from-image", "a.png") == 1
    assert len(one_error(capfd)) < 300


def test_a_bomb_of_pixels(draw, capfd, monkeypatch):
    write(mlx_deepcache='{"prompt": "x"}')
    for limit in (20, 40):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert draw("--from-image", "a.png") == 1
        assert "cannot read a.png" in one_error(capfd)


@pytest.mark.parametrize("piece", ["a", "a ", " ", ',a:"', 'a: "', "\\\\", ":"])
def test_no_text_takes_long(piece):
    """As long as it may be, whatever it repeats."""
    start = time.monotonic()
    metadata.from_a1111("x\nSteps: 1, " + piece * (metadata.LONGEST // len(piece)) + "z", NOWHERE)
    assert time.monotonic() - start < 5


def test_deep_json(draw, capfd):
    write(mlx_deepcache="[" * 50_000)
    assert draw("--from-image", "a.png") == 1
    assert "damaged" in one_error(capfd)
