"""When to run the deep part of the U-Net (DeepCache, Ma et al. 2023, https://arxiv.org/abs/2312.00858)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..diffusion.schedule import Plan
from ..errors import UsageError
from .policy import WHEN, Memory, Policy, check_cut, check_window, require

FEWEST_TO_JUDGE = 10  # in fewer steps a third is a step or two


class CacheWarning(UserWarning):
    """A cache that will cost more picture than need be."""


@dataclass(frozen=True)
class DeepCache(Policy):
    """The deep part runs on the first step and on every `interval`-th one after it, as planned beforehand.

    branch: where the U-Net is cut: the number of the last skip connection that a cached step computes afresh, counted
    from the outside (the pip package's `cache_branch_id`).
    interval: 3; 1 is no caching.
    center, power: the paper's non-uniform 1:N schedule (section 3.3): as many full steps as the interval gives, dense
    around step `center`, the sparser the larger `power` (above 1; the paper has 1.2 to 1.4). Without a center that of
    its code for latent diffusion: dense at the start, with some steps fewer.
    steps: the full steps themselves, by index from 0, in place of an interval.
    start, end: fractions of the steps; every step outside [start, end) is full.
    warmup: this many first steps are full.

    Raises:
        UsageError: a value that cannot be, or two that exclude each other.
    """

    name: ClassVar[str] = "deepcache"
    slots: ClassVar[dict[str, str]] = WHEN
    videos: ClassVar[bool] = True
    about: ClassVar[str] = (
        "every interval-th step is full; the others reuse its deep features. center=15,power=1.4 packs full steps "
        "around step 15, steps=0-9+15+25+40 or steps=F..F. names them"
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
            require(self.interval >= 1, f"cache interval must be at least 1 (1 = no caching), got {self.interval}")
        else:
            object.__setattr__(self, "steps", tuple(sorted(set(self.steps))))
            alone = self.interval is None and self.center is None and self.power is None
            require(alone, "deepcache's steps name the full steps themselves; leave out interval, center, power")
            require(self.steps[:1] == (0,), "deepcache's steps must include 0: the first step has no features to reuse")
        needs, center = "deepcache's non-uniform schedule needs", self.center or 0
        both = self.center is None or self.power is not None
        require(both, f"{needs} center and power, such as center=15,power=1.4, or power alone")
        if self.power is not None and (self.interval < 2 or center < 0 or not self.power > 1):
            got = f"interval={self.interval}, center={self.center}, power={self.power:g}"
            raise UsageError(f"{needs} interval >= 2, center >= 0 and power > 1, got {got}")
        check_cut(self.branch, self.warmup)
        check_window(self.name, self.start, self.end)

    def full_steps(self, n: int, repeated: int = 0) -> list[bool]:
        """For each of n steps, whether the whole U-Net runs. The first always does.

        repeated: how many of them take an earlier one again (PNDM); the paper's code makes its non-uniform schedule
        without those, and the last ones are cached.

        Raises:
            UsageError: the schedule cannot be had with n steps.
        """
        inside = [i >= self.warmup and self.start <= i / n < self.end for i in range(n)]
        if self.steps is not None:
            if self.steps[-1] >= n:
                raise UsageError(f"deepcache's steps name step {self.steps[-1]}, but there are {n}, from 0 to {n - 1}")
            full = [i in self.steps for i in range(n)]
        elif self.power is not None:
            once = n - repeated
            chosen = non_uniform_steps(once, -(-once // self.interval), self.center, self.power)
            full = [i in chosen for i in range(n)]
        else:
            before = max(inside.index(True) - 1, 0) if True in inside else 0  # the full step that the window starts on
            full = [(i - before) % self.interval == 0 for i in range(n)]
        return [i == 0 or full[i] or not inside[i] for i in range(n)]

    def check(self, plan: Plan, guided: bool) -> None:
        """Warns where the last third of the steps has no full one: what they reuse is too old for a clean picture."""
        n, full = len(plan.steps), self.full_steps(len(plan.steps), plan.repeated)
        last = n - 1 - full[::-1].index(True)
        if self.interval != 1 and n >= FEWEST_TO_JUDGE and n - 1 - last >= n / 3:
            warnings.warn(
                f"deepcache's last full step is {last}, and steps {last + 1} to {n - 1} reuse it, which mottles the "
                "picture; let a full step fall into the last third",
                CacheWarning,
                stacklevel=2,
            )

    def memory(self, plan: Plan, pictures: int, guided: bool) -> Memory:
        return Planned(self.full_steps(len(plan.steps), plan.repeated))


def non_uniform_steps(n: int, full: int, center: int | None, power: float) -> list[int]:
    """Which `full` of n steps the paper's code picks: spaced by |i - center|^(1/power), whole numbers. Without a center
    they are spaced from the first one on, and those that coincide are one.

    Before the centre that is a root of a negative number, for which its code takes the complex one. Its powers are cut
    to whole steps; where some coincide, the power is lowered by 0.02 until none do.

    Raises:
        UsageError: no power above 1 gives so many different steps; the paper's code stops there too.
    """
    if center is None:
        powers = np.linspace(0, n ** (1 / power), full + 1) ** power
        return np.unique(powers.astype(int))[:-1].tolist()
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


class Planned(Memory):
    """Full are the steps that the policy named beforehand."""

    def __init__(self, full_steps: list[bool]):
        self.full_steps = full_steps

    def full(self, index: int) -> bool:
        return self.full_steps[index]
