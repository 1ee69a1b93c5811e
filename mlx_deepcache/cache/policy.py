"""What all caching policies share: the questions that they answer, a call of the U-Net as they want it, and checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from ..diffusion.schedule import Plan
from ..errors import UsageError
from ..nets.attend import Attend, Do
from ..nets.blocks import Features

# The questions: no two policies may answer the same one
WHEN = {"when": "on which steps the deep part of the U-Net runs"}
FORECAST = {"forecast": "how the kept features are forecast"}
ATTENTION = {"attention": "which attention outputs are used again"}
GUIDANCE = {"guidance": "on which steps the unconditional half runs"}

SHALLOW, DEEP, FINISH = PARTS = range(3)  # the U-Net's parts, in the order in which they run


class Policy:
    """A caching method's settings: a frozen dataclass that holds no arrays. name: on the command line; slots: the
    questions that it answers; videos: whether it serves for these too, whose timesteps are other numbers; alone:
    whether it serves for nets that read nothing but noisy latents; about: a line of help."""

    name: ClassVar[str]
    slots: ClassVar[dict[str, str]]
    videos: ClassVar[bool] = False
    alone: ClassVar[bool] = True
    about: ClassVar[str]

    def check(self, plan: Plan, guided: bool) -> None:
        """That it can be done over these steps, with or without guidance.

        Raises:
            UsageError: not so; says what.
        """

    def memory(self, plan: Plan, pictures: int, guided: bool) -> Memory:
        """What it remembers while so many pictures are drawn, with or without guidance."""
        return Memory()


class Memory:
    """What a policy remembers of one generation, and its answers; these are those of one that has nothing to say.

    decide: (index, skip at the cut) -> whether that step is full, and the change that this was decided by, where it is
    decided on the way; asked where a step need not be full.
    """

    decide: Callable[[int, mx.array], tuple[bool, float | None]] | None = None

    def full(self, index: int) -> bool:
        """Whether step `index` must be full."""
        return False

    def both(self, index: int, t: float) -> bool:
        """Whether a call at timestep t runs both halves of guidance; asked once a call, if there is guidance."""
        return True

    def splits(self, index: int) -> bool:
        """Whether the halves of a call that runs both may be run apart, on machines that remember one half each."""
        return True

    def differences(self) -> tuple[mx.array, ...]:
        """What to add to the conditional half's output for the unconditional one's, where that is left out."""
        return ()

    def attend(self, index: int, t: float, pictures: int) -> tuple[Attend, ...] | None:
        """What runs the attention layers of each part in a call for so many pictures."""
        return None

    def keep(self, call: Call, output: mx.array) -> None:
        """A call has been made, with this output, float32."""

    @property
    def arrays(self) -> list[mx.array]:
        """All that is remembered."""
        return []


@dataclass(frozen=True)
class Call:
    """How one call of the U-Net is to be made, and how it was.

    both: both halves of guidance are run, first the unconditional one, 0, then the conditional one, 1; apart: each may
    be run without the other; halves: those that are run here, one after the other in the batch; pictures: in the batch
    of all halves; full: whether the deep part runs; reused: stands in for it, None where it runs or nothing is run
    here; residuals: the ControlNets' of the last call that ran them; attend: runs the attention layers of each part;
    differences: see `Memory`. decide: whether it is full after all, see `Memory`; skip, change: what that saw.
    """

    index: int
    both: bool
    apart: bool
    halves: tuple[int, ...]
    pictures: int
    full: bool
    residuals: list[mx.array]
    attend: tuple[Attend, ...]
    differences: tuple[mx.array, ...]
    decide: Callable[[int, mx.array], tuple[bool, float | None]] | None
    skip: mx.array | None = None
    change: float | None = None
    reused: Features | None = None

    @property
    def separable(self) -> bool:
        """Whether the halves may run one after the other: no cache looks at both."""
        return self.decide is None and all(attend.plain for attend in self.attend)

    def decided(self, skip: mx.array) -> Call:
        """The same once the skip at the cut is known; waits for it if an adaptive cache decides on it."""
        if self.decide is None:
            return self
        full, change = (True, None) if self.full else self.decide(self.index, skip)
        return replace(self, full=full, reused=None if full else self.reused, skip=skip, change=change)


class Work(NamedTuple):
    """What a call of the U-Net computed: whether its deep part ran, for how many pictures and tokens of the prompt, and
    what each kind of attention did in each part; change: that an adaptive cache saw."""

    full: bool
    pictures: int
    tokens: int
    attention: tuple[tuple[Do, ...], ...]
    change: float | None


def keyed(default: Any, key: str) -> Any:
    """A field that is called `key` for short on the command line."""
    return field(default=default, metadata={"key": key})


def require(holds: bool, otherwise: str) -> None:
    """Raises UsageError, with these words, where a setting cannot be."""
    if not holds:
        raise UsageError(otherwise)


def check_cut(branch: int, warmup: int) -> None:
    require(branch >= 0, f"cache branch must be at least 0, got {branch}")
    require(warmup >= 0, f"warmup must be at least 0 steps, got {warmup}")


def check_window(name: str, start: float, end: float) -> None:
    words = f"{name}'s start and end are fractions with 0 <= start < end <= 1, got {start:g} and {end:g}"
    require(0 <= start < end <= 1, words)


def check_skip_range(policy: str, key: str, value: int | None) -> None:
    require(value is None or value >= 1, f"{policy}'s {key} must be at least 1 (every time), got {value}")


def check_timesteps(policy: str, key: str, window: tuple[int, int]) -> None:
    words = f"{policy}'s {key} should be two timesteps, the lower first, such as 100..800, got {window}"
    require(len(window) == 2 and window[0] < window[1], words)
