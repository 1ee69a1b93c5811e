"""Errors that suggest what was meant, help in groups, completion, and the installed commands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_deepcache.apps.calibrate import calibrate_parser, main_calibrate
from mlx_deepcache.apps.convert import convert_parser, main_convert
from mlx_deepcache.apps.flags import generate_parser
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.apps.link import main_comfyui
from mlx_deepcache.apps.serve import main_serve, main_ui

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "x", "--schedular", "euler"], "--schedular euler; did you mean --scheduler?"),
        (["--prompt", "x", "--guidance_scale=3"], "did you mean --guidance-scale?"),
        (["--prompt", "x", "--scheduler", "dpm++"], "got 'dpm++'; did you mean dpm++2m?"),
        (["--prompt", "x", "--scheduler", "Euler_a"], "did you mean euler-a?"),
        (["--prompt", "x", "--dtype", "fp16"], "expected one of auto, float16"),
        (["--prompt", "x", "--rng", "cuda"], "did you mean torch-cuda?"),
        (["--prompt", "x", "--quantize", "5"], "expected one of 4, 8, got 5"),
        (["--prompt", "x", "nonsense"], "unrecognized arguments: nonsense"),
        ([], "--prompt TEXT"),
    ],
)
def test_suggestions(capfd, monkeypatch, tmp_path, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main_generate(flags)
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"generate\.py: error: [^\n]*\n", err)
    assert words in err


@pytest.mark.parametrize(
    "parser", [generate_parser(), convert_parser(), calibrate_parser()], ids=["generate", "convert", "calibrate"]
)
def test_every_flag_is_explained(parser):
    for action in parser._actions:
        assert action.help, action.option_strings
    assert len(parser.format_help().splitlines()) < 250


def completions(line):
    """What argcomplete answers to a shell, by its own protocol: on file descriptor 8, of a line up to the cursor."""
    argcomplete = pytest.importorskip("argcomplete")
    assert argcomplete
    read, write = os.pipe()
    script = f"import os; os.dup2({write}, 8)\nfrom mlx_deepcache.apps.generate import main_generate\nmain_generate()"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    subprocess.run([sys.executable, "-c", script], pass_fds=[write], env=environment, cwd=REPOSITORY, timeout=60)
    os.close(write)
    with os.fdopen(read) as answer:
        return [word.strip() for word in answer.read().split("\n") if word.strip()]


def test_completion():
    assert {"--guidance-scale", "--grid"} <= set(completions("generate.py --prompt x --g"))
    assert completions("generate.py --prompt x --scheduler eu") == ["euler", "euler-a"]


def test_completion_of_models_and_caches():
    assert completions("generate.py --model sdx") == ["sdxl", "sdxl-refiner", "sdxl-turbo"]
    assert completions("generate.py --model emo") == ["emoji", "emoji-ddpm"]
    assert "docs/" in completions("generate.py --model do")
    assert completions("generate.py --refiner sdxl-r") == ["sdxl-refiner"]
    assert completions("generate.py --cache t") == ["taylorseer", "tgate"]
    assert completions("generate.py --cache deepcache:in") == ["deepcache:interval="]
    assert completions("generate.py --cache deepcache:interval=3,br") == ["deepcache:interval=3,branch="]
    assert completions("generate.py --cache nothing:") == []


def test_markers_and_entry_points():
    """argcomplete looks for its marker near the start of a script, or of the module that an entry point names."""
    entries = dict(re.findall(r'"(mlx-deepcache-\w+) = ([\w.]+:\w+)"', (REPOSITORY / "setup.py").read_text()))
    assert entries == {
        f"mlx-deepcache-{main.__name__.removeprefix('main_')}": f"{main.__module__}:{main.__name__}"
        for main in (main_generate, main_convert, main_calibrate, main_serve, main_ui, main_comfyui)
    }
    modules = [entry.partition(":")[0].replace(".", "/") + ".py" for entry in entries.values()]
    for file in ("generate.py", "convert.py", "serve.py", *modules):
        assert "PYTHON_ARGCOMPLETE_OK" in (REPOSITORY / file).read_text()[:1024]
