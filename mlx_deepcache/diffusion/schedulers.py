"""Noise schedules as data, read from diffusers' scheduler configs: which levels to visit, with which solver."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import CheckpointError, UsageError, called
from .levels import CLEAN, Level, Step
from .schedule import NoiseSchedule, Scheduler
from .solvers import ddim, ddpm, dpm_2m, euler_ancestral, heun, lcm, plms, unipc

TIMESTEPS = ("uniform", "quad")  # spacings of DDIM's own code, which ends at clean latents


# How each family lays out its steps: (schedule, n) -> steps, init_scale
def _ddim_steps(s: NoiseSchedule, n: int):
    if s.config["timestep_spacing"] in TIMESTEPS:
        return _ddpm_steps(s, n)
    stride = s.config["num_train_timesteps"] // n
    return [Step(s.level(t), s.level(t - stride)) for t in s.spaced(n).astype(int)], 1.0


def _pndm_steps(s: NoiseSchedule, n: int):
    stride = s.config["num_train_timesteps"] // n
    t = s.spaced(n).astype(int)
    if s.config["skip_prk_steps"]:
        steps = [Step(s.level(t[0]), s.level(t[0] - stride))]
        if n == 1:
            return steps, 1.0
        steps.append(Step(s.level(t[1]), s.level(t[1]), stage="again", base=s.level(t[1] + stride)))
        return steps + [Step(s.level(t), s.level(t - stride)) for t in t[1:]], 1.0
    if n < 4:
        raise UsageError(f"steps should be 4 or more with pndm's Runge-Kutta start (skip_prk_steps false), got {n}")
    half, steps = stride // 2, []
    for start, end in pairwise(t[:4]):
        middle = end + half
        for stage, here, there in (
            ("rk1", start, start - half),
            ("rk2", middle, middle),
            ("rk3", middle, middle - half),
            ("rk4", end, end),
        ):
            steps.append(Step(s.level(here), s.level(there), stage=stage, base=s.level(start)))
    return steps + [Step(s.level(t), s.level(t - stride)) for t in t[3:]], 1.0


def _chain(levels: list[Level]) -> list[Step]:
    return [Step(here, there) for here, there in pairwise(levels)]


def _euler_steps(s: NoiseSchedule, n: int):
    t = s.spaced(n, whole=False)
    table = s.ratios()
    ratios = np.interp(t, np.arange(len(table)), table)
    if s.config.get("use_karras_sigmas"):
        high, low = s.config.get("sigma_max"), s.config.get("sigma_min")
        t, ratios = s.karras(len(t), ratios[0] if high is None else high, ratios[-1] if low is None else low)
    if s.config.get("timestep_type") == "continuous" and s.config["prediction_type"] == "v_prediction":
        t = 0.25 * np.log(np.asarray(ratios, np.float32))  # the noise that EDM's networks are told
    levels = s.from_ratios(t, ratios)
    # "leading" starts below the highest level and counts the signal's share into the starting noise
    init_scale = 1.0 if s.config["timestep_spacing"] == "leading" else max(levels, key=lambda v: v.ratio).sigma
    last = s.last()  # Euler's x is x0 + ratio * eps in diffusers, and is left so if noise remains in it
    return _chain([*levels, Level(last.t, 1.0, last.ratio)]), init_scale


def _multistep_levels(s: NoiseSchedule, n: int) -> list[Level]:
    c = s.config
    table = s.ratios()
    snr = -np.log(table)
    total = c["num_train_timesteps"] - int(np.sum(snr < c.get("lambda_min_clipped", -math.inf)))
    if c.get("use_karras_sigmas"):
        t, ratios = s.karras(n, table[-1], table[0])
        return s.from_ratios(t.round(), ratios)
    if c["timestep_spacing"] == "linspace":
        t = np.linspace(0, total - 1, n + 1).round()[::-1][:-1]
    elif c["timestep_spacing"] == "leading":
        t = (np.arange(n + 1) * (total // (n + 1)))[::-1][:-1] + c["steps_offset"]
    else:
        t = np.arange(total, 0, -c["num_train_timesteps"] / n).round() - 1
    return s.from_ratios(t, np.interp(t, np.arange(len(table)), table))


def _dpm_steps(s: NoiseSchedule, n: int):
    c = s.config
    steps = _chain([*_multistep_levels(s, n), s.last()])
    n = len(steps)
    lower_last = c["euler_at_final"] or (c["lower_order_final"] and n < 15) or c["final_sigmas_type"] == "zero"
    return _ordered(s, steps, c["solver_order"], lower_last), 1.0


def _unipc_steps(s: NoiseSchedule, n: int):
    levels = _multistep_levels(s, n)[:n]  # see `NoiseSchedule.spaced`; the same level twice would have no slope
    own = n == 1 and s.config["use_karras_sigmas"] and s.config["final_sigmas_type"] == "sigma_min"
    steps = _chain([*levels, levels[-1] if own else s.last()])  # sigma_min is the lowest of Karras's own here
    lower_last = s.config["lower_order_final"] or s.config["final_sigmas_type"] == "zero"
    return _ordered(s, steps, s.config["solver_order"], lower_last), 1.0


def _ordered(s: NoiseSchedule, steps: list[Step], order: int, lower_last: bool) -> list[Step]:
    """A multistep method starts at order 1, and may end there.

    Raises:
        UsageError: two levels are the same, so that there is no slope between them.
    """
    last = len(steps) - 1
    made = [
        Step(step.here, step.there, order=1 if i == 0 or (i == last and lower_last) else order)
        for i, step in enumerate(steps)
    ]
    if any(step.order == 2 and before.here.sigma == step.here.sigma for before, step in pairwise(made)):
        raise UsageError(
            f"steps should be fewer than {len(steps)} with {s.name} here: two of them would be at the same noise level"
        )
    return made


def _lcm_steps(s: NoiseSchedule, n: int):
    c = s.config
    grid = np.arange(1, c["original_inference_steps"] + 1) * (c["num_train_timesteps"] // c["original_inference_steps"])
    if n > len(grid):
        raise UsageError(f"steps should be at most {len(grid)} with lcm, got {n}")
    t = (grid - 1)[::-1][np.floor(np.linspace(0, len(grid), n, endpoint=False)).astype(int)]
    return _chain([*(s.level(t) for t in t), CLEAN]), 1.0


def _pndm_late(s: NoiseSchedule, n: int, steps: list[Step], start: int) -> list[Step]:
    """PNDM's in diffusers, where only the timesteps are those of a later start: what is done with the first of them,
    with the second and so on stays as it is. So one call is made at a timestep that the latents are not at."""
    stride = s.config["num_train_timesteps"] // n
    late = []
    for (i, usual), step in zip(enumerate(steps), steps[start:], strict=False):
        t = int(step.here.t)
        if usual.stage.startswith("rk"):
            late.append(replace(usual, here=s.level(t), there=s.level(t - (0 if i % 2 else stride // 2))))
        elif usual.stage == "again":
            late.append(Step(s.level(t), s.level(t), stage="again", base=s.level(t + stride)))
        else:
            late.append(Step(s.level(t), s.level(t - stride)))
    return late


def _ddpm_steps(s: NoiseSchedule, n: int):
    return _chain([*(s.level(t) for t in s.spaced(n).astype(int)), CLEAN]), 1.0


# The table of names
_COMMON = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}


_MOST_TIMESTEPS = 100_000  # a hundred times as many as any model was trained with
_NUMBERS = {"num_train_timesteps", "beta_start", "beta_end", "steps_offset", "clip_sample_range", "timestep_scaling"}


_CLIP = {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False}


_RATIOS = {"timestep_spacing": "linspace", "rescale_betas_zero_snr": False, "final_sigmas_type": "zero"}


_OTHER_SIGMAS = {"use_exponential_sigmas": False, "use_beta_sigmas": False}


_MULTISTEP = {
    **_RATIOS,
    **_OTHER_SIGMAS,
    "use_karras_sigmas": False,
    "solver_order": 2,
    "lower_order_final": True,
    "thresholding": False,
    "use_flow_sigmas": False,
}


_DPM = {
    **_MULTISTEP,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "euler_at_final": False,
    "use_lu_lambdas": False,
    "lambda_min_clipped": -math.inf,
}


_EULER = {
    **_RATIOS,
    **_OTHER_SIGMAS,
    "use_karras_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
}


_HEUN = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "linspace",
    "use_karras_sigmas": False,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    **_OTHER_SIGMAS,
}


_LCM = {
    **_CLIP,
    "clip_sample": False,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": True,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    "rescale_betas_zero_snr": False,
}


_SUPPORTED = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "thresholding": (False,),
    "solver_order": (1, 2),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": ("fixed_small", "fixed_large", None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete", "continuous"),
    "predict_x0": (True,),
    "disable_corrector": ([], ()),
    "solver_p": (None,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
}


def _dpm_solver(c: dict) -> Callable:
    return partial(dpm_2m, sde=c["algorithm_type"] == "sde-dpmsolver++", heun=c["solver_type"] == "heun")


def _fixed(solver: Callable) -> Callable:
    return lambda c: solver


SCHEDULERS = {
    "ddim": Scheduler(
        "DDIMScheduler",
        _ddim_steps,
        lambda c: partial(ddim, eta=c.get("eta", 0.0)),
        {**_CLIP, "set_alpha_to_one": True, "rescale_betas_zero_snr": False},
        {},
        zero_snr_floor=0.0,
        takes=("eta", "timesteps", "clip"),
    ),
    "pndm": Scheduler(
        "PNDMScheduler",
        _pndm_steps,
        lambda c: partial(plms, prediction_type=c["prediction_type"]),
        {"skip_prk_steps": False, "set_alpha_to_one": False},
        {},
        late=_pndm_late,
    ),
    "euler": Scheduler("EulerDiscreteScheduler", _euler_steps, _fixed(ddim), _EULER, {}),
    "euler-a": Scheduler(
        "EulerAncestralDiscreteScheduler",
        _euler_steps,
        _fixed(euler_ancestral),
        {"timestep_spacing": "linspace", "rescale_betas_zero_snr": False},
        {},
    ),
    "heun": Scheduler("HeunDiscreteScheduler", _euler_steps, _fixed(heun), _HEUN, {}, takes=("clip",)),
    "dpm++2m": Scheduler("DPMSolverMultistepScheduler", _dpm_steps, _dpm_solver, _DPM, {}),
    "dpm++2m-karras": Scheduler("", _dpm_steps, _dpm_solver, _DPM, {"use_karras_sigmas": True}),
    "dpm++2m-sde": Scheduler("", _dpm_steps, _dpm_solver, _DPM, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Scheduler(
        "UniPCMultistepScheduler",
        _unipc_steps,
        lambda c: partial(unipc, bh1=c["solver_type"] == "bh1"),
        {**_MULTISTEP, "solver_type": "bh2", "predict_x0": True, "disable_corrector": [], "solver_p": None},
        {},
    ),
    "lcm": Scheduler(
        "LCMScheduler",
        _lcm_steps,
        lambda c: partial(lcm, scaling=c["timestep_scaling"]),
        _LCM,
        {},
        zero_snr_floor=0.0,
        takes=("clip",),
    ),
    "ddpm": Scheduler(
        "DDPMScheduler",
        _ddpm_steps,
        lambda c: partial(ddpm, fixed_large=c["variance_type"] == "fixed_large"),
        {**_CLIP, "variance_type": "fixed_small", "rescale_betas_zero_snr": False},
        {},
        zero_snr_floor=0.0,
        takes=("timesteps", "clip"),
    ),
}


def defaults_of(name: str) -> dict[str, Any]:
    """What the config of one of `SCHEDULERS` is where it does not say."""
    return {**_COMMON, **SCHEDULERS[name].defaults}


def _by_class(diffusers_class: str | None) -> str:
    for name, row in SCHEDULERS.items():
        if row.diffusers_class and row.diffusers_class == diffusers_class:
            return name
    known = ", ".join(row.diffusers_class for row in SCHEDULERS.values() if row.diffusers_class)
    raise CheckpointError(
        f"the checkpoint's scheduler is {diffusers_class!r}, which is not supported, only {known}; "
        f"{called('scheduler')} picks one of {', '.join(SCHEDULERS)}"
    )


_ASKED = {"eta": "eta", "timesteps": "timestep_spacing", "clip": "clip_sample"}


def schedule(config: dict, name: str | None = None, **asked: Any) -> NoiseSchedule:
    """The noise schedule that a config describes.

    config: scheduler_config.json; name: one of SCHEDULERS, or None for the config's own; asked, for some of them: eta,
    the share of DDPM's noise that DDIM adds; timesteps, one of `TIMESTEPS`; clip, whether clean latents are clipped on
    the way, if not as the config says.

    Raises:
        UsageError: the name is not known, or something is asked for that this scheduler does not have.
        CheckpointError: the config holds a value that is not supported; it is named.
    """
    if name is None:
        name = _by_class(config.get("_class_name"))
    elif name not in SCHEDULERS:
        raise UsageError(f"scheduler should be one of {', '.join(SCHEDULERS)}, got {name!r}")
    kind = SCHEDULERS[name]
    if config.get("timestep_type") == "continuous" and "timestep_type" not in kind.defaults:
        raise UsageError(f"this model's timesteps are continuous: its scheduler can be euler only, got {name}")
    c = defaults_of(name)
    c.update({k: v for k, v in config.items() if k in c})
    c.update(kind.overrides)
    for key in _NUMBERS & c.keys():
        whole, value = isinstance(_COMMON.get(key), int), c[key]
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or value != value or abs(value) == math.inf:
            raise CheckpointError(f"the scheduler's {key} should be a {'whole ' * whole}number, got {value!r}")
    for key in ("sigma_min", "sigma_max"):
        value = c.get(key)
        if value is not None and not (type(value) in (int, float) and 0 < value < math.inf):
            raise CheckpointError(f"the scheduler's {key} should be a number above 0, got {value!r}")
    total = c["num_train_timesteps"]
    for key, value, low, high in (
        ("num_train_timesteps", total, 1, _MOST_TIMESTEPS),
        ("steps_offset", c["steps_offset"], 0, total - 1),
    ):
        if not low <= value <= high:
            raise CheckpointError(f"the scheduler's {key} should be {low} or more, at most {high}, got {value}")
    betas = c["trained_betas"]
    if betas is not None and not (
        isinstance(betas, list) and len(betas) == total and all(isinstance(beta, float) for beta in betas)
    ):
        raise CheckpointError("the scheduler's trained_betas should be one number for each training timestep")
    ends = (c["beta_start"], c["beta_end"]) if betas is None else (min(betas), max(betas))
    if not all(0 < beta < 1 for beta in ends):
        raise CheckpointError(f"the scheduler's betas should lie between 0 and 1, got {ends[0]} to {ends[1]}")
    for key, allowed in _SUPPORTED.items():
        if key in c and c[key] not in allowed:
            raise CheckpointError(
                f"the scheduler's {key} = {c[key]!r} is not supported with {name}, only {list(allowed)}"
            )
    for key, value in asked.items():
        if key not in kind.takes:
            takers = ", ".join(other for other, row in SCHEDULERS.items() if key in row.takes)
            raise UsageError(f"{called(key)} goes with a scheduler of {takers}, and this is {name}")
        c[_ASKED[key]] = value
    made = NoiseSchedule(name, kind, c)
    if not c.get("rescale_betas_zero_snr") and not 0 < made.alphas_cumprod[-1] <= made.alphas_cumprod[0] < 1:
        raise CheckpointError(
            f"the scheduler's betas, {ends[0]} to {ends[1]}, leave nothing of the picture, or no noise in it"
        )
    return made
