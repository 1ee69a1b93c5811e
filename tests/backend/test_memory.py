"""Tiled decoding against diffusers', and what is said about memory."""

import gc
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import error, to_torch_layout
from PIL import Image

import mlx_deepcache
from mlx_deepcache.backend import memory
from mlx_deepcache.backend.memory import limit_memory, machine_memory
from mlx_deepcache.backend.ops import on_gpu
from mlx_deepcache.checkpoints.checkpoint import BUNDLED, Checkpoint
from mlx_deepcache.errors import UsageError
from mlx_deepcache.media.pictures import to_uint8
from mlx_deepcache.nets.autoencoder import VAEConfig
from mlx_deepcache.nets.tiling import decode_tiled, tiled

SHEET = Path(__file__).parents[2] / "docs" / "contact_sheet.png"
FILES = ("text_encoder/model.safetensors", *(f"{n}/diffusion_pytorch_model.safetensors" for n in ("unet", "vae")))
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
    assert np.abs(in_tiles - whole).mean() / 2 < 0.004  # of the range from black to white
    assert not np.array_equal(in_tiles, whole)


def test_one_tile_is_the_whole(vae):
    latents = encoded(vae, 64, 40)
    assert np.array_equal(decode_tiled(vae, latents), np.array(vae.decode(latents)))


def test_when_tiles_are_used():
    """By itself if more than three quarters of the room would be taken: for 1024 pixels a side in float16, SD's VAE
    takes 2.7 GB on a GPU, and 4.3 GB on the CPU."""
    small, large, gigabyte = (64, 64), (128, 128), 10**9
    enough = 4 / 3 * (2.68 if on_gpu() else 4.29) * gigabyte
    assert not tiled("on", SD_VAE, small, 2, gigabyte)  # one tile holds it
    assert tiled("on", SD_VAE, large, 2, 2 * enough)
    assert not tiled("off", SD_VAE, large, 2, gigabyte)
    assert tiled("auto", SD_VAE, large, 2, 0.97 * enough)
    assert not tiled("auto", SD_VAE, large, 2, 1.03 * enough)


def peak_of(run):
    """What a computation takes at most beside what is there already."""
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(run())
    return mx.get_peak_memory() - before


def test_tiles_take_no_more_memory_than_one(vae):
    latents = encoded(vae, 128, 128)
    mx.eval(latents)
    in_tiles = peak_of(lambda: mx.array(decode_tiled(vae, latents)))
    assert in_tiles < 1.05 * peak_of(lambda: vae.decode(latents[:, :64, :64]))
    assert in_tiles < 0.3 * peak_of(lambda: vae.decode(latents))


def test_the_pipeline_tiles_when_memory_is_short(vae):
    pipe = mlx_deepcache.StableDiffusion.from_pretrained(None, "float32")
    frugal = mlx_deepcache.StableDiffusion.from_pretrained(None, "float32", low_memory=True)
    latents = encoded(vae, 80, 80)
    whole, in_tiles = to_uint8(np.array(vae.decode(latents))), to_uint8(decode_tiled(vae, latents))
    assert not np.array_equal(whole, in_tiles)
    assert np.array_equal(pipe.decode(latents, "off"), whole)
    assert np.array_equal(pipe.decode(latents, "on"), in_tiles)
    assert np.array_equal(pipe.decode(latents), whole)
    assert np.array_equal(frugal.decode(latents), in_tiles)
    assert np.array_equal(frugal.decode(latents, "off"), whole)
    needs, held = 80 * 80 * 4**2 * 32 * (20 if on_gpu() else 16), mx.zeros(10**8, mx.uint8)  # 32 channels at full size
    mx.eval(held)
    for room, expected in ((1.2, in_tiles), (1.5, whole)):  # beside what is there already
        pipe.budget = mx.get_active_memory() + int(room * needs)
        assert np.array_equal(pipe.decode(latents), expected)


def test_peaks_are_reported_by_phase():
    """A phase holds the weights that it needs; with low memory no others, and one half of guidance."""

    def peaks(low):
        """Beyond what other tests hold."""
        gc.collect()
        before = mx.get_active_memory()
        pipe = mlx_deepcache.StableDiffusion.from_pretrained(None, "float32", low_memory=low)
        stats = pipe("a cat", steps=2, height=64, width=64, cache_interval=1).stats
        assert stats["peak_memory_bytes_by_phase"].keys() == stats["seconds"].keys()
        assert max(stats["peak_memory_bytes_by_phase"].values()) == stats["peak_memory_bytes"]
        return {phase: peak - before for phase, peak in stats["peak_memory_bytes_by_phase"].items()}

    held, frugal = peaks(False), peaks(True)
    text, unet, vae = (2 * (BUNDLED / file).stat().st_size for file in FILES)  # they hold float16
    assert text < frugal["encode"] < unet < held["encode"]
    assert unet < frugal["denoise"] < held["denoise"] - text
    assert vae < frugal["decode"] < unet < held["decode"]


def test_a_memory_limit_is_kept_as_a_budget():
    before = mx.set_memory_limit(10**12)
    cache = mx.set_cache_limit(10**9)
    try:
        most = machine_memory() - 300_000_000  # Python and the libraries take some too
        assert limit_memory() == limit_memory(10**6) == most  # there is no more than that
        assert limit_memory(1.5) == 1_500_000_000
        assert mx.set_memory_limit(10**12) == 1_500_000_000
        assert mx.set_cache_limit(10**9) == 375_000_000
        for wrong in (0, -1, 0.1, float("nan")):
            with pytest.raises(UsageError, match="at least 0.25 GB"):
                limit_memory(wrong)
    finally:
        mx.set_memory_limit(before)
        mx.set_cache_limit(cache)


def test_metal_is_kept_within_what_it_recommends(gpu_branch, monkeypatch):
    info = {"memory_size": 16 * 10**9, "max_recommended_working_set_size": 5 * 10**9}
    monkeypatch.setattr(mx, "device_info", lambda device: info)
    before, cache = mx.get_memory_limit(), mx.set_cache_limit(0)
    try:
        for asked, allowed in ((None, 4_500_000_000), (6, 4_500_000_000), (1.5, 1_500_000_000)):
            assert limit_memory(asked) == mx.get_memory_limit() == allowed
            assert mx.set_cache_limit(0) == allowed // 4
        del info["max_recommended_working_set_size"]  # as on CUDA, where MLX's own limit stays
        mx.set_memory_limit(10**12)
        assert limit_memory() == machine_memory() - 300_000_000
        assert mx.get_memory_limit() == 10**12
    finally:
        mx.set_memory_limit(before)
        mx.set_cache_limit(cache)


def test_the_machines_memory():
    """A GPU has its own, or on Apple Silicon that of the machine."""
    own = mx.device_info(mx.default_device()).get("memory_size")
    assert machine_memory() == (own or psutil.virtual_memory().total)


def test_a_machine_that_limits_nothing(monkeypatch):
    """A Mac has no control groups, and neither has Linux where none is mounted."""
    monkeypatch.setattr(memory.os, "access", lambda *asked: False)
    monkeypatch.setattr(memory.resource, "getrlimit", lambda which: (memory.resource.RLIM_INFINITY,) * 2)
    own = mx.device_info(mx.default_device()).get("memory_size")
    assert machine_memory() == (own or psutil.virtual_memory().total)
