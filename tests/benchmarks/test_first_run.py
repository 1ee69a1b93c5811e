"""first_run: what it compares with is right, what is broken fails by name, and all of it runs in one go."""

import json
import math
import re

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks import checks, first_run
from benchmarks.speed import models
from mlx_deepcache.backend import cpu, ops
from mlx_deepcache.errors import UsageError
from mlx_deepcache.unet import UNet2DConditionModel

PIECES = checks.pieces(quick=True)


def piece(start):
    return next(p for p in PIECES if p.name.startswith(start))


def first(array):
    """(N, H, W, C) -> (N, C, H, W)."""
    return array.permute(0, 3, 1, 2)


def last(array):
    return array.permute(0, 2, 3, 1)


def doubled(x, weight, bias):
    return last(F.conv2d(F.interpolate(first(x), scale_factor=2), first(weight), bias, padding=1))


THEIRS = {
    "attention, heads of 40, 64 to 77": F.scaled_dot_product_attention,
    "group norm": lambda x, weight, bias: last(F.silu(F.group_norm(first(x), 16, weight, bias))),
    "layer norm": lambda x, weight, bias: F.layer_norm(x, (x.shape[-1],), weight, bias),
    "SiLU": F.silu,
    "GELU": F.gelu,
    "3x3 convolution, 16x16": lambda x, w, b: last(F.conv2d(first(x), first(w), b, padding=1)),
    "3x3 convolution on odd sides": lambda x, w, b: last(F.conv2d(first(x), first(w), b, padding=1)),
    "3x3 convolution of stride 2, 16x16": lambda x, w, b: last(F.conv2d(first(x), first(w), b, padding=1, stride=2)),
    "3x3 convolution of stride 2, not": lambda x, w, b: last(F.conv2d(first(x), first(w), b, stride=2)),
    "upsampling": doubled,
    "linear": F.linear,
}


@pytest.mark.parametrize("name", THEIRS)
def test_the_references_are_pytorchs(name):
    """In float64, so nothing but order of summation differs."""
    drawn = [array.astype(np.float64) for array in piece(name).draw(np.random.default_rng(3))]
    theirs = THEIRS[name](*map(torch.from_numpy, drawn)).numpy()
    assert np.abs(piece(name).exact(*drawn) - theirs).max() < 1e-12


def test_there_is_a_piece_for_each_kind_of_operation():
    heads = {int(n) for p in PIECES for n in re.findall(r"heads of (\d+)", p.name)}
    assert heads == {40, 64, 80, 96, 128, 160, 512}
    assert all(any(p.name.startswith(name) for p in PIECES) for name in THEIRS)
    assert [p.name for p in checks.pieces(quick=False)] != [p.name for p in PIECES]


def test_one_wrong_row_among_thousands_is_found():
    right = np.random.default_rng(0).standard_normal((16 * 4096, 40))
    wrong = right.copy()
    wrong[-1] = 0
    near, far = checks.error(right * (1 + 1e-4), right), checks.error(wrong, right)
    assert near[0] == pytest.approx(1e-4) and far[0] < 5e-3
    row = checks.row("attention", "float16", 5e-3, {"gpu": far, "cpu": near, "plain": (math.nan, math.nan)})
    assert row["failed"] == ["gpu", "plain"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """first_run, without whole nets unless asked for: exit status, text, and figures."""

    def call(*options, nets=False):
        if not nets:
            monkeypatch.setattr(checks, "nets", lambda quick: [])
        status = first_run.main([*options, "--json", str(tmp_path / "all.json")])
        return status, capsys.readouterr().out, json.loads((tmp_path / "all.json").read_text())

    return call


def test_all_of_it(run):
    status, text, data = run("--quick", nets=True)
    assert status == 0 and data["failures"] == [] and "FAIL" not in text
    rows = data["correctness"]
    compiled = [row for row in rows if row["piece"].endswith("compiled")]  # only on a GPU
    assert len(rows) - len(compiled) == 2 * len(PIECES) + 2 * 3 * 2 and len(compiled) == 8 * ops.on_gpu()
    assert len(re.findall("pass$", text, re.M)) == len(rows)
    ways = {"gpu", "cpu"} if ops.on_gpu() else {"cpu", "plain"}
    for row in rows:
        right = ": " in row["piece"] and row["dtype"] == "float32"
        assert set(row["error"]) == (ways - {"cpu"} if right or row in compiled else ways)
        assert all(0 <= value <= row["limit"] for value in row["error"].values())
    assert [row["step"] for row in data["steps"]] == ["full", "cached 0", "cached 1"]
    assert all(0 < row["of_full"]["plain"] < 1 for row in data["steps"][1:])
    assert [row["phase"] for row in data["memory"]] == ["encode", "denoise", "decode"]
    assert all(row["peak_bytes"] > 0 for row in data["memory"])
    assert {row["ours"] for row in data["choices"]} >= {"folded upsampling"}
    assert data["versions"]["mlx"] in text and data["system"] in text
    assert ops.on_gpu() or "No GPU was found" in text
    assert text.count("What this machine would have otherwise") == 1


def test_a_broken_operation_fails_by_name(run, monkeypatch):
    kernel = cpu.activation

    def broken(x, *args, name):
        out = kernel(x, *args, name=name)
        return out * 1.01 if name == "silu" else out

    monkeypatch.setattr(cpu, "activation", broken)
    status, text, data = run("--quick")
    assert status == 1
    assert [line.split(": ")[0] for line in data["failures"]] == ["SiLU, float32, cpu", "SiLU, float16, cpu"]
    assert all(f"FAIL  {line}" in text for line in data["failures"])
    assert len(re.findall("  FAIL$", text, re.M)) == 2


def test_what_cannot_be_run_fails_and_the_rest_goes_on(run, monkeypatch):
    def absent(*arrays, **how):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(cpu, "layer_norm", absent)
    monkeypatch.setattr(first_run, "memory_rows", lambda pipe, size: [])
    status, text, data = run("--quick")
    assert status == 1 and len(data["failures"]) == 1
    assert re.search("^FAIL  layer norm.*: RuntimeError: no such kernel$", text, re.M)
    assert len(data["correctness"]) == 2 * len(PIECES) - 2


def test_a_losing_choice_is_told():
    def rows(*seconds):
        return [first_run.choice("ours", "theirs", f"place {i}", dict(s)) for i, s in enumerate(seconds)]

    faster, even, slower = ({"ours": s, "other": 1.0} for s in (0.5, 1.01, 2.0))
    assert first_run.otherwise(rows(faster, even)).endswith(": nothing of what was tried")
    assert first_run.otherwise(rows(faster, slower)).endswith(": theirs for place 1 (0.50 of the time)")


@pytest.fixture
def gpu(monkeypatch):
    """As if the CPU were one; compiled nets are counted, not compiled."""
    compiled = []
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    monkeypatch.setattr(UNet2DConditionModel, "compiled", lambda unet: compiled.append(unet) or unet)
    mx.disable_compile()  # MLX's own activations too
    yield compiled
    mx.enable_compile()


def test_compiled_calls_are_checked_on_a_gpu(gpu):
    net = checks.nets(quick=True)[0]
    rows = [row["piece"] for row in checks.check_net(net, checks.ways()) if row["piece"].endswith("compiled")]
    assert len(rows) == 4 and len(gpu) == 4


def test_a_gpus_tables(gpu, run, monkeypatch):
    """Of a small SD 1.5: heads padded where kernels ask for it, compiled steps beside plain ones, and what is too large
    for the machine left out."""
    small = {"block_out_channels": [32, 32, 32, 32]}
    encoder = models.CLIP_L | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    monkeypatch.setitem(models.UNETS, "sd15", models.SD15 | small | {"cross_attention_dim": 64})
    monkeypatch.setitem(models.VAES, "sd15", models.VAE | small)
    monkeypatch.setitem(models.TEXT_ENCODERS, "sd15", {"text_encoder": encoder | {"num_attention_heads": 4}})
    monkeypatch.setattr(first_run, "HEADS", ((40, 64, 64), (64, 64, 64), (40, 64, 77)))
    monkeypatch.setattr(first_run, "UNET_UPSAMPLINGS", first_run.QUICK_UPSAMPLINGS)
    monkeypatch.setattr(first_run, "VAE_UPSAMPLINGS", ())
    monkeypatch.setattr(checks, "pieces", lambda quick: [])
    measure = first_run.memory_rows

    def memory_rows(pipe, size):
        if size == 128:
            raise UsageError("it takes more memory than there is")
        return measure(pipe, size)

    monkeypatch.setattr(first_run, "memory_rows", memory_rows)
    status, text, data = run("--sizes", "64,128")
    assert status == 0 and "128 px: not run, it takes more memory" in text
    assert {row["size"] for row in data["steps"] + data["memory"]} == {64}
    assert all(set(row["seconds"]) == {"plain", "compiled"} for row in data["steps"]) and gpu
    choices = [row["where"] for row in data["choices"] if row["ours"] == "padded heads"]
    assert choices == ["heads of 40, 64 to 64 positions", "heads of 40, 64 to 77 positions"]
    assert [row["where"] for row in data["choices"] if row["ours"] == "compiled steps"] == [
        "64 px, full",
        "64 px, cached 0",
        "64 px, cached 1",
    ]
