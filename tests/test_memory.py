"""Tiled decoding against diffusers', and what is said about memory."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import error, to_torch_layout
from mlx.utils import tree_flatten
from PIL import Image

import mlx_deepcache
from mlx_deepcache.backend.memory import limit_memory, machine_memory
from mlx_deepcache.checkpoints.checkpoint import BUNDLED, Checkpoint
from mlx_deepcache.errors import UsageError
from mlx_deepcache.nets.autoencoder import VAEConfig
from mlx_deepcache.nets.tiling import decode_tiled, tiled

SHEET = Path(__file__).parents[1] / "docs" / "contact_sheet.png"
SD_VAE = VAEConfig(block_out_channels=(128, 256, 512, 512))


@pytest.fixture(scope="module")
def vae():
    return Checkpoint.open(None).load("vae", mx.float32)


def encoded(vae, height, width):
    """Latents of a real picture, of this size in latents."""
    image = Image.open(SHEET).convert("RGB").resize((width * vae.config.factor, height * vae.config.factor))
    return vae.encode(mx.array(np.asarray(image, np.float32)[None] / 127.5 - 1))


def test_tiles_blend_as_diffusers_blends_them(vae):
    theirs = AutoencoderKL.from_pretrained(BUNDLED / "vae")
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = 16, 16 * vae.config.factor
    latents = encoded(vae, 44, 30)
    with torch.no_grad():
        z = torch.from_numpy(to_torch_layout(latents)) / vae.config.scaling_factor
        reference = theirs.tiled_decode(z).sample
    assert error(to_torch_layout(decode_tiled(vae, latents, 16)), reference) < 1e-5


@pytest.mark.parametrize("size", [(96, 112), (65, 40)])
def test_tiles_differ_little_from_the_whole(vae, size):
    latents = encoded(vae, *size)
    whole = np.clip(np.array(vae.decode(latents)), -1, 1)
    in_tiles = np.clip(decode_tiled(vae, latents), -1, 1)
    assert np.abs(in_tiles - whole).mean() / 2 < 0.01  # of the range from black to white
    assert not np.array_equal(in_tiles, whole)


def test_one_tile_is_the_whole(vae):
    latents = encoded(vae, 64, 40)
    assert np.array_equal(decode_tiled(vae, latents), np.array(vae.decode(latents)))


def test_when_tiles_are_used():
    small, large, gigabyte = (64, 64), (128, 128), 10**9
    assert not tiled("on", SD_VAE, small, 2, gigabyte)  # one tile holds it
    assert tiled("on", SD_VAE, large, 2, 10**15)
    assert not tiled("off", SD_VAE, large, 2, gigabyte)
    assert tiled("auto", SD_VAE, large, 2, gigabyte)
    assert not tiled("auto", SD_VAE, large, 2, 10**15)


def test_tiles_take_less_memory(vae):
    latents = encoded(vae, 128, 128)
    peaks = []
    for decode in (vae.decode, lambda z: mx.array(decode_tiled(vae, z))):
        mx.reset_peak_memory()
        mx.eval(decode(latents))
        peaks.append(mx.get_peak_memory() - mx.get_active_memory())
    assert peaks[1] < peaks[0] / 2


def test_the_pipeline_tiles_when_memory_is_short():
    pipe = mlx_deepcache.StableDiffusion.from_pretrained(None, "float32")
    latents = encoded(pipe.checkpoint.load("vae", mx.float32), 80, 80)
    whole, in_tiles = pipe.decode(latents, "off"), pipe.decode(latents, "on")
    assert 0 < np.abs(whole.astype(float) - in_tiles).mean() < 2.55
    assert np.array_equal(pipe.decode(latents, "auto"), whole)
    pipe.budget = 10**6
    assert np.array_equal(pipe.decode(latents, "auto"), in_tiles)


def test_peaks_are_reported_by_phase(pipeline):
    pipe = pipeline("sd15")
    stats = pipe("a cat", steps=2).stats
    peaks = stats["peak_memory_bytes_by_phase"]
    assert set(peaks) == set(stats["seconds"])
    assert max(peaks.values()) == stats["peak_memory_bytes"]
    weights = sum(p.nbytes for p in dict(tree_flatten(pipe.component("unet").parameters())).values())
    assert peaks["denoise"] > weights


def test_a_memory_limit_is_kept_as_a_budget():
    before = mx.set_memory_limit(10**12)
    cache = mx.set_cache_limit(10**9)
    try:
        assert limit_memory() == machine_memory() > 10**9
        assert limit_memory(1.5) == 1_500_000_000
        assert mx.set_memory_limit(10**12) == 1_500_000_000
        assert mx.set_cache_limit(10**9) == 375_000_000
        for wrong in (0, -1, 0.1, float("nan")):
            with pytest.raises(UsageError, match="at least 0.25 GB"):
                limit_memory(wrong)
    finally:
        mx.set_memory_limit(before)
        mx.set_cache_limit(cache)
