"""Caching policies: the values, their text, their combinations, and that nothing of them outlives a picture."""

import gc
import json
import warnings
import weakref

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from helpers import PICTURE, conditioning, to_mlx, unet_inputs
from mlx.utils import tree_flatten

from mlx_deepcache import (
    Adaptive,
    DeepCache,
    FasterCache,
    GuidanceInterval,
    PyramidAttentionBroadcast,
    Spectrum,
    StableDiffusion,
    TaylorSeer,
    TGate,
)
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.cache.composition import KINDS, CacheRun, Caches
from mlx_deepcache.cache.deepcache import CacheWarning
from mlx_deepcache.cache.text import explain, parse, write
from mlx_deepcache.diffusion.schedulers import schedule
from mlx_deepcache.errors import UsageError
from mlx_deepcache.nets import blocks
from mlx_deepcache.sampler import Denoiser


def picture(full):
    return "".join("F" if f else "." for f in full)


# ------------------------------------------------------------------------------------------------- which steps are full


@pytest.mark.parametrize(
    ("interval", "power", "expected"),
    [  # what the paper's code gives for 50 steps around step 15
        (2, 1.2, "0 2 4 6 8 10 12 13 15 16 18 19 21 23 25 27 29 31 33 36 38 40 42 45 47"),
        (2, 1.3, "0 2 4 6 8 10 11 13 15 16 17 19 21 23 25 27 29 31 33 35 38 40 42 45 47"),
        (2, 1.4, "0 2 4 6 7 9 11 12 14 15 17 18 20 22 24 26 28 30 32 35 37 39 42 44 47"),
        (3, 1.2, "0 3 6 9 11 14 15 18 21 24 26 30 33 36 39 43 46"),
        (3, 1.3, "0 3 6 8 11 13 15 17 20 23 26 29 32 35 39 42 46"),
        (3, 1.4, "0 3 6 8 11 13 15 17 20 22 25 28 32 35 38 42 46"),
        (5, 1.2, "0 5 10 14 18 22 27 32 38 44"),
        (5, 1.3, "0 5 10 14 17 22 26 32 37 43"),
        (5, 1.4, "0 5 9 13 17 21 26 31 37 43"),
        (10, 1.2, "0 10 18 27 38"),
        (10, 1.3, "0 10 17 26 37"),
        (10, 1.4, "0 9 17 26 37"),
    ],
)
def test_non_uniform_steps_are_the_papers(interval, power, expected):
    full = DeepCache(interval, center=15, power=power).full_steps(50)
    assert [i for i, f in enumerate(full) if f] == [int(i) for i in expected.split()]


@pytest.mark.parametrize(("scheduler", "calls"), [("ddim", 50), ("pndm", 51)])
def test_non_uniform_steps_of_pndm_too(scheduler, calls):
    """The paper's code lays its schedule over the 50 steps that were asked for, of which PNDM takes one twice."""
    plan = schedule({"skip_prk_steps": True}, scheduler).plan(50)
    memory = DeepCache(5, center=15, power=1.4).memory(plan, 1, True)
    assert len(plan.steps) == calls
    assert [i for i in range(calls) if memory.full(i)] == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]
    with pytest.raises(UsageError, match="one of the 50 steps, from 0 to 49, got 50"):
        DeepCache(5, center=50, power=1.4).check(plan, True)


def test_no_non_uniform_schedule():
    with pytest.raises(UsageError, match="25 full steps in 50 around center=25.*decrease center"):
        DeepCache(2, center=25, power=1.2).full_steps(50)
    with pytest.raises(UsageError, match="one of the 10 steps, from 0 to 9, got 15"):
        DeepCache(2, center=15, power=1.2).full_steps(10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("deepcache:interval=1", "FFFFFFFFFFFF"),
        ("deepcache", "F..F..F..F.."),
        ("deepcache:warmup=3", "FFF..F..F..F"),
        ("deepcache:start=0.25,end=0.75", "FFF..F..FFFF"),
        ("deepcache:interval=20,end=0.5", "F.....FFFFFF"),
        ("deepcache:steps=0-2+5+11", "FFF..F.....F"),
        ("deepcache:steps=F..FF", "F..FF......."),
        ("deepcache:steps=0,end=0.75", "F........FFF"),
        ("adaptive", "F..........."),
        ("adaptive:warmup=2", "FF.........."),
        ("adaptive:max_interval=1", "FFFFFFFFFFFF"),
    ],
)
def test_planned_steps(text, expected):
    assert picture(parse(text).full_steps(12)) == expected


# ------------------------------------------------------------------------------------------------------------ forecasts


@pytest.mark.parametrize("order", [1, 2])
def test_taylorseer_predicts_what_diffusers_does(order):
    """On features of full steps at uneven distances, from the first one on."""
    rng, policy = np.random.default_rng(0), TaylorSeer(order)
    state, kept, steps, checked = TaylorSeerState(torch.float32, max_order=order), [], [], 0
    for step in range(20):
        state.current_step = step
        if step in (0, 2, 3, 7, 12, 13):
            kept.append(rng.standard_normal(5).astype(np.float32))
            steps.append(step)
            state.update((torch.tensor(kept[-1]),))
        else:
            n = policy.history
            ours = np.array(policy.weights(steps[-n:], step, 20)) @ np.stack(kept[-n:])
            assert np.allclose(ours, state.predict()[0].numpy(), rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked == 14


def test_spectrum_is_a_ridge_fit_of_chebyshev_polynomials():
    """Against least squares with the penalty written as extra rows, and polynomials as cosines."""
    steps, step, n, degree, ridge, share = [10, 15, 20, 30], 34, 50, 3, 0.5, 0.4
    values = np.random.default_rng(0).standard_normal((4, 6))

    def basis(s):
        return np.cos(np.outer(np.arccos(2 * np.asarray(s) / n - 1), np.arange(degree + 1)))

    rows = np.concatenate([basis(steps), ridge**0.5 * np.eye(degree + 1)])
    fit, *_ = np.linalg.lstsq(rows, np.concatenate([values, np.zeros((degree + 1, 6))]), rcond=None)
    line = values[-1] + (values[-1] - values[-2]) * 4 / 10
    expected = share * basis([step])[0] @ fit + (1 - share) * line
    weights = Spectrum(share, degree, ridge).weights(steps, step, n)
    assert np.allclose(np.array(weights) @ values, expected)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize(("guidance", "window"), [(1.0, None), (3.0, None), (3.0, (0, 0.4)), (3.0, (0.5, 1))])
@pytest.mark.parametrize("policy", [TaylorSeer(2), Spectrum(history=3)])
def test_a_cached_step_is_given_the_forecast(pipeline, monkeypatch, kind, guidance, window, policy):
    """What the U-Net is given, seen from outside, is the sum of what it returned with the policy's weights: for the
    conditional half that of the conditional half, and for both only of calls that had both."""
    pipe = pipeline(kind)
    unet, full, checked, calls = pipe.component("unet"), [], 0, []
    deep, finish = unet.deep, unet.finish

    def watched_deep(skip, *args, **options):
        features = deep(skip, *args, **options)
        if full and len(full[-1][1].conv) < len(skip):
            full.clear()
        full.append((len(calls), features))
        return features

    def watched_finish(skips, features, *args, **options):
        nonlocal checked
        pictures = len(skips[-1])
        if not full or full[-1][0] != len(calls):
            taken, kept = zip(*full[-policy.history :], strict=True)
            weights = policy.weights(taken, len(calls), 11)
            for part, parts in zip(features, zip(*kept, strict=True), strict=True):
                assert len(part) == pictures
                expected = sum(w * np.array(p)[-pictures:] for w, p in zip(weights, parts, strict=True))
                assert np.allclose(np.array(part), expected, atol=1e-4 * np.abs(expected).max(initial=0))
                checked += part.size > 0
        calls.append(pictures)
        return finish(skips, features, *args, **options)

    monkeypatch.setattr(unet, "deep", watched_deep)
    monkeypatch.setattr(unet, "finish", watched_finish)
    cache = [DeepCache(3), policy] + ([] if window is None else [GuidanceInterval(*window)])
    drawn(pipe, cache, steps=11, guidance_scale=guidance, scheduler="ddim", seeds=[1])
    start, end = (0, 1) if window is None else window
    assert calls == [2 if guidance > 1 and start <= i / 11 < end else 1 for i in range(11)]
    assert checked >= 14


# ---------------------------------------------------------------------------------------- neutral, never left over

OFF = [
    [DeepCache(1)],
    [DeepCache(steps=range(4))],
    [Adaptive(threshold=0)],
    [Adaptive(max_interval=1), TaylorSeer(2)],
    [DeepCache(1), Spectrum()],
    [PyramidAttentionBroadcast(1, 1)],
    [PyramidAttentionBroadcast(None, None)],
    [FasterCache(spatial_attention_block_skip_range=1, unconditional_batch_skip_range=1)],
    [TGate(step=4, sp_interval=1)],
]
SIX = {"steps": 6, "height": 64, "width": 64, "seeds": [5, 6]}  # two pictures of 8 x 8 latents


def drawn(pipe, cache, prompt="a cat", **options):
    """Final latents and stats, without a VAE."""
    settings = pipe.settings(prompt, cache=cache, **SIX | options)
    run = pipe.denoise(settings)
    *_, last = run
    return last.latents, run.stats()


@pytest.mark.parametrize(("kind", "scheduler", "guidance"), [("sd15", "ddim", 4.0), ("sdxl", "euler", 1.0)])
def test_neutral_settings_are_bit_equal_to_no_cache(pipeline, kind, scheduler, guidance):
    options = {"guidance_scale": guidance, "scheduler": scheduler, "steps": 4, "seeds": [5]}
    plain, _ = drawn(pipeline(kind), None, cache_interval=1, **options)
    for cache in [[], *OFF] + ([[GuidanceInterval()]] if guidance > 1 else []):
        latents, stats = drawn(pipeline(kind), cache, **options)
        assert mx.array_equal(latents, plain), cache
        assert stats["unet_macs"] == stats["unet_macs_uncached"]


def test_order_0_copies(pipeline):
    copied, _ = drawn(pipeline("sd15"), [DeepCache(2, 1)])
    forecast, _ = drawn(pipeline("sd15"), ["deepcache:interval=2,branch=1", "taylorseer:order=0"])
    assert mx.array_equal(copied, forecast)


ALL = [
    [DeepCache(2), TaylorSeer(1), PyramidAttentionBroadcast(2, 2, (-1, 1000), (-1, 1000)), GuidanceInterval(0, 0.6)],
    [Adaptive(0.2), Spectrum(), FasterCache(unconditional_batch_timestep_skip_range=(-1, 1000))],
    [DeepCache(3, 2), TGate(step=3)],
]


@pytest.mark.parametrize(("kind", "cache"), [("sd15", ALL[0]), ("sdxl", ALL[1]), ("sd15", ALL[2])])
def test_nothing_survives_a_generation(pipeline, monkeypatch, kind, cache):
    """Another picture of another size, and one given up half-way, leave no trace; the state is freed."""
    pipe, runs = pipeline(kind), []
    call = CacheRun.call
    monkeypatch.setattr(CacheRun, "call", lambda self, i, t: (i or runs.append(weakref.ref(self)), call(self, i, t))[1])
    first, _ = drawn(pipe, cache)
    drawn(pipe, cache, width=128, seeds=[1])
    steps = pipe.denoise(pipe.settings("a dog", cache=cache, **SIX))
    next(steps), next(steps), steps.close()
    again, _ = drawn(pipe, cache)
    fresh, _ = drawn(StableDiffusion(pipe.checkpoint, "float32"), cache)
    assert mx.array_equal(first, again) and mx.array_equal(first, fresh)
    assert not mx.array_equal(first, drawn(pipe, [])[0])
    del steps
    gc.collect()
    assert len(runs) == 6 and all(run() is None for run in runs)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("cache", ALL)
def test_the_first_axis_of_all_that_is_held_counts_pictures(pipeline, kind, cache):
    """Of the conditioning, which guidance has twice, and after each call of whatever the caches keep."""
    unet, plan = pipeline(kind).component("unet"), pipeline(kind).settings("a cat", **SIX).legs[0].plan
    x, context, added = unet_inputs(unet.config, (8, 8), batch=6)
    denoiser = Denoiser(unet, conditioning(context, added), plan, 3.0)
    assert {len(array) for _, array in tree_flatten(denoiser.cond) if array is not None} == {6}
    assert {len(temb) for temb in denoiser.temb.values()} == {6 if kind == "sdxl" else 1}
    run, held = CacheRun(Caches.of(cache), plan, 3, guided=True), []
    for index, step in enumerate(plan.steps):
        denoiser(to_mlx(x[:3]), index, step.here, run)
        held += [len(array) for arrays in run.arrays.values() for array in arrays]
    assert set(held) == {3, 6}


@pytest.mark.parametrize("scheduler", ["heun", "dpm++2m-sde", "unipc", "lcm"])
@pytest.mark.parametrize("cache", ALL)
def test_other_schedulers(pipeline, scheduler, cache):
    _, stats = drawn(pipeline("sd15"), cache, scheduler=scheduler)  # a failure if the latents are not finite
    assert stats["unet_macs"] < stats["unet_macs_uncached"]


def test_pictures_drawn_together_are_those_drawn_alone(pipeline):
    cache = [DeepCache(2), TaylorSeer(1), TGate(step=3, sp_interval=2)]
    both, _ = drawn(pipeline("sd15"), cache)
    alone, _ = drawn(pipeline("sd15"), cache, seeds=[6])
    assert mx.allclose(both[1:], alone, atol=1e-4)


# ---------------------------------------------------------------------------------------- what it costs and saves


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "policy", [PyramidAttentionBroadcast(2, 3, (-1, 1000), (-1, 1000)), TGate(step=3, fi_interval=2)]
)
def test_multiply_adds_are_those_of_the_layers_that_ran(pipeline, monkeypatch, kind, policy):
    """Counted at the attention layers, which no part of the package counts."""
    work, plain = [], blocks.Attention.__call__

    def counted(self, x, keys_values=None):
        B, S, d = x.shape
        keys, dims = (S, d) if keys_values is None else (77, self.to_k.weight.shape[1])
        work.append(B * (2 * S * d * d + 2 * keys * dims * d + 2 * S * keys * d))
        return plain(self, x, keys_values)

    monkeypatch.setattr(blocks.Attention, "__call__", counted)

    def run(cache):
        work.clear()
        _, stats = drawn(pipeline(kind), cache, guidance_scale=1.0)
        return stats["unet_macs"], sum(work)

    (plain_macs, plain_work), (macs, attention) = run([TGate(step=6, sp_interval=1)]), run([policy])
    assert macs < plain_macs
    assert plain_macs - macs == plain_work - attention


def test_multiply_adds_count_the_tokens_that_are_read(pipeline, monkeypatch):
    """A long prompt's are more by what its attention layers were seen to do more."""
    seen, plain = [], blocks.Attention.__call__

    def counted(self, x, keys_values=None):
        if keys_values is not None:
            (dims, inner), tokens = self.to_k.weight.shape, keys_values[0].shape[2]
            seen.append(len(x) * (2 * tokens * dims * inner + 2 * x.shape[1] * tokens * dims))
        return plain(self, x, keys_values)

    monkeypatch.setattr(blocks.Attention, "__call__", counted)

    def run(prompt):
        seen.clear()
        _, stats = drawn(pipeline("sd15"), DeepCache(2), prompt, long_prompt=True)
        return stats["unet_macs"], sum(seen)

    (short, seen_short), (long, seen_long) = run("a cat"), run("a cat " * 80)
    assert long - short == seen_long - seen_short > 0


def test_half_a_batch_is_half_the_work(pipeline):
    _, stats = drawn(pipeline("sd15"), [GuidanceInterval(0, 0.5)], scheduler="ddim")
    assert stats["unet_macs"] == stats["unet_macs_uncached"] * 3 // 4


def test_bytes_of_each_cache(pipeline):
    """Features: conv, shortcut and straddling channels in float32; forecasts keep several; attention: one output a
    layer, of the 64 positions and fewer that SD's levels have here."""

    def stats(*cache):
        return drawn(pipeline("sd15"), cache, guidance_scale=1.0)[1]["cache_bytes"]

    one = stats(DeepCache(2))["deepcache"]
    assert one == 2 * 4 * 64 * (32 + 32)  # two pictures
    assert stats(DeepCache(2), TaylorSeer(2))["deepcache"] == 3 * one
    kept = stats(DeepCache(2), PyramidAttentionBroadcast(2, 2))
    dims = [(64, 32)] * 5 + [(16, 40)] * 5 + [(4, 48)] * 5 + [(1, 48)]
    assert kept == {"deepcache": one, "pab": 2 * 2 * 4 * sum(s * d for s, d in dims)}


# ---------------------------------------------------------------------------------------- text, combinations


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_back(kind):
    assert parse(kind.name) == kind() == parse(write(kind()))
    assert parse(next(line for line in explain() if line.startswith(kind.name))) == kind()


@pytest.mark.parametrize(
    "policy",
    [
        DeepCache(5, 2, center=15, power=1.4),
        DeepCache(steps=(0, 1, 2, 3, 7, 9, 10), end=0.75),
        Adaptive(0.123456789, 7, 1, 2),
        Spectrum(0.5, 2, 0.1, 4),
        PyramidAttentionBroadcast(None, 3, cross_attention_timestep_skip_range=(-1, 900)),
        FasterCache(attention_weight=(0, 1), alpha_low_frequency=1.2, unconditional_batch_skip_range=3),
        TGate(7, 3, 2, 1),
        GuidanceInterval(0.1, 0.9),
    ],
)
def test_text_of_a_policy_and_back(policy):
    assert parse(write(policy)) == policy


def test_full_names_and_short_ones():
    long = parse("pab:spatial_attention_block_skip_range=3,cross_attention_timestep_skip_range=50..900")
    assert long == parse("pab:spatial=3,cross_window=50..900")
    assert parse("deepcache:steps=0+2-4+6") == DeepCache(steps=(0, 2, 3, 4, 6))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tgat", "no cache called 'tgat'; did you mean 'tgate'?"),
        ("", "no cache called ''"),
        ("tgate:stp=3", "no setting 'stp'; did you mean 'step'?"),
        ("tgate:step", "tgate's step needs a value, such as tgate:step=10"),
        ("tgate:step=", "tgate's step needs a value"),
        ("tgate:step=2.5", "should be a whole number, got '2.5'"),
        ("tgate:step=0", "step must be at least 1"),
        ("tgate:step=3,step=4", "step is given twice"),
        ("pab:spatial=2,spatial_attention_block_skip_range=3", "given twice"),
        ("pab:spatial=two", "should be a whole number or off, got 'two'"),
        ("pab:cross_window=800..100", "two timesteps, the lower first"),
        ("pab:cross_window=100-800", "two whole numbers, such as 100..800, got '100-800'"),
        ("adaptive:threshold=nan", "should be a number, got 'nan'"),
        ("adaptive:threshold=-1", "threshold must be 0 or more"),
        ("deepcache:steps=5-2", "should be steps such as 0-9+12+15"),
        ("deepcache:steps=1+2", "must include 0"),
        ("deepcache:steps=0+2,interval=3", "leave out interval"),
        ("deepcache:center=15", "needs center and power"),
        ("deepcache:center=15,power=1", "power > 1"),
        ("deepcache:start=0.5,end=0.5", "0 <= start < end <= 1, got 0.5 and 0.5"),
        ("deepcache:interval=0", "interval must be at least 1"),
        ("deepcache:branch=-1", "branch must be at least 0"),
        ("deepcache:warmup=-1", "warmup must be at least 0"),
        ("taylorseer:order=3", "0 (copy), 1 or 2, got 3"),
        ("spectrum:ridge=0", "ridge must be above 0"),
        ("fastercache:uncond=0", "uncond must be at least 1"),
        ("fastercache:alpha_low=0", "must be above 0"),
        ("guidance:start=0.9,end=0.1", "0 <= start < end <= 1"),
    ],
)
def test_text_that_cannot_be(text, message):
    with pytest.raises(UsageError) as error:
        parse(text)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["deepcache", "adaptive"],
            "deepcache and adaptive both decide on which steps the deep part",
        ),
        (["deepcache:interval=2", "deepcache"], "deepcache is given twice"),
        (["pab", "tgate"], "pab and tgate both decide which attention outputs are used again"),
        (["fastercache", "tgate"], "both decide which attention outputs are used again"),
        (["tgate", "guidance"], "tgate and guidance both decide on which steps the unconditional half runs"),
        (["taylorseer", "spectrum", "deepcache"], "both decide how the kept features are forecast"),
        (["taylorseer", "pab"], "taylorseer forecasts what a cached step uses, so it needs deepcache or adaptive"),
    ],
)
def test_combinations_without_meaning(texts, message):
    with pytest.raises(UsageError) as error:
        Caches.of(map(parse, texts))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("policy", "steps", "last"),
    [
        ("deepcache:steps=0-9+12+15", 50, 15),
        ("deepcache:steps=F..F..", 20, 3),
        ("deepcache:interval=40", 50, 40),
        ("deepcache:interval=50", 50, 0),
        ("deepcache:steps=0-9+33", 50, None),
        ("deepcache:interval=5,center=15,power=1.4", 50, None),
        ("deepcache:interval=10", 50, None),
        ("deepcache:interval=50,end=0.5", 50, None),
        ("deepcache:interval=3", 10, None),
    ],
)
def test_no_full_step_in_the_last_third(policy, steps, last):
    """Counted by hand: of 50 steps, one of 33 to 49 is full."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parse(policy).check(schedule({}, "ddim").plan(steps), True)
    if last is None or 3 * last >= 2 * steps:
        assert not caught
    else:
        assert [w.category for w in caught] == [CacheWarning]
        assert f"last full step is {last}, " in str(caught[0].message)


def test_settings(pipeline):
    def caches(steps=20, **options):
        settings = pipeline("sd15").settings("a cat", steps=steps, scheduler="ddim", **options)
        return [write(policy) for policy in settings.cache.policies]

    assert caches() == ["deepcache:interval=3"]
    assert caches(steps=9) == ["deepcache:interval=1"]
    assert caches(cache=[]) == ["deepcache:interval=1"]
    assert caches(cache=TGate(5)) == ["deepcache:interval=1", "tgate:step=5"]
    assert caches(cache="pab") == ["deepcache:interval=1", "pab"]
    assert caches(cache=["pab"], cache_interval=4, cache_branch=1) == [
        "deepcache:interval=4,branch=1",
        "pab",
    ]
    for options, message in [
        ({"cache": ["adaptive"], "cache_interval": 3}, "adaptive and deepcache both decide"),
        ({"cache": ["pab"], "cache_branch": 1}, "belongs to a cache interval"),
        ({"cache": ["adaptive:branch=12"]}, r"must be in \[0, 12\) for this U-Net, got 12"),
        ({"cache": ["tgate:step=21"]}, "from 1 to the 20 steps there are, got 21"),
        ({"cache": ["deepcache:steps=0+20"]}, "there are 20, from 0 to 19"),
        ({"cache": ["guidance:end=0.5"], "guidance_scale": 1}, "no meaning where guidance is off"),
        ({"cache": [3]}, "cache should be one of the policies"),
    ]:
        with pytest.raises(UsageError, match=message):
            caches(**options)


def test_the_cache_is_off_where_few_steps_are_run(pipeline):
    """20 steps of which the picture's strength leaves 6."""
    few, many = ({"image": PICTURE, "steps": 20, "strength": strength} for strength in (0.3, 0.5))
    assert pipeline("sd15").settings("a cat", **few).cache.when == DeepCache(1)
    assert pipeline("sd15").settings("a cat", **many).cache.when == DeepCache(3)


@pytest.mark.parametrize(
    ("ours", "theirs", "but"),
    [
        (FasterCache(), diffusers.FasterCacheConfig(), set()),
        # which leaves both kinds of attention alone until a range is given
        (
            PyramidAttentionBroadcast(),
            diffusers.PyramidAttentionBroadcastConfig(),
            {"spatial_attention_block_skip_range", "cross_attention_block_skip_range"},
        ),
    ],
    ids=["fastercache", "pab"],
)
def test_defaults_are_those_of_diffusers(ours, theirs, but):
    shared = {name for name in vars(ours) if hasattr(theirs, name)} - but
    assert len(shared) >= 2
    for name in shared:
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


def test_cache_list(capsys):
    with pytest.raises(SystemExit) as stopped:
        main_generate(["--cache", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and len(lines) == 2 * len(KINDS)
    assert [line.split(":")[0] for line in lines[::2]] == [kind.name for kind in KINDS]


def test_command_line(tmp_path, checkpoint, capsys):
    from PIL import Image

    def generate(*flags):
        out = ["--output", str(tmp_path / "a.png"), "--stats", str(tmp_path / "s.json")]
        model = [
            "--model",
            str(checkpoint("sd15")),
            "--prompt",
            "a cat",
            "--steps",
            "6",
            "--height",
            "64",
            "--width",
            "64",
        ]
        return main_generate([*model, *out, *flags])

    flags = ["--cache", "adaptive:threshold=0.2", "--cache", "taylorseer", "--cache", "tgate:step=3"]
    assert generate(*flags) == 0
    stats = json.loads((tmp_path / "s.json").read_text())
    assert stats["caches"] == ["adaptive:threshold=0.2", "taylorseer", "tgate:step=3"]
    assert set(stats["cache_bytes"]) == {"adaptive", "tgate"} and stats["decisions"]
    for decision in stats["decisions"]:
        assert decision["full"] == (stats["steps"][decision["step"]] == "full")
    with Image.open(tmp_path / "a.png") as image:
        assert "Caches: adaptive:threshold=0.2 + taylorseer + tgate:step=3" in image.text["parameters"].replace('"', "")
        assert json.loads(image.text["mlx_deepcache"])["cache"] == stats["caches"]
    capsys.readouterr()
    assert generate("--cache", "tgte") == 2
    assert capsys.readouterr().err == (
        "error: there is no cache called 'tgte'; did you mean 'tgate'?; --cache list explains them\n"
    )
