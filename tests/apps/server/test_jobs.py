"""Jobs by HTTP: drawn, watched, cancelled, refused, on a real port."""

import base64
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import mlx.core as mx
import numpy as np
import pytest
from helpers import PICTURE
from PIL import Image

import mlx_deepcache
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.apps.server.offers import Offers
from mlx_deepcache.apps.server.service import Limits

APPLE = {"prompt": "a red apple", "steps": 6, "seed": 3, "cache_interval": 2}
LONG = {"prompt": "a red apple", "steps": 900, "cache_interval": 1}


def packed(image):
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_the_same_bytes_as_from_the_command_line(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = server.ended(server.job(**APPLE))
    flags = ["--prompt", "a red apple", "--steps", "6", "--seed", "3", "--cache-interval", "2", "--dtype", "float32"]
    assert main_generate([*flags, "--quiet"]) == 0
    assert job["status"] == "completed"
    assert server.get(job["images"][0]["url"]).content == (tmp_path / "out.png").read_bytes()


def test_events_tell_each_step(server):
    job = server.job(**APPLE, compare=True)
    heard = list(server.events(job))
    steps = [data for name, data in heard if name == "step"]
    assert [data["step"] for data in steps] == list(range(steps[0]["step"], 13))
    assert [data["full"] for data in steps][-6:] == [True] * 6, "the comparison is not cached"
    previews = [data for name, data in heard if name == "preview"]
    assert previews and Image.open(BytesIO(base64.b64decode(previews[0]["image"]))).format == "JPEG"
    name, last = heard[-1]
    assert name == "completed" and last["job"]["status"] == "completed"
    assert [data["phase"] for name, data in heard if name == "phase"][-1] == "decode"
    pair = last["job"]["images"][0]
    images = [np.asarray(Image.open(BytesIO(server.get(pair[key]).content))) for key in ("url", "uncached_url")]
    assert pair["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean((images[0].astype(float) - images[1]) ** 2)))
    assert list(server.events(job)) == [("completed", last)], "late ones are told how it stands"


def test_a_job_of_several_pictures_is_drawn_in_parts(serve):
    with serve(limits=Limits(batch=2)) as server:
        job = server.ended(server.job(**APPLE | {"n": 3}))
        assert [image["seed"] for image in job["images"]] == [3, 4, 5]
        assert job["progress"]["batches"] == 2
        pipe = mlx_deepcache.StableDiffusion.from_pretrained(None, "float32")
        whole = pipe("a red apple", steps=6, cache_interval=2, seeds=[3, 4]).images
        for image, ours in zip(whole, job["images"], strict=False):
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(BytesIO(server.get(ours["url"]).content))))


def test_from_a_picture_with_a_mask(server):
    mask = Image.fromarray(np.pad(np.full((72, 52), 255, np.uint8), ((0, 0), (0, 52))))
    asked = APPLE | {"image": packed(PICTURE), "mask": packed(mask), "strength": 0.8, "height": 64, "width": 64}
    job = server.ended(server.job(**asked))
    drawn = np.asarray(Image.open(BytesIO(server.get(job["images"][0]["url"]).content)))
    given = np.asarray(PICTURE.resize((64, 64), Image.Resampling.LANCZOS))
    assert np.array_equal(drawn[:, 40:], given[:, 40:]) and not np.array_equal(drawn[:, :24], given[:, :24])


def test_a_plan_says_what_would_be_drawn_while_another_job_is(server):
    running = server.job(**LONG)
    server.until(running, "generating")
    plan = server.post("/api/v1/plan", json={"prompt": "a cat", "steps": 10, "cache_interval": 3}).json()
    assert server.look(running)["status"] == "generating"
    server.post(f"/api/v1/jobs/{running['id']}/cancel")
    assert plan["steps"] == "FccFccFccF" and (plan["full_steps"], plan["cached_steps"]) == (4, 6)


@pytest.mark.parametrize("more", [{}, {"width": 64, "height": 64, "hires_scale": 1.5, "hires_steps": 4}])
def test_a_plan_is_what_is_drawn_then(server, more):
    options = {"steps": 10, "cache_interval": 3} | more
    plan = server.post("/api/v1/plan", json={"prompt": "a cat"} | options).json()
    drawn = mlx_deepcache.StableDiffusion.from_pretrained(None, "float32")("a cat", **options).stats
    assert [step[0].upper() for step in drawn["steps"]] == list(plan["steps"].upper())
    assert plan["unet_macs_share"] == pytest.approx(drawn["unet_macs"] / drawn["unet_macs_uncached"])


def test_cancelling_while_drawn_and_while_waiting(server):
    running, waiting = server.job(**LONG), server.job(**APPLE)
    server.until(running, "generating")
    assert server.look(waiting)["queue_position"] == 0
    assert server.post(f"/api/v1/jobs/{waiting['id']}/cancel").json()["status"] == "cancelled"
    began = time.monotonic()
    server.post(f"/api/v1/jobs/{running['id']}/cancel")
    assert server.ended(running)["status"] == "cancelled" and time.monotonic() - began < 5
    assert server.post(f"/api/v1/jobs/{running['id']}/cancel").status_code == 409
    assert server.ended(server.job(**APPLE))["status"] == "completed", "the worker goes on"


@pytest.mark.parametrize("route", ["/sdapi/v1/txt2img", "/v1/images/generations"])
def test_whoever_waits_as_the_server_ends_may_ask_another(serve, route):
    with serve() as server, ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.post, route, json=LONG)
        while not server.service.worker.busy:
            time.sleep(0.01)
        waiting = pool.submit(server.post, route, json=APPLE)
        while not server.service.worker.length:
            time.sleep(0.01)
        server.service.worker.stop()
        assert [answer.result().status_code for answer in (running, waiting)] == [503, 503]


def test_a_full_queue_says_when_to_come_back(server):
    jobs = [server.job(**LONG)]
    server.until(jobs[0], "generating")
    jobs += [server.job(**APPLE) for _ in range(3)]
    refused = server.post("/api/v1/jobs", json=APPLE)
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "queue_full"
    for job in jobs:
        server.post(f"/api/v1/jobs/{job['id']}/cancel")
        assert server.ended(job)["status"] == "cancelled"


def test_a_job_that_fails_leaves_the_worker_alive(server):
    heavy = APPLE | {"guidance_scale": 1e38}
    job = server.ended(server.job(**heavy))
    assert job["status"] == "failed" and "NaN" in job["error"]["message"]
    assert server.ended(server.job(**APPLE))["status"] == "completed"


@pytest.mark.parametrize(
    "asked, status, words",
    [
        ({"prompt": "a cat", "stepss": 3}, 422, "stepss"),
        ({"prompt": "a cat", "steps": 0}, 422, "1 or more"),
        ({"prompt": "a cat", "scheduler": "eulr"}, 422, "euler"),
        ({"prompt": "a cat", "model": "/etc/passwd"}, 404, "there is no model"),
        ({"prompt": "a cat", "loras": [{"name": "../x"}]}, 404, "there is no LoRA"),
        ({"prompt": "a cat", "controls": [{"model": "/x", "image": packed(PICTURE)}]}, 404, "there is no ControlNet"),
        ({"prompt": "a cat", "image": "http://127.0.0.1:1/x.png"}, 422, "Requests not allowed"),
        ({"prompt": "a cat", "image": "/etc/passwd"}, 422, "Invalid encoded image"),
        ({"prompt": "a cat", "image": base64.b64encode(b"GIF89a").decode()}, 422, "Invalid encoded image"),
        ({"prompt": "a cat", "n": 17}, 422, "1 to 16"),
        ({"prompt": "a cat", "height": 4096, "width": 4096}, 422, "4,194,304"),
        ({"prompt": "a cat", "cache": "deepcach"}, 202, None),
        ({"prompt": "a cat", "latents": "/x"}, 422, "latents"),
    ],
)
def test_what_cannot_be_is_refused_at_once(server, asked, status, words):
    answer = server.post("/api/v1/jobs", json=asked)
    assert answer.status_code == status, answer.text
    if words is not None:
        assert words in answer.json()["error"]["message"]
        return
    job = server.ended(answer.json())  # what needs the model is found once it starts
    assert job["status"] == "failed" and "deepcache" in job["error"]["message"]


def test_two_clients_at_once(server):
    with ThreadPoolExecutor(2) as pool:
        jobs = list(pool.map(lambda seed: server.ended(server.job(**APPLE | {"seed": seed})), (1, 2)))
    assert [job["status"] for job in jobs] == ["completed"] * 2
    assert server.get(jobs[0]["images"][0]["url"]).content != server.get(jobs[1]["images"][0]["url"]).content


def test_jobs_are_kept_for_a_while(serve):
    with serve(keep=0.2) as server:
        job = server.ended(server.job(**APPLE))
        time.sleep(0.3)
        for route in ("", "/events", "/images/0"):
            assert server.get(f"/api/v1/jobs/{job['id']}{route}").status_code == 410
            assert server.get(f"/api/v1/jobs/none{route}").status_code == 404
        assert server.get("/api/v1/jobs").json() == []


def test_an_idle_model_is_freed_and_comes_back(serve):
    with serve(idle=0.3) as server:
        server.ended(server.job(**APPLE))
        painter, end = server.service.painter, time.monotonic() + 10
        while painter.loaded is not None and time.monotonic() < end:
            time.sleep(0.05)
        assert painter.loaded is None
        assert server.ended(server.job(**APPLE))["status"] == "completed"


def test_models_loras_and_their_absence(serve, checkpoint, tmp_path):
    """A LoRA is its own request's only; models go by their names."""
    offers = Offers([f"tiny={checkpoint('sd15')}", "emoji"])
    with serve(offers) as server:
        models = {model["id"]: model for model in server.get("/api/v1/capabilities").json()["models"]}
        assert list(models) == ["tiny", "emoji"]
        first = server.ended(server.job(prompt="a cat", steps=2, seed=1, height=64, width=64))
        assert first["status"] == "completed" and first["model"] == "tiny"
        assert first["settings"]["model"] == "tiny", "no path is told"
        assert server.ended(server.job(**APPLE, model="emoji"))["model"] == "emoji"
        assert server.post("/api/v1/models/load", json={"model": "tiny"}).json()["loaded"]
        assert server.service.painter.loaded.model == "tiny"
        server.post("/api/v1/models/unload")
        assert server.service.painter.loaded is None


def test_one_thread_touches_mlx(serve, monkeypatch):
    """Every function of MLX, in drawing, planning, describing, cancelling and unloading."""
    import threading

    threads = set()

    def watched(function):
        def call(*args, **kwargs):
            threads.add(threading.current_thread().name)
            return function(*args, **kwargs)

        return call

    for name in dir(mx):
        if type(getattr(mx, name)).__name__ == "nb_func":
            monkeypatch.setattr(mx, name, watched(getattr(mx, name)))
    with serve() as server:
        server.get("/api/v1/capabilities")
        job = server.job(**APPLE)
        list(server.events(job))
        server.post("/api/v1/plan", json=APPLE)
        long = server.job(**LONG)
        server.post(f"/api/v1/jobs/{long['id']}/cancel")
        server.ended(long)
        server.post("/api/v1/models/unload")
    assert threads == {"mlx-worker"}
