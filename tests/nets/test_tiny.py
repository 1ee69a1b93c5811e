"""AutoencoderTiny against diffusers, and a VAE in place of a checkpoint's own."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny as Reference
from helpers import error, to_mlx, to_torch_layout
from safetensors.numpy import load_file, save_file

from mlx_deepcache import StableDiffusion
from mlx_deepcache.checkpoints.part import OtherVAE
from mlx_deepcache.errors import CheckpointError
from mlx_deepcache.nets.autoencoder import VAEConfig

OWN = VAEConfig((16, 16, 24, 32))


def test_decode_and_encode(taesd):
    vae, reference = OtherVAE.open(str(taesd), OWN).load(None), Reference.from_pretrained(taesd)
    rng = np.random.default_rng(0)
    latents = 3 * rng.standard_normal((2, 4, 5, 9), dtype=np.float32)  # some beyond the clamp
    image = rng.uniform(-1, 1, (2, 3, 40, 72)).astype(np.float32)
    with torch.no_grad():
        decoded = reference.decode(torch.tensor(latents) / 1.3).sample
        encoded = reference.encode(torch.tensor(image)).latents * 1.3
    assert error(to_torch_layout(vae.decode(to_mlx(latents))), decoded) < 1e-5
    assert error(to_torch_layout(vae.encode(to_mlx(image))), encoded) < 1e-5


def test_in_place_of_a_models_own(checkpoint, taesd):
    """The picture is TAESD's of the very latents; a model's folder gives its VAE."""
    options = {"steps": 2, "height": 64, "width": 64}
    plain = StableDiffusion.from_pretrained(str(checkpoint("sd15")), "float32")("a cat", **options)
    other = StableDiffusion.from_pretrained(str(checkpoint("sd15")), "float32", vae=str(taesd))("a cat", **options)
    assert np.array_equal(plain.latents, other.latents)
    with torch.no_grad():
        latents = torch.tensor(to_torch_layout(plain.latents)) / 1.3
        expected = Reference.from_pretrained(taesd).decode(latents).sample[0].permute(1, 2, 0)
    expected = ((expected / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    assert np.abs(np.asarray(other.images[0], int) - expected).max() <= 1
    same = StableDiffusion.from_pretrained(str(checkpoint("sd15")), "float32", vae=str(checkpoint("sd15")))
    assert np.array_equal(same("a cat", **options).images[0], plain.images[0])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"latent_channels": 16}, "latent channels should be 4, got 16"),
        ({"num_decoder_blocks": [1, 1], "decoder_block_out_channels": [24, 24]}, "same factor"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu'"),
        ({"num_encoder_blocks": [1, 1, 1]}, "one value for each of the 4 levels"),
        ({"decoder_block_out_channels": [24, 24, 24, 16]}, "all be equal"),
        ({"scaling_factor": 0}, "scaling_factor = 0"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "kind AsymmetricAutoencoderKL"),
    ],
)
def test_refused(taesd, tmp_path, values, words):
    (tmp_path / "config.json").write_text(json.dumps(json.loads((taesd / "config.json").read_text()) | values))
    with pytest.raises(CheckpointError, match=words):
        OtherVAE.open(str(tmp_path), OWN)


def test_lacking_and_surplus(taesd, tmp_path):
    with pytest.raises(CheckpointError, match="is no VAE"):
        OtherVAE.open(str(tmp_path), OWN)
    (tmp_path / "config.json").write_text((taesd / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no weights"):
        OtherVAE.open(str(tmp_path), OWN).load(None)
    tensors = load_file(taesd / "diffusion_pytorch_model.safetensors")
    name = "decoder.layers.3.conv.2.weight"
    weight = tensors.pop(name)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        OtherVAE.open(str(tmp_path), OWN).load(None)
    tensors |= {name: weight, "decoder.layers.1.weight": weight}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds decoder.layers.1.weight"):
        OtherVAE.open(str(tmp_path), OWN).load(None)


def test_another_family_is_doubted(checkpoint):
    with pytest.warns(UserWarning, match="another family"):
        OtherVAE.open(str(checkpoint("sdxl")), OWN)
