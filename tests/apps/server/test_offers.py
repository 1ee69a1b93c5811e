"""Models, LoRAs and embeddings by name: each request has its own, and none has another's."""

import shutil
import unicodedata
from io import BytesIO

import mlx.core as mx
import numpy as np
import pytest
import torch
import webuiapi
from PIL import Image
from safetensors.torch import save_file
from serving import Offers
from tiny import write_lora, write_upscaler

from mlx_deepcache import StableDiffusion
from mlx_deepcache.checkpoints.part import load_upscaler
from mlx_deepcache.errors import UsageError
from mlx_deepcache.fields import file_and_scale
from mlx_deepcache.nets.upscaler import upscaled

SMALL = {"steps": 2, "height": 64, "width": 64}


@pytest.fixture
def folders(tmp_path):
    """A LoRA of one layer, and an embedding."""
    torch.manual_seed(0)
    (tmp_path / "loras").mkdir()
    (tmp_path / "words").mkdir()
    write_lora(tmp_path / "loras/ink.safetensors")
    save_file({"emb_params": torch.randn(2, 32)}, tmp_path / "words/wild-style.safetensors")
    return tmp_path


def drawn(server, **asked):
    job = server.ended(server.job(seed=1, **SMALL, **asked))
    assert job["status"] == "completed", job["error"]
    return np.asarray(Image.open(BytesIO(server.get(job["images"][0]["url"]).content))), job["settings"]


def python(checkpoint, prompt, drawing=None, **options):
    pipe = StableDiffusion.from_pretrained(str(checkpoint("sd15")), "float32", **options)
    return np.asarray(pipe(prompt, seeds=[1], **SMALL, **(drawing or {})).images[0])


def test_a_lora_is_its_own_requests_only(serve, checkpoint, folders):
    offers = Offers([f"tiny={checkpoint('sd15')}"], lora_dirs=[folders / "loras"])
    with serve(offers) as server:
        plain, _ = drawn(server, prompt="a cat")
        inked, settings = drawn(server, prompt="a <lora:ink:0.8>cat")
        listed, _ = drawn(server, prompt="a cat", loras=[{"name": "ink", "scale": 0.8}])
        again, _ = drawn(server, prompt="a cat")
        assert np.array_equal(plain, again) and not np.array_equal(plain, inked)
        assert np.array_equal(inked, listed)
        ours = python(checkpoint, "a cat", loras=[(folders / "loras/ink.safetensors", 0.8)])
        assert np.array_equal(inked, ours)
        assert [file_and_scale(text)[1] for text in settings["lora"]] == [0.8] and "ink" in settings["lora_hashes"]
        assert str(folders) not in str(settings), "no path is told"
        told = server.get("/sdapi/v1/loras").json()
        assert told == [{"name": "ink", "alias": "ink", "path": "ink", "metadata": {"ss_title": "ink"}}]
        asked = {"prompt": "a cat <lora:none:1>"}
        assert server.post("/sdapi/v1/txt2img", json=asked).status_code == 404
        text = server.post("/sdapi/v1/txt2img", json=asked | {"disable_extra_networks": True} | SMALL)
        assert text.status_code == 200, "then a tag is only text"


def test_an_embedding_where_a_prompt_has_its_word(serve, checkpoint, folders):
    offers = Offers([f"tiny={checkpoint('sd15')}"], embedding_dirs=[folders / "words"])
    with serve(offers) as server:
        styled, _ = drawn(server, prompt="a cat in wild-style")
        file = folders / "words/wild-style.safetensors"
        assert np.array_equal(styled, python(checkpoint, "a cat in wild-style", embeddings=[file]))
        assert server.service.painter.loaded.embeddings == ("wild-style",)
        drawn(server, prompt="a cat")
        assert server.service.painter.loaded.embeddings == ()
        assert list(server.get("/sdapi/v1/embeddings").json()["loaded"]) == ["wild-style"]


def test_an_upscaler_enlarges_by_its_name_only(serve, checkpoint, tmp_path):
    (tmp_path / "nets").mkdir()
    file = write_upscaler(tmp_path / "nets/sharp.safetensors")
    offers = Offers([str(checkpoint("sd15"))], upscaler_dirs=[tmp_path / "nets"])
    with serve(offers) as server:
        for names in ({"upscale": "sharp"}, {"hires_scale": 1.5, "hires_net": "sharp"}):
            image, settings = drawn(server, prompt="a cat", **names)
            files = {name: file if value == "sharp" else value for name, value in names.items()}
            assert np.array_equal(image, python(checkpoint, "a cat", drawing=files))
            assert "sharp" in settings.values() and str(tmp_path) not in str(settings), "no path is told"
        assert server.post("/api/v1/jobs", json={"prompt": "a", "upscale": str(file)}).status_code == 404
        api = webuiapi.WebUIApi(host="127.0.0.1", port=server.port)
        assert [net["scale"] for net in api.get_upscalers() if net["name"] == "sharp"] == [2]
        picture = Image.fromarray(image[:24, :40])
        large = api.extra_single_image(picture, upscaler_1="sharp", upscaling_resize=2).image
        net = load_upscaler(str(file), mx.float32)
        assert np.array_equal(np.asarray(large), upscaled(net, np.asarray(picture), mx.float32))
        assert api.extra_single_image(picture, upscaler_1="sharp", upscaling_resize=3).image.size == (120, 72)


def test_folders_are_looked_into_again(serve, checkpoint, tmp_path):
    (tmp_path / "models").mkdir()
    shutil.copytree(checkpoint("sd15"), tmp_path / "models/one")
    with serve(Offers(model_dirs=[tmp_path / "models"])) as server:
        assert [model["id"] for model in server.get("/v1/models").json()["data"]] == ["one"]
        shutil.copytree(checkpoint("sd15"), tmp_path / "models/two")
        assert server.post("/sdapi/v1/refresh-checkpoints").json() is None
        assert [model["title"] for model in server.get("/sdapi/v1/sd-models").json()] == ["one", "two"]
        assert drawn(server, prompt="a cat", model="two")[1]["model"] == "two"
        shutil.rmtree(tmp_path / "models/two")
        server.post("/sdapi/v1/refresh-checkpoints")
        assert server.post("/api/v1/jobs", json={"prompt": "a cat", "model": "two"}).status_code == 404


def test_files_that_are_called_alike_have_their_folders_names(tmp_path):
    """As the hub has them: networks with a config, LoRAs, embeddings."""
    files = ["canny/diffusion_pytorch_model.safetensors", "canny/diffusion_pytorch_model.fp16.safetensors"]
    files += [f"depth/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files += ["cat-toy/learned_embeds.safetensors", "chalk/adapter_model.safetensors"]
    files += ["ink/pytorch_lora_weights.safetensors", "ink/weights-slider.safetensors"]
    for file in (tmp_path / name for name in files):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
    for name in ("canny", "depth", "ink"):
        (tmp_path / name / "config.json").write_text("{}")
    shelf = Offers(controlnet_dirs=[tmp_path]).controlnets
    assert shelf.names() == ["canny", "cat-toy", "chalk", "depth", "ink", "weights-slider"]
    assert shelf.path("depth") == str(tmp_path / "depth")
    assert [shelf.path(name) for name in ("cat-toy", "weights-slider")] == [str(tmp_path / files[i]) for i in (4, 7)]


def test_names(tmp_path):
    file = tmp_path / "mine.safetensors"
    file.touch()
    (empty := tmp_path / "empty").mkdir()
    offers = Offers([str(file), "short=owner/name", "owner/other:x.safetensors", "sd15"])
    assert offers.models.names() == ["mine", "short", "x.safetensors", "sd15"] and offers.default == "mine"
    with pytest.raises(UsageError, match="two models are called 'a'"):
        Offers(["a=b", "a=c"])
    with pytest.raises(UsageError, match="expected a folder of LoRAs"):
        Offers(lora_dirs=[tmp_path / "none"])
    with pytest.raises(UsageError, match="no model in the folders"):
        Offers(model_dirs=[empty])


def test_upscalers_are_named_too(serve, tmp_path):
    """A path in their place is no name."""
    (tmp_path / "net.safetensors").write_bytes(b"")
    with serve(Offers(upscaler_dirs=[tmp_path])) as server:
        assert server.get("/api/v1/capabilities").json()["upscalers"] == ["net"]
        for asked in ({"upscale": str(tmp_path / "net.safetensors")}, {"hires_net": "other", "hires_scale": 2}):
            answer = server.post("/api/v1/jobs", json={"prompt": "a red apple", "steps": 1} | asked)
            assert answer.status_code == 404 and "there is no upscaler" in answer.text


def test_a_name_with_its_accents_apart(folders):
    """So macOS writes the names of files that its own programs make, and nobody types them so."""
    typed, written = (unicodedata.normalize(form, "Café ü") for form in ("NFC", "NFD"))
    (folders / "loras/ink.safetensors").rename(folders / f"loras/{written}.safetensors")
    offers = Offers(lora_dirs=[folders / "loras"])
    assert offers.loras.names() == [typed]
    assert offers.loras.path(typed) == offers.loras.path(written) == str(folders / f"loras/{written}.safetensors")
