"""What deep features a cached step is given in place of the last full step's: forecasts from several.

A forecast is a weighted sum of what was kept, so a policy is a rule for the weights, and holds no arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from ..diffusion.schedule import Plan
from ..nets.blocks import Features
from .policy import FORECAST, Policy, require


class Forecast(Policy):
    """A rule for the weights of what the last full steps had."""

    slots: ClassVar[dict[str, str]] = FORECAST
    videos: ClassVar[bool] = True
    history: int  # how many full steps to keep

    def weights(self, kept: Sequence[int], step: int, n: int) -> list[float]:
        """The forecast for a step is a weighted sum of what the full steps `kept` (ascending) had; n: all steps."""

    def memory(self, plan: Plan, pictures: int, guided: bool) -> Kept:
        return Kept(self, len(plan.steps))


class Kept:
    """The deep features of the last full steps, and what a cached step is given for them.

    Features are what the resnet at the cut makes of the deep part. Its convolution comes after a normalisation and an
    activation, so a forecast of them is not quite that of what enters it; it saves that work on each cached step.
    """

    def __init__(self, forecast: Forecast, n: int):
        self.forecast, self.n = forecast, n
        self.steps: list[int] = []
        self.features: list[Features] = []
        self.pictures = 0  # in the batch of the last full call

    def keep(self, step: int, features: Features | None, pictures: int) -> None:
        """Of a full call for so many pictures; the last one of a step counts. None where it was run elsewhere."""
        if self.pictures < pictures or features is None:
            self.steps, self.features = [], []  # a half of those was never computed
        self.pictures = pictures
        if features is None:
            return
        if step in self.steps:
            self.steps.pop(), self.features.pop()
        room = self.forecast.history
        self.steps, self.features = [*self.steps, step][-room:], [*self.features, features][-room:]

    def serves(self, pictures: int) -> bool:
        """Whether there are features for so many."""
        return self.pictures >= pictures

    def reuse(self, step: int, pictures: int) -> Features:
        """For the last `pictures` of the batch, which the conditional half are."""
        weights = self.forecast.weights(self.steps, step, self.n)
        if [w for w in weights if w] == [1.0]:
            return Features(*(part[-pictures:] for part in self.features[weights.index(1.0)]))
        kept = zip(*self.features, strict=True)
        return Features(*(_weighted([part[-pictures:] for part in parts], weights) for parts in kept))

    @property
    def arrays(self) -> list[mx.array]:
        return [part for features in self.features for part in features]


def _weighted(arrays: list[mx.array], weights: list[float]) -> mx.array:
    """Their weighted sum, in float32 on the way."""
    total = sum((w * a.astype(mx.float32) for w, a in zip(weights, arrays, strict=True)), mx.array(0.0))
    return total.astype(arrays[0].dtype)


@dataclass(frozen=True)
class TaylorSeer(Forecast):
    """Forecast the deep features instead of copying them: a Taylor series over the steps (Liu et al. 2025, "From
    Reusing to Forecasting", equation 4), with finite differences for derivatives. order: 1 or 2; 0 copies.

    Raises:
        UsageError: another order.
    """

    name: ClassVar[str] = "taylorseer"
    about: ClassVar[str] = (
        "beside deepcache or adaptive: continues the deep features along a line (order 1) or a parabola (2)"
    )

    order: int = 1

    def __post_init__(self):
        require(self.order in (0, 1, 2), f"taylorseer's order must be 0 (copy), 1 or 2, got {self.order}")

    @property
    def history(self) -> int:
        return self.order + 1

    def weights(self, kept: Sequence[int], step: int, n: int) -> list[float]:
        """As in diffusers, the second difference is that of the two first ones, over the distance of the last two
        steps."""
        factors: list[np.ndarray] = []  # of the step before; each is a combination of the kept values
        for i, here in enumerate(kept):
            fresh = [np.eye(len(kept))[i]]
            for before in factors[: self.order]:
                fresh.append((fresh[-1] - before) / (here - kept[i - 1]))
            factors = fresh
        distance = step - kept[-1]
        terms = (f * d for f, d in zip(factors, (1, distance, distance**2 / 2), strict=False))
        return sum(terms, np.zeros(len(kept))).tolist()


@dataclass(frozen=True)
class Spectrum(Forecast):
    """Forecast the deep features with a Chebyshev polynomial, fitted to the last full steps with a ridge penalty, and
    mixed with a straight line (Spectrum, as in stable-diffusion.cpp, whose defaults these are but for the ridge: with
    its 1 the bundled model's pictures come out worse than with copied features).

    weight: the polynomial's share, against that of `TaylorSeer(1)`; degree: of the polynomial; ridge: its penalty;
    history: full steps to fit to.

    Raises:
        UsageError: a value that cannot be.
    """

    name: ClassVar[str] = "spectrum"
    about: ClassVar[str] = (
        "beside deepcache or adaptive: continues the deep features by a Chebyshev fit to the last full steps"
    )

    weight: float = 0.4
    degree: int = 3
    ridge: float = 0.01
    history: int = 6

    def __post_init__(self):
        require(0 <= self.weight <= 1, f"spectrum's weight must be in [0, 1], got {self.weight}")
        require(0 <= self.degree <= 20, f"spectrum's degree must be in [0, 20], got {self.degree}")
        require(self.ridge > 0, f"spectrum's ridge must be above 0, got {self.ridge}")
        require(self.history >= 2, f"spectrum's history must be 2 full steps or more, got {self.history}")

    def weights(self, kept: Sequence[int], step: int, n: int) -> list[float]:
        """Steps 0 to n are the polynomials' -1 to 1."""
        if len(kept) == 1:
            return [1.0]
        basis = np.polynomial.chebyshev.chebvander(2 * np.array([*kept, step]) / n - 1, self.degree)
        x, here = basis[:-1], basis[-1]
        fit = here @ np.linalg.solve(x.T @ x + self.ridge * np.eye(self.degree + 1), x.T)
        line = np.array(TaylorSeer(1).weights(kept, step, n))
        return (self.weight * fit + (1 - self.weight) * line).tolist()
