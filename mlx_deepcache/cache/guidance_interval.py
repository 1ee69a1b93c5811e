"""Guidance on some of the steps only (Kynkaanniemi et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .policy import GUIDANCE, check_window


@dataclass(frozen=True)
class GuidanceInterval:
    """Guidance only on the steps from the fraction `start` to the fraction `end`; on the others only the conditional
    half runs (Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval", which sets noise levels).

    Raises:
        UsageError: not 0 <= start < end <= 1.
    """

    name: ClassVar[str] = "guidance"
    slots: ClassVar[dict[str, str]] = GUIDANCE
    about: ClassVar[str] = (
        "guidance only between these fractions of the steps; the others run the conditional half alone, at half cost"
    )

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        check_window(self.name, self.start, self.end)

    def guided(self, c: int, n: int) -> bool:
        """Whether guidance runs on step c of n."""
        return self.start <= c / n < self.end
