"""Who may ask, and what is never done for anyone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from mlx_deepcache.apps.serve import _address, _listen, main_serve
from mlx_deepcache.apps.server.http import Access
from mlx_deepcache.apps.server.service import Limits

REPOSITORY = Path(__file__).parents[3]
KEY = "let me in"


def test_a_key(serve):
    with serve(access=Access(key=KEY)) as server:
        assert server.get("/health").json()["status"] == "ok"
        for route in ("/sdapi/v1/options", "/v1/models", "/api/v1/jobs", "/docs", "/openapi.json"):
            refused = server.get(route)
            assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic")
            assert server.get(route, headers={"authorization": f"Bearer {KEY}"}).status_code == 200
            assert server.get(route, auth=("anyone", KEY)).status_code == 200
        for wrong in (f"Bearer {KEY}x", "Bearer", "Basic x", "Basic " + "é", f"Digest {KEY}"):
            assert server.get("/v1/models", headers={"authorization": wrong.encode()}).status_code == 401
        assert server.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert server.get("/sdapi/v1/options").json()["detail"] == "Incorrect username or password"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:7860", "[::1", ""])
def test_hosts_of_other_names(server, host):
    assert server.get("/health", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "[::1]:7860"])
def test_names_of_this_machine(server, host):
    assert server.get("/health", headers={"host": host}).status_code == 200


def test_pages_of_others(serve):
    with serve(access=Access(origins=("https://friend.example",), hosts=("mac.local",))) as server:
        form = {"files": {"image": b"x"}, "data": {"prompt": "a dog"}}
        refused = server.post("/v1/images/edits", headers={"origin": "https://evil.example"}, **form)
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
        assert server.get("/health", headers={"origin": "null"}).status_code == 403
        assert server.get("/health", headers={"origin": f"http://127.0.0.1:{server.port}"}).status_code == 200
        friend = server.get("/health", headers={"origin": "https://friend.example"})
        assert friend.headers["access-control-allow-origin"] == "https://friend.example"
        assert server.get("/health", headers={"host": "mac.local"}).status_code == 200


def test_a_body_that_is_too_large(serve):
    with serve(limits=Limits(body=10_000)) as server:
        assert server.post("/sdapi/v1/txt2img", json={"prompt": "x" * 20_000}).status_code == 413
        assert server.post("/v1/images/edits", files={"image": b"x" * 20_000}, data={"prompt": "x"}).status_code == 413


def test_only_json_is_taken_for_json(server):
    assert server.post("/api/v1/jobs", content='{"prompt": "x"}', headers={"content-type": "text/plain"}).is_error


def test_an_address_in_a_request_is_never_asked(server):
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.5)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/x.png"
    asked = [
        ("/sdapi/v1/img2img", {"init_images": [address]}),
        ("/sdapi/v1/png-info", {"image": address}),
        ("/sdapi/v1/extra-single-image", {"image": address}),
        ("/sdapi/v1/txt2img", {"alwayson_scripts": {"ControlNet": {"args": [{"image": address, "model": "x"}]}}}),
        ("/api/v1/jobs", {"prompt": "a dog", "image": address}),
        ("/api/v1/plan", {"prompt": "a dog", "image": address}),
        ("/v1/images/generations", {"prompt": "a dog", "image": address}),
    ]
    for route, body in asked:
        answer = server.post(route, json=body)
        assert answer.status_code >= 400 and "not allowed" in answer.text, (route, answer.text)
    with pytest.raises(TimeoutError):
        listening.accept()
    listening.close()


def test_every_answer_has_a_number(server):
    numbers = {server.get(route).headers["x-request-id"] for route in ("/health", "/none", "/v1/models/none")}
    assert len(numbers) == 3


def test_other_machines_need_a_key(capfd, monkeypatch):
    monkeypatch.delenv("MLX_DEEPCACHE_API_KEY", raising=False)
    assert main_serve(["--host", "0.0.0.0"]) == 2
    assert "--no-key" in capfd.readouterr().err


def test_a_port_that_is_taken(capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main_serve(["--port", str(taken.getsockname()[1])]) == 1
    assert "--port names another" in capfd.readouterr().err


def test_the_command_serves_and_ends_cleanly(tmp_path):
    """As it is started and told to end by people, with a job under way."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "serve.py", "--port", str(port), "--dtype", "float32", "--outputs", str(tmp_path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        transport = httpx.HTTPTransport(retries=8)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, timeout=30) as client:
            answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a dog", "steps": 2, "seed": 1})
            assert answer.status_code == 200, answer.text
            client.post("/api/v1/jobs", json={"prompt": "a dog", "steps": 900})
        process.terminate()
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143 and "Traceback" not in err, err
    assert "completed" in out and [file.suffix for file in tmp_path.iterdir()] == [".png"]


def test_drawing_needs_none_of_it(tmp_path):
    check = (
        "import sys; from mlx_deepcache.apps.generate import main_generate; "
        "assert main_generate(['--prompt', 'a dog', '--steps', '1', '--quiet']) == 0; "
        "found = {m for m in sys.modules if m.split('.')[0] in ('fastapi', 'uvicorn', 'starlette', 'pydantic') "
        "or m.startswith(('mlx_deepcache.apps.serve', 'mlx_deepcache.apps.server'))}; assert not found, found"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", check], check=True, cwd=tmp_path, env=environment)


def test_localhost_is_found_by_number(monkeypatch):
    """A Mac says ::1 first, where clients that go to 127.0.0.1 would find nobody."""
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with _listen("localhost", 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("localhost", "http://localhost:7/"),
        ("0.0.0.0", "http://127.0.0.1:7/"),
        ("::1", "http://[::1]:7/"),
        ("::", "http://[::1]:7/"),
    ],
)
def test_the_address_that_is_said(host, address):
    assert _address(host, 7) == address
