"""DeepCache decided on the way: the deep part runs when what enters it has changed enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..diffusion.schedule import Plan
from .deepcache import Planned
from .policy import WHEN, Call, Memory, Policy, check_cut, require


@dataclass(frozen=True)
class Adaptive(Policy):
    """The deep part runs when what enters it has changed enough since it last ran; decided on the way.

    The skip at `branch` is computed on every step anyway. Its relative change since the last full step,
    mean |now - then| / mean |then|, of that picture of the batch where it is largest, is compared with `threshold`
    (0: every step is full). At least every `max_interval`-th step is full, and so are the first `warmup` steps. The
    rule is that of first-block caches; here it costs one wait for the device a step, and no computation.

    Raises:
        UsageError: a value that cannot be.
    """

    name: ClassVar[str] = "adaptive"
    slots: ClassVar[dict[str, str]] = WHEN
    videos: ClassVar[bool] = True
    about: ClassVar[str] = (
        "a step is full once the deep part's input has changed by the share threshold, or after max_interval; "
        "--stats logs it"
    )

    threshold: float = 0.1
    max_interval: int = 10
    branch: int = 0
    warmup: int = 0

    def __post_init__(self):
        require(self.threshold >= 0, f"adaptive's threshold must be 0 or more (0 = no caching), got {self.threshold}")
        interval = self.max_interval
        require(interval >= 1, f"adaptive's max_interval must be at least 1 (1 = no caching), got {interval}")
        check_cut(self.branch, self.warmup)

    def full_steps(self, n: int) -> list[bool]:
        """For each of n steps, whether it is full whatever enters the deep part."""
        return [i == 0 or i < self.warmup or self.max_interval == 1 for i in range(n)]

    def full(self, since: int, change: float) -> bool:
        """Whether a step is full that comes `since` steps after the last full one, with this relative change."""
        return since >= self.max_interval or not change < self.threshold

    def memory(self, plan: Plan, pictures: int, guided: bool) -> Memory:
        return Probed(self, len(plan.steps))


class Probed(Planned):
    """The skip at the cut of the last full call. Of a step's calls the first decides."""

    def __init__(self, policy: Adaptive, n: int):
        super().__init__(policy.full_steps(n))
        self.policy, self.skip, self.last_full, self.latest = policy, None, 0, -1

    def decide(self, index: int, skip: mx.array) -> tuple[bool, float | None]:
        if index == self.latest:
            return False, None
        change = relative_change(skip, self.skip[-len(skip) :])
        return self.policy.full(index - self.last_full, change), change

    def keep(self, call: Call, output: mx.array) -> None:
        self.latest = call.index
        if call.full:
            self.skip, self.last_full = call.skip, call.index

    @property
    def arrays(self) -> list[mx.array]:
        return [] if self.skip is None else [self.skip]


def relative_change(now: mx.array, then: mx.array) -> float:
    """mean |now - then| / mean |then| of the picture where it is largest; (B, ..., C) each, of a video all
    frames. Waits for the device."""
    now, then, own = now.astype(mx.float32), then.astype(mx.float32), tuple(range(1, now.ndim))
    change = mx.abs(now - then).mean(axis=own) / mx.maximum(mx.abs(then).mean(axis=own), 1e-12)
    return change.max().item()
