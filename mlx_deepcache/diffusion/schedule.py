"""A noise schedule: levels and timesteps, and plans of steps over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import UsageError
from .levels import Level, Step


@dataclass(frozen=True)
class Plan:
    """All that the sampling loop needs: the steps, their solver, and the deviation that x starts with."""

    steps: tuple[Step, ...]
    solver: Callable
    init_scale: float
    prediction_type: str
    clip: float | None

    @property
    def repeated(self) -> int:
        """How many steps take an earlier one again."""
        return sum(step.repeats for step in self.steps)


def _late(s: NoiseSchedule, n: int, steps: list[Step], start: int) -> list[Step]:
    """The steps of a run that starts late: a multistep method starts at order 1 all the same."""
    return [replace(steps[start], order=1), *steps[start + 1 :]]


@dataclass(frozen=True)
class Scheduler:
    """A row: diffusers' class, how steps are laid out, the solver for a config, the class's own defaults, and what is
    left of the steps in a run that starts late; takes: what else may be asked of it, see `schedulers.schedule`."""

    diffusers_class: str
    steps: Callable
    solver: Callable[[dict], Callable]
    defaults: dict[str, Any]
    overrides: dict[str, Any]
    zero_snr_floor: float = 2**-24
    late: Callable = _late
    takes: tuple[str, ...] = ()


class NoiseSchedule:
    """A diffusers scheduler config, read: timesteps, noise levels and solver for any number of steps."""

    def __init__(self, name: str, kind: Scheduler, config: dict):
        """name: of `kind`, a row of `schedulers.SCHEDULERS`; config: complete, from `schedulers.schedule`."""
        self.name, self.kind, self.config = name, kind, config
        self.alphas_cumprod = _alphas_cumprod(config, floor=kind.zero_snr_floor)

    def plan(self, steps: int, start: int = 0, stop: int | None = None) -> Plan:
        """The steps of a picture drawn from pure noise, or from a picture with noise added: then without the first
        `start` of them; and without those from `stop` on, for another model to take.

        Raises:
            UsageError: this scheduler has no schedule with so many steps.
        """
        c = self.config
        if not 1 <= steps <= c["num_train_timesteps"]:
            raise UsageError(f"steps should be from 1 to {c['num_train_timesteps']}, got {steps}")
        made, init_scale = self.kind.steps(self, steps)
        if start:
            made = self.kind.late(self, steps, made, start)
        made = made if stop is None else made[: stop - start]
        clip = c["clip_sample_range"] if c.get("clip_sample") else None
        return Plan(tuple(made), self.kind.solver(c), init_scale, c["prediction_type"], clip)

    def handover(self, steps: int, share: float) -> int:
        """The first step of a plan that starts below the timestep where `share` of the noise schedule has gone by
        (diffusers' denoising_end and denoising_start)."""
        total = self.config["num_train_timesteps"]
        cutoff = round(total - share * total)
        return sum(step.here.t >= cutoff for step in self.plan(steps).steps)

    def level(self, t: int) -> Level:
        """The level of a whole training timestep; one before the first is the level that DDIM ends at."""
        if t < 0:
            final = 1.0 if self.config["set_alpha_to_one"] else float(self.alphas_cumprod[0])
            return Level(float(t), math.sqrt(final), math.sqrt(1 - final))
        a = float(self.alphas_cumprod[t])
        return Level(float(t), math.sqrt(a), math.sqrt(1 - a))

    def kept(self, low: int, high: int) -> float:
        """The share of the variance that is left of a signal noised from one whole training timestep to a higher one,
        over the steps from `low` up to, but not with, `high`."""
        before, after = (float(self.alphas_cumprod[t - 1]) if t > 0 else 1.0 for t in (low, high))
        return after / before

    def spaced(self, n: int, *, whole: bool = True) -> np.ndarray:
        """n timesteps, descending, spread as the config's `timestep_spacing` says, or one of DDIM's own code:
        "uniform", which makes more than n where n does not divide the training timesteps, and "quad", denser towards
        the picture (Song et al. 2021, section D.2), which repeats the last ones where n is large.

        Raises:
            UsageError: they should be whole, and the first lies beyond the last training timestep.
        """
        c, total = self.config, self.config["num_train_timesteps"]
        spacing = c["timestep_spacing"]
        if spacing == "uniform":
            return np.arange(0, total, total // n)[::-1]
        if spacing == "quad":
            return (np.linspace(0, math.sqrt(0.8 * total), n) ** 2).astype(int)[::-1]
        if spacing == "linspace":
            t = np.linspace(0, total - 1, n)[::-1]
            return t.round() if whole else t.astype(np.float32)
        if spacing == "leading":
            t = (np.arange(n) * (total // n))[::-1] + c["steps_offset"]
            if whole and t[0] >= total:
                raise UsageError(
                    f"steps should be fewer than {n} with {self.name} here: the first would be at timestep {t[0]} of 0 "
                    f"to {total - 1}"
                )
            return t
        t = np.arange(total, 0, -total / n).round() - 1
        return (
            t[:n] if whole else t
        )  # rounding makes one too many for some n (61 of 1000): -1, at which there is no level

    def ratios(self) -> np.ndarray:
        """Noise over signal at each training timestep, ascending."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def from_ratios(self, t: np.ndarray, ratios: np.ndarray) -> list[Level]:
        """Levels with these timesteps and ratios of noise to signal."""
        scale = 1 / np.sqrt(np.asarray(ratios, float) ** 2 + 1)
        return [Level(float(t), float(s), float(r * s)) for t, r, s in zip(t, ratios, scale, strict=True)]

    def karras(self, n: int, high: float, low: float) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and ratios spaced by Karras et al. (2022), equation 5 with rho = 7."""
        ratios = (high ** (1 / 7) + np.linspace(0, 1, n) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        table = np.log(self.ratios())
        return np.interp(np.log(ratios), table, np.arange(len(table))), ratios

    def last(self) -> Level:
        """The level that solvers over ratios end at: clean latents, or the lowest training level."""
        low = float(self.ratios()[0]) if self.config.get("final_sigmas_type") == "sigma_min" else 0.0
        return self.from_ratios([-1], [low])[0]


def _alphas_cumprod(c: dict, floor: float) -> np.ndarray:
    """Signal variance at each training timestep, float32 as PyTorch computes it."""
    n, kind = c["num_train_timesteps"], c["beta_schedule"]
    if c["trained_betas"] is not None:
        betas = np.asarray(c["trained_betas"], np.float32)
    elif kind == "linear":
        betas = np.linspace(c["beta_start"], c["beta_end"], n).astype(np.float32)
    elif kind == "scaled_linear":
        betas = np.linspace(c["beta_start"] ** 0.5, c["beta_end"] ** 0.5, n).astype(np.float32) ** 2
    else:  # squaredcos_cap_v2 (Nichol and Dhariwal 2021, equation 17)
        bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(np.float32)
    alphas_cumprod = np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)
    if c.get("rescale_betas_zero_snr"):  # Lin et al. 2024, algorithm 1
        root = np.sqrt(alphas_cumprod.astype(np.float64))
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alphas_cumprod = (root**2).astype(np.float32)
        alphas_cumprod[-1] = floor
    return alphas_cumprod
