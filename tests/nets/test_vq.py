"""The autoencoder with a codebook against diffusers."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import VQModel as Reference
from helpers import error, to_mlx, to_torch_layout

from mlx_deepcache.errors import CheckpointError
from mlx_deepcache.nets import vq
from mlx_deepcache.nets.autoencoder import VAEConfig
from mlx_deepcache.nets.vq import VectorQuantizer, VQConfig


def test_decode_and_encode(unprompted):
    folder, pipe = unprompted("ldm")
    reference, vae = Reference.from_pretrained(folder / "vqvae"), pipe.component("vae")
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, 3, 40, 72)).astype(np.float32)
    with torch.no_grad():
        encoded = reference.encode(torch.tensor(image)).latents
        words = reference.quantize(encoded)[0]
        decoded = reference.decode(words).sample.numpy()
        plain = reference.decode(encoded, force_not_quantize=True).sample.numpy()
    assert error(to_torch_layout(vae.encode(to_mlx(image))), encoded.numpy()) < 1e-5
    assert error(to_torch_layout(vae.decode(to_mlx(words.numpy()))), decoded) < 1e-5
    assert error(to_torch_layout(vae.decode(to_mlx(encoded.numpy()))), decoded) < 1e-5
    assert error(plain, decoded) > 0.01  # or the codebook would not have mattered


def test_the_nearest_codeword_of_thousands(monkeypatch):
    """As many as in the real one, in several goes, against distances in double precision."""
    monkeypatch.setattr(vq, "TOGETHER", 100)
    rng = np.random.default_rng(1)
    words, z = rng.standard_normal((8192, 3)), rng.standard_normal((2, 16, 16, 3))
    net = VectorQuantizer(8192, 3)
    net.embedding.weight = mx.array(words.astype(np.float32))
    found = np.array(net(mx.array(z.astype(np.float32))))
    distances = np.linalg.norm(z.reshape(-1, 1, 3) - words, axis=-1)
    nearest = words[distances.argmin(axis=1)].reshape(z.shape)
    assert np.abs(found - nearest).max() < 1e-6


def test_scaled_latents():
    torch.manual_seed(0)
    config = {"block_out_channels": [32], "norm_num_groups": 8, "scaling_factor": 0.5, "num_vq_embeddings": 16}
    reference = Reference(**config).eval()
    torch.nn.init.normal_(reference.quantize.embedding.weight)
    vae = vq.VQModel(VQConfig.from_dict(config))
    vae.quantize.embedding.weight = mx.array(reference.quantize.embedding.weight.detach().numpy())
    latents = np.random.default_rng(0).standard_normal((1, 3, 8, 8), dtype=np.float32)
    z = vae.quantize(to_mlx(latents) / 0.5)
    with torch.no_grad():
        expected = reference.quantize(torch.tensor(latents) / 0.5)[0].numpy()
    assert error(to_torch_layout(z), expected) < 1e-6


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"vq_embed_dim": 4}, "vq_embed_dim = 4 is not supported"),
        ({"norm_type": "spatial"}, "norm_type = 'spatial' is not supported"),
        ({"lookup_from_codebook": True}, "lookup_from_codebook = True is not supported"),
        ({"num_vq_embeddings": 0}, "num_vq_embeddings = 0"),
        ({"num_vq_embeddings": "many"}, "num_vq_embeddings"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "is not supported in a VAE"),
    ],
)
def test_what_it_cannot_honour(values, words):
    with pytest.raises(CheckpointError, match=words):
        VQConfig.from_dict(values)


def test_defaults_are_those_of_diffusers():
    ours, theirs = VQConfig.from_dict({}), Reference().config
    shared = ("block_out_channels", "latent_channels", "num_vq_embeddings", "scaling_factor", "layers_per_block")
    assert all(getattr(ours, name) == theirs[name] for name in shared)
    assert VQConfig.spreads is False and VAEConfig.spreads is True
