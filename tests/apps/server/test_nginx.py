"""Several servers behind nginx, with the configuration that the docs give: what is asked of it, and what is lost."""

import base64
import grp
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from io import BytesIO
from itertools import islice
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import Access, Limits, Served, serve

from mlx_deepcache.apps.server.jobs import ENDS

REPOSITORY = Path(__file__).parents[3]
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
KEY, NAME = "let me in", "pictures.example"
HEADERS = {"authorization": f"Bearer {KEY}", "host": NAME}
LONG = {"prompt": "a red apple", "steps": 900, "cache_interval": 1}
SHORT = {"prompt": "a red apple", "steps": 2, "seed": 3}
FRAME = """
daemon off;
user {user};
pid {folder}/pid;
error_log {folder}/error.log;
worker_processes 2;
events {{}}
http {{
    log_format asked '$request_uri $upstream_addr';
    access_log {folder}/asked.log asked;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    include {folder}/servers.conf;
}}
"""

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def nginx(tmp_path):
    """nginx(ports, changes): a client of it, before servers on these two ports; changes: (old, new) in the file."""
    with ExitStack() as ends:

        def start(ports, changes=()):
            port = free_port()
            given = [f"192.168.1.1{i + 1}:7860" for i in range(2)]
            ours = [f"127.0.0.1:{port}" for port in ports]
            text = (REPOSITORY / "docs" / "nginx.conf").read_text()
            for old, new in [*zip(given, ours, strict=True), ("listen 7860;", f"listen 127.0.0.1:{port};"), *changes]:
                assert old in text, old
                text = text.replace(old, new)
            (tmp_path / "servers.conf").write_text(text)
            user = f"{pwd.getpwuid(os.getuid()).pw_name} {grp.getgrgid(os.getgid()).gr_name}"
            (tmp_path / "nginx.conf").write_text(FRAME.format(folder=tmp_path, user=user))
            process = subprocess.Popen([NGINX, "-p", tmp_path, "-c", tmp_path / "nginx.conf"], stderr=subprocess.PIPE)
            ends.callback(process.communicate)
            ends.callback(process.terminate)
            client = ends.enter_context(Served(None, port, headers=HEADERS))
            while True:
                try:
                    client.get("/none")
                    return client
                except httpx.ConnectError:
                    assert process.poll() is None, process.stderr.read().decode()
                    time.sleep(0.01)

        yield start


@contextmanager
def two():
    """Two servers in this process, which have a key and a name."""
    access, limits = Access(key=KEY, hosts=(NAME,)), Limits(queue=3)
    with serve(access=access, limits=limits) as one, serve(access=access, limits=limits) as other:
        for server in (one, other):
            server.headers.update(HEADERS)
        yield one, other


@pytest.fixture(scope="module")
def servers():
    """The same, for tests that leave them with nothing to do."""
    with two() as both:
        yield both


def asked_of(tmp_path):
    """For each request, its address and the servers that it was passed to, in order."""
    lines = (tmp_path / "asked.log").read_text().splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].split(", ")) for line in lines]


def wait_for_log(holds):
    """nginx writes of a request after it has answered."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def all_jobs(servers):
    return [job for server in servers for job in server.get("/api/v1/jobs").json()]


def pictures(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["images"]


@contextmanager
def processes():
    """Two servers as they are started by people."""
    ports = [free_port(), free_port()]
    command = [sys.executable, "serve.py", "--dtype", "float32", "--api-only", "--quiet", "--allow-host", NAME]
    started = [
        subprocess.Popen([*command, "--port", str(port), "--api-key", KEY], cwd=REPOSITORY, env=os.environ)
        for port in ports
    ]
    try:
        clients = [Served(None, port, headers=HEADERS) for port in ports]
        for process, client in zip(started, clients, strict=True):
            while True:
                try:
                    client.get("/health")
                    break
                except httpx.ConnectError:
                    assert process.poll() is None
                    time.sleep(0.05)
        yield list(zip(started, clients, strict=True))
        for client in clients:
            client.close()
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_server_is_killed_under_load(server, nginx, tmp_path):
    """Nothing is lost but its running job, which is drawn again; and with it what waited there."""
    bodies = [SHORT | {"steps": 10, "seed": seed, "force_task_id": f"seed-{seed}"} for seed in range(8)]
    alone = [pictures(server.post("/sdapi/v1/txt2img", json=body)) for body in bodies]
    with processes() as [(victim, there), (_, other)], ThreadPoolExecutor(len(bodies)) as pool:
        client = nginx([there.port, other.port])
        asked = [client.job(**SHORT)["id"] for _ in range(2)]
        [lost] = [job["id"] for job in all_jobs([there]) if job["id"] in asked]
        answers = [pool.submit(client.post, "/sdapi/v1/txt2img", json=body) for body in bodies]
        running = None
        while running is None:
            now = [job for job in all_jobs([there]) if job["status"] == "generating" and job["id"].startswith("seed-")]
            running = next((job["id"] for job in now if 1 <= job["progress"]["step"] < 4), None)
        victim.send_signal(signal.SIGKILL)
        for answer, picture in zip(answers, alone, strict=True):
            assert pictures(answer.result()) == picture
        drawn = other.get(f"/api/v1/jobs/{running}").json()
        assert drawn["status"] == "completed", "what was drawn when the server died is drawn by the other"
        both = [f"127.0.0.1:{there.port}", f"127.0.0.1:{other.port}"]
        wait_for_log(lambda: any(u.endswith("txt2img") and asked == both for u, asked in asked_of(tmp_path)))
        for _ in range(2):  # whichever is asked first
            assert client.get(f"/api/v1/jobs/{lost}").status_code == 404, "its jobs went with it"
        assert pictures(client.post("/sdapi/v1/txt2img", json=SHORT)), "one is enough"


def test_a_server_that_is_told_to_end_hands_on_what_it_has(nginx, tmp_path):
    """What it draws, what waits there and what comes now; a body that nginx keeps in a file is sent again too."""
    noise, buffer = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8), BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    start = base64.b64encode(buffer.getvalue()).decode()
    body = SHORT | {"steps": 8, "init_images": [start], "denoising_strength": 0.9}
    with two() as servers, ThreadPoolExecutor(2) as pool:
        client = nginx([server.port for server in servers])
        first = pool.submit(client.post, "/sdapi/v1/img2img", json=body)
        while not any(server.service.worker.busy for server in servers):
            time.sleep(0.01)
        leaving, staying = sorted(servers, key=lambda server: not server.service.worker.busy)
        goes_on = threading.Event()
        leaving.service.worker.call(goes_on.wait, urgent=True)
        waiting = pool.submit(leaving.post, "/sdapi/v1/txt2img", json=SHORT)
        while not leaving.service.worker.length:
            time.sleep(0.01)
        leaving.service.worker.stop()
        goes_on.set()
        assert waiting.result().status_code == 503 and waiting.result().json()["error"] == "shutting_down"
        assert pictures(first.result()) == pictures(staying.post("/sdapi/v1/img2img", json=body))
        for _ in range(2):
            answer = client.post("/v1/images/generations", json=SHORT | {"n": 1})
            assert answer.status_code == 200 and answer.json()["data"]
        handed_on = [f"127.0.0.1:{server.port}" for server in (leaving, staying)]
        wait_for_log(lambda: [asked for _, asked in asked_of(tmp_path)].count(handed_on) >= 2)


def test_a_full_queue_is_passed_over(servers, nginx):
    full, free = servers
    client = nginx([full.port, free.port])
    long, other = full.job(**LONG), free.job(**LONG)
    for server, job in ((full, long), (free, other)):
        server.until(job, "generating")
    waiting = [full.job(**SHORT) for _ in range(3)]
    waiting += [client.job(**SHORT) for _ in range(3)]
    assert free.service.worker.length == 3
    for _ in range(3):  # all are full, and again: nginx has not taken any for dead
        refused = client.post("/api/v1/jobs", json=SHORT)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
    assert client.post("/sdapi/v1/txt2img", json=SHORT).status_code == 429
    for job in (long, other):
        assert client.post(f"/api/v1/jobs/{job['id']}/cancel").status_code == 200
    assert [client.ended(job)["status"] for job in waiting] == ["completed"] * 6


def test_jobs_are_found_and_tell_of_themselves_as_they_are_drawn(servers, nginx):
    """With both servers busy, events of what waits are few and small: nothing pushes them through."""
    client = nginx([server.port for server in servers])
    long = [client.job(**LONG) for _ in servers]
    assert [[job["status"] in ENDS for job in all_jobs([server])].count(False) for server in servers] == [1, 1]
    asked = [client.job(**SHORT) for _ in range(4)]
    for job in asked:
        heard = client.events(job)
        assert next(heard) == ("queued", {"position": client.look(job)["queue_position"]})
        assert client.look(job)["status"] == "queued"
        heard.close()
    last = client.events(asked[-1])
    next(last)
    for job in long:
        assert client.post(f"/api/v1/jobs/{job['id']}/cancel").status_code == 200
    assert [name for name, _ in last][-1] == "completed"
    for job in asked:
        done = client.ended(job)
        assert done["status"] == "completed"
        assert client.get(done["images"][0]["url"]).content.startswith(b"\x89PNG")
    assert client.get("/api/v1/jobs/none").json()["error"]["code"] == "not_found"
    named = client.post("/v1/images/generations", json=SHORT | {"response_format": "url"}).json()
    url = named["data"][0]["url"]
    assert url.startswith(f"http://{NAME}/v1/") and client.get(httpx.URL(url).path).status_code == 200


def test_a_picture_that_streams_and_a_client_that_leaves(servers, nginx):
    """Previews of a third and two thirds of the steps come before the end; who leaves takes the job along."""
    client = nginx([server.port for server in servers])
    asked = LONG | {"steps": 60, "stream": True, "partial_images": 2, "size": "32x32", "output_format": "jpeg"}
    with client.stream("POST", "/v1/images/generations", json=asked) as answer:
        lines = [line for line in islice(answer.iter_lines(), 5) if line]
        assert len(lines[-1]) < 1460, "nginx keeps what is smaller, if it may"
        assert lines[::2] == ["event: image_generation.partial_image"] * 2
        assert [json.loads(line.removeprefix("data: "))["partial_image_index"] for line in lines[1::2]] == [0, 1]
        [(drawing, job)] = [(s, s.service.worker.running) for s in servers if s.service.worker.busy]
    assert drawing.ended({"id": job.id})["status"] == "cancelled"


def test_progress_of_a_named_task(servers, nginx):
    with ThreadPoolExecutor(2) as pool:
        client = nginx([server.port for server in servers])
        names = ["first", "second"]
        for name in names:
            pool.submit(client.post, "/sdapi/v1/txt2img", json=LONG | {"force_task_id": name})
            while (found := client.get("/sdapi/v1/progress", params={"task_id": name})).status_code == 404:
                time.sleep(0.01)
            assert found.json()["queued"] or found.json()["active"]
        for name in names * 2:
            assert client.get("/sdapi/v1/progress", params={"task_id": name}).status_code == 200
        for name in names:
            assert client.post(f"/api/v1/jobs/{name}/cancel").status_code == 200


def test_what_is_slow_is_not_drawn_twice(servers, nginx):
    client = nginx([server.port for server in servers], [("1h;", "1s;")])
    before = [job["id"] for job in all_jobs(servers)]
    assert client.post("/sdapi/v1/txt2img", json=LONG).status_code == 504
    [job] = [job for job in all_jobs(servers) if job["id"] not in before]
    client.until(job, "cancelled")
