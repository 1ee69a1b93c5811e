"""Options are declared once: each is a keyword, a flag, a check and a part of a picture's settings by that alone."""

import json
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mlx_deepcache.apps import flags, generate
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.errors import UsageError
from mlx_deepcache.generation import options, record, settings
from mlx_deepcache.generation.options import KINDS, PICTURE, SHARE, Control, ModelOptions, Options, option, options_of

ALL = [(cls, o) for cls in (ModelOptions, Options, Control) for o in options_of(cls)]
SAMPLES = {
    "str": "a word",
    "Model": "emoji",
    "Seed": "3",
    "int": "2",
    "float": "0.5",
    "Policy": "pab",
    "Lora": "a.safetensors:0.5",
}
SAMPLES |= {"Embedding": "b.safetensors:word", "Picture": "in.png", "Latents": "in.png"}


def sample(o):
    """A value of this option, as text on a command line."""
    if o.choices is not None:
        return str(o.choices[-1])
    return SAMPLES[next(name for name, kind in KINDS.items() if kind is o.kind)]


@pytest.mark.parametrize(("cls", "o"), ALL, ids=lambda value: getattr(value, "name", ""))
def test_flag_record_and_back(cls, o, tmp_path, monkeypatch):
    """What a flag says is written into a picture, read from it as a flag, and means the same again."""
    monkeypatch.chdir(tmp_path)
    for name in ("in.png", "a.safetensors", "b.safetensors"):
        Path(name).write_text("")
    assert o.help and o.group in options.GROUPS + (options.FILES,)
    if o.kind is KINDS["Control"]:  # given by a flag for each of its parts, which are tested by themselves
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
    ],
)
def test_python_values(values, message):
    with pytest.raises(UsageError, match=message):
        options.taken(Options, values)


def test_python_values_that_make_sense_are_taken():
    made = options.taken(Options, {"steps": 20.0, "seeds": 3, "guidance_scale": 2, "cache": "pab"})
    assert (made.steps, made.seeds, made.guidance_scale, made.cache) == (20, (3,), 2.0, ("pab",))
    assert options.taken(Options, {"seeds": np.arange(2), "controls": None}) == Options(seeds=(0, 1))
    picture = np.zeros((8, 8, 3), np.uint8)
    assert options.taken(Options, {"image": picture, "mask": picture[..., 0]}).image is picture
    with pytest.raises(TypeError, match="there is no option 'guidence_scale'; did you mean guidance_scale"):
        options.taken(Options, {"guidence_scale": 2})


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
