"""When to run the deep part of the U-Net (DeepCache, Ma et al. 2023, https://arxiv.org/abs/2312.00858)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .errors import UsageError


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


@dataclass(frozen=True)
class Adaptive:
    """The deep part runs when what enters it has changed enough since it last ran; decided on the way.

    The skip at `branch` is computed on every step anyway. Its relative change since the last full step,
    mean |now - then| / mean |then|, of that picture of the batch where it is largest, is compared with `threshold`
    (0: every step is full). At least every `max_interval`-th step is full, and so are the first `warmup` steps. The
    rule is that of first-block caches; here it costs one wait for the device a step, and no computation.

    Raises:
        UsageError: a value that cannot be.
    """

    name: ClassVar[str] = "adaptive"
    slots: ClassVar[dict[str, str]] = DeepCache.slots
    about: ClassVar[str] = (
        "a step is full once the deep part's input has changed by the share threshold, or after max_interval; "
        "--stats logs it"
    )

    threshold: float = 0.1
    max_interval: int = 10
    branch: int = 0
    warmup: int = 0

    def __post_init__(self):
        if not self.threshold >= 0:
            raise UsageError(f"adaptive's threshold must be 0 or more (0 = no caching), got {self.threshold}")
        if self.max_interval < 1:
            raise UsageError(f"adaptive's max_interval must be at least 1 (1 = no caching), got {self.max_interval}")
        check_branch(self.branch)
        check_warmup(self.warmup)

    def full_steps(self, n: int) -> list[bool | None]:
        """For each of n steps True, or None where it is decided on the way."""
        return [True if i == 0 or i < self.warmup or self.max_interval == 1 else None for i in range(n)]

    def full(self, since: int, change: float) -> bool:
        """Whether a step is full that comes `since` steps after the last full one, with this relative change."""
        return since >= self.max_interval or not change < self.threshold


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


def check_branch(branch: int) -> None:
    if branch < 0:
        raise UsageError(f"cache branch must be at least 0, got {branch}")


def check_warmup(warmup: int) -> None:
    if warmup < 0:
        raise UsageError(f"warmup must be at least 0 steps, got {warmup}")


def check_window(name: str, start: float, end: float) -> None:
    if not 0 <= start < end <= 1:
        raise UsageError(f"{name}'s start and end are fractions with 0 <= start < end <= 1, got {start:g} and {end:g}")


CacheSchedule = DeepCache  # its name before there were others
