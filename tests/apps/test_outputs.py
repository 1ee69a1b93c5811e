"""No file is lost: what is written names nothing that is read, and pictures from before stay."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load_file, save_file

from mlx_deepcache.apps.calibrate import calibrate_parser, main_calibrate
from mlx_deepcache.apps.convert import convert_parser, main_convert
from mlx_deepcache.apps.flags import Named, generate_parser
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.apps.outputs import Pattern, safe
from mlx_deepcache.errors import UsageError
from mlx_deepcache.media.files import whole

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def draw(checkpoint, monkeypatch):
    """draw(*flags): generate.py's exit code; one step of 32 x 32 pixels."""

    def run(*flags, main=main_generate, model=None):
        small = ["--prompt", "a cat", "--steps", 1, "--height", 32, "--width", 32, "--scheduler", "ddim", "--quiet"]
        flags = ["--model", model or checkpoint("sd15"), *small, *flags] if main is main_generate else flags
        try:
            return main([str(flag) for flag in flags])
        except SystemExit as stop:
            return stop.code

    return run


def content():
    return {str(file): file.read_bytes() for file in Path().rglob("*") if file.is_file()}


def settings(file):
    with Image.open(file) as image:
        return json.loads(image.text["mlx_deepcache"])


# --------------------------------------------------------------------------------------------- what is read is not lost


@pytest.mark.parametrize("parser", [generate_parser(), convert_parser(), calibrate_parser()])
def test_every_flag_that_names_a_file_says_so(parser):
    """By what the help calls its value, so that none can be forgotten."""
    for action in parser._actions:
        if isinstance(action.metavar, str) and re.match(r"(FILE|DIR|SRC|M\b)", action.metavar):
            assert isinstance(action.type, Named), action.option_strings


INPUTS = {
    "--image": "in.png",
    "--mask": "in.png",
    "--from-image": "in.png",
    "--control-image": "in.png",
    "--lora": "in.safetensors",
    "--embedding": "in.safetensors",
    "--latents": "in.safetensors",
    "--vae": "in.safetensors",
    "--refiner": "in.safetensors",
    "--controlnet": "in.safetensors",
    "--preview-vae": "in.safetensors",
    "--model": "in.safetensors",
    "--prompt-file": "in.json",
}
OUTPUTS = {"--output": ".png", "--preview": ".png", "--save-latents": ".safetensors", "--stats": ".json"}


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
@pytest.mark.parametrize("flag", INPUTS)
def test_an_output_that_is_an_input(draw, capfd, flag, link):
    """Under its own name, through a link, and as the same file by another name."""
    for name in ("in.safetensors", "in.json"):
        Path(name).write_bytes(b"irreplaceable")
    info = PngInfo()
    info.add_itxt("mlx_deepcache", '{"prompt": "a cat"}')
    Image.new("RGB", (8, 8)).save("in.png", pnginfo=info)
    file = Path(INPUTS[flag])
    output = next(output for output, suffix in OUTPUTS.items() if suffix == file.suffix)
    target = file
    if link is not None:
        target = file.with_stem("other")
        link(file, target)
    before = content()
    value = {"--lora": f"{file}:0.8", "--embedding": f"{file}:word"}.get(flag, str(file))
    prompt = [] if flag in ("--prompt-file", "--from-image") else ["--prompt", "x"]
    model = [] if flag == "--model" else ["--model", "nowhere"]  # nothing else is looked at first
    assert main_generate([*prompt, *model, flag, value, output, f"./{target}"]) == 2
    assert f"error: {output} and {flag} name the same file, {target}\n" in capfd.readouterr().err
    assert content() == before


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
def test_an_output_inside_the_model(draw, checkpoint, capfd, here, name):
    model = shutil.copytree(checkpoint("sd15"), here / "mm")
    (here / "other.json").symlink_to(model / name)
    before = content()
    for file in (model / name, "other.json"):
        assert draw("--stats", file, model="mm") == 2
        assert "--stats and --model name the same file" in capfd.readouterr().err
    assert content() == before
    assert draw("--stats", "mm/new.json", "--output", "mm/new.png", "--overwrite", model="mm") == 0  # costs nothing
    assert draw("--output", "mm/new.png", "--overwrite", model="mm") == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stats", "s.txt"], "--stats should end in .json, got 's.txt'"),
        (["--save-latents", "l.npy"], "--save-latents should end in .safetensors, got 'l.npy'"),
        (["--preview", "p.jpg"], "--preview should end in .png"),
        (["--preview", "out.png"], "--output and --preview name the same file"),
        (["--save-latents", "../{here}/x.safetensors", "--stats", "x.safetensors"], "--stats should end in .json"),
        (["--output", "a.png", "--preview", "link.png"], "name the same file"),
    ],
)
def test_outputs_that_cannot_be(draw, capfd, here, flags, words):
    Path("link.png").symlink_to("a.png")
    assert draw(*(flag.format(here=here.name) for flag in flags)) == 2
    assert words in capfd.readouterr().err
    assert os.listdir() == ["link.png"]


def test_the_other_commands(draw, checkpoint, capfd):
    Path("p.json").write_text("a cat\n")
    assert draw("--prompts", "p.json", "--output", "p.json", main=main_calibrate) == 2
    assert "--output and --prompts name the same file" in capfd.readouterr().err
    Path("w.safetensors").write_text("w")
    assert draw("--model", "w.safetensors", "--output", "w.safetensors", main=main_convert) == 2
    assert "--output and --model name the same file" in capfd.readouterr().err
    assert content() == {"p.json": b"a cat\n", "w.safetensors": b"w"}


def test_the_picture_that_it_starts_from_stays(draw, capfd):
    """Also under the default name, which nobody wrote."""
    Image.new("RGB", (32, 32)).save("out.png")
    before = Path("out.png").read_bytes()
    assert draw("--image", "out.png", "--strength", 1) == 0
    assert (Path("out.png").read_bytes(), sorted(os.listdir())) == (before, ["out-2.png", "out.png"])
    assert draw("--image", "out.png", "--strength", 1, "--overwrite") == 2
    assert "--output and --image name the same file, out.png" in capfd.readouterr().err
    os.link("out.png", "x-2.png")
    assert draw("--image", "out.png", "--strength", 1, "--num-images", 2, "--output", "x.png", "--overwrite") == 2
    assert "--output and --image name the same file, x-2.png" in capfd.readouterr().err
    assert draw("--image", "out.png", "--strength", 1, "--output", "{n}.png", "--overwrite") == 0
    os.link("out.png", "2.png")  # a name that is known only when it is written
    assert draw("--image", "out.png", "--strength", 1, "--output", "{n}.png", "--seed", 1, 2, "--overwrite") == 0
    assert Path("2.png").read_bytes() == before and Path("2-2.png").is_file()


# ------------------------------------------------------------------------------------------------- devices and pipes


@pytest.mark.parametrize("flag", OUTPUTS)
def test_pipes_are_written_to(draw, flag):
    os.mkfifo("pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append(Path("pipe").read_bytes()))
    reader.start()
    assert draw(flag, "pipe") == 0
    reader.join(20)
    assert Path("pipe").is_fifo()
    start = {".png": b"\x89PNG", ".json": b"{\n"}.get(OUTPUTS[flag])
    assert got[0].startswith(start) if start else b"latents" in got[0]
    assert sorted(os.listdir()) == sorted({"pipe", "out.png"} - {"out.png" if flag == "--output" else ""})


def test_devices_are_written_to(draw):
    before = os.stat("/dev/null")
    everything = [part for flag in OUTPUTS for part in (flag, "/dev/null")]
    assert draw(*everything, "--num-images", 2, "--grid", "--overwrite") == 0
    assert os.stat("/dev/null") == before
    assert os.listdir() == []
    assert not Path("/dev/null-grid").exists()


def test_stdout_is_written_to(checkpoint):
    """Nothing but the picture, whether it is a pipe or a file."""
    command = [sys.executable, REPOSITORY / "generate.py", "--model", checkpoint("sd15"), "--prompt", "a cat"]
    command += ["--steps", "1", "--height", "32", "--width", "32", "--output", "/dev/stdout"]
    piped = subprocess.run(command, capture_output=True, check=True).stdout
    with open("x.png", "wb") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.PIPE, check=True)
    assert piped.startswith(b"\x89PNG") and piped.endswith(b"IEND\xaeB`\x82")
    assert Path("x.png").read_bytes() == piped
    assert os.listdir() == ["x.png"]


# ------------------------------------------------------------------------------------------------------- free numbers


def test_free_numbers(draw, capfd):
    """A second run costs the first one nothing, and says what it is called."""
    assert draw() == 0
    first = Path("out.png").read_bytes()
    assert draw("--seed", 5, "--stats", "s.json") == 0
    assert (Path("out.png").read_bytes(), settings("out-2.png")["seed"]) == (first, 5)
    stats = json.loads(Path("s.json").read_text())
    assert (stats["pictures"], stats["seeds"]) == (["out-2.png"], [5])
    assert draw("--num-images", 2, "--grid") == 0
    assert {"out-3.png", "out-4.png", "out-grid.png"} <= set(os.listdir())
    assert draw("--num-images", 2, "--grid") == 0
    assert {"out-5.png", "out-6.png", "out-grid-2.png"} <= set(os.listdir())
    Path("out-3.png").unlink()
    assert draw() == 0  # the first number that is free
    assert settings("out-3.png")["seed"] == 0
    assert draw("--seed", 9, "--overwrite") == 0
    assert settings("out.png")["seed"] == 9
    assert draw("--seed", 9, "--num-images", 2, "--overwrite") == 0
    assert [settings(f"out-{i}.png")["seed"] for i in (1, 2)] == [9, 10]
    assert len(os.listdir()) == 10  # with the statistics


def test_names_that_others_take_meanwhile(draw, monkeypatch):
    """A file that comes to be between the look and the writing stays."""
    link = os.link

    def late(source, target):
        if Path(target).name in ("out.png", "out-2.png"):
            Path(target).write_text("another program's")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert draw() == 0
    assert sorted(os.listdir()) == ["out-2.png", "out-3.png", "out.png"]
    assert Path("out-2.png").read_text() == "another program's"

    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    assert draw() == 0
    assert settings("out-4.png")["seed"] == 0
    with pytest.raises(FileExistsError), whole(Path("out.png"), replace=False) as part:
        part.write_text("x")
    assert Path("out.png").read_text() == "another program's"


def test_links_and_folders_in_the_way(draw, capfd):
    Path("out.png").symlink_to("nowhere.png")  # taken, though it leads nowhere
    assert draw() == 0
    assert os.readlink("out.png") == "nowhere.png" and not Path("nowhere.png").exists()
    Path("x-2.png").mkdir()
    assert draw("--output", "x.png", "--num-images", 2) == 1
    assert "cannot write x-2.png: it is a folder" in capfd.readouterr().err


def test_other_outputs_keep_their_names(draw):
    Path("now.png").write_text("an older preview")
    assert draw("--preview", "x-2.png", "--output", "x.png", "--num-images", 2) == 0
    assert sorted(os.listdir()) == ["now.png", "x-1.png", "x-2.png", "x-3.png"]
    assert [settings(f"x-{i}.png")["seed"] for i in (1, 3)] == [0, 1]


# ----------------------------------------------------------------------------------------------------------- patterns


def test_pattern(draw):
    assert (
        draw("--prompt", "../a cat/\n: 猫", "--seed", 7, 8, "--output", "{prompt}-{seed:04}-{steps}.png", "--grid") == 0
    )
    names = ["_a cat_ _ 猫-0007-1.png", "_a cat_ _ 猫-0008-1.png", "_a cat_ _ 猫-0007-1-grid.png"]
    assert sorted(os.listdir()) == sorted(names)
    assert draw("--seed", 7, 8, "--output", "{{x}}{prompt}.png", "--overwrite") == 0  # one name for two pictures
    assert [settings(name)["seed"] for name in ("{x}a cat.png", "{x}a cat-2.png")] == [7, 8]


def test_pattern_knows_every_setting(draw):
    assert (
        draw("--output", "{model}_{n:02}_{width}_{scheduler}_{guidance_scale}_{negative_prompt}_{date}_{time}.png") == 0
    )
    assert re.fullmatch(r"sd15\d*_01_32_ddim_7\.5___\d{4}-\d\d-\d\d_\d{6}\.png", *os.listdir())


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{promt}.png", "there is no field {promt}; did you mean prompt?"),
        ("{}.png", "there is no field {}"),
        ("{prompt.__class__}.png", "there is no field {prompt.__class__}"),
        ("{seed!r}.png", "a field is {seed}"),
        ("{seed:999999999}.png", "{seed:03}"),
        ("{seed.png", "a brace itself is written twice"),
        ("seed}.png", "a brace itself is written twice"),
        ("{seed}/x.png", "not its folder's"),
        ("{seed}.jpg", "should end in .png"),
    ],
)
def test_patterns_that_cannot_be(draw, capfd, pattern, words):
    assert draw("--output", pattern) == (1 if "/" in pattern else 2)
    assert words in capfd.readouterr().err or "/" in pattern
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red apple", "a red apple"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("..", "_"),
        ("", "_"),
        ("-rf *", "rf _"),
        ("a\x1b[31m\n\u202eb", "a [31m b"),
        ("a" * 500, "a" * 120),
        ("猫" * 100, "猫" * 40),
        ("e\u0301", "é"),
    ],
)
def test_safe(text, expected):
    assert safe(text) == expected


def test_a_long_pattern_is_a_name(here):
    name = Pattern("{prompt}{negative_prompt}{model}{vae}-{seed}.png").fill(
        {"prompt": "p" * 500, "negative_prompt": "n" * 500, "model": "m" * 500, "vae": "v", "seed": 2**90}, 1
    )
    assert len(name) <= 224 and name.endswith(".png")
    with pytest.raises(UsageError, match="width"):
        Pattern("{widht}.png")


# --------------------------------------------------------------------------------------------------------- random seeds


def test_random_seed(draw, capfd, pipeline):
    assert draw("--seed", "random", "--stats", "s.json", "--num-images", 2) == 0
    seed = settings("out-1.png")["seed"]
    assert settings("out-2.png")["seed"] == seed + 1
    assert json.loads(Path("s.json").read_text())["seeds"] == [seed, seed + 1]
    assert 0 <= seed < 2**32 and seed != 0
    assert draw("--seed", seed, "--output", "again.png") == 0
    assert np.abs(pixels("again.png") - pixels("out-1.png")).max() <= 1
    result = [pipeline("sd15").settings("a cat", seeds=seeds).seeds for seeds in ("random", ["random", 3])]
    assert len(result[0]) == 1 and result[1][1] == 3 and result[0][0] != result[1][0]


def test_random_seed_is_told(checkpoint, capsys):
    flags = ["--steps", "1", "--height", "32", "--width", "32", "--prompt", "x", "--seed", "random"]
    assert main_generate(["--model", str(checkpoint("sd15")), *flags]) == 0
    assert f"seed: {settings('out.png')['seed']}\n" in capsys.readouterr().out


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


# ---------------------------------------------------------------------------------------------------- pictures of steps


def test_steps_do_not_mix(draw, capfd):
    assert draw("--save-steps", "steps", "--steps", 3) == 0
    Path("steps/notes.txt").write_text("mine")
    before = content()
    assert draw("--save-steps", "steps", "--steps", 2) == 0
    assert sorted(os.listdir("steps-2")) == ["step-001.png", "step-002.png"]
    assert {name: data for name, data in content().items() if name in before} == before
    assert draw("--save-steps", "steps", "--overwrite") == 0  # only its own are cleared
    assert sorted(os.listdir("steps")) == ["notes.txt", "step-001.png"]
    Path("plain").mkdir()
    assert draw("--save-steps", "plain") == 0  # an empty one is used
    assert os.listdir("plain") == ["step-001.png"]


def test_a_step_that_is_read_is_not_cleared(draw, capfd):
    assert draw("--save-steps", "steps") == 0
    before = content()
    assert draw("--save-steps", "steps", "--image", "steps/step-001.png", "--strength", 1, "--overwrite") == 2
    assert "--save-steps and --image name the same file, steps/step-001.png" in capfd.readouterr().err
    assert content() == before


def test_latents_and_previews_are_whole(draw):
    """What keeps its name is replaced by renaming."""
    Path("l.safetensors").write_text("old")
    assert draw("--save-latents", "l.safetensors") == 0
    assert load_file("l.safetensors")["latents"].shape == (1, 4, 4, 4)
    save_file({"latents": np.zeros((1, 4, 4, 4), "f")}, "n.safetensors")
    assert draw("--latents", "n.safetensors", "--save-latents", "n.safetensors") == 2


# ----------------------------------------------------------------------------------------------- what is there already


def test_resume_draws_what_lacks_and_leaves_what_is_there(draw, capfd):
    how = ["--num-images", 4, "--seed", 3]
    assert draw(*how) == 0
    before = content()
    Path("out-2.png").unlink()
    Path("out-4.png").unlink()
    times = {file: os.stat(file).st_mtime_ns for file in content()}
    assert draw(*how, "--resume", "--stats", "stats.json") == 0
    assert {file: os.stat(file).st_mtime_ns for file in times} == times
    drawn = json.loads(Path("stats.json").read_text())
    assert [batch["seeds"] for batch in drawn] == [[4], [6]]
    Path("stats.json").unlink()
    assert content().keys() == before.keys()
    for name in before:
        assert settings(name) == dict(settings("out-1.png"), seed=settings(name)["seed"])
    assert draw(*how, "--resume", "--stats", "stats.json") == 0
    assert json.loads(Path("stats.json").read_text()) == []


def test_resume_takes_no_other_picture_for_its_own(draw):
    """One of other settings keeps its name, as does what is no picture of ours; and is found there the next time."""
    assert draw("--num-images", 3, "--guidance-scale", 2) == 0
    Path("out-2.png").write_bytes(b"not a picture")
    before = content()
    for _ in range(2):
        assert draw("--num-images", 3, "--resume") == 0
        assert {name: content()[name] for name in before} == before
        assert sorted(content()) == [f"out-{i}.png" for i in range(1, 7)]
    assert [settings(f"out-{i}.png")["seed"] for i in (4, 5, 6)] == [0, 1, 2]


def test_resume_by_pattern_and_prompts(draw):
    """Where several have one name, each is found once."""
    Path("prompts.txt").write_text("a dog\na dog\na cat\n")
    how = ["--prompt-file", "prompts.txt", "--output", "{prompt}.png"]

    def run(*more):
        flags = ["--model", "emoji", "--steps", 1, "--height", 32, "--width", 32, "--quiet", *how, *more]
        return main_generate([str(flag) for flag in flags])

    assert run() == 0
    assert sorted(content()) == ["a cat.png", "a dog-2.png", "a dog.png", "prompts.txt"]
    Path("a dog-2.png").unlink()
    assert run("--resume", "--stats", "stats.json") == 0
    assert json.loads(Path("stats.json").read_text())["pictures"] == ["a dog-2.png"]
    assert sorted(content()) == ["a cat.png", "a dog-2.png", "a dog.png", "prompts.txt", "stats.json"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--grid"], "--grid is for all pictures"),
        (["--compare"], "--compare is for all pictures"),
        (["--save-latents", "x.safetensors"], "--save-latents is for all pictures"),
        (["--overwrite"], "leave out --overwrite"),
        (["--no-metadata"], "leave out --no-metadata"),
        (["--seed", "random"], "not --seed random"),
        (["--output", "/dev/null"], "/dev/null has no place for that"),
        (["--output", "out.gif"], "out.gif has no place for that"),
    ],
)
def test_resume_where_it_cannot_be_told_what_was_drawn(draw, capfd, flags, words):
    assert draw("--resume", *flags) == 2
    assert words in capfd.readouterr().err
    assert content() == {}
