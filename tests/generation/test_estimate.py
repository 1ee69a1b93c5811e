"""What a generation is said to take beforehand, against what MLX counts while it runs; and what does not fit."""

import gc
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny import write_controlnet

from mlx_deepcache import StableDiffusion
from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.backend import memory
from mlx_deepcache.backend.footprint import footprint
from mlx_deepcache.backend.ops import attention, gelu, on_gpu, silu
from mlx_deepcache.cache.halves import SharedHalves
from mlx_deepcache.errors import UsageError
from mlx_deepcache.generation.options import Control
from mlx_deepcache.nets.autoencoder import AutoencoderKL, VAEConfig

REPOSITORY = Path(__file__).parents[2]
SHEET = REPOSITORY / "docs" / "contact_sheet.png"
ONE = "a red heart"
on_cpu = pytest.mark.skipif(on_gpu(), reason="estimates are fitted to the CPU's measured peaks")


def peak_of(call, *inputs):
    mx.eval(*inputs)
    mx.synchronize()
    before = mx.get_active_memory()
    memory.reset_peak()
    mx.eval(call(*inputs))
    return memory.peak() - before


class Operation(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.weight, self.call = mx.ones(1), call


@on_cpu
@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (gelu, [(512, 2048)]),
        (silu, [(512, 2048)]),
        (
            lambda x, w: silu(mx.conv2d(silu(mx.conv2d(x, w, padding=1)), w, padding=1)),
            [(1, 64, 64, 64), (64, 3, 3, 64)],
        ),
        (attention, [(2, 8, 512, 40)] * 3),
        (attention, [(1, 1, 2048, 64)] * 3),
    ],
)
def test_the_estimate_of_one_operation(call, shapes):
    arrays = [mx.random.normal(shape) for shape in shapes]
    measured = peak_of(call, *arrays)
    estimated = footprint(Operation(call), call, *arrays)
    assert estimated.least <= estimated.most
    assert 0.8 < estimated.most / measured < 1.25


@on_cpu
def test_the_estimate_of_a_real_vae():
    """SD's decoder, random weights, 128 x 128 pixels."""
    vae = AutoencoderKL(VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2))
    mx.eval(vae.parameters())
    measured = peak_of(vae.decode, mx.random.normal((1, 16, 16, 4)))
    estimated = footprint(vae, vae.decode, mx.zeros((1, 16, 16, 4)))
    assert 0.8 < estimated.most / measured < 1.25


CASES = {
    "freed": ({"keep": False}, {}),
    "kept": ({}, {}),
    "large": ({"keep": False}, {"height": 112, "width": 144}),
    "several": ({"keep": False}, {"seeds": range(6), "cache_interval": 2}),
    "low memory": ({"low_memory": True}, {"height": 144, "width": 144}),
    "8 bits": ({"keep": False, "quantize": 8}, {}),
    "picture": ({"keep": False}, {"image": SHEET, "height": 128, "width": 128}),
    "no guidance": ({"keep": False}, {"guidance_scale": 1, "seeds": range(3)}),
}


@on_cpu
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_by_phase(case):
    model, options = CASES[case]
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()  # what other tests hold
    pipe = StableDiffusion.from_pretrained(**model)
    stats = pipe(ONE, **{"steps": 3, "strength": 1.0} | options if "image" in options else {"steps": 3} | options).stats
    measured = {phase: peak - before for phase, peak in stats["peak_memory_bytes_by_phase"].items()}
    estimated = stats["estimated_memory_bytes_by_phase"]
    assert estimated.keys() == measured.keys()
    for phase, peak in measured.items():
        assert 0.75 < estimated[phase] / peak < 1.25, (phase, estimated[phase], peak)


class Echo:
    """A machine that runs the other half, and answers what it is told."""

    def swap(self, x):
        return x

    def send(self, x):
        pass


@on_cpu
@pytest.mark.parametrize(("cache", "rows"), [("deepcache:interval=2", 1), ("tgate:step=2,warm_up=1,sp_interval=1", 2)])
def test_a_machine_that_runs_one_half(cache, rows):
    """T-GATE's gate needs both at once."""
    gc.collect()
    before = mx.get_active_memory()
    pipe = StableDiffusion.from_pretrained(keep=False)
    options = {"steps": 4, "height": 144, "width": 144, "cache": [cache]}
    both, unguided = (pipe.estimate(pipe.settings(ONE, **options | more)) for more in ({}, {"guidance_scale": 1}))
    pipe.halves = SharedHalves(1, Echo())
    stats = pipe(ONE, **options).stats
    estimated = stats["estimated_memory_bytes_by_phase"]["denoise"]
    assert estimated == (unguided if rows == 1 else both)["denoise"]
    assert 0.75 < estimated / (stats["peak_memory_bytes_by_phase"]["denoise"] - before) < 1.25


def test_controlnets_are_counted(checkpoint, tmp_path):
    write_controlnet("sd15", tmp_path / "net")
    pipe = StableDiffusion.from_pretrained(str(checkpoint("sd15")), "float32")  # as the file is
    options = {"steps": 2, "height": 64, "width": 64}
    without = pipe.estimate(pipe.settings(ONE, **options))
    control = Control(str(tmp_path / "net"), Image.new("RGB", (64, 64)))
    with_net = pipe.estimate(pipe.settings(ONE, controls=[control], **options))
    weights = (tmp_path / "net" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert weights * 0.9 < with_net["denoise"] - without["denoise"] < weights * 3
    assert with_net["encode"] == without["encode"]


def test_weights_that_are_stored_quantized_count_as_they_are(checkpoint, tmp_path):
    source, output = str(checkpoint("sd15")), str(tmp_path / "small")
    assert main_convert(["--model", source, "--output", output, "--quantize", "4"]) == 0
    options = {"steps": 2, "height": 64, "width": 64}
    whole, here, stored = (
        pipe.estimate(pipe.settings(ONE, **options))
        for pipe in (
            StableDiffusion.from_pretrained(m, keep=False, quantize=q)
            for m, q in ((source, None), (source, 4), (output, None))
        )
    )
    assert stored["denoise"] == here["denoise"] < whole["denoise"]
    assert stored["load"] < here["load"] == whole["load"]


def test_bits_that_others_wrote_are_not_believed(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("sd15"), tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "bits": "many"})
    ours, theirs = (StableDiffusion.from_pretrained(str(m)) for m in (folder, checkpoint("sd15")))
    options = {"steps": 1, "height": 64, "width": 64}
    assert ours.estimate(ours.settings(ONE, **options)) == theirs.estimate(theirs.settings(ONE, **options))
    assert len(ours(ONE, **options).images) == 1


def refused(call):
    with pytest.raises(UsageError) as caught:
        call()
    return str(caught.value)


def test_what_does_not_fit_is_refused_and_what_is_proposed_fits():
    pipe = StableDiffusion.from_pretrained(memory_limit=0.25)
    message = refused(lambda: pipe(ONE, height=1800, width=1200))
    assert message.startswith("1200 x 1800 pixels would take about ") and "there are 0.2" in message
    width, height = (int(re.search(rf"{side}=(\d+)", message)[1]) for side in ("width", "height"))
    assert width / height == pytest.approx(600 / 900, abs=0.05)
    pipe.denoise(pipe.settings(ONE, height=height, width=width, steps=1))
    larger = pipe.settings(ONE, height=int(height * 1.15) // 8 * 8, width=int(width * 1.15) // 8 * 8, steps=1)
    refused(lambda: pipe.denoise(larger))


def test_pictures_at_once_are_refused_with_how_many_fit():
    pipe = StableDiffusion.from_pretrained(memory_limit=0.25)
    message = refused(lambda: pipe(ONE, seeds=range(2000)))
    assert "2000 pictures at once" in message
    fit = int(message.split(" at once would fit")[0].split()[-1])
    pipe.denoise(pipe.settings(ONE, seeds=range(fit), steps=1))
    refused(lambda: pipe.denoise(pipe.settings(ONE, seeds=range(fit + 1), steps=1)))
    assert "at most 100,000" in refused(lambda: pipe.settings(ONE, seeds=range(10**9)))


@pytest.mark.parametrize("size", [(100_000, 64), (100_000, 100_000), (2**40, 2**40), (4096, 4096)])
def test_no_size_ends_in_the_dark(size):
    pipe = StableDiffusion.from_pretrained(memory_limit=2)
    height, width = size
    assert f"{width} x {height} pixels" in refused(lambda: pipe(ONE, height=height, width=width))
    if height > 10_000:
        with_picture = refused(lambda: pipe.settings(ONE, image=SHEET, height=height, width=10_000))
        assert "can be resized to" in with_picture


def test_the_command_line_draws_as_many_at_once_as_fit(tmp_path):
    """The same pictures as one by one, each written, in two or more batches."""
    command = [sys.executable, REPOSITORY / "generate.py", "--prompt", ONE, "--steps", "1"]
    command += ["--height", "256", "--width", "256", "--seed", "5"]
    many = [*command, "--num-images", "10", "--memory-limit", "0.25", "--stats", "s.json", "--output", "a.png"]
    done = subprocess.run(many, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "10 pictures, " in done.stdout and " at a time" in done.stdout
    stats = json.loads((tmp_path / "s.json").read_text())
    assert len(stats) > 1
    assert all(batch["peak_memory_bytes"] < 0.25e9 for batch in stats)
    assert len(list(tmp_path.glob("a-*.png"))) == 10
    subprocess.run([*command[:-1], "14", "--output", "b.png"], cwd=tmp_path, check=True, capture_output=True)
    last, alone = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a-10.png", "b.png"))
    assert np.abs(last - alone).max() <= 1  # sums over a batch come in another order


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is counted on Linux")
def test_ulimit_counts():
    code = "from mlx_deepcache.backend.memory import machine_memory; print(machine_memory())"

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (6 * 10**9, 6 * 10**9))

    out = subprocess.run([sys.executable, "-c", code], preexec_fn=limited, capture_output=True, text=True, check=True)
    assert 10**9 < int(out.stdout) < 6 * 10**9
