"""A server on two machines, here processes that `mlx.launch` starts on this one, against one alone."""

import base64
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from helpers import MASK, PICTURE
from safetensors.numpy import load_file, save_file
from serving import Served, serve

from mlx_deepcache.apps.server.offers import Offers
from mlx_deepcache.backend import ops

pytestmark = pytest.mark.skipif(ops.on_gpu(), reason="to the byte on a CPU only")
ROOT = Path(__file__).parents[3]
LAUNCH = Path(sys.executable).with_name("mlx.launch")
RING = 40_000 + os.getpid() % 10_000  # its ports, not those of other tests
DRAWN = {"prompt": "a cat", "steps": 4, "width": 64, "height": 64, "scheduler": "ddim", "cache_interval": 2}


def encoded(image):
    file = BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def pictures(client, asked):
    job = client.ended(client.job(**asked))
    assert job["status"] == "completed", job["error"]
    return [client.get(image["url"]).content for image in job["images"]], job


@contextmanager
def launched(*flags, script=ROOT / "serve.py"):
    """(a client, the process of mlx.launch) of a server on two, once it is there or has ended; script: run in its
    place."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        LAUNCH,
        "-n",
        "2",
        "--starting-port",
        RING,
        "--python",
        sys.executable,
        "--",
        script,
        "--port",
        port,
        *flags,
    ]
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    stdin, hold = os.pipe()  # it reads to the end of its own over and over
    command = [*map(str, [*command, *flags]), "--dtype", "float32", "--api-only"]
    process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        with Served(None, port) as client:
            end = time.monotonic() + 60
            while process.poll() is None and not _answers(client):
                assert time.monotonic() < end
                time.sleep(0.05)
            yield client, process
    finally:
        interrupt(process)
        process.wait(30)
        for pipe in (process.stdout, process.stderr):
            pipe.close()
        os.close(stdin)
        os.close(hold)


def interrupt(process):
    """What a terminal does on Ctrl-C: rank 0 ends, and tells the others, which do not listen to that."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in map(int, children):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)


def _answers(client):
    try:
        return client.get("/api/v1/jobs").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def team(checkpoint):
    with launched("--model", f"tiny={checkpoint('sd15')}") as (client, _):
        yield client


@pytest.fixture(scope="module")
def alone(checkpoint):
    with serve(Offers([f"tiny={checkpoint('sd15')}"])) as client:
        yield client


@pytest.mark.parametrize(
    "asked",
    [
        {"n": 3, "seed": 5, "compare": True},
        {"n": 2, "seed": 1, "image": encoded(PICTURE), "mask": encoded(MASK), "strength": 0.8},
        {"seed": 7, "cache": ["deepcache:interval=3", "taylorseer:order=1"], "cache_interval": None},
    ],
)
def test_files_are_those_of_one_machine(team, alone, asked):
    ours, job = pictures(team, DRAWN | asked)
    theirs, expected = pictures(alone, DRAWN | asked)
    assert ours == theirs
    same = ("settings", "seeds", "model", "ignored")
    assert [job[key] for key in same] == [expected[key] for key in same]
    same = ("steps", "full_steps", "cached_steps", "unet_macs", "caches")
    assert [job["stats"][key] for key in same] == [expected["stats"][key] for key in same]
    assert [image.get("psnr") for image in job["images"]] == [image.get("psnr") for image in expected["images"]]


def test_a_job_is_cancelled_or_stopped_on_all_of_them(team, alone):
    """At one step, so that they go on with the next job together."""
    long = DRAWN | {"steps": 900, "n": 4, "seed": 3}
    job = team.job(**long)
    team.until(job, "generating")
    assert team.post(f"/api/v1/jobs/{job['id']}/cancel").status_code == 200
    assert team.ended(job)["status"] == "cancelled"
    job = team.job(**long)
    while not team.look(job)["progress"]["step"]:
        time.sleep(0.01)
    team.post("/sdapi/v1/interrupt")
    ended = team.ended(job)
    assert ended["status"] == "completed" and ended["interrupted"] and len(ended["images"]) == 4
    asked = DRAWN | {"n": 2, "seed": 8}
    assert pictures(team, asked)[0] == pictures(alone, asked)[0]


def test_what_cannot_be_drawn_ends_its_job_only(team, alone):
    job = team.ended(
        team.job(**DRAWN | {"n": 2, "scheduler": "lcm", "strength": 0.5, "image": encoded(PICTURE), "steps": 1})
    )
    assert job["status"] == "failed", job
    team.post("/api/v1/models/unload")
    asked = DRAWN | {"n": 2, "seed": 9}
    assert pictures(team, asked)[0] == pictures(alone, asked)[0]


def test_guidance_is_split(checkpoint, alone):
    """And all end when the server is told to."""
    with launched("--model", f"tiny={checkpoint('sd15')}", "--split", "guidance") as (client, process):
        asked = DRAWN | {"n": 2, "seed": 4, "compare": True}
        assert pictures(client, asked)[0] == pictures(alone, asked)[0]
        long = client.job(**DRAWN | {"steps": 900})
        client.until(long, "generating")
        interrupt(process)
        said = process.communicate(timeout=60)
        assert "Traceback" not in said[1], said


def test_a_machine_that_serves_something_else_is_named(checkpoint, tmp_path):
    weights = shutil.copytree(checkpoint("sd15"), tmp_path / "other") / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(weights).items()}, weights)
    script = tmp_path / "changed.py"
    script.write_text(
        "import os, sys\nfrom mlx_deepcache.apps.serve import main_serve\n"
        f"model = ({str(checkpoint('sd15'))!r}, {str(tmp_path / 'other')!r})[int(os.environ['MLX_RANK'])]\n"
        "sys.exit(main_serve([*sys.argv[1:], '--model', 'tiny=' + model]))\n"
    )
    with launched(script=script) as (_, process):
        out, said = process.communicate(timeout=60)
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "rank 1 (" in line and "the model tiny, unet/diffusion_pytorch_model.safetensors" in line, line


def test_it_ends_when_a_machine_goes(checkpoint, tmp_path):
    """And says so; what is asked meanwhile is answered with that."""
    script = tmp_path / "changed.py"
    script.write_text(
        "import os, sys\nfrom mlx_deepcache.apps.serve import main_serve\n"
        "from mlx_deepcache.apps.server.crew import Crew\n"
        "if os.environ['MLX_RANK'] == '1':\n"
        "    Crew._draw = lambda *given: os._exit(7)\n"
        "sys.exit(main_serve())\n"
    )
    with launched("--model", f"tiny={checkpoint('sd15')}", script=script) as (client, process):
        try:
            job = client.job(**DRAWN | {"n": 2})
            assert client.ended(job)["status"] == "failed"
        except httpx.TransportError:  # it had gone already
            pass
        out, said = process.communicate(timeout=60)
        assert "rank 1 exited with code 7" in said.lower() or "no connection to the other machines" in said, said
        assert "Traceback" not in said
