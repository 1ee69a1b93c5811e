"""When to run the deep part of the U-Net (DeepCache, Ma et al. 2023, https://arxiv.org/abs/2312.00858)."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class CacheSchedule:
    """The deep part runs on the first step and on every `interval`-th one after it.

    `branch` says where the U-Net is cut: it is the number of the last skip connection that a cached step computes
    afresh, counted from the outside (the pip package's `cache_branch_id`). Any object with these two members,
    `branch` and `full_steps`, is a caching policy.

    Raises:
        UsageError: the interval is below 1 or the branch below 0.
    """

    interval: int = 3
    branch: int = 0

    def __post_init__(self):
        if self.interval < 1:
            raise UsageError(f"cache interval must be at least 1 (1 = no caching), got {self.interval}")
        if self.branch < 0:
            raise UsageError(f"cache branch must be at least 0, got {self.branch}")

    def full_steps(self, n: int) -> list[bool]:
        """For each of n steps, whether the whole U-Net runs. The first always does."""
        return [i % self.interval == 0 for i in range(n)]
