"""Pyramid Attention Broadcast (Zhao et al. 2024)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

from ..diffusion.schedule import Plan
from ..nets.attend import Do, Kind
from .attention import AttentionMemory
from .deepcache import CacheWarning
from .policy import ATTENTION, Memory, Policy, check_skip_range, check_timesteps, keyed


@dataclass(frozen=True)
class PyramidAttentionBroadcast(Policy):
    """An attention layer's output is used again for a range of calls, inside a window of timesteps (Zhao et al. 2024).

    Names and counters are diffusers': a skip range N computes every N-th call of a layer (1: every call; None: this
    kind is left alone) while lo < timestep < hi; a layer counts its own calls, outside the window too. spatial is
    self-attention, temporal that of a video over its frames, cross the attention to the prompt; 2 and 6 as in the
    paper, which has 4 for temporal. A video's timesteps go from about -1.6 to 1.7. diffusers' identifiers have to be
    told apart for this: by default, layers over frames count as spatial ones there.

    Raises:
        UsageError: a range that cannot be.
    """

    name: ClassVar[str] = "pab"
    slots: ClassVar[dict[str, str]] = ATTENTION
    videos: ClassVar[bool] = True
    about: ClassVar[str] = (
        "Pyramid Attention Broadcast: self-attention (spatial) runs every 2nd time, cross-attention every 6th, or off; "
        "temporal: a video's over its frames"
    )

    spatial_attention_block_skip_range: int | None = keyed(2, "spatial")
    cross_attention_block_skip_range: int | None = keyed(6, "cross")
    spatial_attention_timestep_skip_range: tuple[int, int] = keyed((100, 800), "spatial_window")
    cross_attention_timestep_skip_range: tuple[int, int] = keyed((100, 800), "cross_window")
    temporal_attention_block_skip_range: int | None = keyed(None, "temporal")
    temporal_attention_timestep_skip_range: tuple[int, int] = keyed((100, 800), "temporal_window")

    def __post_init__(self):
        for kind in Kind:
            every, window = self.ranges(kind)
            check_skip_range(self.name, kind.name.lower(), every)
            check_timesteps(self.name, f"{kind.name.lower()}_window", window)

    def ranges(self, kind: Kind) -> tuple[int | None, tuple[int, int]]:
        """The skip range of a kind of attention, and its window."""
        name = f"{kind.name.lower()}_attention"
        return getattr(self, f"{name}_block_skip_range"), getattr(self, f"{name}_timestep_skip_range")

    def remembers(self, kind: Kind) -> bool:
        """Whether outputs of this kind of attention are ever used again."""
        every, _ = self.ranges(kind)
        return every is not None and every > 1

    def computes(self, kind: Kind, iteration: int, t: float) -> bool:
        """Whether a layer runs at its call number `iteration` (from 0), at timestep t."""
        every, window = self.ranges(kind)
        return every is None or iteration % every == 0 or not window[0] < t < window[1]

    def check(self, plan: Plan, guided: bool) -> None:
        """Warns where no timestep lies in a window of what is remembered, so that nothing is ever used again."""
        kinds = [kind for kind in Kind if self.remembers(kind)]
        if kinds and all(self.computes(kind, 1, step.here.t) for kind in kinds for step in plan.steps):
            first, last = plan.steps[0].here.t, plan.steps[-1].here.t
            warnings.warn(
                f"pab uses nothing again: these steps' timesteps, {first:g} to {last:g}, lie outside of its windows",
                CacheWarning,
                stacklevel=2,
            )

    def memory(self, plan: Plan, pictures: int, guided: bool) -> Memory:
        return Broadcast(self)


class Broadcast(AttentionMemory):
    """The latest output of each layer."""

    def __init__(self, policy: PyramidAttentionBroadcast):
        super().__init__()
        self.policy = policy

    def wanted(self, kind: Kind, calls: int, index: int, t: float) -> Do:
        if not self.policy.remembers(kind):
            return Do.COMPUTE
        return Do.KEEP if self.policy.computes(kind, calls, t) else Do.REUSE
