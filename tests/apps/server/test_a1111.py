"""AUTOMATIC1111's API, as its clients use it: webuiapi, and bodies as Open WebUI, SillyTavern, LibreChat send them."""

import base64
import json
import threading
import time
from io import BytesIO

import numpy as np
import pytest
import tiny
import webuiapi
from helpers import MASK, PICTURE
from PIL import Image

import mlx_deepcache
from mlx_deepcache.apps.server.offers import Offers
from mlx_deepcache.apps.server.service import Limits

SMALL = {"width": 64, "height": 64, "steps": 6}


@pytest.fixture
def api(server):
    return webuiapi.WebUIApi(host="127.0.0.1", port=server.port)


def pixels(image):
    return np.asarray(image.convert("RGB"))


def decoded(text):
    return Image.open(BytesIO(base64.b64decode(text)))


def pipe():
    return mlx_deepcache.StableDiffusion.from_pretrained(None, "float32")


def test_txt2img_draws_what_python_draws(api):
    result = api.txt2img(prompt="a red apple", seed=3, cfg_scale=5, sampler_name="Euler a", n_iter=2, **SMALL)
    options = {"steps": 6, "scheduler": "euler-a", "guidance_scale": 5.0, "height": 64, "width": 64}
    for seed, image in zip((3, 4), result.images, strict=True):
        assert np.array_equal(pixels(image), pixels(pipe()("a red apple", seeds=[seed], **options).images[0]))
    assert result.info["all_seeds"] == [3, 4] and result.info["sampler_name"] == "Euler a"
    assert result.info["infotexts"][0] == result.images[0].text["parameters"]
    assert result.info["deepcache"]["caches"] == ["deepcache:interval=1"], "below ten steps it is off"
    told = api.png_info(result.images[0])
    assert told.info == result.info["infotexts"][0] and told.parameters["Steps"] == "6"


def test_img2img_keeps_what_the_mask_leaves(api):
    asked = {"mask_image": MASK, "mask_blur": 0, "denoising_strength": 0.8, "inpaint_full_res": False}
    result = api.img2img([PICTURE], prompt="a red apple", seed=3, **asked, **SMALL)
    assert result.info["ignored"] == ["inpainting_fill"]
    given, grey = (image.resize((64, 64), Image.Resampling.LANCZOS) for image in (PICTURE, MASK))
    outside = np.asarray(grey) < 128
    assert np.array_equal(pixels(result.image)[outside], pixels(given)[outside])
    assert not np.array_equal(pixels(result.image)[~outside], pixels(given)[~outside])
    assert result.parameters["init_images"] is None


def test_only_masked_draws_around_the_mask_at_the_pictures_own_size(api):
    asked = {"mask_image": MASK, "mask_blur": 4, "denoising_strength": 0.8, "inpaint_full_res_padding": 8}
    result = api.img2img([PICTURE], prompt="a red apple", seed=3, **asked, **SMALL)
    options = {"image": PICTURE, "mask": MASK, "mask_blur": 4, "mask_padding": 8, "strength": 0.8}
    options |= {"guidance_scale": 7, "scheduler": "euler-a"}  # which webuiapi always sends
    drawn = pipe()("a red apple", seeds=[3], **options, **SMALL).images[0]
    assert result.image.size == PICTURE.size and np.array_equal(pixels(result.image), pixels(drawn))
    assert "Masked area padding: 8" in result.info["infotexts"][0] and "inpaint_full_res" not in result.info["ignored"]


FIX = {"enable_hr": True, "prompt": "a red apple", "seed": 3, **SMALL}


@pytest.mark.parametrize(
    "asked, options",
    [
        ({"hr_scale": 1.5}, {"hires_scale": 1.5, "hires_strength": 0.75}),
        (
            {"hr_resize_x": 128, "hr_resize_y": 128, "hr_upscaler": "Lanczos", "hr_second_pass_steps": 3}
            | {"denoising_strength": 0.6, "hr_sampler_name": "Use same sampler", "hr_prompt": "a red apple"},
            {"hires_scale": 2, "hires_upscaler": "lanczos", "hires_steps": 3, "hires_strength": 0.6},
        ),
    ],
)
def test_hires_fix(server, asked, options):
    answer = server.post("/sdapi/v1/txt2img", json=FIX | asked).json()
    drawn = pipe()("a red apple", seeds=[3], **options, **SMALL).images[0]
    assert np.array_equal(pixels(decoded(answer["images"][0])), pixels(drawn))
    info = json.loads(answer["info"])
    assert (info["width"], info["denoising_strength"]) == (drawn.width, options["hires_strength"])
    assert f"Hires upscale: {options['hires_scale']}" in info["infotexts"][0]


def test_clip_skip_counts_as_upstream_does(api, server):
    drawn = {skip: pipe()("a red apple", seeds=[3], clip_skip=skip, **SMALL).images[0] for skip in (0, 1)}
    assert not np.array_equal(pixels(drawn[0]), pixels(drawn[1]))
    asked = {"prompt": "a red apple", "seed": 3} | SMALL

    def check(skip, **more):
        answer = server.post("/sdapi/v1/txt2img", json=asked | more).json()
        assert np.array_equal(pixels(decoded(answer["images"][0])), pixels(drawn[skip - 1]))
        info = json.loads(answer["info"])
        assert info["clip_skip"] == skip and ("Clip skip: 2" in info["infotexts"][0]) == (skip == 2)

    for skip in (1, 2):
        check(skip, override_settings={"CLIP_stop_at_last_layers": skip})
    api.set_options({"CLIP_stop_at_last_layers": 2})
    try:
        assert api.get_options()["CLIP_stop_at_last_layers"] == 2
        check(2)
        check(1, clip_skip=1)
    finally:
        api.set_options({"CLIP_stop_at_last_layers": 1})


def test_a_transparent_mask_is_its_alpha(server):
    mask = Image.new("RGBA", PICTURE.size, (255, 255, 255, 255))
    mask.paste((255, 255, 255, 0), (0, 0, 52, 72))
    asked = {"init_images": [webuiapi.b64_img(PICTURE)], "mask": webuiapi.b64_img(mask), "mask_blur": 0, "seed": 1}
    asked |= {"inpaint_full_res": False}
    answer = server.post("/sdapi/v1/img2img", json=asked | {"prompt": "a dog", "denoising_strength": 0.6} | SMALL)
    drawn, given = (
        pixels(decoded(answer.json()["images"][0])),
        pixels(PICTURE.resize((64, 64), Image.Resampling.LANCZOS)),
    )
    assert np.array_equal(drawn[:, :28], given[:, :28]) and not np.array_equal(drawn[:, 40:], given[:, 40:])


def test_control_nets(serve, checkpoint, tmp_path):
    nets = tmp_path / "nets"
    nets.mkdir()
    tiny.write_controlnet("sd15", tmp_path / "one")
    (tmp_path / "one" / "diffusion_pytorch_model.safetensors").rename(nets / "edges.safetensors")
    with serve(Offers([f"tiny={checkpoint('sd15')}"], controlnet_dirs=[nets])) as server:
        api = webuiapi.WebUIApi(host="127.0.0.1", port=server.port)
        assert api.controlnet_model_list() == ["edges"]
        unit = webuiapi.ControlNetUnit(image=PICTURE, model="edges [0123abcd]", weight=0.7, guidance_end=0.9)
        asked = {"prompt": "a cat", "seed": 3, "cfg_scale": 5, "sampler_name": "Euler"} | SMALL
        # unless it is given a dict, this client keeps a call's units in its default for all later ones
        result, plain = api.txt2img(**asked, controlnet_units=[unit], alwayson_scripts={}), api.txt2img(**asked)
        assert not np.array_equal(pixels(result.image), pixels(plain.image))
        said = json.loads(result.image.text["mlx_deepcache"])
        assert said["controls"][0]["model"] == "edges" and str(tmp_path) not in str(result.image.text), (
            "no path is told"
        )
        ours = mlx_deepcache.StableDiffusion.from_pretrained(str(checkpoint("sd15")), "float32")
        control = mlx_deepcache.Control(nets / "edges.safetensors", PICTURE, scale=0.7, end=0.9)
        options = {"steps": 6, "scheduler": "euler", "guidance_scale": 5.0, "height": 64, "width": 64, "fit": "pad"}
        drawn = ours("a cat", seeds=[3], controls=[control], **options).images[0]
        assert np.array_equal(pixels(result.image), pixels(drawn))
        with pytest.raises(RuntimeError, match="preprocessor"):
            api.txt2img(
                **asked,
                controlnet_units=[webuiapi.ControlNetUnit(image=PICTURE, module="canny", model="edges")],
                alwayson_scripts={},
            )


def test_progress_and_interrupt(api):
    results = []
    asked = {"prompt": "a red apple", "seed": 3, "steps": 900, "width": 64, "height": 64}
    drawing = threading.Thread(target=lambda: results.append(api.txt2img(**asked, n_iter=2)))
    drawing.start()
    other, end = (
        webuiapi.WebUIApi(host="127.0.0.1", port=int(api.baseurl.split(":")[2].split("/")[0])),
        time.time() + 30,
    )
    while (now := other.get_progress())["current_image"] is None and time.time() < end:
        time.sleep(0.05)
    assert 0 < now["progress"] < 1 and now["state"]["job_count"] == 2 and now["state"]["sampling_steps"] == 900
    assert "step" in now["textinfo"] and decoded(now["current_image"]).size == (64, 64)
    assert other.interrupt() == {}
    drawing.join(30)
    assert results[0].info["interrupted"] and len(results[0].images) == 1
    other.util_wait_for_ready(check_interval=0.1)
    assert other.get_progress()["state"]["job_count"] == 0


def test_options_come_back_as_they_were_read(api, server):
    """As Open WebUI does, which posts all of them back."""
    options = api.get_options()
    assert options["sd_model_checkpoint"] == "emoji"
    assert api.set_options(options) is None
    api.set_options({"deep_cache_interval": 4})
    drawn = api.txt2img(prompt="a dog", seed=1, width=64, height=64, steps=12)
    assert drawn.info["deepcache"]["caches"] == ["deepcache:interval=4"]
    api.set_options({"deep_cache_interval": None})
    own = api.txt2img(
        prompt="a dog", seed=1, override_settings={"deep_cache_interval": 2}, width=64, height=64, steps=12
    )
    assert own.info["deepcache"]["caches"] == ["deepcache:interval=2"]
    answer = server.post("/sdapi/v1/options", json={"sd_model_checkpoint": "nothing"})
    assert answer.status_code == 404 and "no model" in answer.json()["detail"]


def test_lists(api):
    assert [model["title"] for model in api.get_sd_models()] == ["emoji"]
    assert {"Euler a", "DPM++ 2M"} <= {sampler["name"] for sampler in api.get_samplers()}
    assert api.get_upscalers()[0]["name"] == "None"
    assert api.get_memory()["mlx"]["peak"] >= 0
    assert api.get_face_restorers() == api.get_prompt_styles() == []
    assert api.refresh_checkpoints() is None
    api.util_set_model("emoji")
    assert api.util_get_current_model() == "emoji"


def test_enlarging(api):
    assert api.extra_single_image(PICTURE, upscaler_1="Lanczos", upscaling_resize=2).image.size == (208, 144)
    several = api.extra_batch_images([PICTURE, MASK], upscaler_1="Nearest", resize_mode=1)
    assert [image.size for image in several.images] == [(512, 512)] * 2
    with pytest.raises(RuntimeError, match="no upscaler"):
        api.extra_single_image(PICTURE, upscaler_1="R-ESRGAN 4x+")


SILLYTAVERN = {  # src/endpoints/stable-diffusion.js, public/scripts/extensions/stable-diffusion/index.js
    "url": "http://127.0.0.1:7860",
    "auth": "",
    "prompt": "a red apple",
    "negative_prompt": "lowres",
    "sampler_name": "Euler a",
    "scheduler": "Automatic",
    "steps": 4,
    "cfg_scale": 7,
    "width": 64,
    "height": 64,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 2,
    "hr_additional_steps": 0,
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "seed": -1,
    "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}
OPEN_WEBUI = {"prompt": "a red apple", "batch_size": 1, "width": 64, "height": 64, "steps": 4}  # routers/images.py
LIBRECHAT = {  # api/app/clients/tools/structured/StableDiffusion.js
    "prompt": "a red apple",
    "negative_prompt": "blurry",
    "cfg_scale": 4.5,
    "steps": 22,
    "width": 64,
    "height": 64,
}


@pytest.mark.parametrize("body", [SILLYTAVERN, OPEN_WEBUI, LIBRECHAT])
def test_bodies_as_clients_send_them(server, body):
    answer = server.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    info = json.loads(answer.json()["info"])
    assert decoded(answer.json()["images"][0]).size == (64, 64)
    assert info["infotexts"][0].startswith("a red apple") and info["seed"] >= 0 and info["width"] == 64


def test_an_infotext_fills_what_is_not_said(server):
    text = "a red apple\nSteps: 5, Sampler: Euler a, CFG scale: 4, Seed: 9, Size: 64x64, RNG: CPU"
    info = json.loads(server.post("/sdapi/v1/txt2img", json={"infotext": text, "steps": 4}).json()["info"])
    assert (info["prompt"], info["seed"], info["steps"], info["cfg_scale"]) == ("a red apple", 9, 4, 4.0)


@pytest.mark.parametrize(
    "route, asked, status, words",
    [
        ("txt2img", {"sampler_name": "Eulr a"}, 400, "Sampler not found"),
        ("txt2img", FIX | {"hr_upscaler": "4x-UltraSharp"}, 422, "no upscaler"),
        ("txt2img", FIX | {"hr_prompt": "another"}, 422, "another prompt"),
        ("txt2img", FIX | {"hr_resize_x": 128, "hr_resize_y": 96}, 422, "proportions"),
        ("txt2img", {"enable_hr": True, "hr_resize_x": 128}, 422, "width and height"),
        ("txt2img", FIX | {"hr_scale": 0.5}, 422, "above 1"),
        ("txt2img", {"clip_skip": 99}, 422, "clip skip"),
        ("txt2img", {"styles": ["x"]}, 422, "styles"),
        ("txt2img", {"scheduler": "karras", "sampler_name": "Euler"}, 422, "DPM"),
        ("txt2img", {"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, 422, "ADetailer"),
        ("txt2img", {"script_name": "X/Y/Z plot"}, 422, "Script not found"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "other"}}, 404, "no model"),
        ("txt2img", {"force_task_id": "a/b"}, 422, "force_task_id"),
        ("img2img", {}, 404, "Init image not found"),
        ("img2img", {"init_images": ["http://127.0.0.1/x.png"]}, 500, "Requests not allowed"),
        ("img2img", {"init_images": ["aaaa"]}, 500, "Invalid encoded image"),
        ("interrogate", {"image": ""}, 404, "Model not found"),
        ("create/embedding", {}, 404, "Not Found"),
    ],
)
def test_what_lacks_is_said(server, route, asked, status, words):
    answer = server.post(f"/sdapi/v1/{route}", json=asked)
    assert answer.status_code == status and words in answer.json()["detail"], answer.text


def test_a_client_that_leaves_takes_its_job_along(serve):
    import httpx

    with serve(limits=Limits(queue=4)) as server:
        asked = {"prompt": "a red apple", "steps": 900, "width": 64, "height": 64}
        for _ in range(2):  # one is drawn, one waits

            def leave():
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"http://127.0.0.1:{server.port}/sdapi/v1/txt2img", json=asked, timeout=1.5)

            threads = [threading.Thread(target=leave) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        end = time.monotonic() + 10
        while (server.service.worker.busy or server.service.worker.length) and time.monotonic() < end:
            time.sleep(0.05)
        assert {job["status"] for job in server.get("/api/v1/jobs").json()} == {"cancelled"}
