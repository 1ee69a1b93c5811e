"""Stable Video Diffusion's checkpoints: found, told from others, converted."""

import json
import shutil

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file
from tiny import Hub, files, write_json

from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.checkpoints.families import SVD
from mlx_deepcache.checkpoints.weights import read_component
from mlx_deepcache.errors import CheckpointError

WEIGHTS = ("image_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")


def parameters(checkpoint, name, dtype=None):
    return dict(tree_flatten(checkpoint.load(name, dtype).parameters()))


def test_it_is_told_by_its_configs(video_checkpoint):
    found = Checkpoint.open(str(video_checkpoint))
    assert found.family is SVD and found.video and not found.inpainting
    assert found.components == ("image_encoder", "unet", "vae")
    assert found.native_size == (576, 1024) and found.steps == 25 and found.guidance_scale == 3
    assert found.unet_config.num_frames == 5


@pytest.fixture
def with_half(video_checkpoint, tmp_path):
    """A copy with each file of weights in half precision beside it."""
    folder = shutil.copytree(video_checkpoint, tmp_path / "model")
    for name in WEIGHTS:
        tensors = {key: value.half() for key, value in load_file(folder / f"{name}.safetensors").items()}
        save_file(tensors, folder / f"{name}.fp16.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["svd", "svd-xt", "stabilityai/stable-video-diffusion-img2vid"])
def test_a_short_name_gets_the_half_precision_files(with_half, tmp_path, monkeypatch, name):
    hub = Hub(monkeypatch, tmp_path / "hub")
    repository = f"stabilityai/stable-video-diffusion-img2vid{'-xt' * name.endswith('xt')}"
    hub.repositories[repository] = with_half
    found = Checkpoint.open(name, half=True)
    weights = {file for file in hub.got if file.endswith(".safetensors")}
    assert weights == {f"{part}.fp16.safetensors" for part in WEIGHTS}
    assert found.family is SVD
    assert parameters(found, "unet")["conv_in.weight"].dtype == mx.float16
    hub.calls.clear()
    Checkpoint.open(name, half=True)
    assert not hub.calls  # all of it is here


def test_convert(video_checkpoint, tmp_path, capfd):
    output = tmp_path / "new"
    assert main_convert(["--model", str(video_checkpoint), "--output", str(output), "--dtype", "float16"]) == 0
    made = {"config.json", "weights.safetensors"}
    assert files(output) == {f"{part}/{name}" for part in ("image_encoder", "unet", "vae") for name in made} | {
        "model_index.json",
        "scheduler/scheduler_config.json",
    }
    new, old = Checkpoint.open(str(output)), Checkpoint.open(str(video_checkpoint))
    assert new.schedule(None).config == old.schedule(None).config
    for name in old.components:
        ours, theirs = parameters(new, name), parameters(old, name)
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(ours[key], theirs[key].astype(mx.float16)) for key in theirs)
    assert json.loads((output / "unet" / "config.json").read_text()) == old.source.part("unet").config


def test_convert_quantizes_linear_layers_and_leaves_convolutions(video_checkpoint, tmp_path, capfd):
    output = tmp_path / "new"
    assert main_convert(["--model", str(video_checkpoint), "--output", str(output), "--quantize", "8"]) == 0
    unet = read_component(output / "unet")[0]
    blocks = "down_blocks.1.attentions.0.temporal_transformer_blocks.0"
    assert unet[f"{blocks}.attn1.to_q.weight"].dtype == mx.uint32
    assert unet["down_blocks.1.resnets.0.temporal_res_block.conv1.weight"].dtype == mx.float32
    x, context = mx.random.normal((1, 3, 8, 8, 8), key=mx.random.key(0)), mx.random.normal((1, 1, 24))
    outputs = []
    for folder in (output, video_checkpoint):
        from mlx_deepcache.nets.unet_parts import Conditioning

        net = Checkpoint.open(str(folder)).load("unet", None)
        cond = net.prepare(Conditioning(context, time_ids=mx.array([[6.0, 127, 0.02]])))
        outputs.append(np.array(net(x, net.time_embed(mx.array([0.5]), cond)[0], cond)[0]))
    distance = np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[1])
    assert 0 < distance < 0.05


def test_a_vae_without_an_encoder_that_says_how_far_latents_spread_is_refused(video_checkpoint, checkpoint, tmp_path):
    folder = shutil.copytree(video_checkpoint, tmp_path / "model")
    shutil.rmtree(folder / "vae")
    diffusers.AutoencoderTiny().save_pretrained(folder / "vae")
    words = "goes with this U-Net is an AutoencoderKLTemporalDecoder or AutoencoderKL"
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(str(folder))
    with pytest.raises(CheckpointError, match="is an AutoencoderKL or AutoencoderTiny"):
        Checkpoint.open(str(checkpoint("sd15")), vae=str(video_checkpoint / "vae"))


def test_a_folder_without_the_encoder_of_pictures_is_refused(video_checkpoint, tmp_path):
    folder = shutil.copytree(video_checkpoint, tmp_path / "model")
    shutil.rmtree(folder / "image_encoder")
    with pytest.raises(CheckpointError, match="lacks the folder image_encoder"):
        Checkpoint.open(str(folder))


@pytest.mark.parametrize("key", ["time_mixer.mix_factor", "temporal_res_block.conv1.weight", "time_pos_embed"])
def test_a_tensor_that_lacks_is_named(video_checkpoint, tmp_path, key):
    folder = shutil.copytree(video_checkpoint, tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if key in name)
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        Checkpoint.open(str(folder)).load("unet", None)


def test_a_convolution_over_space_too_is_refused(video_checkpoint, tmp_path):
    folder = shutil.copytree(video_checkpoint, tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, name = load_file(file), "mid_block.resnets.0.temporal_res_block.conv1.weight"
    tensors[name] = torch.zeros(96, 96, 3, 3, 3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="should have shape"):
        Checkpoint.open(str(folder)).load("unet", None)


def test_another_norm_of_clip_is_refused(video_checkpoint, tmp_path):
    folder = shutil.copytree(video_checkpoint, tmp_path / "model")
    config = json.loads((folder / "image_encoder" / "config.json").read_text())
    write_json(folder / "image_encoder" / "config.json", config | {"hidden_act": "relu"})
    with pytest.raises(CheckpointError, match="hidden_act = 'relu' is not supported"):
        Checkpoint.open(str(folder)).load("image_encoder", None)
