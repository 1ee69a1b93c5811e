"""Several caching policies at once: which go together, and what they remember of one generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

import mlx.core as mx

from ..diffusion.guidance import Guidance
from ..diffusion.schedule import Plan
from ..errors import UsageError
from ..nets.blocks import Attention, Fixed
from .adaptive import Adaptive, relative_change
from .attention import AttentionCache
from .deepcache import DeepCache, Features
from .fastercache import Extrapolated, FasterCache, RebuiltGuidance
from .forecast import Spectrum, TaylorSeer
from .guidance_interval import GuidanceInterval
from .pab import Broadcast, PyramidAttentionBroadcast
from .tgate import Gate, TGate


class Call(NamedTuple):
    """One call of the U-Net: whether all of it ran, for how many pictures, and the multiply-adds of the attention
    layers that it left out."""

    full: bool
    pictures: int
    saved: int


class CacheRun:
    """The state of all caches while one batch of pictures is drawn.

    A step begins with `begin_step`; each of its U-Net calls with `begin_call`, which says whether the batch holds both
    halves of guidance. The call is then given what `reuse` returns, `attend` and `branch`; its own features go to
    `finish`.
    """

    def __init__(self, caches: Caches, plan: Plan, pictures: int, guidance_scale: float | None):
        """guidance_scale: None where the U-Net is run as it is."""
        n, guided = len(plan.steps), guidance_scale is not None
        self.caches, self.pictures, self.guided, self.branch = caches, pictures, guided, caches.branch
        self.repeated = sum(step.stage not in ("", "rk1") for step in plan.steps)  # PNDM's first steps, taken again
        self.planned = caches.when.full_steps(n)
        self.kept = Features(caches.forecast, n)
        self.probe: mx.array | None = None  # Adaptive: the skip at the branch on the last full step
        self.last_full = 0
        self.residuals: list[mx.array] = []  # the ControlNets', of the last call that ran them

        policy = caches.attention
        self.outputs: AttentionCache | None = None
        if isinstance(policy, PyramidAttentionBroadcast):
            self.outputs = Broadcast(policy)
        elif isinstance(policy, FasterCache):
            self.outputs = Extrapolated(policy, pictures, guided, n)
        elif isinstance(policy, TGate):
            self.outputs = Gate(policy, guided)
        self.attend = Attention.__call__ if self.outputs is None else self.outputs

        policy, self.guidance = caches.guidance, None
        if guidance_scale is not None:
            if isinstance(policy, FasterCache):
                self.guidance = RebuiltGuidance(guidance_scale, policy)
            elif policy is None:
                self.guidance = Guidance(guidance_scale)
            else:
                self.guidance = Guidance(guidance_scale, lambda c: policy.guided(c, n))

    def begin_step(self, index: int) -> None:
        """Step `index` of the plan begins."""
        self.index, self.calls, self.change = index, [], None
        self.c = index - self.repeated if isinstance(self.caches.attention, TGate) else index
        self.full = self.planned[index]
        if isinstance(self.caches.attention, TGate) and self.caches.attention.is_gate(self.c):
            self.full = True  # so that every layer has an output to keep

    def begin_call(self, t: float) -> bool:
        """A U-Net call at timestep t begins: whether the batch holds both halves."""
        if self.outputs is not None:
            self.outputs.begin(self.c, t)
        both = self.guidance is not None and self.guidance.begin(self.c, t)
        self.batch = self.pictures * (2 if both else 1)
        return both

    def reuse(self) -> Fixed | Callable[[mx.array], Fixed | None] | None:
        """What to give the U-Net as `features`."""
        if isinstance(self.caches.when, Adaptive):
            return self._decide
        if not self.full:
            reused = self.kept.reuse(self.index, self.batch)
            self.full = reused is None  # also if the half that is wanted now was not computed then
            return reused
        return None

    def _decide(self, skip: mx.array) -> Fixed | None:
        """Adaptive's decision on the step's first call, from the skip at the branch."""
        reused = None
        if self.full is not True and self.probe is not None and len(self.probe) >= len(skip):
            if self.full is None:
                self.change = relative_change(skip, self.probe[-len(skip) :])
                self.full = self.caches.when.full(self.index - self.last_full, self.change)
            reused = None if self.full else self.kept.reuse(self.index, self.batch)
        self.full = reused is None
        if self.full:
            self.probe, self.last_full = skip, self.index
        return reused

    def finish(self, features: Fixed) -> None:
        """A U-Net call has returned these features."""
        if self.full:
            self.kept.keep(self.index, features)
        saved = 0 if self.outputs is None else self.outputs.saved
        self.calls.append(Call(bool(self.full), self.batch, saved))

    @property
    def arrays(self) -> dict[str, list[mx.array]]:
        """All that is remembered, by the name of the policy that does."""
        when = self.caches.when.name
        kept = {when: self.kept.arrays + ([] if self.probe is None else [self.probe]) + self.residuals}
        if self.outputs is not None:
            kept[self.caches.attention.name] = self.outputs.arrays + (
                [] if self.guidance is None else self.guidance.arrays
            )
        return kept


Policy = (
    DeepCache | Adaptive | TaylorSeer | Spectrum | PyramidAttentionBroadcast | FasterCache | TGate | GuidanceInterval
)


KINDS: tuple[type, ...] = Policy.__args__


@dataclass(frozen=True)
class Caches:
    """Policies put together, at most one for each question; see `Caches.of`."""

    when: DeepCache | Adaptive = DeepCache(1)
    forecast: TaylorSeer | Spectrum | None = None
    attention: PyramidAttentionBroadcast | FasterCache | TGate | None = None
    guidance: FasterCache | TGate | GuidanceInterval | None = None

    @classmethod
    def of(cls, policies: Iterable[Policy]) -> Caches:
        """
        Raises:
            UsageError: two of them answer the same question, or one has no meaning without another; says which and why.
        """
        chosen: dict[str, Policy] = {}
        for policy in policies:
            for slot, question in getattr(policy, "slots", {}).items():
                if (other := chosen.setdefault(slot, policy)) is not policy:
                    twice = (
                        f"{policy.name} is given twice"
                        if other.name == policy.name
                        else f"{other.name} and " + (f"{policy.name} both decide {question}")
                    )
                    raise UsageError(f"caches cannot be combined: {twice}; give one of them")
            if not isinstance(policy, KINDS):
                raise UsageError(
                    f"a cache should be one of the policies, such as DeepCache(interval=3), got {policy!r}"
                )
        if "forecast" in chosen and "when" not in chosen:
            raise UsageError(
                f"{chosen['forecast'].name} forecasts what a cached step uses, so it needs deepcache or adaptive "
                "beside it, such as deepcache:interval=5"
            )
        return cls(**chosen)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Each one once; DeepCache with interval 1 where nothing decides on the steps."""
        return tuple(dict.fromkeys(p for f in fields(self) if (p := getattr(self, f.name)) is not None))

    @property
    def branch(self) -> int:
        """Where the U-Net is cut."""
        return self.when.branch

    def check(self, n: int, guided: bool) -> None:
        """That all of it can be done in n steps, with or without guidance.

        Raises:
            UsageError: not so; says what.
        """
        self.when.full_steps(n)
        if isinstance(self.attention, TGate) and self.attention.step > n:
            raise UsageError(f"tgate's step must be from 1 to the {n} steps there are, got {self.attention.step}")
        if isinstance(self.guidance, GuidanceInterval) and not guided:
            raise UsageError("a guidance interval has no meaning where guidance is off (guidance scale 1 or less)")
