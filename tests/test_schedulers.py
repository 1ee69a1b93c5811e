"""Schedules and solvers against diffusers' schedulers, around a stand-in for the network."""

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

from mlx_deepcache.diffusion.levels import Prediction, split
from mlx_deepcache.diffusion.schedulers import SCHEDULERS, schedule
from mlx_deepcache.errors import CheckpointError, UsageError

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


def ours(name, config, steps, start):
    plan = schedule(config, name).plan(steps)
    generator, calls = torch.Generator().manual_seed(1), 0

    def denoise(x, level):
        nonlocal calls
        calls += 1
        output = mx.array(network(np.array(x), level.t))
        x0, eps = split(plan.prediction_type, output, x, level)
        return Prediction(output, x0 if plan.clip is None else mx.clip(x0, -plan.clip, plan.clip), eps, x)

    x, history = mx.array(start) * plan.init_scale, None
    for step in plan.steps:
        x, history = plan.solver(
            denoise, x, step, history, lambda: mx.array(torch.randn(start.shape, generator=generator).numpy())
        )
    return np.array(x), calls


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
