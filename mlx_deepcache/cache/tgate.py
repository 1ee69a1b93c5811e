"""T-GATE (Zhang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..diffusion.schedule import Plan
from ..nets.attend import Do, Kind
from .attention import AttentionMemory, Entry
from .policy import ATTENTION, GUIDANCE, Memory, Policy, check_skip_range, require


@dataclass(frozen=True)
class TGate(Policy):
    """The prompt is read on the first `step` steps only (T-GATE, Zhang et al. 2024; gate_step in its code).

    Until then self-attention runs every `sp_interval`-th step, after `warm_up` steps. On the last of these steps every
    attention runs, and the mean of its unconditional and conditional outputs is kept. From then on the cross-attention
    is that mean, self-attention runs every `fi_interval`-th step, and guidance is off: only one half runs. That is the
    conditional one here; in T-GATE's own code it is the unconditional one, which differs for SDXL only, in the pooled
    prompt. Steps are the solver's, without repeated first ones (PNDM).

    Raises:
        UsageError: a value that cannot be.
    """

    name: ClassVar[str] = "tgate"
    slots: ClassVar[dict[str, str]] = ATTENTION | GUIDANCE
    alone: ClassVar[bool] = False
    about: ClassVar[str] = (
        "T-GATE: after so many steps the prompt is no longer read and guidance is off; self-attention is thinned before"
    )

    step: int = 10
    sp_interval: int = 5
    fi_interval: int = 1
    warm_up: int = 2

    def __post_init__(self):
        for key in ("step", "sp_interval", "fi_interval"):
            check_skip_range(self.name, key, getattr(self, key))
        require(self.warm_up >= 0, f"tgate's warm_up must be at least 0 steps, got {self.warm_up}")

    def action(self, cross: bool, c: int) -> Do:
        """What an attention layer does on step c."""
        if c == self.step - 1:  # the gate
            return Do.KEEP
        if c < self.step - 1:
            if cross or c < self.warm_up:
                return Do.COMPUTE
            return Do.KEEP if c == self.warm_up or c % self.sp_interval == 0 else Do.REUSE
        return Do.REUSE if cross or c % self.fi_interval else Do.KEEP

    def check(self, plan: Plan, guided: bool) -> None:
        n = len(plan.steps)
        require(self.step <= n, f"tgate's step must be from 1 to the {n} steps there are, got {self.step}")

    def memory(self, plan: Plan, pictures: int, guided: bool) -> Memory:
        return Gate(self, plan.repeated, guided)


class Gate(AttentionMemory):
    """The latest output of each layer, at the gate the mean of both halves'."""

    def __init__(self, policy: TGate, repeated: int, guided: bool):
        """repeated: steps of the plan that take an earlier one again, which do not count."""
        super().__init__()
        self.policy, self.repeated, self.guided = policy, repeated, guided

    def gate(self, index: int) -> bool:
        return index - self.repeated == self.policy.step - 1

    def full(self, index: int) -> bool:
        return self.gate(index)  # so that every layer has an output to keep

    def both(self, index: int, t: float) -> bool:
        return index - self.repeated < self.policy.step

    def splits(self, index: int) -> bool:
        return not self.gate(index)

    def wanted(self, kind: Kind, calls: int, index: int, t: float) -> Do:
        return self.policy.action(kind is Kind.CROSS, index - self.repeated)

    def entry(self, old: Entry, out: mx.array, do: Do, index: int) -> Entry:
        if self.guided and self.gate(index):
            without, given = mx.split(out, 2)
            return ((without + given) / 2,)
        return super().entry(old, out, do, index)
