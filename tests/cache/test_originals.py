"""The caches against diffusers' hooks and against their published rules, on whole runs; alone and with DeepCache."""

from contextlib import nullcontext

import cache_oracle as reference
import numpy as np
import pytest
import torch
from cache_oracle import PROMPT, Calls, draw, drop, fresh, masked, wrap_attention
from diffusers.hooks.faster_cache import _split_low_high_freq
from helpers import error, to_mlx, to_torch_layout

from mlx_deepcache import Adaptive, DeepCache, FasterCache, GuidanceInterval, PyramidAttentionBroadcast, TGate
from mlx_deepcache.cache.fastercache import low_pass

CASES = [("sd15", "ddim", 5.0), ("sd15", "pndm", 1.0), ("sdxl", "euler", 3.0), ("sdxl", "ddim", 1.0)]
STEPS = 12


def ours(pipeline, kind, scheduler, guidance, cache):
    """Latents in PyTorch's layout, the steps, stats."""
    pipe = pipeline(kind)
    options = {"height": 64, "width": 64, "seeds": [3], "scheduler": scheduler, "guidance_scale": guidance}
    settings = pipe.settings(PROMPT, steps=STEPS, cache=cache, **options)
    run = pipe.denoise(settings)
    taken = list(run)
    return to_torch_layout(run.latents), taken, run.stats()


UNCACHED = {}


def plain(checkpoint, *case):
    """diffusers' latents without any cache."""
    if case not in UNCACHED:
        kind, scheduler, guidance = case
        UNCACHED[case] = draw(fresh(checkpoint(kind), scheduler), STEPS, guidance)
    return UNCACHED[case]


def agrees(latents, expected, uncached):
    """To 1e-4, while caching matters."""
    assert error(latents, expected) < 1e-4
    assert error(expected, uncached) > 1e-3


def deepcache(pipe, full, branch=0):
    return nullcontext() if full is None else masked(pipe, lambda call, *_, **__: full[call], branch)


@pytest.mark.parametrize(("kind", "scheduler", "guidance"), CASES)
@pytest.mark.parametrize("branch", [None, 1])
def test_pyramid_attention_broadcast(checkpoint, pipeline, kind, scheduler, guidance, branch):
    """diffusers' hook on the same net. Its layers that a cached step of DeepCache leaves out do not count on. The
    timesteps are 83 apart, and the windows begin and end at some of them, which are outside."""
    ranges = {
        "spatial_attention_block_skip_range": 2,
        "cross_attention_block_skip_range": 3,
        "spatial_attention_timestep_skip_range": (84, 831),
        "cross_attention_timestep_skip_range": (167, 748),
    }
    pipe = fresh(checkpoint(kind), scheduler)
    reference.broadcast(pipe, Calls(pipe), **ranges)
    full = None if branch is None else DeepCache(3).full_steps(STEPS + 1)
    with deepcache(pipe, full, branch):
        expected = draw(pipe, STEPS, guidance)
    cache = [PyramidAttentionBroadcast(**ranges)] + ([] if branch is None else [DeepCache(3, branch)])
    latents, _, stats = ours(pipeline, kind, scheduler, guidance, cache)
    agrees(latents, expected, plain(checkpoint, kind, scheduler, guidance))
    assert stats["cache_bytes"]["pab"] > 0 and stats["unet_macs"] < stats["unet_macs_uncached"]


@pytest.mark.parametrize(("kind", "scheduler"), [("sd15", "ddim"), ("sdxl", "euler")])
def test_pyramid_attention_broadcast_where_guidance_ends(checkpoint, pipeline, kind, scheduler):
    """From then on the outputs that were kept of both halves are used for the conditional one alone."""
    ranges = {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 5}
    ranges |= {f"{attention}_attention_timestep_skip_range": (-1, 1000) for attention in ("spatial", "cross")}
    pipe = fresh(checkpoint(kind), scheduler)
    reference.broadcast(pipe, Calls(pipe, lambda call, t, out: out if call < STEPS / 2 else drop(out)), **ranges)
    expected = draw(pipe, STEPS, 5.0)
    cache = [PyramidAttentionBroadcast(**ranges), GuidanceInterval(0, 0.5)]
    latents, taken, _ = ours(pipeline, kind, scheduler, 5.0, cache)
    agrees(latents, expected, plain(checkpoint, kind, scheduler, 5.0))
    assert [step.work[0].pictures for step in taken] == [2] * (STEPS // 2) + [1] * (STEPS // 2)


@pytest.mark.parametrize(("kind", "scheduler", "guidance"), CASES)
@pytest.mark.parametrize("weight", [(0.5, 0.5), (0, 1)])
def test_faster_cache(checkpoint, pipeline, kind, scheduler, guidance, weight):
    """diffusers' hooks for the denoiser and for blocks; windows that begin after the first step, as they need, and
    whose bounds are timesteps of the run."""
    options = {"spatial_attention_timestep_skip_range": (1, 831), "unconditional_batch_timestep_skip_range": (1, 748)}
    options["low_frequency_weight_update_timestep_range"] = (416, 665)
    options["high_frequency_weight_update_timestep_range"] = (167, 582)
    pipe, steps = fresh(checkpoint(kind), scheduler), []
    n = STEPS + (scheduler == "pndm")
    reference.faster(
        pipe, guidance > 1, lambda _: weight[0] + (weight[1] - weight[0]) * len(steps) / (n - 1), **options
    )
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: (forward(*args, **kwargs), steps.append(1))[0]
    expected = draw(pipe, STEPS, guidance)
    latents, _, stats = ours(pipeline, kind, scheduler, guidance, [FasterCache(**options, attention_weight=weight)])
    agrees(latents, expected, plain(checkpoint, kind, scheduler, guidance))
    assert stats["cache_bytes"]["fastercache"] > 0 and stats["unet_macs"] < stats["unet_macs_uncached"]


@pytest.mark.parametrize("size", [(16, 16), (9, 13), (4, 7)])
def test_low_frequencies_are_those_of_diffusers(size):
    x = np.random.default_rng(0).standard_normal((2, 4, *size)).astype(np.float32)
    low, _ = _split_low_high_freq(torch.tensor(x))
    expected = torch.fft.ifft2(torch.fft.ifftshift(low)).real.numpy()
    assert error(to_torch_layout(low_pass(to_mlx(x))), expected) < 1e-5


@pytest.mark.parametrize(("kind", "scheduler"), [("sd15", "ddim"), ("sdxl", "euler")])
def test_faster_cache_with_deepcache(checkpoint, pipeline, kind, scheduler):
    """By hand, both halves always run. A cached step that needs both after a full one of the conditional half is full
    instead: here with interval 3 and both halves at calls 0 to 4, 6 and 9, the steps 0, 3, 6 and 9 and no other."""
    policy = FasterCache(
        unconditional_batch_skip_range=3,
        unconditional_batch_timestep_skip_range=(-1, 700),
        spatial_attention_timestep_skip_range=(-1, 700),
    )
    pipe = fresh(checkpoint(kind), scheduler)
    kept = {}

    def rebuilt(call, t, out):
        without, given = out.chunk(2)
        low, high = _split_low_high_freq(given)
        if policy.skips_unconditional(call, t):
            kept["low"] = kept["low"] * (1.1 if 99 < t < 901 else 1)
            kept["high"] = kept["high"] * (1.1 if -1 < t < 301 else 1)
            spectrum = kept["low"] + low + kept["high"] + high
            without = torch.fft.ifft2(torch.fft.ifftshift(spectrum)).real
        else:
            kept["low"], kept["high"] = (a - b for a, b in zip(_split_low_high_freq(without), (low, high), strict=True))
        return torch.cat([without, given])

    full = [call % 4 == 0 for call in range(STEPS)]
    with deepcache(pipe, full):
        calls = Calls(pipe, rebuilt)

        def rule(cross, state, compute):
            if cross:
                return compute()
            number = state["calls"] = state.get("calls", -1) + 1
            halved = policy.skips_unconditional(calls.number, calls.t)
            if halved and -1 < calls.t < 700 and (number == 0 or number % 2 != 0):
                before, last = state["kept"]
                out = last + (last - before) * 0.5
            else:
                out = compute()
            state["kept"] = (state.get("kept", (out, out))[1], out)
            return out

        wrap_attention(pipe.unet, rule)
        latents, taken, _ = ours(pipeline, kind, scheduler, 4.0, [policy, DeepCache(4)])
        full[:] = [step.full for step in taken]
        expected = draw(pipe, STEPS, 4.0)
    halved = [step.work[0].pictures == 1 for step in taken]
    for i, step in enumerate(taken):  # full are every 4th step and, after a full step of one half, the next of both
        last = max([j for j in range(i) if taken[j].full], default=0)
        assert step.full == (i % 4 == 0 or (halved[last] and not halved[i]))
    assert any(halved) and any(step.full and i % 4 for i, step in enumerate(taken))
    agrees(latents, expected, plain(checkpoint, kind, scheduler, 4.0))


@pytest.mark.parametrize(("kind", "scheduler", "guidance"), CASES)
@pytest.mark.parametrize("interval", [None, 3])
def test_tgate(checkpoint, pipeline, kind, scheduler, guidance, interval):
    policy = TGate(step=6, sp_interval=2, fi_interval=3, warm_up=1)
    pipe, repeated = fresh(checkpoint(kind), scheduler), int(scheduler == "pndm")
    n, guided = STEPS + repeated, guidance > 1
    # the gate is a full step, so that every layer has an output to keep
    full = None if interval is None else [i % interval == 0 or i == 5 + repeated for i in range(n)]
    with deepcache(pipe, full):
        calls = Calls(pipe, lambda call, t, out: drop(out) if guided and call - repeated >= 6 else out)
        rule = reference.gate_rule(calls, lambda call: call - repeated, 6, 2, 3, 1, guided)

        def lenient(cross, state, compute):
            """A layer that cached steps left out computes, and keeps, where it has nothing to use again."""
            if "kept" in state or interval is None:
                return rule(cross, state, compute)
            c = calls.number - repeated
            out = compute()
            if not cross and 1 <= c < 5:
                state["kept"] = out
            return rule(cross, state, lambda: out) if c == 5 else out

        wrap_attention(pipe.unet, lenient)
        expected = draw(pipe, STEPS, guidance)
    cache = [policy] + ([] if interval is None else [DeepCache(interval)])
    latents, taken, stats = ours(pipeline, kind, scheduler, guidance, cache)
    agrees(latents, expected, plain(checkpoint, kind, scheduler, guidance))
    assert [step.work[0].pictures for step in taken] == [1 + (guided and i - repeated < 6) for i in range(n)]
    assert full is None or [step.full for step in taken] == full
    assert stats["cache_bytes"]["tgate"] > 0


@pytest.mark.parametrize(("kind", "scheduler"), [("sd15", "pndm"), ("sdxl", "euler")])
@pytest.mark.parametrize(("start", "end"), [(0, 0.5), (0.3, 0.8)])
@pytest.mark.parametrize("interval", [None, 4])
def test_guidance_interval(checkpoint, pipeline, kind, scheduler, start, end, interval):
    """Where guidance begins late, the cached steps there have no features of the unconditional half: they are full
    until there is one."""
    pipe, n = fresh(checkpoint(kind), scheduler), STEPS + (scheduler == "pndm")
    guided = [start <= i / n < end for i in range(n)]
    full = None
    if interval is not None:
        full = [i % interval == 0 or (guided[i] and not guided[i - 1]) for i in range(n)]
    with deepcache(pipe, full):
        Calls(pipe, lambda call, t, out: out if guided[call] else drop(out))
        expected = draw(pipe, STEPS, 6.0)
    cache = [GuidanceInterval(start, end)] + ([] if interval is None else [DeepCache(interval)])
    latents, taken, _ = ours(pipeline, kind, scheduler, 6.0, cache)
    agrees(latents, expected, plain(checkpoint, kind, scheduler, 6.0))
    assert [step.work[0].pictures == 2 for step in taken] == guided
    assert full is None or [step.full for step in taken] == full


@pytest.mark.parametrize(("kind", "scheduler", "guidance"), CASES)
@pytest.mark.parametrize("branch", [0, 4])
def test_adaptive(checkpoint, pipeline, kind, scheduler, guidance, branch):
    """The decisions are made from the skip at the branch in PyTorch; the pip package keeps the features."""
    pipe = fresh(checkpoint(kind), scheduler)
    decide, log = reference.skip_change(pipe.unet, branch, 0.3, 4)
    with masked(pipe, decide, branch) as cache:
        expected = draw(pipe, STEPS, guidance)
        full = list(cache.full)
    latents, taken, stats = ours(pipeline, kind, scheduler, guidance, [Adaptive(0.3, 4, branch)])
    assert [step.full for step in taken] == full and full.count(False) > 2 and full.count(True) > 4
    agrees(latents, expected, plain(checkpoint, kind, scheduler, guidance))
    assert [d["change"] for d in stats["decisions"]] == pytest.approx(log, rel=1e-3)
    assert [d["full"] for d in stats["decisions"]] == full[1:]


@pytest.mark.parametrize(
    "schedule",
    [
        DeepCache(5, 2, center=4, power=1.4),
        DeepCache(steps=(0, 1, 2, 6, 9), branch=4),
        DeepCache(4, 1, start=0.3, warmup=2),
    ],
)
@pytest.mark.parametrize(("kind", "scheduler", "guidance"), CASES[::2])
def test_planned_schedules(checkpoint, pipeline, kind, scheduler, guidance, schedule):
    pipe = fresh(checkpoint(kind), scheduler)
    full = schedule.full_steps(STEPS)
    with deepcache(pipe, full, schedule.branch):
        expected = draw(pipe, STEPS, guidance)
    latents, taken, _ = ours(pipeline, kind, scheduler, guidance, [schedule])
    assert [step.full for step in taken] == full and 2 < sum(full) < STEPS
    agrees(latents, expected, plain(checkpoint, kind, scheduler, guidance))
