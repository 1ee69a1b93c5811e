"""A generation is a value of its own: its doors, and what it does once for all of a command line's pictures."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import oracle
import pytest
import torch
from helpers import PICTURE, error, to_torch_layout, unet_inputs
from PIL import Image
from tiny import write_controlnet
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.cache.macs import unet_macs
from mlx_deepcache.checkpoints import part

REPOSITORY = Path(__file__).parents[2]
SMALL = {"height": 64, "width": 64, "scheduler": "ddim"}


def test_two_may_be_open_at_once(pipeline):
    """Begun one after the other and drawn in turns, each gives the picture that it gives alone, and its own report."""
    pipe = pipeline("sd15")
    one = pipe.settings("a cat", steps=4, cache_interval=2, seeds=[1], **SMALL)
    two = pipe.settings("a dog", steps=6, cache_interval=3, seeds=[2, 3], rng="mlx", **SMALL)
    alone = [pipe.denoise(settings) for settings in (one, two)]
    for drawing in alone:
        list(drawing)
    both = [pipe.denoise(settings) for settings in (one, two)]
    for _ in range(4):
        next(both[0]), next(both[1])
    list(both[1])
    for drawing, expected in zip(both, alone, strict=True):
        assert mx.array_equal(drawing.latents, expected.latents)
        assert np.array_equal(drawing.decode(), expected.decode())
        ours, theirs = drawing.stats(), expected.stats()
        for key in ("steps", "full_steps", "unet_macs", "unet_macs_uncached", "cache_bytes"):
            assert ours[key] == theirs[key]
        assert all(ours["seconds"][phase] > 0 for phase in ("encode", "denoise", "decode"))
    assert [len(drawing.steps) for drawing in both] == [4, 6]
    assert both[0].clock.seconds != both[1].clock.seconds


def test_the_doors_by_themselves(checkpoint, pipeline):
    """Encoding, preparing latents, sampling and decoding one after the other draw what diffusers draws."""
    pipe = pipeline("sdxl")
    settings = pipe.settings("a cat", steps=5, seeds=[7], guidance_scale=3.0, cache_interval=2, **SMALL)
    drawing = pipe.denoise(settings)
    cond, started = drawing.encode(), drawing.prepare_latents()
    *_, last = drawing.sample(settings.legs[0], pipe.models[0], cond, started)
    expected = oracle.generate(
        checkpoint("sdxl"), "a cat", steps=5, guidance_scale=3.0, interval=2, branch=0, seed=[7], **SMALL
    )
    assert error(to_torch_layout(last.latents), expected["latents"]) < 1e-4
    assert np.abs(pipe.decode(last.latents).astype(float) - expected["image"]).mean() < 0.1


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("tokens", [77, 231])
def test_multiply_adds_of_a_prompt_of_any_length(checkpoint, pipeline, kind, tokens):
    """PyTorch counts its own; a multiply-add is two of its operations."""
    net = oracle.shared(str(checkpoint(kind))).unet
    x, context, added = unet_inputs(pipeline(kind).component("unet").config, size=(16, 16), batch=1)
    context = np.concatenate([context] * (tokens // 77), axis=1)
    args, kwargs = oracle.unet_arguments(x, 500, context, added)
    plain = sdpa_kernel(SDPBackend.MATH)  # the fused kernel for CPUs is not counted
    with FlopCounterMode(display=False) as counter, plain, torch.no_grad():
        net(*args, **kwargs)
    ours, _ = unet_macs(pipeline(kind).component("unet"), (16, 16), 0, tokens)
    assert abs(2 * ours / counter.get_total_flops() - 1) < 1e-3


def test_stats_count_the_tokens_that_there_are(pipeline):
    options = {"steps": 2, "cache_interval": 1, "guidance_scale": 1.0, **SMALL}
    short, long = (pipeline("sd15")("a cat, " * n, long_prompt=True, **options).stats["unet_macs"] for n in (1, 60))
    unet = pipeline("sd15").component("unet")
    assert [short, long] == [2 * unet_macs(unet, (8, 8), 0, tokens)[0] for tokens in (77, 231)]


def test_nets_and_pictures_are_looked_for_once(checkpoint, tmp_path, monkeypatch):
    """However many batches a command line comes to."""
    net = write_controlnet("sd15", tmp_path / "net")
    monkeypatch.chdir(tmp_path)
    PICTURE.save("in.png")
    Path("prompts").write_text("a cat\na dog\na bird\n")
    found, opened, find, plain = [], [], part.find_controlnet, Image.open
    monkeypatch.setattr("mlx_deepcache.generation.pipeline.find_controlnet", lambda *a: (found.append(a), find(*a))[1])
    monkeypatch.setattr(Image, "open", lambda file, *a, **k: (opened.append(str(file)), plain(file, *a, **k))[1])
    flags = ["--model", str(checkpoint("sd15")), "--prompt-file", "prompts", "--steps", "2", "--quiet", "--low-memory"]
    flags += ["--controlnet", str(net), "--control-image", "in.png", "--height", "64", "--width", "64"]
    assert main_generate([*flags, "--num-images", "2", "--stats", "s.json"]) == 0
    assert len(json.loads(Path("s.json").read_text())) == 6
    assert len(found) == 1 and opened.count("in.png") == 1


@pytest.mark.parametrize(
    "flags", [["--help"], ["--version"], ["--steps", "none"], ["--prompt", "x", "--shceduler", "y"]]
)
def test_reading_flags_costs_no_mlx(flags):
    code = f"""
import sys
from mlx_deepcache.apps.generate import main_generate
try:
    main_generate({flags!r})
except SystemExit:
    pass
assert not {{"mlx.core", "tokenizers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, capture_output=True)
