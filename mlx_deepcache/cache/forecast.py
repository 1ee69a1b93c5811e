"""What deep features a cached step is given in place of the last full step's: forecasts from several.

A forecast is a weighted sum of what was kept, so a policy is a rule for the weights, and holds no arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import UsageError

FORECAST = {"forecast": "how the kept features are forecast"}


@dataclass(frozen=True)
class TaylorSeer:
    """Forecast the deep features instead of copying them: a Taylor series over the steps (Liu et al. 2025, "From
    Reusing to Forecasting", equation 4), with finite differences for derivatives. order: 1 or 2; 0 copies.

    Raises:
        UsageError: another order.
    """

    name: ClassVar[str] = "taylorseer"
    slots: ClassVar[dict[str, str]] = FORECAST
    about: ClassVar[str] = (
        "beside deepcache or adaptive: continues the deep features along a line (order 1) or a parabola (2)"
    )

    order: int = 1

    def __post_init__(self):
        if self.order not in (0, 1, 2):
            raise UsageError(f"taylorseer's order must be 0 (copy), 1 or 2, got {self.order}")

    @property
    def history(self) -> int:
        """How many full steps to keep."""
        return self.order + 1

    def weights(self, kept: Sequence[int], step: int, n: int) -> list[float]:
        """The forecast for a step is a weighted sum of what the full steps `kept` (ascending) had; n: all steps.

        As in diffusers, the second difference is that of the two first ones, over the distance of the last two steps.
        """
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
class Spectrum:
    """Forecast the deep features with a Chebyshev polynomial, fitted to the last full steps with a ridge penalty, and
    mixed with a straight line (Spectrum, as in stable-diffusion.cpp, whose defaults these are but for the ridge: with
    its 1 the bundled model's pictures come out worse than with copied features).

    weight: the polynomial's share, against that of `TaylorSeer(1)`; degree: of the polynomial; ridge: its penalty;
    history: full steps to fit to.

    Raises:
        UsageError: a value that cannot be.
    """

    name: ClassVar[str] = "spectrum"
    slots: ClassVar[dict[str, str]] = FORECAST
    about: ClassVar[str] = (
        "beside deepcache or adaptive: continues the deep features by a Chebyshev fit to the last full steps"
    )

    weight: float = 0.4
    degree: int = 3
    ridge: float = 0.01
    history: int = 6

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise UsageError(f"spectrum's weight must be in [0, 1], got {self.weight}")
        if not 0 <= self.degree <= 20:
            raise UsageError(f"spectrum's degree must be in [0, 20], got {self.degree}")
        if not self.ridge > 0:
            raise UsageError(f"spectrum's ridge must be above 0, got {self.ridge}")
        if self.history < 2:
            raise UsageError(f"spectrum's history must be 2 full steps or more, got {self.history}")

    def weights(self, kept: Sequence[int], step: int, n: int) -> list[float]:
        """See `TaylorSeer.weights`. Steps 0 to n are the polynomials' -1 to 1."""
        if len(kept) == 1:
            return [1.0]
        basis = np.polynomial.chebyshev.chebvander(2 * np.array([*kept, step]) / n - 1, self.degree)
        x, here = basis[:-1], basis[-1]
        fit = here @ np.linalg.solve(x.T @ x + self.ridge * np.eye(self.degree + 1), x.T)
        line = np.array(TaylorSeer(1).weights(kept, step, n))
        return (self.weight * fit + (1 - self.weight) * line).tolist()
