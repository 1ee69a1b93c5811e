"""The hub as a server on this machine, asked by huggingface_hub itself: one that answers, one that is gone, and ones
that accept a connection and say nothing."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import files

REPOSITORY = Path(__file__).parents[2]
SCRIPT = (
    "import sys; from mlx_deepcache.checkpoints import hub; hub.PATIENCE = float(sys.argv.pop(1)); "
    "from mlx_deepcache.apps.generate import main_generate; sys.exit(main_generate())"
)
SHA = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """repositories: folders by name; silent: says nothing to requests whose path has this in it; asked: their paths."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories, self.silent, self.asked, self.over = {}, None, [], threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self):
        self.over.set()
        self.shutdown()
        self.server_close()


class Answers(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        if hub.silent is not None and hub.silent in path:
            hub.over.wait(60)
            return
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            folder = hub.repositories.get(match[1])
            if folder is not None:
                listed = [{"rfilename": name, "size": (folder / name).stat().st_size} for name in sorted(files(folder))]
                about = {"id": match[1], "sha": SHA, "siblings": listed, "private": False, "tags": [], "downloads": 0}
                self.answer(json.dumps(about).encode())
                return
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            file = hub.repositories.get(match[1], Path("/nowhere")) / match[2]
            if file.is_file():
                self.answer(file.read_bytes())
                return
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body):
        self.send_response(200)
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def run(server, tmp_path):
    """run(*flags): generate.py in a process and a folder of its own, and how long it took."""
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("HF_")}
    environment |= {
        "PYTHONPATH": str(REPOSITORY),
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    (tmp_path / "run").mkdir()

    def run(*flags, patience=10, **more):
        small = ["--prompt", "a cat", "--steps", 1, "--height", 32, "--width", 32, "--scheduler", "ddim"]
        command = [sys.executable, "-c", SCRIPT, patience, *small, *flags]
        start = time.monotonic()
        done = subprocess.run(
            list(map(str, command)),
            cwd=tmp_path / "run",
            env=environment | more,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in done.stderr
        return done, time.monotonic() - start

    return run


def lines(text):
    """Of an error output, without bars and the note about the machine."""
    return [
        line for line in text.splitlines() if line.strip() and "|" not in line and not line.startswith("note: no fast")
    ]


def test_once_downloaded(server, run, checkpoint, tmp_path):
    """A line and a bar the first time; then not a word to the hub, nor when it is gone."""
    server.repositories["somebody/model"] = checkpoint("sd15")
    done, _ = run("--model", "somebody/model")
    assert done.returncode == 0, done.stderr
    fetching, *rest = lines(done.stderr)
    assert (
        re.fullmatch(r"fetching somebody/model from the Hugging Face hub: \d+ files, \d+\.\d MB", fetching) and not rest
    )
    assert "100%" in done.stderr.partition("step")[0]
    asked = [path.partition("/resolve/main/")[2] for path in server.asked if "/resolve/" in path]
    first = next(i for i, path in enumerate(asked) if path.endswith(".safetensors"))
    assert asked[0] == "model_index.json" and set(asked[:first]) < set(asked)
    server.asked.clear()
    server.stop()
    done, _ = run("--model", "somebody/model", "--output", "again.png")
    assert (done.returncode, lines(done.stderr), server.asked) == (0, [], []), done.stderr
    done, _ = run("--model", checkpoint("sd15"), "--output", "local.png")
    pixels = [np.asarray(Image.open(tmp_path / "run" / f"{name}.png")) for name in ("out", "again", "local")]
    assert np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])


def test_quiet_and_unsupported(server, run, checkpoint, tmp_path):
    server.repositories["somebody/flux"] = shutil.copytree(checkpoint("sd15"), tmp_path / "flux")
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    done, _ = run("--model", "somebody/flux")
    assert done.returncode == 1
    assert [line[:60] for line in lines(done.stderr)] == [
        "error: somebody/flux holds a FluxPipeline, which is not supported"[:60]
    ]
    assert not any(path.endswith(".safetensors") for path in server.asked)
    server.repositories["somebody/model"] = checkpoint("sd15")
    done, _ = run("--model", "somebody/model", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "silent", ["/api/", "model_index.json", "vae/config.json", "unet/diffusion", "a.safetensors", "gone"]
)
def test_a_hub_that_does_not_answer(server, run, checkpoint, tmp_path, silent):
    """Given up once patience ends, without trying another mirror, in a line or two; nor does it keep the program."""
    server.repositories["somebody/model"] = server.repositories["stable-diffusion-v1-5/stable-diffusion-v1-5"] = (
        checkpoint("sd15")
    )
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "a.safetensors").write_text("x")
    server.repositories["somebody/lora"] = tmp_path / "lora"
    server.silent = silent
    if silent == "gone":
        server.stop()
    lora = ["--model", checkpoint("sd15"), "--lora", "somebody/lora"]
    done, seconds = run(*(lora if silent == "a.safetensors" else ["--model", "sd15"]), patience=0.5)
    assert done.returncode == 1
    assert len(lines(done.stderr)) <= 2
    assert "is no folder here, and the Hugging Face hub does not answer" in lines(done.stderr)[-1]
    assert seconds < 20  # and what starting and other files take; by itself huggingface_hub takes minutes


def test_no_such_repository(server, run):
    done, seconds = run("--model", "nobody/nothing")
    assert done.returncode == 1 and seconds < 10
    (line,) = lines(done.stderr)
    assert (
        "nobody/nothing is no folder here and cannot be had from the Hugging Face hub (RepositoryNotFoundError" in line
    )
