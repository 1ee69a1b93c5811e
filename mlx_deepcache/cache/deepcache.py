"""When to run the deep part of the U-Net (DeepCache, Ma et al. 2023, https://arxiv.org/abs/2312.00858)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from ..errors import UsageError
from ..nets.blocks import Fixed
from .forecast import Spectrum, TaylorSeer
from .policy import check_branch, check_warmup, check_window


@dataclass(frozen=True)
class DeepCache:
    """The deep part runs on the first step and on every `interval`-th one after it, as planned beforehand.

    branch: where the U-Net is cut: the number of the last skip connection that a cached step computes afresh, counted
    from the outside (the pip package's `cache_branch_id`).
    interval: 3; 1 is no caching.
    center, power: the paper's non-uniform 1:N schedule (section 3.3): as many full steps as the interval gives, dense
    around step `center`, the sparser the larger `power` (above 1; the paper has 1.2 to 1.4).
    steps: the full steps themselves, by index from 0, in place of an interval.
    start, end: fractions of the steps; every step outside [start, end) is full.
    warmup: this many first steps are full.

    Raises:
        UsageError: a value that cannot be, or two that exclude each other.
    """

    name: ClassVar[str] = "deepcache"
    slots: ClassVar[dict[str, str]] = {"when": "on which steps the deep part of the U-Net runs"}
    about: ClassVar[str] = (
        "every interval-th step is full; the others reuse its deep features. center=15,power=1.4 packs full steps "
        "around step 15, steps=0-9+12 or steps=F..F. names them"
    )

    interval: int | None = None
    branch: int = 0
    center: int | None = None
    power: float | None = None
    steps: tuple[int, ...] | None = None
    start: float = 0.0
    end: float = 1.0
    warmup: int = 0

    def __post_init__(self):
        if self.steps is None:
            object.__setattr__(self, "interval", 3 if self.interval is None else self.interval)
            if self.interval < 1:
                raise UsageError(f"cache interval must be at least 1 (1 = no caching), got {self.interval}")
        else:
            object.__setattr__(self, "steps", tuple(sorted(set(self.steps))))
            if self.interval is not None or self.center is not None or self.power is not None:
                raise UsageError("deepcache's steps name the full steps themselves; leave out interval, center, power")
            if not self.steps or self.steps[0] != 0:
                raise UsageError("deepcache's steps must include 0: the first step has no features to reuse")
        if (self.center is None) != (self.power is None):
            raise UsageError("deepcache's non-uniform schedule needs center and power, such as center=15,power=1.4")
        if self.power is not None and (self.interval < 2 or self.center < 0 or not self.power > 1):
            raise UsageError(
                "deepcache's non-uniform schedule needs interval >= 2, center >= 0 and power > 1, got "
                f"interval={self.interval}, center={self.center}, power={self.power:g}"
            )
        check_branch(self.branch)
        check_window(self.name, self.start, self.end)
        check_warmup(self.warmup)

    def full_steps(self, n: int) -> list[bool]:
        """For each of n steps, whether the whole U-Net runs. The first always does.

        Raises:
            UsageError: the schedule cannot be had with n steps.
        """
        inside = [i >= self.warmup and self.start <= i / n < self.end for i in range(n)]
        if self.steps is not None:
            if self.steps[-1] >= n:
                raise UsageError(f"deepcache's steps name step {self.steps[-1]}, but there are {n}, from 0 to {n - 1}")
            full = [i in self.steps for i in range(n)]
        elif self.power is not None:
            chosen = non_uniform_steps(n, -(-n // self.interval), self.center, self.power)
            full = [i in chosen for i in range(n)]
        else:
            before = max(inside.index(True) - 1, 0) if True in inside else 0  # the full step that the window starts on
            full = [(i - before) % self.interval == 0 for i in range(n)]
        return [i == 0 or full[i] or not inside[i] for i in range(n)]


def non_uniform_steps(n: int, full: int, center: int, power: float) -> list[int]:
    """Which `full` of n steps the paper's code picks: spaced by |i - center|^(1/power), whole numbers.

    Before the centre that is a root of a negative number, for which its code takes the complex one. Its powers are cut
    to whole steps; where some coincide, the power is lowered by 0.02 until none do.

    Raises:
        UsageError: no power above 1 gives so many different steps; the paper's code stops there too.
    """
    if center >= n:
        raise UsageError(f"deepcache's center must be one of the {n} steps, from 0 to {n - 1}, got {center}")
    p = power
    while p > 1:
        ends = complex(-center) ** (1 / p), (n - center) ** (1 / p)
        offsets = np.unique(np.trunc((np.linspace(*ends, full + 1) ** p).real).astype(int))
        steps = [0, *(int(offset) + center for offset in offsets[1:-1])]
        if len(steps) == full:
            return steps
        p -= 0.02
    raise UsageError(
        f"deepcache has no non-uniform schedule of {full} full steps in {n} around center={center} with power "
        f"{power:g} or less; decrease center, or raise interval or power"
    )


CacheSchedule = DeepCache  # its name before there were others


class Features:
    """The deep features of the last full steps, and what a cached step is given for them.

    Kept is `Fixed`, what the resnet at the cut makes of the features, as that is all that a cached step needs. Its
    convolution comes after a normalisation and an activation, so a forecast of it is not quite that of the features;
    it saves doing that work again on each cached step.
    """

    def __init__(self, forecast: TaylorSeer | Spectrum | None, n: int):
        self.forecast, self.n = forecast, n
        self.steps: list[int] = []
        self.kept: list[Fixed] = []

    def keep(self, step: int, features: Fixed) -> None:
        """Of a full call; the last one of a step counts."""
        pictures = len(features.shortcut)
        if self.kept and len(self.kept[-1].shortcut) < pictures:  # the unconditional half of those was never computed
            self.steps, self.kept = [], []
        if step in self.steps:
            self.steps.pop(), self.kept.pop()
        room = 1 if self.forecast is None else self.forecast.history
        self.steps, self.kept = [*self.steps, step][-room:], [*self.kept, features][-room:]

    def reuse(self, step: int, pictures: int) -> Fixed | None:
        """For the last `pictures` of the batch, which the conditional half are; None if there are fewer."""
        if not self.kept or len(self.kept[-1].shortcut) < pictures:
            return None
        weights = [1.0] if self.forecast is None else self.forecast.weights(self.steps, step, self.n)
        if [w for w in weights if w] == [1.0]:
            return Fixed(*(part[-pictures:] for part in self.kept[weights.index(1.0)]))
        return Fixed(
            *(_weighted([part[-pictures:] for part in parts], weights) for parts in zip(*self.kept, strict=True))
        )

    @property
    def arrays(self) -> list[mx.array]:
        return [part for features in self.kept for part in features]


def _weighted(arrays: list[mx.array], weights: list[float]) -> mx.array:
    """Their weighted sum, in float32 on the way."""
    total = sum((w * a.astype(mx.float32) for w, a in zip(weights, arrays, strict=True)), mx.array(0.0))
    return total.astype(arrays[0].dtype)
