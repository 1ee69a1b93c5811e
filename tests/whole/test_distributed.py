"""Several machines, here processes that `mlx.launch` starts on this one, against one alone."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import same, smooth
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny import write_controlnet, write_lora, write_upscaler

from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.apps.messages import pack, unpack
from mlx_deepcache.apps.team import Drawn
from mlx_deepcache.backend import ops
from mlx_deepcache.backend.distributed import _Seal
from mlx_deepcache.cache.deepcache import DeepCache
from mlx_deepcache.cache.forecast import TaylorSeer
from mlx_deepcache.generation.options import Control

GENERATE = Path(__file__).parents[2] / "generate.py"
LAUNCH, SCRIPT = (Path(sys.executable).with_name(name) for name in ("mlx.launch", "generate.py"))
CACHED = ["--cache-interval", 2]
PORT = 20_000 + os.getpid() % 20_000  # not MLX's own, where another test may be listening


def exit_code(flags):
    try:
        return main_generate([str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def flags(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--dtype", "float32", "--steps", 4, "--height", 64, "--width", 64]
    return ["--model", checkpoint("sd15"), "--prompt", "a cat", *small, "--scheduler", "ddim"]


@pytest.fixture
def alone(flags, capfd):
    """alone(*flags): what generate.py prints, drawing in this process."""

    def run(*more):
        capfd.readouterr()
        assert exit_code([*flags, *more]) == 0
        return capfd.readouterr()

    return run


@pytest.fixture
def launch(flags):
    """launch(n, *flags): what generate.py prints, drawn by so many processes; script: run in its place."""

    def run(n, *more, script=GENERATE, python=("--python", sys.executable)):
        command = [LAUNCH, "-n", n, "--starting-port", PORT, *python, script, *flags, *more]
        threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(GENERATE.parent)}
        stdin, hold = os.pipe()  # it reads to the end of its own over and over
        try:
            done = subprocess.run(
                list(map(str, command)),
                stdin=stdin,
                capture_output=True,
                text=True,
                env=os.environ | threads,
                timeout=120,
            )
        finally:
            os.close(stdin)
            os.close(hold)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def script(tmp_path, text):
    """A generate.py with something done before it draws, which knows its `rank`."""
    file = tmp_path / "changed.py"
    start = "import os, sys\nimport mlx_deepcache\nrank = int(os.environ['MLX_RANK'])\n"
    end = "from mlx_deepcache.apps.generate import main_generate\nsys.exit(main_generate())\n"
    file.write_text(start + textwrap.dedent(text) + end)
    return file


def errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def same_files(one, other):
    if not ops.on_gpu():
        return Path(one).read_bytes() == Path(other).read_bytes()
    if Path(one).suffix == ".png":
        return same(values(one), values(other))
    return same(*(mx.load(file)["latents"] for file in (one, other)))


def values(file):
    return np.asarray(Image.open(file)).astype(int)


def test_pictures_are_dealt_out_and_are_those_of_one_machine(launch, alone):
    wanted = ["--num-images", 4, "--grid", "--save-latents"]
    wanted[:0] = ["--save-steps", "steps"]
    said = launch(2, *CACHED, *wanted, "two.safetensors", "--compare", "--output", "two.png", "--stats", "two.json")
    assert re.findall("wrote (.*)", said.stdout) == [
        *(f"two-{i}.png" for i in (1, 2, 3, 4)),
        "two-grid.png",
        "two-compare.png",
    ]
    assert said.stdout.count("full and") == said.stdout.count("PSNR to the uncached") == 2
    alone(*CACHED, *wanted, "one.safetensors", "--output", "one.png")  # its steps are in steps-2
    for step in ("step-001.png", "step-004.png"):
        shown = np.hstack([values(f"steps/{batch}-{step}") for batch in (1, 2)])
        assert same(shown, values(f"steps-2/{step}"))
    for name in (1, 2, 3, 4, "grid"):
        assert same_files(f"two-{name}.png", f"one-{name}.png")
    assert same_files("two.safetensors", "one.safetensors")
    first, second = json.loads(Path("two.json").read_text())
    assert [first["pictures"], second["pictures"]] == [["two-1.png", "two-2.png"], ["two-3.png", "two-4.png"]]
    assert first["machine"].startswith("rank 0 (") and second["machine"].startswith("rank 1 (")


def test_prompts_are_dealt_out_and_one_that_fails_stops_no_other(launch, alone, tmp_path):
    Path("prompts.txt").write_text("a cat\na <lora:none:1> dog\na small tree\n")
    (tmp_path / "loras").mkdir()
    lines = ["--prompt-file", "prompts.txt", "--lora-dir", "loras", "--output", "{prompt}.png"]
    done = launch(2, *lines, script=_without_prompt(tmp_path))
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["a cat.png", "a small tree.png"]
    failed, all_of_it = errors(done)
    assert re.match(r"error: prompt 2, 'a <lora:none:1> dog': rank 1 \(.*\): ", failed)
    assert all_of_it == "error: 1 of 3 prompts could not be drawn"
    alone("--output", "cat.png")
    assert np.array_equal(values("a cat.png"), values("cat.png"))


def _without_prompt(tmp_path):
    return script(tmp_path, "i = sys.argv.index('--prompt')\ndel sys.argv[i : i + 2]\n")


def test_guidance_is_split(launch, alone):
    launch(2, *CACHED, "--split", "guidance", "--output", "two.png", "--save-latents", "two.safetensors")
    alone(*CACHED, "--output", "one.png", "--save-latents", "one.safetensors")
    assert same_files("two.png", "one.png") and same_files("two.safetensors", "one.safetensors")


@pytest.mark.skipif(not SCRIPT.exists(), reason="the package is not installed")
def test_the_installed_script_is_found_as_docs_write_it(launch, alone, monkeypatch):
    """As `generate.py`, by its own Python."""
    monkeypatch.setenv("PATH", f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}")
    said = launch(2, "--num-images", 2, "--quiet", script=SCRIPT.name, python=())
    assert re.findall("wrote (.*)", said.stdout) == []
    alone("--num-images", 2, "--output", "one.png")
    assert all(same_files(f"out-{n}.png", f"one-{n}.png") for n in (1, 2))


def test_guidance_is_split_and_pictures_dealt_out(launch, alone):
    """Two pairs, with a cache that decides on the way: together, in each of them."""
    how = ["--num-images", 3, "--seed", 5, "--cache", "adaptive:threshold=0.3", "--cache", "guidance:end=0.7"]
    how += ["--steps", 8]
    done = launch(4, *how, "--split", "guidance", "--output", "four.png", "--stats", "four.json")
    assert re.findall("wrote (.*)", done.stdout) == ["four-1.png", "four-2.png", "four-3.png"]
    assert done.stderr.count("one of two machines waits") == 1
    first, second = json.loads(Path("four.json").read_text())
    alone(*how[:1], 2, *how[2:], "--output", "pair.png", "--stats", "pair.json")
    alone(*how[:1], 1, "--seed", 7, *how[4:], "--output", "last.png", "--stats", "last.json")
    for ours, file in ((first, "pair.json"), (second, "last.json")):
        expected = json.loads(Path(file).read_text())
        assert [ours[key] for key in ("steps", "unet_macs")] == [expected[key] for key in ("steps", "unet_macs")]
    for number, file in ((1, "pair-1.png"), (2, "pair-2.png"), (3, "last.png")):
        assert same_files(f"four-{number}.png", file)


def test_what_was_finished_is_kept_when_a_machine_goes_and_resume_draws_the_rest(launch, alone, tmp_path):
    goes = """
        from mlx_deepcache.apps.team import Team
        from mlx_deepcache.generation.pipeline import StableDiffusion

        StableDiffusion.together = lambda self, settings: 1
        share, turns = Team.share, []

        def leave(self, *drawn):
            turns.append(drawn)
            if rank == 1 and len(turns) == 2:
                os._exit(7)
            return share(self, *drawn)

        Team.share = leave
    """
    done = launch(2, "--num-images", 5, script=script(tmp_path, goes))
    assert "rank 1 exited with code 7" in done.stderr
    assert [line for line in errors(done) if "no connection to the other machines (rank 1 (" not in line] == []
    kept = sorted(file.name for file in tmp_path.glob("*.png"))
    assert kept in (["out-1.png", "out-2.png"], ["out-1.png", "out-2.png", "out-3.png"])  # rank 0's own may be there
    before = [Path(name).stat().st_mtime_ns for name in kept]
    done = launch(2, "--num-images", 5, "--resume")
    assert f"{len(kept)} of 5 are there already" in done.stdout
    assert re.findall("wrote (.*)", done.stdout) == ["out-3.png", "out-4.png", "out-5.png"][len(kept) - 2 :]
    assert [Path(name).stat().st_mtime_ns for name in kept] == before
    alone("--num-images", 5, "--output", "one.png")
    for i in range(1, 6):
        assert same_files(f"out-{i}.png", f"one-{i}.png")
    assert "5 of 5 are there already" in alone("--num-images", 5, "--resume").out
    assert len(list(tmp_path.glob("*.png"))) == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("os.chdir('there' if rank else '.')", r"unet/diffusion_pytorch_model.safetensors \(\w{12} for \w{12}\)$"),
        ("sys.argv += ['--steps', '5'] * rank", r"steps \(5 for 4\)$"),
    ],
)
def test_a_machine_that_would_draw_something_else_is_named(launch, checkpoint, tmp_path, change, words):
    for folder in (tmp_path, tmp_path / "there"):
        folder.mkdir(exist_ok=True)
        weights = shutil.copytree(checkpoint("sd15"), folder / "model") / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, weights)
    done = launch(2, "--num-images", 2, "--model", "model", script=script(tmp_path, change + "\n"))
    (said,) = errors(done)
    assert re.match(rf"error: rank 1 \(.*\): it would draw something else: it differs from rank 0 in {words}", said), (
        said
    )
    assert list(tmp_path.glob("*.png")) == []


def test_weights_are_sent_to_machines_that_lack_them(launch, checkpoint, tmp_path, monkeypatch):
    """Where they are kept; and to three of them, one from the other. A picture says nothing of that."""
    (tmp_path / "here").mkdir()
    shutil.copytree(checkpoint("sd15"), tmp_path / "here/turbo")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    away = script(tmp_path, "os.environ['XDG_CACHE_HOME'] += str(rank)\nos.chdir('.' if rank else 'here')\n")
    flags = ["--num-images", 2, "--model", "turbo", "--share-weights"]
    done = launch(3, *flags, script=away)
    assert re.findall("wrote (.*)", done.stdout) == ["out-1.png", "out-2.png"]
    for rank in (1, 2):
        (kept,) = (tmp_path / f"cache{rank}/mlx_deepcache/shared").glob("*/turbo")
        copied = {str(file.relative_to(kept)): file.read_bytes() for file in kept.rglob("*") if file.is_file()}
        for name in ("unet", "vae"):
            file = f"{name}/diffusion_pytorch_model.safetensors"
            assert copied[file] == (tmp_path / "here/turbo" / file).read_bytes()
        times = {name: (kept / name).stat().st_mtime_ns for name in copied}
    with Image.open("here/out-2.png") as image:
        said = json.loads(image.text["mlx_deepcache"])
        assert said["model"] == "./turbo" and said["guidance_scale"] == 1, "it is known by its name"
    (tmp_path / "here/out-2.png").unlink()
    assert "wrote out-2.png" in launch(3, *flags, "--resume", script=away).stdout
    assert {name: (kept / name).stat().st_mtime_ns for name in times} == times


def test_all_weights_that_flags_name_are_sent(launch, alone, checkpoint, tmp_path, monkeypatch):
    """A picture is what one machine draws with them, to the byte."""
    here = tmp_path / "here"
    shutil.copytree(checkpoint("sd15"), here / "model")
    shutil.copytree(checkpoint("sd15") / "vae", here / "vae")
    write_controlnet("sd15", here / "edges")
    write_lora(here / "ink.safetensors")
    write_upscaler(here / "sharp.safetensors")
    save_file({"emb_params": np.ones((2, 32), np.float32)}, here / "wild.safetensors")
    smooth(64, 64).save(tmp_path / "lines.png")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    away = script(tmp_path, "os.environ['XDG_CACHE_HOME'] += str(rank)\nos.chdir('.' if rank else 'here')\n")
    flags = ["--num-images", 2, "--model", "model", "--vae", "vae", "--lora", "ink.safetensors:0.8", "--upscale"]
    flags += ["sharp.safetensors", "--embedding", "wild.safetensors", "--controlnet", "edges", "--control-image"]
    flags += [tmp_path / "lines.png"]
    done = launch(2, *flags, "--share-weights", script=away)
    assert re.findall("wrote (.*)", done.stdout) == ["out-1.png", "out-2.png"]
    (said,) = errors(launch(2, *flags, "--lora", "none.safetensors", "--share-weights", script=away))
    assert said == "error: there is no file none.safetensors"
    kept = {file.name for file in (tmp_path / "cache1").rglob("*.safetensors")}
    assert kept >= {file.name for file in here.glob("*.safetensors")} | {"diffusion_pytorch_model.safetensors"}
    (here / "alone").mkdir()
    monkeypatch.chdir(here)
    alone(*flags, "--output", "alone/out.png")
    for n in (1, 2):
        assert same_files(f"out-{n}.png", f"alone/out-{n}.png")


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no MPI")
@pytest.mark.parametrize("split", ["images", "guidance"])
def test_by_mpi(flags, alone, monkeypatch, split):
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    monkeypatch.setenv("OMPI_MCA_rmaps_base_oversubscribe", "1")
    wanted = [*flags, "--num-images", 2, "--split", split, "--output"]
    command = ["mpirun", "-n", 2, sys.executable, GENERATE, *wanted, "two.png"]
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(GENERATE.parent)}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | threads, timeout=120
    )
    assert re.findall("wrote (.*)", done.stdout) == ["two-1.png", "two-2.png"], done.stderr
    alone("--num-images", 2, "--output", "one.png")
    for n in (1, 2):
        assert same_files(f"two-{n}.png", f"one-{n}.png")


def test_a_machine_with_less_memory_decides_how_many_are_drawn_at_once(launch, tmp_path):
    less = """
        from mlx_deepcache.generation.pipeline import StableDiffusion

        StableDiffusion.together = lambda self, settings: 9 - 8 * rank
    """
    drawn = ["--seed", *["random"] * 4, "--output", "{seed}.png", "--stats", "s.json"]  # the same seeds at both
    done = launch(2, *drawn, script=script(tmp_path, less))
    seeds = re.search(r"seed: (.*)", done.stdout)[1].split(", ")
    assert re.findall("wrote (.*)", done.stdout) == [f"{seed}.png" for seed in seeds]
    assert [batch["seeds"] for batch in json.loads(Path("s.json").read_text())] == [[int(seed)] for seed in seeds]


def test_what_cannot_be_split(launch, capfd, flags):
    assert exit_code([*flags, "--split", "guidance"]) == 2
    assert "--split guidance is for pairs of machines" in capfd.readouterr().err
    (said,) = errors(launch(3, "--split", "guidance"))
    assert said.startswith("error: --split guidance is for pairs of machines") and said.endswith("; got 3")
    (said,) = errors(launch(2, "--split", "guidance", "--guidance-scale", 1))
    assert said.startswith("error: --split guidance has no meaning where guidance is off")
    assert list(Path().glob("*.png")) == []


def test_prompts_are_not_read_from_standard_input(monkeypatch, capfd):
    """Which mlx.launch holds open."""
    monkeypatch.setenv("MLX_RANK", "0")
    assert exit_code(["--prompt-file", "-"]) == 2
    assert "--prompt-file - never ends under mlx.launch" in capfd.readouterr().err


def test_what_all_would_say_one_says(monkeypatch, capfd, flags):
    """A flag that is not known, help, and a list: rank 0 does."""
    monkeypatch.setenv("MLX_RANK", "1")
    for asked in (["--bad"], ["--help"], ["--list-prompts"]):
        assert exit_code([*flags, *asked]) == 0
    assert capfd.readouterr() == ("", "")


def test_what_goes_between_machines_arrives_as_it_was():
    picture, cache = np.arange(24, dtype=np.uint8).reshape(2, 4, 3), [DeepCache(3, branch=1), TaylorSeer(1)]
    sent = [1, 0.5, "é", None, (True, {"a": (1,), 2: []}), cache, Control("net", Image.fromarray(picture), end=0.5)]
    *rest, control = unpack(pack(sent), [Control, DeepCache, TaylorSeer])
    assert rest == sent[:-1] and type(rest[4]) is tuple
    assert (control.model, control.end, control.image.mode) == ("net", 0.5, "RGB")
    assert np.array_equal(control.image, picture)
    for mode in ("L", "RGBA", "1"):
        image = Image.fromarray(picture).convert(mode)
        assert unpack(pack(image)).mode == mode and np.array_equal(unpack(pack(image)), image)
    drawn = Drawn(3, 7, [picture], latents=mx.ones((1, 2)), stats={"caches": ["é"]}, uncached=([picture + 1], 1.5))
    got = unpack(pack(drawn), [Drawn])
    assert (got.place, got.first, got.stats, got.error) == (3, 7, {"caches": ["é"]}, None)
    assert np.array_equal(got.images[0], picture) and np.array_equal(got.uncached[0][0], picture + 1)
    assert np.array_equal(got.latents, drawn.latents) and got.uncached[1] == 1.5
    with pytest.raises(TypeError, match="object cannot be sent"):
        pack([object()])
    with pytest.raises(KeyError):  # nothing is made that the reader does not name
        unpack(pack(drawn), [Control])


def test_what_arrives_is_what_was_sent_at_that_time():
    here, there = _Seal(), _Seal()
    first, second = here.close(b"one"), here.close(b"two")
    there.count = 1
    assert there.open(first[None]) == [b"one"]
    there.count = 2
    assert there.open(second[None]) == [b"two"]
    for wrong in (first, np.zeros_like(second)):
        with pytest.raises(RuntimeError, match="damaged"):
            there.open(np.stack([second, wrong]))


def test_it_can_be_launched_as_it_is():
    """`mlx.launch ./generate.py` runs the file itself, by the first python3 there is; and one process speaks."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    stdin, hold = os.pipe()
    command = [LAUNCH, "-n", "2", "--starting-port", str(PORT), "./generate.py", "--list-prompts"]
    done = subprocess.run(
        command, cwd=GENERATE.parent, env=os.environ | {"PATH": path}, stdin=stdin, capture_output=True, text=True
    )
    os.close(stdin)
    os.close(hold)
    assert done.stdout.count("grinning face (also: ") == 1, done


@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        (None, "MLX_HOSTFILE should be a file such as"),
        ("no JSON", "MLX_HOSTFILE should be a file such as"),
        ("[ ]", "MLX_HOSTFILE should be a file such as"),
        ('[["127.0.0.1:1"], []]', "MLX_HOSTFILE should be a file such as"),
        ('[["127.0.0.1:1"]]', "MLX_RANK is 1, and hosts.json has 1 machines"),
        ('[["127.0.0.1:1"], ["no.such.host.invalid:2"]]', "no connection to the other machines: Can't parse address"),
    ],
)
def test_machines_that_cannot_be_found(flags, monkeypatch, capfd, hosts, words):
    if hosts is not None:
        Path("hosts.json").write_text(hosts)
    monkeypatch.setenv("MLX_HOSTFILE", "hosts.json")
    monkeypatch.setenv("MLX_RANK", "1")
    assert exit_code([*flags, "--num-images", 2]) == (1 if words.startswith("no") else 2)
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"error: rank 1 ({socket.gethostname()}): ") and words in said
