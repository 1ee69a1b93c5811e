"""The VAE against diffusers."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Reference
from helpers import error, to_mlx, to_torch_layout
from oracle import vae_decode, vae_encode
from tiny import KINDS

from mlx_deepcache.checkpoints.weights import rename, to_channels_last
from mlx_deepcache.nets.autoencoder import AutoencoderKL, VAEConfig


@pytest.mark.parametrize("kind", KINDS)
def test_decode_and_encode(checkpoint, pipeline, kind):
    vae = pipeline(kind).component("vae")
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 4, 5, 9), dtype=np.float32)
    assert error(to_torch_layout(vae.decode(to_mlx(latents))), vae_decode(checkpoint(kind), latents)) < 1e-5
    image = rng.uniform(-1, 1, (2, 3, 40, 72)).astype(np.float32)
    assert error(to_torch_layout(vae.encode(to_mlx(image))), vae_encode(checkpoint(kind), image)) < 1e-5


def test_without_attention_or_quantization_convolutions_and_with_a_shift():
    """The variants that other families and small VAEs have."""
    torch.manual_seed(0)
    config = {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
        "layers_per_block": 2,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latent_channels": 4,
        "scaling_factor": 0.3,
        "shift_factor": 0.1,
    }
    reference = Reference(**config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    vae = AutoencoderKL(VAEConfig.from_dict(config))
    tensors = rename({name: mx.array(value.numpy()) for name, value in reference.state_dict().items()})
    from mlx.utils import tree_flatten

    shapes = {name: p.shape for name, p in tree_flatten(vae.parameters())}
    vae.load_weights(list(to_channels_last(tensors, shapes).items()))
    latents = np.random.default_rng(0).standard_normal((1, 4, 6, 6), dtype=np.float32)
    with torch.no_grad():
        expected = reference.decode(torch.tensor(latents) / 0.3 + 0.1).sample.numpy()
        image = torch.rand(1, 3, 12, 12)
        encoded = (reference.encode(image).latent_dist.mean - 0.1) * 0.3
    assert error(to_torch_layout(vae.decode(to_mlx(latents))), expected) < 1e-5
    assert error(to_torch_layout(vae.encode(to_mlx(image))), encoded) < 1e-5
