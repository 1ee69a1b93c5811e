"""Guidance on some of the steps only (Kynkaanniemi et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..diffusion.schedule import Plan
from .policy import GUIDANCE, Memory, Policy, check_window, require


@dataclass(frozen=True)
class GuidanceInterval(Policy):
    """Guidance only on the steps from the fraction `start` to the fraction `end`; on the others only the conditional
    half runs (Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval", which sets noise levels).

    Raises:
        UsageError: not 0 <= start < end <= 1.
    """

    name: ClassVar[str] = "guidance"
    slots: ClassVar[dict[str, str]] = GUIDANCE
    videos: ClassVar[bool] = True
    about: ClassVar[str] = (
        "guidance only between these fractions of the steps; the others run the conditional half alone, at half cost"
    )

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        check_window(self.name, self.start, self.end)

    def check(self, plan: Plan, guided: bool) -> None:
        require(guided, "a guidance interval has no meaning where guidance is off (guidance scale 1 or less)")

    def memory(self, plan: Plan, pictures: int, guided: bool) -> Memory:
        return Window(self, len(plan.steps))


class Window(Memory):
    """Both halves run inside of it."""

    def __init__(self, policy: GuidanceInterval, n: int):
        self.policy, self.n = policy, n

    def both(self, index: int, t: float) -> bool:
        return self.policy.start <= index / self.n < self.policy.end
