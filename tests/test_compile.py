"""The U-Net's three parts through `mx.compile`: the same numbers, and built no more often than shapes ask for."""

import shutil

import mlx.core as mx
import pytest
from helpers import at, conditioning, error, primitives, unet_inputs

from mlx_deepcache import StableDiffusion
from mlx_deepcache.backend.ops import on_gpu
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.nets.attend import Attend, Do
from mlx_deepcache.nets.blocks import GEGLU, Features, Transformer2DModel, Upsample2D

BRANCH = 1
PARTS = ("shallow", "deep", "finish")
runs_gpp = pytest.mark.skipif(not on_gpu() and shutil.which("g++") is None, reason="on the CPU, mx.compile runs g++")


@pytest.fixture
def unet(checkpoint):
    return Checkpoint.open(str(checkpoint("bk-tiny"))).load("unet", mx.float32)


def counted(unet):
    """The U-Net compiled, and a list of its parts' calls: in a compiled function, a call is a graph being built."""
    built, kind = [], type(unet)

    def watch(name):
        def call(inner, *args, **options):
            built.append(name)
            return getattr(kind, name)(inner, *args, **options)

        return call

    unet.__class__ = type("Counted", (kind,), {name: watch(name) for name in PARTS})
    return unet.compiled(), built


def inputs(unet, size=(16, 16), batch=2, seed=0):
    x, context, added = unet_inputs(unet.config, size, batch, seed)
    cond = unet.prepare(conditioning(context, added))
    return mx.array(x.transpose(0, 2, 3, 1)), at(unet, cond, 500 + seed), cond


@runs_gpp
def test_a_compiled_call_gives_the_same(unet):
    x, temb, cond = inputs(unet)
    call = unet.compiled()
    plain, features = unet(x, temb, cond, branch=BRANCH)
    compiled, compiled_features = call(x, temb, cond, branch=BRANCH)
    assert error(compiled, plain) < 1e-5
    assert type(compiled_features) is Features
    plain, _ = unet(x * 0.5, temb, cond, branch=BRANCH, reused=features)
    compiled, _ = call(x * 0.5, temb, cond, branch=BRANCH, reused=compiled_features)
    assert error(compiled, plain) < 1e-5


def test_a_graph_is_built_once_for_each_part_branch_and_shape(unet):
    small, large, batch = inputs(unet), inputs(unet, (24, 16)), inputs(unet, batch=4)
    call, built = counted(unet)
    for _ in range(2):  # a second generation builds nothing anew
        for case, branch in ((small, 0), (large, 0), (batch, 0), (small, 1)):
            for _ in range(3):
                _, features = call(*case, branch=branch)
                call(*case, branch=branch, reused=features)
    assert sorted(built) == sorted([*PARTS] * 4)


def test_another_prompt_and_timestep_need_no_new_graph(checkpoint):
    unet = Checkpoint.open(str(checkpoint("sdxl"))).load("unet", mx.float32)
    call, built = counted(unet)
    for seed in (0, 1):
        call(*inputs(unet, (8, 8), seed=seed), branch=0)
    assert built == [*PARTS]


def test_what_attention_does_is_built_in_and_what_it_keeps_is_not(unet):
    """A graph for each of: compute, keep, reuse. What is reused goes in and what is kept comes out, every time."""
    x, temb, cond = inputs(unet)
    compiled, built = counted(unet)
    cut = compiled.cut(BRANCH)
    for factor in (1.0, 0.5):
        keep = Attend((Do.KEEP, Do.COMPUTE))
        skips = compiled.shallow(x * factor, temb, cond, cut, attend=keep)
        assert len(keep.kept[0]) == 1 and keep.kept[1] == []
        reuse = Attend((Do.REUSE, Do.COMPUTE), (keep.kept[0], []))
        again = compiled.shallow(x * factor, temb, cond, cut, attend=reuse)
        assert mx.allclose(again[-1], skips[-1], atol=1e-5)
        other = compiled.shallow(x * factor, temb, cond, cut, attend=Attend(reuse.do, ([keep.kept[0][0] * 2], [])))
        assert not mx.allclose(other[-1], skips[-1], atol=1e-2)
    assert built == ["shallow", "shallow"]


CACHES = [
    ["deepcache:interval=2,branch=1", "taylorseer"],
    ["adaptive:threshold=0.3"],
    ["pab:spatial=2,cross=2,spatial_window=-1..1000,cross_window=-1..1000", "deepcache:interval=2"],
    ["fastercache:uncond=2,uncond_window=-1..1000,spatial_window=-1..1000,weight=0..1"],
    ["tgate:step=3,sp_interval=2,fi_interval=2,warm_up=0", "deepcache:interval=2"],
]


@runs_gpp
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache[0].partition(":")[0])
def test_every_cache_runs_compiled(checkpoint, pipeline, monkeypatch, cache):
    """Whole pictures as without `mx.compile`; a second one, of another prompt and seed, builds no graph."""
    compiled = StableDiffusion(pipeline("bk-tiny").checkpoint, "float32", compile="on")
    options = {"cache": cache, "steps": 6, "scheduler": "ddim", "height": 64, "width": 64}
    built, counts, call = [], [], Transformer2DModel.__call__
    for prompt, seed in (("a cat", 1), ("a dog", 2)):
        expected = pipeline("bk-tiny")(prompt, seeds=[seed], **options)
        with monkeypatch.context() as watching:
            watching.setattr(Transformer2DModel, "__call__", lambda *args: (built.append(args[0]), call(*args))[1])
            result = compiled(prompt, seeds=[seed], **options)
        counts.append(len(built))
        assert error(result.latents, expected.latents) < 1e-4
        assert result.stats["steps"] == expected.stats["steps"]
        assert result.stats["unet_macs"] == expected.stats["unet_macs"] < expected.stats["unet_macs_uncached"]
    assert 0 < counts[0] == counts[1]


def test_weights_are_folded_and_split_before_the_graph(unet, gpu_branch, tmp_path):
    """In a compiled full step nothing is made of weights alone: the gates of the feed-forward layers are all that
    splits. At branch 0 no group straddles the cut, and skips being joined are all that concatenates."""
    x, temb, cond = inputs(unet)
    mx.eval(unet.parameters(), temb, cond)
    gates, folds = (sum(isinstance(m, kind) for m in unet.modules()) for kind in (GEGLU, Upsample2D))

    def step(net):
        output, features = net(x, temb, cond, branch=0)
        return primitives(tmp_path, output, *features)

    plain, joined = step(unet), len(unet.up_layers()) - 1
    assert folds == 2
    assert plain["Split"] == gates + 3 * folds + 1  # a fold's rows, and both kinds' columns; the weights at the cut
    assert plain["Concatenate"] == joined + 7 * folds
    compiled = step(unet.compiled())
    assert (compiled["Split"], compiled["Concatenate"]) == (gates, joined)
