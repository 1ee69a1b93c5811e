"""Stable Video Diffusion's VAE against diffusers."""

import mlx.core as mx
import numpy as np
import pytest
import torch
import video_oracle
from helpers import error, to_mlx, to_torch_layout
from mlx.utils import tree_flatten

from mlx_deepcache.checkpoints.folder import Part
from mlx_deepcache.nets.layers import GroupNorm
from mlx_deepcache.nets.temporal_vae import (
    AutoencoderKLTemporalDecoder,
    TemporalVAEConfig,
    decode_frames,
    frames_together,
)


@pytest.fixture(scope="module")
def vae(video_checkpoint):
    part = Part.of(video_checkpoint / "vae")
    return part.load(AutoencoderKLTemporalDecoder(TemporalVAEConfig.from_dict(part.config)), None)


@pytest.mark.parametrize("chunk", [1, 2, 5, 14])
def test_frames_are_decoded_in_chunks_that_see_each_other(video_checkpoint, vae, chunk):
    latents = np.random.default_rng(0).standard_normal((5, 4, 5, 9)).astype(np.float32)
    pipe = video_oracle.shared(str(video_checkpoint))
    with torch.no_grad():
        expected = pipe.decode_latents(torch.tensor(latents)[None], 5, chunk)[0].transpose(0, 1).numpy()
    ours = decode_frames(vae, to_mlx(latents), chunk)
    assert error(to_torch_layout(ours), expected) < 1e-5
    together = decode_frames(vae, to_mlx(latents), 5)
    assert (error(ours, together) > 1e-3) == (chunk < 5)


def test_as_many_frames_together_as_memory_is_for(vae):
    """Half of it: a frame of 8 x 8 latents is counted as 64 x 64 pixels of 32 channels."""
    frame = 64 * 64 * 32 * 16
    for budget, expected in ((2**40, 5), (2 * 3 * frame, 3), (2 * 3 * frame - 1, 2), (0, 1)):
        assert frames_together(vae.config, (5, 8, 8), 4, budget) == expected


def test_encode(video_checkpoint, vae):
    """The pipeline's latents of a picture are not scaled."""
    image = np.random.default_rng(1).uniform(-1, 1, (2, 3, 40, 72)).astype(np.float32)
    pipe = video_oracle.shared(str(video_checkpoint))
    expected = pipe._encode_vae_image(torch.tensor(image), "cpu", 1, False).detach().numpy()
    assert error(to_torch_layout(vae.encode(to_mlx(image)) / vae.config.scaling_factor), expected) < 1e-5


def test_norms_have_the_epsilons_of_diffusers(video_checkpoint, vae):
    theirs = video_oracle.shared(str(video_checkpoint)).vae
    expected = {name: module.eps for name, module in theirs.named_modules() if isinstance(module, torch.nn.GroupNorm)}
    assert {n: m.eps for n, m in vae.named_modules() if isinstance(m, GroupNorm)} == expected


def test_all_parameters_matter_in_a_chunk(vae):
    """A last frame's change is seen in the frame before it, through the convolutions over frames."""
    latents = mx.random.normal((3, 4, 4, 4), key=mx.random.key(0))
    changed = mx.concatenate([latents[:2], latents[2:] + 1])
    assert error(decode_frames(vae, changed, 3)[0], decode_frames(vae, latents, 3)[0]) > 1e-4
    assert len(tree_flatten(vae.decoder.time_conv_out.parameters())) == 2
