"""`mx.compile` of the U-Net's two kinds of call: the same numbers, and built no more often than shapes ask for."""

import shutil

import mlx.core as mx
import pytest
from helpers import at, conditioning, error, unet_inputs

from mlx_deepcache.backend.ops import on_gpu
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.nets.blocks import Attention

BRANCH = 1


@pytest.fixture(scope="module")
def parts(checkpoint):
    return Checkpoint.open(str(checkpoint("bk-tiny")))


class Counting:
    """A U-Net's class with its calls counted: in a compiled function, a call is a graph being built."""

    def __init__(self, unet):
        self.unet, self.built = unet, []
        kind = type(unet)

        class Counted(kind):
            def __call__(inner, *args, **options):  # noqa: N805
                self.built.append((options["branch"], options.get("features") is None))
                return super().__call__(*args, **options)

        unet.__class__ = Counted


def inputs(unet, size=(16, 16), batch=2):
    x, context, added = unet_inputs(unet.config, size, batch)
    prompt = unet.prepare(conditioning(context, added))
    return mx.array(x.transpose(0, 2, 3, 1)), at(unet, prompt, 500), prompt


@pytest.mark.skipif(not on_gpu() and shutil.which("g++") is None, reason="on the CPU, mx.compile runs g++")
def test_a_compiled_call_gives_the_same(parts):
    unet = parts.load("unet", mx.float32)
    x, temb, prompt = inputs(unet)
    call = unet.compiled()
    plain, features = unet(x, temb, prompt, branch=BRANCH)
    compiled, compiled_features = call(x, temb, prompt, branch=BRANCH)
    assert error(compiled, plain) < 1e-5
    assert type(compiled_features) is type(features)
    plain, _ = unet(x * 0.5, temb, prompt, branch=BRANCH, features=features)
    compiled, _ = call(x * 0.5, temb, prompt, branch=BRANCH, features=compiled_features)
    assert error(compiled, plain) < 1e-5


def test_a_graph_is_built_once_for_each_kind_of_step_branch_and_shape(parts):
    unet = parts.load("unet", mx.float32)
    small, large, batch = inputs(unet), inputs(unet, (24, 16)), inputs(unet, batch=4)
    call = unet.compiled()
    counting = Counting(unet)
    for _ in range(2):  # a second generation builds nothing anew
        for case, branch in ((small, 0), (large, 0), (batch, 0), (small, 1)):
            x, temb, prompt = case
            for _ in range(3):
                _, features = call(x, temb, prompt, branch=branch)
                _, features = call(x, temb, prompt, branch=branch, features=features)
    assert sorted(counting.built) == sorted([(0, True), (0, False)] * 3 + [(1, True), (1, False)])


def test_another_prompt_and_timestep_need_no_new_graph(checkpoint):
    unet = Checkpoint.open(str(checkpoint("sdxl"))).load("unet", mx.float32)
    counting = Counting(unet)
    call = unet.compiled()
    for seed in (0, 1):
        x, context, added = unet_inputs(unet.config, (8, 8), 2, seed)
        prompt = unet.prepare(conditioning(context, added))
        call(mx.array(x.transpose(0, 2, 3, 1)), at(unet, prompt, 10 + seed), prompt, branch=0)
    assert counting.built == [(0, True)]


def test_functions_that_remember_are_not_built_in(parts):
    """A compiled U-Net given one for its attention, or its features, calls it every time."""
    unet = parts.load("unet", mx.float32)
    x, temb, prompt = inputs(unet)
    call, attended, decided = unet.compiled(), [], []

    def attend(layer, x, keys_values=None):
        attended.append(layer)
        return layer(x, keys_values)

    plain, _ = unet(x, temb, prompt, branch=BRANCH)
    for _ in range(2):
        out, _ = call(x, temb, prompt, branch=BRANCH, attend=attend)
        assert mx.array_equal(out, plain)
        call(x, temb, prompt, branch=BRANCH, features=decided.append)
    assert len(attended) == 2 * sum(isinstance(m, Attention) for m in unet.modules()) and len(decided) == 2
