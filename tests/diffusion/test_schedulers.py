"""Schedules, solvers and the loop around them against diffusers' schedulers, with a stand-in for the network."""

import inspect
import re
from itertools import product

import diffusers
import mlx.core as mx
import numpy as np
import oracle
import pytest
import torch
from helpers import error

from mlx_deepcache.cache.composition import Caches
from mlx_deepcache.diffusion.levels import Prediction, split
from mlx_deepcache.diffusion.schedulers import SCHEDULERS, schedule
from mlx_deepcache.errors import CheckpointError, UsageError
from mlx_deepcache.nets.blocks import Features
from mlx_deepcache.nets.unet_parts import Conditioning
from mlx_deepcache.sampler import Denoiser, sample

BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VARIANTS = {
    "defaults": {},
    "sd": {"skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1},
    "karras": {"use_karras_sigmas": True, "clip_sample": False},
    "clip": {"clip_sample": True, "clip_sample_range": 0.7, "variance_type": "fixed_large", "solver_type": "heun"},
    "sigma_min": {"final_sigmas_type": "sigma_min", "clip_sample": False, "solver_order": 1},
    "bh1": {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "euler_at_final": True, "lambda_min_clipped": -2.0},
    "zero_snr": {"rescale_betas_zero_snr": True, "clip_sample": False},
    "linear": {"beta_schedule": "linear", "num_train_timesteps": 900},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
}


def network(x, t):
    """Any smooth function of latents and time."""
    return (0.5 * x + 0.1 * np.cos(t / 100) + 0.2 * np.sin(3 * x)).astype(np.float32)


def reference(name, config, steps, start):
    """The final latents of diffusers' scheduler, and how often it called the network."""
    cls, options = oracle.SCHEDULERS[name]
    cls = getattr(diffusers, cls)
    known = inspect.signature(cls.__init__).parameters
    scheduler = cls(**{k: v for k, v in (config | options).items() if k in known})
    scheduler.set_timesteps(steps)
    x = torch.tensor(start) * scheduler.init_noise_sigma
    draws = (
        {"generator": torch.Generator().manual_seed(1)}
        if "generator" in inspect.signature(scheduler.step).parameters
        else {}
    )
    for t in scheduler.timesteps:
        output = torch.tensor(network(scheduler.scale_model_input(x, t).numpy(), float(t)))
        x = scheduler.step(output, t, x, **draws).prev_sample
    return x.numpy(), len(scheduler.timesteps)


class StandIn:
    """A U-Net's place in the sampling loop, filled by `network`; counts its calls."""

    def __init__(self):
        self.calls = 0

    def prepare(self, cond):
        return None

    def time_embed(self, t, prompt):
        return t

    def cut(self, branch):
        return branch

    def shallow(self, x, *_, **__):
        return [x]

    def deep(self, skip, *_, **__):
        return Features(*[mx.zeros(len(skip))] * 3)

    def finish(self, skips, features, t, *_, **__):
        self.calls += 1
        return mx.array(network(np.array(skips[0]), t.item()))


def ours(name, config, steps, start):
    """The final latents of the whole sampling loop, and how often it called the network."""
    plan, generator = schedule(config, name).plan(steps), torch.Generator().manual_seed(1)
    net, x = StandIn(), mx.array(start) * plan.init_scale
    denoiser = Denoiser(net, Conditioning(mx.zeros((1, 1, 1))), plan, None)
    *_, last = sample(denoiser, x, Caches(), lambda: mx.array(torch.randn(start.shape, generator=generator).numpy()))
    return np.array(last.latents), net.calls


# diffusers loses count of its steps where a timestep comes twice, as it does in this whole schedule
CASES = [case for case in product(SCHEDULERS, VARIANTS) if case != ("dpm++2m-karras", "cosine")]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_trajectory(name, variant):
    """Every spacing, both predictions and several lengths, from the same noise."""
    # The cosine schedule all but reaches zero signal. Against the same steps in float64, our Heun is within 2e-5 there,
    # and diffusers', whose latents are then 20,000 times as large, within 1e-2.
    tolerance = 2e-4 if variant != "cosine" else 2e-2 if name == "heun" else 2e-3
    start, compared = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32), 0
    for spacing, prediction, steps in product(
        (None, "leading", "trailing", "linspace"), ("epsilon", "v_prediction"), (4, 7, 20, 30)
    ):
        if variant == "zero_snr" and prediction == "epsilon":
            continue  # noise alone cannot be split
        config = BASE | {"prediction_type": prediction} | VARIANTS[variant]
        if spacing is not None:
            config["timestep_spacing"] = spacing
        try:
            expected, expected_calls = reference(name, config, steps, start)
        except IndexError:
            continue  # diffusers loses count where a timestep comes twice in these very schedules
        if not np.isfinite(expected).all():
            continue  # and divides by zero where two levels coincide
        latents, calls = ours(name, config, steps, start)
        assert calls == expected_calls, (spacing, prediction, steps)
        assert error(latents, expected) < tolerance, (spacing, prediction, steps)
        compared += 1
    assert compared >= 12


@pytest.mark.parametrize("ends", [{"sigma_min": 0.002, "sigma_max": 700.0}, {}, {"sigma_max": 80}])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_continuous_timesteps(ends, spacing):
    """Stable Video Diffusion's schedule, and what its config could say else: levels, what the network is told of them,
    and the latents."""
    config = BASE | ends | {"timestep_type": "continuous", "use_karras_sigmas": True, "timestep_spacing": spacing}
    config["prediction_type"] = "v_prediction"
    start = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    for steps in (1, 4, 25):
        theirs = diffusers.EulerDiscreteScheduler(**config)
        theirs.set_timesteps(steps)
        plan = schedule(config, "euler").plan(steps)
        assert np.allclose([step.here.t for step in plan.steps], theirs.timesteps.numpy(), atol=1e-6)
        ratios = np.array([step.here.ratio for step in plan.steps])
        assert np.allclose(ratios, theirs.sigmas[:-1].numpy(), rtol=1e-6)
        expected, calls = reference("euler", config, steps, start)
        latents, made = ours("euler", config, steps, start)
        assert made == calls and error(latents, expected) < 2e-4


def test_continuous_timesteps_are_for_euler():
    with pytest.raises(UsageError, match="its scheduler can be euler only, got ddim"):
        schedule({"timestep_type": "continuous"}, "ddim")
    with pytest.raises(CheckpointError, match="sigma_max should be a number above 0, got 0"):
        schedule({"sigma_max": 0}, "euler")


def test_published_trajectories():
    """The last latents of 20 steps for a one-number network, from a table made with diffusers 0.42.1."""
    golden = {"ddim": 2.585767, "pndm": 2.423537, "euler": 2.546009, "heun": 2.37869}
    config = BASE | VARIANTS["sd"] | {"timestep_spacing": "leading"}
    for name, expected in golden.items():
        plan = schedule(config, name).plan(20)

        def denoise(x, level, plan=plan):
            output = 0.5 * x + 0.1 * float(np.cos(level.t / 100))
            return Prediction(output, *split(plan.prediction_type, output, x, level), x)

        x, history = mx.array([1.0]) * plan.init_scale, None
        for step in plan.steps:
            x, history = plan.solver(denoise, x, step, history, None)
        assert abs(x.item() - expected) < 1e-4, name


def test_one_step():
    """The shortest schedules, where there is no history and no next timestep."""
    start = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    for name in SCHEDULERS:
        config = BASE | VARIANTS["sd"] | {"timestep_spacing": "trailing"}
        assert error(ours(name, config, 1, start)[0], reference(name, config, 1, start)[0]) < 2e-4, name


@pytest.mark.parametrize(
    ("name", "solver_type"),
    [*product(("dpm++2m", "dpm++2m-sde"), ("midpoint", "heun")), ("unipc", "bh1"), ("unipc", "bh2")],
)
def test_karras_levels_that_end_at_sigma_min(name, solver_type):
    """The last level comes twice; a step between the two has no length, or by rounding a negative one. UniPC's one step
    stays where it is."""
    start = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    for prediction, steps in product(("epsilon", "v_prediction"), (1, 2, 3, 20)):
        config = BASE | {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_type": solver_type}
        latents, _ = ours(name, config | {"prediction_type": prediction}, steps, start)
        expected, _ = reference(name, config | {"prediction_type": prediction}, steps, start)
        assert np.isfinite(latents).all()
        if solver_type == "heun" and steps == 20:
            assert np.isnan(expected).all()  # diffusers divides 0 by 0
        else:
            assert error(latents, expected) < 2e-4


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "lcm"])
def test_a_timestep_too_many(name):
    """For some numbers of steps diffusers' trailing timesteps are one more, and the last is -1. Where it is an index,
    that of the noisiest level, it is left out; elsewhere it means the first timestep's level."""
    config, steps = BASE | VARIANTS["sd"] | {"timestep_spacing": "trailing"}, 61
    start = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    plan, latents = schedule(config, name).plan(steps), ours(name, config, steps, start)[0]
    if name in ("ddim", "pndm", "ddpm", "unipc"):
        assert len(plan.steps) - plan.repeated == steps
        assert min(step.here.t for step in plan.steps) >= 0
        assert np.isfinite(latents).all()
    else:
        assert error(latents, reference(name, config, steps, start)[0]) < 2e-4
    if name == "ddim":
        scheduler = diffusers.DDIMScheduler(**{k: v for k, v in config.items() if k != "skip_prk_steps"})
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps[-1] == -1
        x = torch.tensor(start)
        for t in scheduler.timesteps[:-1]:
            x = scheduler.step(torch.tensor(network(x.numpy(), float(t))), t, x).prev_sample
        assert error(latents, x.numpy()) < 2e-4


@pytest.mark.parametrize("steps", [14, 15])
@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
def test_the_last_step_of_a_short_run(name, steps):
    """DPM-Solver ends at order 1 below 15 steps, which shows where noise is left at the end."""
    start = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    config = BASE | {"final_sigmas_type": "sigma_min"}
    assert error(ours(name, config, steps, start)[0], reference(name, config, steps, start)[0]) < 1e-5


@pytest.mark.parametrize(
    ("name", "spacing", "more"),
    [
        ("ddim", "leading", {"steps_offset": 0}),
        ("pndm", "trailing", {}),
        ("euler", "leading", {}),
        ("dpm++2m", "trailing", {}),
        ("dpm++2m", "linspace", {"solver_order": 1}),
        ("unipc", "linspace", {"solver_order": 1}),
    ],
)
def test_as_many_steps_as_there_are_timesteps(name, spacing, more):
    start = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    config = BASE | VARIANTS["sd"] | {"timestep_spacing": spacing} | more
    assert error(ours(name, config, 1000, start)[0], reference(name, config, 1000, start)[0]) < 2e-4


@pytest.mark.parametrize(
    ("name", "steps", "spacing", "message"),
    [
        ("ddim", 1000, "leading", "fewer than 1000 with ddim here: the first would be at timestep 1000 of 0 to 999"),
        ("pndm", 1000, "leading", "fewer than 1000 with pndm"),
        ("ddpm", 1000, "leading", "fewer than 1000 with ddpm"),
        (
            "dpm++2m",
            1000,
            "leading",
            r"fewer than 1000 with dpm\+\+2m here: two of them would be at the same noise level",
        ),
        ("dpm++2m", 999, "leading", "fewer than 999"),
        ("dpm++2m-sde", 1000, "linspace", "the same noise level"),
        ("unipc", 1000, "linspace", "the same noise level"),
    ],
)
def test_too_many_steps_for_a_spacing(name, steps, spacing, message):
    """Where diffusers looks beyond the last timestep, or divides by zero."""
    start = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    config = BASE | VARIANTS["sd"] | {"timestep_spacing": spacing}
    with pytest.raises(UsageError, match=message):
        schedule(config, name).plan(steps)
    try:
        with np.errstate(invalid="ignore"):
            expected, _ = reference(name, config, steps, start)
    except (IndexError, AssertionError):
        return
    assert not np.isfinite(expected).all()


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("ddim", 0, "steps should be from 1 to 1000, got 0"),
        ("euler", 1001, "steps should be from 1 to 1000, got 1001"),
        ("lcm", 51, "at most 50 with lcm, got 51"),
        ("pndm", 3, "4 or more with pndm's Runge-Kutta start"),
        ("plms", 5, "scheduler should be one of ddim, pndm"),
    ],
)
def test_impossible(name, steps, message):
    with pytest.raises(UsageError, match=message):
        schedule(BASE, name).plan(steps)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("ddim", "thresholding", True),
        ("ddim", "beta_schedule", "sigmoid"),
        ("dpm++2m", "solver_order", 3),
        ("dpm++2m", "algorithm_type", "dpmsolver"),
        ("unipc", "predict_x0", False),
        ("euler", "use_beta_sigmas", True),
        ("ddpm", "variance_type", "learned"),
    ],
)
def test_unsupported_values_are_named(name, key, value):
    with pytest.raises(CheckpointError, match=re.escape(f"{key} = {value!r} is not supported with {name}")):
        schedule(BASE | {key: value}, name)


def test_unknown_scheduler_class():
    with pytest.raises(CheckpointError, match="'EDMEulerScheduler', which is not supported"):
        schedule({"_class_name": "EDMEulerScheduler"})


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"beta_start": NAN}, "betas should lie between 0 and 1, got nan to 0.02|beta_start should be a number"),
        ({"beta_end": INF}, "beta_end should be a number, got inf"),
        ({"beta_end": 2}, "betas should lie between 0 and 1, got 0.0001 to 2"),
        ({"beta_start": -1}, "betas should lie between 0 and 1, got -1 to 0.02"),
        ({"beta_start": 0}, "betas should lie between 0 and 1"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "0.5 to 0.1, leave nothing of the picture"),
        ({"beta_start": 1e-300, "beta_end": 1e-300}, "or no noise in it"),
        ({"trained_betas": [0.1] * 999 + [NAN]}, "betas should lie between 0 and 1|leave nothing"),
        ({"trained_betas": [0.1] * 999 + [None]}, "one number for each training timestep"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps should be 1 or more, at most 100000, got 1000000000"),
        ({"steps_offset": -5}, "steps_offset should be 0 or more, at most 999, got -5"),
        ({"clip_sample_range": NAN}, "clip_sample_range should be a number, got nan"),
    ],
)
@pytest.mark.parametrize("name", ["ddim", "dpm++2m-karras"])
def test_schedules_that_cannot_be(values, words, name):
    """Each would end in NaN, or take all memory."""
    if "clip_sample_range" in values and name != "ddim":
        return
    with pytest.raises(CheckpointError, match=words):
        schedule(values, name)
