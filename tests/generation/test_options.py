"""Options are declared once: each is a keyword, a flag, a check and a part of a picture's settings by that alone."""

import io
import json
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import smooth
from PIL import Image

from mlx_deepcache import DeepCache
from mlx_deepcache.apps import flags, generate
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.errors import UsageError
from mlx_deepcache.generation import declared, options, record, settings
from mlx_deepcache.generation.declared import option, options_of
from mlx_deepcache.generation.kinds import KINDS, SHARE
from mlx_deepcache.generation.options import A_CONTROL, PICTURE, Control, ModelOptions, Options
from mlx_deepcache.media.pictures import read_mask, read_picture

ALL = [(cls, o) for cls in (ModelOptions, Options, Control) for o in options_of(cls)]
SAMPLES = {
    "str": "a word",
    "Seed": "3",
    "int": "2",
    "float": "0.5",
    "Policy": "pab",
    "Motion": "-3,1.5",
    "Label": "golden retriever",
    "Sides": "8,0,16,0",
    "Model": "emoji",
    "Lora": "a.safetensors:0.5",
}
SAMPLES |= {"Embedding": "b.safetensors:word", "Picture": "in.png", "Pictures": "in.png", "Latents": "in.png"}


def sample(o):
    """A value of this option, as text on a command line."""
    if o.choices is not None:
        return str(o.choices[-1])
    if o.name == "hires_scale":  # which other shares are too small for
        return "1.5"
    return SAMPLES[next(name for name, kind in KINDS.items() if kind is o.kind)]


@pytest.mark.parametrize(("cls", "o"), ALL, ids=lambda value: getattr(value, "name", ""))
def test_flag_record_and_back(cls, o, tmp_path, monkeypatch):
    """What a flag says is written into a picture, read from it as a flag, and means the same again."""
    monkeypatch.chdir(tmp_path)
    for name in ("in.png", "a.safetensors", "b.safetensors"):
        Path(name).write_text("")
    assert o.help and o.group in options.GROUPS + (options.FILES,)
    if o.kind is A_CONTROL:  # given by a flag for each of its parts, which are tested by themselves
        return
    flag = [o.flag] if o.kind is KINDS["bool"] else [o.flag, sample(o)]
    name = o.key if cls is Control else o.name
    given = getattr(flags.generate_parser().parse_args(flag), name)
    value = given[0] if cls is Control else given
    said = json.loads(json.dumps(o.record(SimpleNamespace(**{o.name: value}))))
    one = said[0] if o.nargs is not None else said
    again = flags.generate_parser().parse_args(record.flags_of(o, one, Path("a.png")))
    assert getattr(again, name) == given


STRICT = [o for _, o in ALL if o.choices is not None or o.kind in (KINDS["int"], KINDS["float"], KINDS["bool"])]


@pytest.mark.parametrize("o", STRICT, ids=lambda o: o.name)
def test_what_cannot_be_is_refused(o, capsys):
    """By the flag and by the keyword, in one line that names it."""
    wrong = "x" if o.choices is None else "no such choice"
    if o.kind is not KINDS["bool"]:
        with pytest.raises(SystemExit) as stop:
            flags.generate_parser().parse_args([o.flag, wrong])
        assert stop.value.code == 2
        assert f"argument {o.flag}: expected" in capsys.readouterr().err
    for value in (wrong, [1, "y"], object()):
        with pytest.raises(UsageError, match=f"^{o.name} should be "):
            o.take([value] if o.many else value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 2.5}, "steps should be a whole number, 1 or more, got 2.5"),
        ({"steps": True}, "steps should be"),
        ({"guidance_scale": float("nan")}, "guidance_scale should be a number, got nan"),
        ({"long_prompt": 1}, "long_prompt should be True or False, got 1"),
        ({"seeds": ["x"]}, "seeds should be a whole number, or random, got 'x'"),
        ({"strength": 0.5}, "strength has no meaning without an image"),
        ({"fit": "crop"}, "fit has no meaning without an image"),
        ({"control_every_step": True}, "control_every_step has no meaning without a control"),
        ({"cache_interval": 1.5}, "cache_interval should be a whole number, 1 or more, got 1.5"),
        ({"seeds": b"3"}, "seeds should be .* got b'3'"),
        ({"seeds": [True]}, "seeds should be .* got True"),
        ({"seed": 1, "seeds": 2}, "seed and seeds are the same; give one of them"),
        ({"guidance_scale": 10**400}, "guidance_scale should be a number, got 1000*...$"),
        ({"guidance_scale": np.ones(2)}, "guidance_scale should be a number, got an array \\(2,\\) of float64"),
        ({"negative_prompt": "\ud800"}, "negative_prompt should be text in UTF-8"),
        ({"image": 3}, "image should be a picture: .* got 3"),
        ({"image": np.zeros((3, 8, 8))}, "image should be a picture: .* got an array \\(3, 8, 8\\) of float64"),
        ({"image": np.full((8, 8, 3), 2.0)}, "image should be a picture"),
        ({"image": np.full((8, 8, 3), np.nan)}, "image should be a picture"),
        ({"image": np.zeros((8, 0, 3), np.uint8)}, "image should be a picture"),
        ({"image": np.zeros((8, 8, 3), np.int64)}, "image should be a picture"),
        ({"image": ""}, "image should be a picture"),
        ({"controls": "x"}, "controls should be a Control, got 'x'"),
        ({"cache": DeepCache}, "cache should be one of the policies"),
        ({"cache": b"x"}, "cache should be one of the policies"),
        ({"outpaint": (8, 0, 8)}, "outpaint should be pixels, 0 or more: one number, or LEFT,TOP,RIGHT,BOTTOM, got"),
        ({"outpaint": 0}, "outpaint should be pixels"),
        ({"outpaint": "8,0,-8,0"}, "outpaint should be pixels"),
        ({"outpaint": 8}, "outpaint has no meaning without an image"),
        ({"mask_padding": 8}, "mask_padding has no meaning without a mask"),
        ({"latents": 3}, "latents should be a file, or an array \\(N, height, width, channels\\), got 3"),
    ],
)
def test_python_values(values, message):
    with pytest.raises(UsageError, match=message):
        declared.taken(Options, values)


def test_python_values_that_make_sense_are_taken():
    made = declared.taken(Options, {"steps": 20.0, "seeds": 3, "guidance_scale": 2, "cache": "pab"})
    assert (made.steps, made.seeds, made.guidance_scale, made.cache) == (20, (3,), 2.0, ("pab",))
    assert declared.taken(Options, {"seeds": np.arange(2), "controls": None}) == Options(seeds=(0, 1))
    picture = np.zeros((8, 8, 3), np.uint8)
    assert declared.taken(Options, {"image": picture, "mask": picture[..., 0]}).image is picture
    made = declared.taken(
        Options, {"seed": mx.array(3), "steps": np.float32(4), "long_prompt": np.True_, "cache": "pab"}
    )
    assert (made.seeds, made.steps, made.long_prompt) == ((3,), 4, True)
    assert declared.taken(Options, {"seeds": 2**70}).seeds == (2**70,)  # as any other
    assert (
        declared.taken(Options, {"seeds": np.array(7)}).seeds == declared.taken(Options, {"seeds": 7.0}).seeds == (7,)
    )


def test_pictures_in_memory_are_those_of_files(tmp_path):
    """Bytes, open files, arrays of any library and of either range."""
    drawn = smooth(8, 12)
    drawn.save(tmp_path / "a.png")
    pixels = np.asarray(drawn)
    for same in (
        drawn,
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(),
        bytearray((tmp_path / "a.png").read_bytes()),
        io.BytesIO((tmp_path / "a.png").read_bytes()),
        pixels,
        pixels / 255,
        (pixels / 255).astype(np.float32),
        mx.array(pixels),
        torch.tensor(pixels),
        np.dstack([pixels, np.full((8, 12), 255, np.uint8)]),
    ):
        assert np.array_equal(read_picture(declared.taken(Options, {"image": same}).image), pixels)
    for mask in (pixels[..., 0] > 99, (pixels[..., :1] > 99) * np.uint8(255), (pixels[..., 0] > 99).astype(float)):
        taken = declared.taken(Options, {"image": drawn, "mask": mask}).mask
        assert np.array_equal(np.asarray(read_mask(taken)) > 0, pixels[..., 0] > 99)


@pytest.mark.parametrize(
    ("flags", "keywords", "words"),
    [
        (["--height", "60"], {"height": 60}, "{height} should be a positive multiple of 8 pixels, got 60; try 64"),
        (["--strength", "0.5"], {"strength": 0.5}, "{strength} has no meaning without an {image}"),
        (
            ["--control-every-step"],
            {"control_every_step": True},
            "{control_every_step} has no meaning without a {control}",
        ),
        (["--min-psnr", "30"], {"min_psnr": 30}, "{min_psnr} is for picking a cache"),
        (["--refiner-start", "0.5"], {"refiner_start": 0.5}, "{refiner_start} has no meaning without a {refiner}"),
    ],
)
def test_messages_name_options_as_their_reader_does(pipeline, checkpoint, capsys, flags, keywords, words):
    names = {name: name for name in ("height", "strength", "image", "min_psnr", "refiner_start", "refiner", "control")}
    names["control_every_step"] = "control_every_step"
    with pytest.raises(UsageError) as caught:
        pipeline("sd15").settings("a cat", **keywords)
    assert str(caught.value).startswith(words.format(**names))
    assert main_generate(["--model", str(checkpoint("sd15")), "--prompt", "a cat", *flags]) == 2
    named = {name: "--" + name.replace("_", "-") for name in names} | {"control": "--controlnet"}
    assert f"error: {words.format(**named)}" in capsys.readouterr().err


def test_keywords_that_are_none():
    for kind in (TypeError, UsageError):  # Python's own kind of error, and the package's
        with pytest.raises(kind, match="there is no option 'guidence_scale'; did you mean guidance_scale"):
            declared.taken(Options, {"guidence_scale": 2})
    with pytest.raises(UsageError, match="'num_inference_steps'; here it is steps"):
        declared.taken(Options, {"num_inference_steps": 2})


@pytest.mark.parametrize(
    ("values", "taken"),
    [
        ({"loras": "x"}, ((Path("x"), 1.0),)),
        ({"lora": "x:0.5"}, ((Path("x"), 0.5),)),
        ({"loras": ("x", 0.5)}, (("x", 0.5),)),
        ({"loras": ["x", ["y", 2]]}, ((Path("x"), 1.0), ("y", 2.0))),
        ({"loras": [Path("x")]}, ((Path("x"), 1.0),)),
        ({"loras": ("x", "y")}, ((Path("x"), 1.0), (Path("y"), 1.0))),
        ({"loras": None}, ()),
        ({"loras": {"x": 1.0}}, None),
        ({"loras": [3]}, None),
        ({"loras": [("x", "y")]}, None),
        ({"loras": [("x", 1, 2)]}, None),
        ({"loras": [("x", float("nan"))]}, None),
        ({"loras": b"x"}, None),
        ({"loras": [""]}, None),
    ],
)
def test_loras_in_python(values, taken):
    if taken is not None:
        assert declared.taken(ModelOptions, values).loras == taken
    else:
        with pytest.raises(UsageError, match="^loras should be FILE or FILE:SCALE"):
            declared.taken(ModelOptions, values)


@pytest.mark.parametrize(
    ("prompt", "given", "message"),
    [
        (None, {}, "Stable Diffusion 1.x draws from text: give it a prompt"),
        ("\ud800", {}, "prompt should be text"),
        (b"cat", {}, "prompt should be text in UTF-8, or several in a list, got b'cat'"),
        (["a", 3], {}, "prompt should be text in UTF-8, or several in a list, got 3"),
        ({"a": 1}, {}, "prompt should be text"),
        (["a", "b"], {}, r"one prompt, or one a seed \(1\), got 2"),
        (
            "a",
            {"latents": np.zeros((1, 4, 8, 8), "f")},
            r"latents should have shape \(1, 8, 8, 4\), \(N, height, width, channels\), and these have channels first: "
            r"transpose\(0, 2, 3, 1\) them; for 1 pictures of 64 x 64, got \(1, 4, 8, 8\)",
        ),
        ("a", {"latents": mx.zeros((8, 8, 4))}, r"shape \(N, height, width, channels\), got an array \(8, 8, 4\)"),
        ("a", {"latents": np.zeros((1, 8, 8, 4), int)}, "of floating point .* of int64"),
        ("a", {"latents": np.full((1, 8, 8, 4), np.nan)}, "latents hold NaN"),
        ("a", {"latents": np.array("x")}, "latents should be an array|a file, or an array"),
        ("a", {"prompt_weights": 3}, "should be True or False, got 3"),
    ],
)
def test_prompts_and_latents_in_python(pipeline, prompt, given, message):
    with pytest.raises(UsageError, match=message):
        pipeline("sd15").settings(prompt, height=64, width=64, **given)


def test_latents_are_taken_from_any_library(pipeline):
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4))
    for same in (noise, noise.astype(np.float32), mx.array(noise), torch.tensor(noise)):
        settings = pipeline("sd15").settings("a", height=64, width=64, latents=same)
        assert np.array_equal(settings.noise, noise.astype(np.float32))
    with pytest.raises(UsageError, match=r"shape \(N, height, width, 4\), got \(1, 4, 8, 8\)"):
        pipeline("sd15").decode(noise.transpose(0, 3, 1, 2))


def test_one_more_option_is_found_everywhere(pipeline, checkpoint, tmp_path, monkeypatch, capsys):
    declared = option(None, "how much it sparkles", PICTURE, metavar="X", check=SHARE, a1111="Sparkle")
    more = make_dataclass("Options", [("sparkle", "float | None", declared)], bases=(Options,), frozen=True)
    for module in (options, settings, record, flags, generate):
        monkeypatch.setattr(module, "Options", more)
    monkeypatch.chdir(tmp_path)

    assert pipeline("sd15").settings("a cat", sparkle=0.25).sparkle == 0.25  # a keyword, and a setting
    with pytest.raises(UsageError, match="sparkle should be above 0 and at most 1, got 3"):
        pipeline("sd15").settings("a cat", sparkle=3)
    draw = ["--model", str(checkpoint("sd15")), "--prompt", "a cat", "--steps", "1", "--height", "64", "--width", "64"]
    assert main_generate([*draw, "--sparkle", "0.5"]) == 0  # a flag
    with Image.open("out.png") as image:
        assert json.loads(image.text["mlx_deepcache"])["sparkle"] == 0.5  # recorded
        assert "Sparkle: 0.5" in image.text["parameters"]
    assert main_generate(["--from-image", "out.png", "--output", "again.png"]) == 0  # and back
    with Image.open("again.png") as image:
        assert json.loads(image.text["mlx_deepcache"])["sparkle"] == 0.5
    assert record.from_a1111("a cat\nSteps: 2, Sparkle: 0.5", Path("a.png"))[0]["sparkle"] == "0.5"
    with pytest.raises(SystemExit):
        main_generate([*draw, "--sparkle", "3"])
    assert "argument --sparkle: expected above 0 and at most 1, got '3'" in capsys.readouterr().err
    help_text = flags.generate_parser().format_help()
    assert "how much it sparkles" in help_text.partition(PICTURE)[2].partition("which model")[0]  # in its group
