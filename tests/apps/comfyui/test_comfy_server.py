"""The nodes in a real ComfyUI, headless on the CPU: COMFYUI_PATH names a checkout of it, and COMFYUI_PYTHON the Python
that has what it requires, if that is not this one. Without the first there is nothing to test."""

import base64
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import comfy_host
import numpy as np
import pytest
from PIL import Image

from mlx_deepcache import StableDiffusion
from mlx_deepcache.apps.link import NAME, main_comfyui

COMFYUI = os.environ.get("COMFYUI_PATH")
if not COMFYUI:
    pytest.skip("COMFYUI_PATH names no checkout of ComfyUI", allow_module_level=True)

REPOSITORY = Path(__file__).parents[3]
PREVIEW = 1  # of the websocket's binary messages
PATIENCE = 120  # seconds, for a start and for a message
SMALL = {"steps": 12, "width": 64, "height": 64, "seed": 3}


class Server:
    """ComfyUI's HTTP routes, and what its websocket says to one client."""

    def __init__(self, port):
        self.port, self.client = port, secrets.token_hex(8)
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        head = f"GET /ws?clientId={self.client} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
        head += f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        self._socket.sendall(head.encode())
        self._read = self._socket.makefile("rb")
        assert b"101" in self._read.readline()
        while self._read.readline().strip():
            pass

    def close(self):
        self._read.close()
        self._socket.close()

    def get(self, path):
        return self._ask(Request(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path, body):
        data = json.dumps(body).encode()
        return self._ask(Request(f"http://127.0.0.1:{self.port}{path}", data, {"content-type": "application/json"}))

    def _ask(self, request):
        try:
            with urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            return error.code, error.read()

    def json(self, path):
        return json.loads(self.get(path)[1])

    def message(self):
        """The next one: (type, data) of a text, or ("preview", picture)."""
        while True:
            first, second = self._read.read(2)
            length = second & 0x7F
            if length > 125:
                length = int.from_bytes(self._read.read(2 if length == 126 else 8), "big")
            payload = self._read.read(length)
            if first & 0xF == 1:
                text = json.loads(payload)
                return text["type"], text["data"]
            if first & 0xF == 2 and struct.unpack(">I", payload[:4])[0] == PREVIEW:
                return "preview", Image.open(BytesIO(payload[8:]))

    def run(self, prompt, at_message=lambda kind, data: None):
        """What the websocket says of a prompt until it ends, and its history."""
        status, answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client})
        assert status == 200, answer
        number, said = json.loads(answer)["prompt_id"], []
        ends = ("execution_success", "execution_error", "execution_interrupted")
        while not said or said[-1][0] not in ends:
            kind, data = self.message()
            if kind == "preview" or data.get("prompt_id") == number:
                said.append((kind, data))
                at_message(kind, data)
        deadline = time.monotonic() + PATIENCE
        while number not in (history := self.json(f"/history/{number}")):  # written once it has been said
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return said, history[number]

    def pictures(self, history):
        """What SaveImage wrote, (H, W, 3) uint8 each."""
        files = [file for node in history["outputs"].values() for file in node.get("images", ())]
        answers = [
            self.get("/view?filename={filename}&subfolder={subfolder}&type={type}".format(**file)) for file in files
        ]
        return [np.asarray(Image.open(BytesIO(content))) for _, content in answers]

    def workflow(self, name, **changes):
        """An example as the page sends it, with some values of the node that draws changed."""
        workflow = json.loads((comfy_host.PACK / "example_workflows" / f"{name}.json").read_text())

        def describe(kind):
            found = self.json(f"/object_info/{kind}")[kind]["input"]
            return found.get("required", {}) | found.get("optional", {})

        described = {
            kind: {id: (one[0], one[1] if len(one) > 1 else {}) for id, one in describe(kind).items()}
            for kind in {node["type"] for node in workflow["nodes"]} - {"MarkdownNote"}
        }
        prompt = comfy_host.as_prompt(workflow, described.__getitem__)
        for node in prompt.values():
            if "positive" in node["inputs"]:
                node["inputs"] |= changes
        return prompt


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    base, port = tmp_path_factory.mktemp("base"), free_port()
    for name in ("custom_nodes", "models", "input", "output", "page"):
        (base / name).mkdir()
    (base / "page" / "index.html").write_text("<title>none</title>")
    Image.new("RGB", (96, 64), "orange").save(base / "input" / "example.png")
    assert main_comfyui([str(base)]) == 0
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    flags = ["--cpu", "--disable-api-nodes", "--database-url", "sqlite:///:memory:", "--listen", "127.0.0.1"]
    folders = ["--front-end-root", str(base / "page"), "--base-directory", str(base), "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with open(base / "log.txt", "w") as log:
        process = subprocess.Popen(
            [python, "main.py", *flags, *folders], cwd=COMFYUI, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                server = Server(port)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (base / "log.txt").read_text()[-4000:]
                time.sleep(0.5)
        yield server
        server.close()
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.fixture(scope="module")
def expected():
    """The same by Python; of the examples' interval."""
    result = StableDiffusion.from_pretrained()(
        "a red apple", seeds=[3], steps=12, width=64, height=64, cache_interval=3
    )
    return np.asarray(result.images[0])


def kinds(said):
    return [kind for kind, _ in said]


def test_it_knows_the_nodes(comfyui, nodes):
    for name, cls in nodes.items():
        info = comfyui.json(f"/object_info/{name}")[name]
        assert info["category"] == "MLX DeepCache" and info["python_module"] == f"custom_nodes.{NAME}"
        found = [id for part in ("required", "optional") for id in info["input"].get(part, {})]
        assert found == list(comfy_host.inputs(cls))
    files = sorted((comfy_host.PACK / "example_workflows").glob("*.json"))
    assert sorted(comfyui.json("/workflow_templates")[NAME]) == [file.stem for file in files]
    for file in files:
        status, picture = comfyui.get(f"/api/workflow_templates/{NAME}/{file.stem}.jpg")
        assert status == 200 and picture == file.with_suffix(".jpg").read_bytes()


def test_draws_with_a_bar_and_previews(comfyui, expected):
    prompt = comfyui.workflow("text_to_image", **SMALL)
    said, history = comfyui.run(prompt)
    assert history["status"]["status_str"] == "success"
    assert [data["value"] for kind, data in said if kind == "progress"] == list(range(1, 13))
    previews = [picture for kind, picture in said if kind == "preview"]
    assert len(previews) == 12
    assert all(one.format == "JPEG" and one.size == (512, 512) for one in previews)  # which ComfyUI enlarges
    assert all(np.array_equal(one, expected) for one in comfyui.pictures(history))
    (text,) = (node["text"][0] for node in history["outputs"].values() if "text" in node)
    assert json.loads(text)["cached_steps"] == 8

    said, again = comfyui.run(prompt)  # answered by what ComfyUI kept
    (cached,) = (data["nodes"] for kind, data in said if kind == "execution_cached")
    assert sorted(cached) == sorted(prompt) and "progress" not in kinds(said)
    said, other = comfyui.run(comfyui.workflow("text_to_image", **SMALL | {"seed": 4}))
    assert kinds(said).count("progress") == 12
    assert not np.array_equal(comfyui.pictures(other)[0], expected)


def test_stops(comfyui, expected):
    told = []

    def stop(kind, data):
        if kind == "progress" and not told:
            told.append(comfyui.post("/interrupt", {})[0])

    said, history = comfyui.run(comfyui.workflow("text_to_image", **SMALL | {"steps": 600}), stop)
    assert said[-1][0] == "execution_interrupted" and kinds(said).count("progress") < 300
    assert comfyui.pictures(history) == []
    _, history = comfyui.run(comfyui.workflow("text_to_image", **SMALL | {"seed": 3, "negative": ""}))
    assert np.array_equal(comfyui.pictures(history)[0], expected)


def test_draws_after_its_memory_was_freed(comfyui, expected):
    comfyui.run(comfyui.workflow("text_to_image", **SMALL))
    assert comfyui.post("/free", {"unload_models": True, "free_memory": True})[0] == 200
    deadline, progress = time.monotonic() + PATIENCE, 0
    while not progress:  # the worker frees in its own time
        assert time.monotonic() < deadline
        said, history = comfyui.run(comfyui.workflow("text_to_image", **SMALL))
        progress = kinds(said).count("progress")
    assert progress == 12 and np.array_equal(comfyui.pictures(history)[0], expected)


def test_says_what_is_wrong(comfyui):
    prompt = comfyui.workflow("text_to_image", **SMALL | {"steps": -5})
    status, answer = comfyui.post("/prompt", {"prompt": prompt, "client_id": comfyui.client})
    assert status == 400 and json.loads(answer)["error"]["type"] == "prompt_outputs_failed_validation"
    (errors,) = (node["errors"] for node in json.loads(answer)["node_errors"].values())
    assert [error["type"] for error in errors] == ["value_smaller_than_min"]
    said, _ = comfyui.run(comfyui.workflow("text_to_image", **SMALL | {"width": 63}))
    kind, data = said[-1]
    assert kind == "execution_error" and data["node_type"] == "MLXDeepCacheDraw"
    assert data["exception_message"].strip() == "width should be a positive multiple of 4 pixels, got 63; try 64"


@pytest.mark.parametrize("name", ["with_and_without_cache", "from_a_picture"])
def test_other_workflows(comfyui, name):
    said, history = comfyui.run(comfyui.workflow(name, **SMALL))
    assert said[-1][0] == "execution_success"
    assert len(comfyui.pictures(history)) == (2 if name == "with_and_without_cache" else 1)
