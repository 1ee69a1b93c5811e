"""Models, LoRAs and embeddings by name: each request has its own, and none has another's."""

import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from serving import Offers

from mlx_deepcache import StableDiffusion
from mlx_deepcache.errors import UsageError
from mlx_deepcache.fields import file_and_scale

SMALL = {"steps": 2, "height": 64, "width": 64}
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def folders(tmp_path):
    """A LoRA of one layer, and an embedding."""
    torch.manual_seed(0)
    (tmp_path / "loras").mkdir()
    (tmp_path / "words").mkdir()
    sides = {"down": torch.randn(2, 32), "up": torch.randn(32, 2)}
    tensors = {f"{LAYER}.lora_{side}.weight": tensor for side, tensor in sides.items()}
    save_file(tensors, tmp_path / "loras/ink.safetensors", {"ss_title": "ink"})
    save_file({"emb_params": torch.randn(2, 32)}, tmp_path / "words/wild-style.safetensors")
    return tmp_path


def drawn(server, **asked):
    job = server.ended(server.job(seed=1, **SMALL, **asked))
    assert job["status"] == "completed", job["error"]
    return np.asarray(Image.open(BytesIO(server.get(job["images"][0]["url"]).content))), job["settings"]


def python(checkpoint, prompt, **options):
    pipe = StableDiffusion.from_pretrained(str(checkpoint("sd15")), "float32", **options)
    return np.asarray(pipe(prompt, seeds=[1], **SMALL).images[0])


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
