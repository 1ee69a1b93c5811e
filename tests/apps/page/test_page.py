"""The page as a program sees it, by gradio_client: no browser is needed."""

import ast
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image, PngImagePlugin
from serving import Access, Limits, Offers
from tiny import write_controlnet, write_lora, write_upscaler

import mlx_deepcache
from mlx_deepcache import StableDiffusion
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.apps.page import form
from mlx_deepcache.apps.page.facts import sizes_of
from mlx_deepcache.apps.page.widgets import label
from mlx_deepcache.generation.declared import options_of
from mlx_deepcache.generation.options import Options

HOUSE = Path(mlx_deepcache.__file__).parent
ASKED = {"prompt": "a red apple", "steps": 8, "seed": 3, "cache_interval": 2}


@pytest.fixture(scope="module")
def visits(server):
    """A client whose leaving, which takes it a second, is waited for once."""
    with visitor(server) as client:
        yield client


@pytest.fixture
def client(visits):
    """One that has not been there before."""
    visits.reset_session()
    return visits


class visitor:
    """A client that leaves at last."""

    def __init__(self, server, **options):
        self.client = Client(f"http://127.0.0.1:{server.port}/", verbose=False, **options)

    def __enter__(self):
        return self.client

    def __exit__(self, *error):
        self.client.close()


def value(shown):
    """What a widget shows, from an update of it."""
    return shown.get("value") if isinstance(shown, dict) else shown


def settings(file):
    with Image.open(file) as image:
        return json.loads(image.info["mlx_deepcache"])


def end_of(job):
    """The last outputs of a job that is being drawn, and its `state`."""
    shown = job.result(60)
    return shown, re.sub("<[^>]+>", "", value(shown[2]))


def test_a_picture_is_the_one_that_every_face_draws(server, client, tmp_path):
    """Page, HTTP and command line: the same bytes; page and HTTP the same file."""
    file = value(client.predict(**ASKED, api_name="/draw")[0])
    job = server.ended(server.job(**{**ASKED, "guidance_scale": 5.0, "width": 64, "height": 64}))
    by_http = server.get(job["images"][0]["url"]).content
    flags = ["--prompt", "a red apple", "--steps", "8", "--seed", "3", "--cache-interval", "2", "--dtype", "float32"]
    assert main_generate([*flags, "--quiet", "--output", str(tmp_path / "cli.png")]) == 0
    assert Path(file).read_bytes() == by_http
    assert (np.asarray(Image.open(file)) == np.asarray(Image.open(tmp_path / "cli.png"))).all()
    texts = Image.open(file).info
    assert texts["parameters"].startswith("a red apple") and settings(file)["seed"] == 3


def test_the_plan_is_the_servers(server, client):
    shown = client.predict(**ASKED, api_name="/plan")[0]
    plan = server.post("/api/v1/plan", json=ASKED).json()
    cells = "".join({"full": "F", "cached": "c"}[kind] for kind in re.findall('<i class="(\\w+)"></i>', shown)[:8])
    assert cells == plan["steps"] == "FcFcFcFc"
    assert f"{plan['unet_macs_share']:.0%}" in shown and 'aria-label="8 steps: 4 full, 4 cached"' in shown
    client.predict(**ASKED, api_name="/draw")
    assert "about" in client.predict(**ASKED, api_name="/plan")[0]  # as one was drawn


def test_with_and_without(client):
    preview, *_, slider, about, numbers = client.predict(**ASKED, compare=True, api_name="/draw")
    with_cache, without = (np.asarray(Image.open(file), float) for file in value(slider))
    near = 10 * np.log10(255**2 / ((with_cache - without) ** 2).mean())
    assert f"PSNR <b>{near:.1f} dB</b>" in about and "×</b> as fast" in about
    assert "4 full, 4 cached" in numbers and "Peak memory" in numbers and "Remembered by deepcache" in numbers


def test_stop_keeps_the_last_estimate(client):
    job = client.submit(**ASKED | {"steps": 100}, api_name="/draw")
    while not any("step" in str(value(shown[2])) for shown in job.outputs()):
        time.sleep(0.05)
    assert "stopping" in client.predict(api_name="/stop")
    shown, state = end_of(job)
    assert re.match(r"stopped at step \d+ of 100: the last estimate", state), state
    assert Image.open(value(shown[0])).size == (64, 64)
    assert value(shown[1])[0]["caption"].startswith("stopped at ")
    assert "nothing is drawn" in client.predict(api_name="/stop")


def test_four_at_once_and_their_places(server):
    """Each visitor's picture is its own, and each is told how many are before it."""
    held = threading.Event()
    server.service.worker.call(held.wait)
    with ThreadPoolExecutor(4) as pool:
        clients = list(pool.map(visitor, [server] * 4))
    jobs = [one.client.submit(**ASKED | {"seed": i}, api_name="/draw") for i, one in enumerate(clients)]
    while server.service.worker.length < 4:
        time.sleep(0.02)
    time.sleep(1)
    held.set()
    ends = [end_of(job) for job in jobs]
    said = {re.sub("<[^>]+>", "", str(value(shown[2]))) for job in jobs for shown in job.outputs()}
    assert {"1 before you", "2 before you", "3 before you"} <= said
    assert [settings(value(shown[0]))["seed"] for shown, _ in ends] == [0, 1, 2, 3]
    assert all(state.startswith("drawn in") for _, state in ends)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: one.client.close(), clients))


def test_who_leaves_takes_the_job_along(server):
    with visitor(server) as client:
        job = client.submit(**ASKED | {"steps": 100}, api_name="/draw")
        while not server.service.worker.busy:
            time.sleep(0.02)
        mine = server.service.worker.running
        job.cancel()
        assert mine.done.result(10).status == "cancelled"
        assert end_of(client.submit(**ASKED, api_name="/draw"))[1].startswith("drawn in")


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"cache": "depcache"}, "there is no cache called 'depcache'; did you mean 'deepcache'?"),
        ({"compare": True, "cache_interval": 1}, "compare shows what the cache changes, but it is off"),
        ({"width": 65}, "multiple"),
        ({"width": 100_000, "height": 100_000}, "pixels"),
        ({"outpaint": "x", "editor": "apple"}, "outpaint should be pixels"),
    ],
)
def test_an_error_is_one_line(client, tmp_path, wrong, told):
    if "editor" in wrong:
        wrong = wrong | {"editor": painting(tmp_path, Image.new("RGB", (64, 64), "red"))}
    with pytest.raises(AppError, match=re.escape(told)) as error:
        client.predict(**ASKED | wrong, api_name="/draw")
    assert "\n" not in str(error.value)


def painting(folder, picture, painted=()):
    """What an ImageEditor sends: a picture, and a layer with these boxes painted."""
    layer = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    for box in painted:
        layer.paste((255, 255, 255, 255), box)
    files = {"background": folder / "background.png", "layer": folder / "layer.png"}
    picture.save(files["background"])
    layer.save(files["layer"])
    background, layer = (handle_file(str(file)) for file in files.values())
    return {"background": background, "layers": [layer], "composite": background}


def test_a_painted_mask_is_the_same_as_a_files(server, client, tmp_path):
    """Outside of what is painted the picture stays; the whole is what Python draws from the same two pictures."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    asked = ASKED | {"strength": 0.5}
    file = value(client.predict(**asked, editor=painting(tmp_path, picture, [(16, 16, 48, 40)]), api_name="/draw")[0])
    mask = Image.new("L", picture.size)
    mask.paste(255, (16, 16, 48, 40))
    drawn = np.asarray(Image.open(file))
    options = {"steps": 8, "seed": 3, "cache_interval": 2, "strength": 0.5}
    image = StableDiffusion.from_pretrained(dtype="float32")("a red apple", **options, image=picture, mask=mask)
    assert (drawn == np.asarray(image.images[0])).all()
    assert (drawn[:16] == np.asarray(picture)[:16]).all() and (
        drawn[20:36, 20:44] != np.asarray(picture)[20:36, 20:44]
    ).any()
    mask.save(tmp_path / "mask.png")
    by_file = client.predict(
        **asked, editor=painting(tmp_path, picture), mask=handle_file(str(tmp_path / "mask.png")), api_name="/draw"
    )
    assert (np.asarray(Image.open(value(by_file[0]))) == drawn).all()


def test_masks(tmp_path):
    picture, layer = Image.new("RGBA", (8, 8), "red"), Image.new("RGBA", (8, 8))
    assert form.painted({"background": picture, "layers": [layer]}, None, False) == (picture, None)
    assert form.painted({"background": Image.new("RGBA", (8, 8)), "layers": [layer]}, None, False) == (None, None)
    assert form.painted(None, Image.new("L", (8, 8)), False) == (None, None)
    blank = {"background": Image.new("RGBA", (800, 800), "white")}
    assert form.painted(blank | {"layers": [Image.new("RGBA", (800, 800))]}, None, False) == (None, None)
    with pytest.raises(ValueError, match="there is no picture under it"):
        form.painted(blank | {"layers": [Image.new("RGBA", (800, 800), "white")]}, None, False)
    layer.putpixel((2, 3), (255, 255, 255, 1))
    _, mask = form.painted({"background": picture, "layers": [layer]}, None, False)
    assert np.argwhere(np.asarray(mask)).tolist() == [[3, 2]] and mask.getpixel((2, 3)) == 255
    _, inverted = form.painted({"background": picture, "layers": [layer]}, None, True)
    assert (np.asarray(inverted) == 255 - np.asarray(mask)).all()
    for layers, file in (
        ([layer.resize((9, 8))], None),
        ([], Image.new("L", (9, 8))),
        ([layer], Image.new("L", (8, 8))),
    ):
        with pytest.raises(ValueError, match="mask"):
            form.painted({"background": picture, "layers": layers}, file, False)


def filled(client, shown):
    """Values of the fields that a restore filled, by their labels."""
    returns = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/restore"]["returns"]
    return {about["label"]: value(one) for about, one in zip(returns, shown, strict=True)}


def test_restoring_our_own(client):
    asked = ASKED | {"negative_prompt": "grey", "guidance_scale": 3.5, "clip_skip": 1, "scheduler": "euler"}
    file = value(client.predict(**asked, cache="taylorseer\ndeepcache:interval=4", api_name="/draw")[0])
    fields = filled(client, client.predict(handle_file(file), api_name="/restore"))
    assert fields["Prompt"] == "a red apple" and fields["Negative prompt"] == "grey" and fields["Seed"] == 3
    assert (fields["Steps"], fields["Guidance scale"], fields["Scheduler"], fields["Clip skip"]) == (8, 3.5, "euler", 1)
    assert sorted(fields["Policy"].splitlines()) == ["deepcache:interval=4", "taylorseer"]


def test_restoring_a1111s(client, tmp_path):
    """Every field that has a meaning is filled; of the rest it is said."""
    info = PngImagePlugin.PngInfo()
    info.add_text(
        "parameters",
        "a castle <lora:none:0.5>\nNegative prompt: fog\nSteps: 22, Sampler: DPM++ 2M Karras, CFG scale: 6.5, "
        "Seed: 77, Size: 128x64, RNG: CPU, Clip skip: 2, Model: other, Face restoration: CodeFormer",
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    shown = client.predict(handle_file(str(tmp_path / "a.png")), api_name="/restore")
    fields = filled(client, shown)
    assert fields["Prompt"] == "a castle <lora:none:0.5>" and fields["Negative prompt"] == "fog"
    assert (fields["Steps"], fields["Guidance scale"], fields["Seed"]) == (22, 6.5, 77)
    assert (fields["Width"], fields["Height"], fields["Scheduler"], fields["Clip skip"]) == (
        128,
        64,
        "dpm++2m-karras",
        1,
    )
    assert "without meaning here: Model, Face restoration" in shown[0]
    Image.new("RGB", (8, 8)).save(tmp_path / "none.png")
    with pytest.raises(AppError, match="carries no settings"):
        client.predict(handle_file(str(tmp_path / "none.png")), api_name="/restore")


def test_a_cache_is_picked_by_its_price(client):
    policy, reason = client.predict(min_psnr=45, api_name="/pick")
    front = json.loads((HOUSE / "checkpoints/bundled/emoji/cache_front.json").read_text())
    price = next(p for p in front["policies"] if p["cache"] == policy.splitlines())
    assert f"{price['macs']:.3f} of the multiply-adds" in reason and price["psnr"] > 45
    with pytest.raises(AppError, match="no calibrated cache"):
        client.predict(min_psnr=60, max_macs=0.1, api_name="/pick")


def test_grid(client):
    *_, shown = client.predict(**ASKED | {"seed": 5}, intervals=["5"], seeds=2, api_name="/grid")
    cells = [(settings(cell["image"]), cell["caption"]) for cell in value(shown)]
    assert [(s["cache_interval"], s["seed"]) for s, _ in cells] == [(1, 5), (1, 6), (5, 5), (5, 6)]
    assert all(re.match(r"uncached, \d", caption) for _, caption in cells[:2])
    images = [np.asarray(Image.open(cell["image"]), float) for cell in value(shown)]
    for first, other, (_, caption) in zip(images[:2], images[2:], cells[2:], strict=True):
        near = 10 * np.log10(255**2 / ((first - other) ** 2).mean())
        assert caption.startswith(f"every 5: {near:.1f} dB, ")


def test_every_option_has_a_field(client):
    """By its own name, with what is declared."""
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/draw"]["parameters"]
    names = {about["parameter_name"] for about in described}
    assert all(about["parameter_has_default"] for about in described)
    served = {o.name for o in form.SERVED} - set(form.PIECES)
    assert served <= names and {"prompt", "seed", "pictures", "model", "vae", "refiner", "loras", "editor"} <= names
    assert {"hires_scale", "clip_skip", "outpaint", "mask_padding", "upscale"} <= served
    config = httpx.get(client.src + "config").json()
    shown = {about["props"].get("elem_id"): about["props"] for about in config["components"]}
    steps = next(o for o in options_of(Options) if o.name == "steps")
    assert (shown["steps"]["minimum"], shown["steps"]["maximum"], shown["steps"]["step"]) == steps.span
    assert shown["branch"]["maximum"] == 8 and shown["steps"]["value"] == 50  # as the model says
    assert "--" not in json.dumps([about["props"].get("info") for about in config["components"]])


def test_all_twelve_are_there(client):
    config = httpx.get(client.src + "config").json()
    ids = {about["props"].get("elem_id"): about for about in config["components"]}
    for name in (
        "prompt negative tokens model vae loras interval branch policy compare slider price min_psnr pick preview "
        "strip stop state gallery restore editor strength fit control control_image"
    ).split():
        assert name in ids, name
    assert not ids["vae"]["props"]["visible"] and not ids["loras"]["props"]["visible"]
    assert not next(c for c in config["components"] if c["props"].get("label") == "Controlnet")["props"]["visible"]
    assert all(ids[name]["props"]["format"] == "png" for name in ("preview", "slider", "gallery", "editor"))


def test_what_is_offered(serve, checkpoint, tmp_path):
    """ControlNets are seen where there are some, models can be chosen, and files are named, never typed."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "edges.safetensors").write_bytes(b"")
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "ink.safetensors").write_bytes(b"")
    offers = Offers(["emoji", f"tiny={checkpoint('sdxl')}"], (), [tmp_path / "loras"], (), [tmp_path / "nets"])
    with serve(offers) as server, visitor(server) as client:
        config = httpx.get(client.src + "config").json()
        ids = {about["props"].get("elem_id"): about["props"] for about in config["components"]}
        assert [name for name, _ in ids["control"]["choices"]] == ["none", "edges"]
        assert ids["loras"]["visible"] and ids["loras"]["value"]["data"] == [["ink", 0.0]]
        for wrong in ({"model": "/etc/passwd"}, {"upscale": "/etc/passwd"}, {"control": "x"}):
            with pytest.raises(AppError):
                client.predict(**ASKED, **wrong, api_name="/draw")
        shown = client.predict(**ASKED | {"width": 32, "height": 32}, model="tiny", prompt_2="x", api_name="/draw")
        drawn = settings(value(shown[0]))
        assert drawn["model"] == "tiny" and drawn["prompt_2"] == "x"


def test_with_a_lora_a_controlnet_and_an_upscaler(serve, checkpoint, tmp_path):
    """The picture is Python's with these, and no other than without one of them."""
    for name in ("loras/ink", "nets", "upscalers"):
        (tmp_path / name).mkdir(parents=True)
    lora, net = (
        write_lora(tmp_path / "loras/ink/pytorch_lora_weights.safetensors"),
        write_controlnet("sd15", tmp_path / "nets/edges"),
    )
    sharp, edges = write_upscaler(tmp_path / "upscalers/sharp.safetensors"), tmp_path / "edges.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(edges)
    model = str(checkpoint("sd15"))
    offers = Offers([f"tiny={model}"], (), [tmp_path / "loras"], (), [tmp_path / "nets"], [tmp_path / "upscalers"])
    asked = ASKED | {"steps": 4, "width": 64, "height": 64, "guidance_scale": 5.0}
    inked = {"headers": ["LoRA", "strength"], "data": [["ink", 0.8]], "metadata": None}
    follows = {"control": "edges", "control_image": handle_file(str(edges)), "control_scale": 0.7}
    with serve(offers) as server, visitor(server) as client:
        shown = client.predict(**asked, **follows, loras=inked, upscale="sharp", api_name="/draw")
        drawn = np.asarray(Image.open(value(shown[0])))
        plain = np.asarray(Image.open(value(client.predict(**asked, **follows, api_name="/draw")[0])))
    control = mlx_deepcache.Control(str(net), str(edges), scale=0.7)
    pipe = StableDiffusion.from_pretrained(model, dtype="float32", loras=[(lora, 0.8)])
    assert (drawn == np.asarray(pipe(**asked, controls=[control], upscale=str(sharp)).images[0])).all()
    pipe = StableDiffusion.from_pretrained(model, dtype="float32")
    assert (plain == np.asarray(pipe(**asked, controls=[control]).images[0])).all()
    assert drawn.shape == (128, 128, 3) and (drawn[::2, ::2] != plain).any()


def test_the_rest_of_the_server_stays(server):
    """Routes, errors in their families' shapes, and what no page is asked for."""
    assert server.get("/health").json()["status"] == "ok" and server.get("/docs").status_code == 200
    assert (
        server.get("/sdapi/v1/samplers").status_code == 200 and "/sdapi/v1/txt2img" in server.get("/openapi.json").text
    )
    for path in ("/nowhere", "/v1/nowhere", "/sdapi/v1/nowhere", "/api/v1/nowhere"):
        assert server.get(path).status_code == 404, path
    assert "error" in server.get("/v1/nowhere").json() and server.get("/nowhere").json() == {"detail": "Not Found"}
    assert server.get("/", headers={"host": "elsewhere"}).status_code == 403
    assert server.get("/config", headers={"origin": "http://elsewhere"}).status_code == 403


def test_a_key_guards_the_page(serve):
    with serve(None, None, Access(key="secret")) as server:
        assert server.get("/").status_code == 401 and server.get("/config").status_code == 401
        assert server.get("/", auth=("anybody", "secret")).status_code == 200


def test_no_path_and_no_address_is_opened(server, tmp_path):
    """A file of the machine's is not sent, and a request's address is not asked."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    for path in ("/etc/passwd", str(tmp_path / "secret.png"), str(Path("README.md").resolve())):
        assert server.get(f"/gradio_api/file={path}").status_code in (403, 404), path
    asked = []
    with socket_that_hears(asked) as port:
        for path in (f"http://127.0.0.1:{port}/a.png", "/etc/hosts"):
            data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
            event = server.post("/gradio_api/call/restore", json={"data": data}).json()["event_id"]
            assert "event: error" in server.get(f"/gradio_api/call/restore/{event}").text
    assert not asked
    assert server.post("/gradio_api/upload", files={"files": b"x" * 100}).status_code == 200


class socket_that_hears:
    """A port that keeps what connects to it."""

    def __init__(self, heard):
        import socket

        self.heard, self.socket = heard, socket.create_server(("127.0.0.1", 0))

    def __enter__(self):
        def hear():
            while True:
                try:
                    self.heard.append(self.socket.accept())
                except OSError:
                    return

        threading.Thread(target=hear, daemon=True).start()
        return self.socket.getsockname()[1]

    def __exit__(self, *error):
        self.socket.close()


def test_a_large_upload_is_refused(serve):
    with serve(None, Limits(body=1000)) as server:
        answer = server.post("/gradio_api/upload", files={"files": b"x" * 5000})
        assert answer.status_code == 413


def test_no_module_of_the_page_imports_mlx():
    for file in (HOUSE / "apps/page").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"mlx"}, file


def test_generate_imports_none_of_it(tmp_path):
    flags = ["--prompt", "a red apple", "--steps", "1", "--quiet", "--output", str(tmp_path / "a.png")]
    check = (
        f"import sys; from mlx_deepcache.apps.generate import main_generate; assert main_generate({flags}) == 0; "
        "assert not {'gradio', 'fastapi', 'pandas', 'uvicorn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=HOUSE.parent)


def test_without_gradio_one_line_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('No module named gradio')")
    run = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from mlx_deepcache.apps.serve import main_ui; "
        "sys.exit(main_ui(['--port', '7999']))"
    )
    told = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=HOUSE.parent)
    assert told.returncode == 1 and len(told.stderr.splitlines()) == 1
    assert told.stderr.startswith("error: the page needs") and "pip install 'mlx_deepcache[ui]'" in told.stderr


def test_sizes():
    assert sizes_of((512, 512), 8)["3:2"] == (640, 448) and sizes_of((1024, 1024), 8)["1:1"] == (1024, 1024)
    for native, multiple in (((64, 64), 8), ((512, 512), 8), ((1024, 1024), 8), ((768, 512), 64)):
        for width, height in sizes_of(native, multiple).values():
            assert width % multiple == height % multiple == 0
            assert 0.7 < width * height / (native[0] * native[1]) < 1.4


def test_labels():
    assert label("vae_tiling") == "VAE tiling" and label("min_psnr") == "Min PSNR" and label("width") == "Width"
