"""Noise levels, the steps between them, and what a network says at one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that names and plans cost no MLX
    import mlx.core as mx


@dataclass(frozen=True)
class Level:
    """A noise level: x = alpha * x0 + sigma * eps at training timestep t (0-999, may be fractional)."""

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """Karras et al.'s sigma: noise over signal."""
        return self.sigma / self.alpha

    @property
    def snr(self) -> float:
        """DPM-Solver's lambda, log(alpha / sigma)."""
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


CLEAN = Level(-1.0, 1.0, 0.0)  # no noise


@dataclass(frozen=True)
class Step:
    """From one level to another. `order` is a multistep solver's; `stage` and `base` are PNDM's, see there."""

    here: Level
    there: Level
    order: int = 1
    stage: str = ""
    base: Level | None = None

    @property
    def repeats(self) -> bool:
        """Whether it takes an earlier step again, from where that one began."""
        return self.stage not in ("", "rk1")


@dataclass(frozen=True)
class Prediction:
    """What the network said at a level: its raw output, the clean latents and the noise that follow from it, and the
    noisy latents that it was shown (not always those that the solver had: see `sampler.sample`)."""

    output: mx.array
    x0: mx.array
    eps: mx.array
    x: mx.array


def split(prediction_type: str, output: mx.array, x: mx.array, level: Level) -> tuple[mx.array, mx.array]:
    """Clean latents and noise from the network's output (Salimans and Ho 2022, section 4)."""
    if prediction_type == "epsilon":
        return (x - level.sigma * output) / level.alpha, output
    if prediction_type == "v_prediction":
        return level.alpha * x - level.sigma * output, level.alpha * output + level.sigma * x
    return output, (x - level.alpha * output) / level.sigma
