"""T-GATE (Zhang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..errors import UsageError
from ..nets.blocks import Attention
from .attention import AttentionCache, KeysValues
from .policy import ATTENTION, GUIDANCE, check_skip_range


class Gate(AttentionCache):
    """T-GATE."""

    def __init__(self, policy: TGate, guided: bool):
        super().__init__()
        self.policy, self.guided = policy, guided

    def __call__(self, layer: Attention, x: mx.array, keys_values: KeysValues = None) -> mx.array:
        action, kept = self.policy.action(keys_values is not None, self.c), self.usable(layer, len(x))
        if action == "reuse" and kept:
            self.skip(layer, x, keys_values)
            return kept[0]
        out = layer(x, keys_values)
        if action == "gate" and self.guided:
            without, given = mx.split(out, 2)
            self.kept[id(layer)] = ((without + given) / 2,)
        elif action != "compute":  # also where a layer that a cached step left out has nothing yet to use again
            self.kept[id(layer)] = (out,)
        return out


@dataclass(frozen=True)
class TGate:
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
        if self.warm_up < 0:
            raise UsageError(f"tgate's warm_up must be at least 0 steps, got {self.warm_up}")

    def guided(self, c: int, n: int) -> bool:
        """Whether guidance runs on step c."""
        return c < self.step

    def is_gate(self, c: int) -> bool:
        """Whether all attention must run on step c, to be kept."""
        return c == self.step - 1

    def action(self, cross: bool, c: int) -> str:
        """What an attention layer does on step c: compute, keep (compute, and keep the output), reuse, or gate
        (compute, and keep the mean of both halves)."""
        if c == self.step - 1:
            return "gate"
        if c < self.step - 1:
            if cross or c < self.warm_up:
                return "compute"
            return "keep" if c == self.warm_up or c % self.sp_interval == 0 else "reuse"
        return "reuse" if cross or c % self.fi_interval else "keep"
