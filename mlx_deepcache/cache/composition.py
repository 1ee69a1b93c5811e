"""Several caching policies at once: which go together, and what they remember of one generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import mlx.core as mx

from ..diffusion.levels import Level
from ..diffusion.schedule import Plan
from ..errors import UsageError
from ..nets.attend import PLAIN, compute
from ..nets.blocks import Features
from .adaptive import Adaptive
from .deepcache import DeepCache
from .fastercache import FasterCache
from .forecast import Forecast, Spectrum, TaylorSeer
from .guidance_interval import GuidanceInterval
from .halves import Halves
from .pab import PyramidAttentionBroadcast
from .policy import Call, Memory, Policy, require
from .tgate import TGate

KINDS = (DeepCache, Adaptive, TaylorSeer, Spectrum, PyramidAttentionBroadcast, FasterCache, TGate, GuidanceInterval)


@dataclass(frozen=True)
class Caches:
    """Policies put together, at most one for each question; see `Caches.of`."""

    when: DeepCache | Adaptive = DeepCache(1)
    forecast: Forecast | None = None
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
            sort = "a cache should be one of the policies, such as DeepCache(interval=3)"
            require(hasattr(policy, "slots"), f"{sort}, got {policy!r}")
            for slot, question in policy.slots.items():
                other = chosen.setdefault(slot, policy)
                if other is not policy:
                    both = f"{other.name} and {policy.name} both decide {question}"
                    twice = f"{policy.name} is given twice" if other.name == policy.name else both
                    raise UsageError(f"caches cannot be combined: {twice}; give one of them")
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

    def check(self, plan: Plan, guided: bool) -> None:
        """That all of it can be done over these steps, with or without guidance.

        Raises:
            UsageError: not so; says what.
        """
        for policy in self.policies:
            policy.check(plan, guided)

    def splits(self, plan: Plan) -> bool:
        """Whether guidance's halves may be run apart on every step."""
        memories = self.memories(plan, 1, guided=True).values()
        return all(memory.splits(index) for memory in memories for index in range(len(plan.steps)))

    def memories(self, plan: Plan, pictures: int, guided: bool) -> dict[Policy, Memory]:
        """What each policy but the forecast remembers while so many pictures are drawn."""
        return {
            policy: policy.memory(plan, pictures, guided) for policy in self.policies if policy is not self.forecast
        }


class CacheRun:
    """The state of all caches while one batch of pictures is drawn: `call` says how the U-Net is to be called next, and
    `keep` is told how that went."""

    def __init__(
        self,
        caches: Caches,
        plan: Plan,
        pictures: int,
        guided: bool,
        inner: Callable[..., mx.array] = compute,
        halves: Halves | None = None,
    ):
        """guided: whether the U-Net also runs without the prompt; inner: how attention layers are run, see `Attend`;
        halves: who runs these, if not this machine alone. What is kept is of those halves that are run here, and what
        is decided does not depend on who runs them."""
        self.caches, self.pictures, self.guided, self.branch = caches, pictures, guided, caches.branch
        self.inner, self.halves = inner, halves or Halves()
        self.kept = (caches.forecast or TaylorSeer(0)).memory(plan, pictures, guided)  # which copies
        self.memories = caches.memories(plan, pictures, guided)
        self.residuals: list[mx.array] = []  # the ControlNets', of the last call that ran them
        self.index, self.full = -1, True

    def call(self, index: int, level: Level) -> Call:
        """The next call, on step `index` of the plan; one that comes after a full one on the same step is full too."""
        memories = self.memories.values()
        if index != self.index:
            self.index, self.full = index, any(memory.full(index) for memory in memories)
        both = self.guided and all(memory.both(index, level.t) for memory in memories)
        pictures = self.pictures * (1 + both)
        attends = (memory.attend(index, level.t, pictures) for memory in memories)
        call = Call(
            index,
            both,
            apart=all(memory.splits(index) for memory in memories),
            halves=(0, 1) if both else (1,),
            pictures=pictures,
            full=self.full or not self.kept.serves(pictures),
            residuals=[residual[-pictures:] for residual in self.residuals],
            attend=tuple(attend.around(self.inner) for attend in next(filter(None, attends), (PLAIN,) * 3)),
            differences=() if both else sum((memory.differences() for memory in memories), ()),
            decide=next((memory.decide for memory in memories if memory.decide is not None), None),
        )
        call = self.halves.take(call)
        if call.full or not call.halves:
            return call
        return replace(call, reused=self.kept.reuse(index, pictures))

    def keep(self, call: Call, features: Features | None, output: mx.array, residuals: list[mx.array] | None) -> None:
        """A call has been made: these are the features of the halves that were run here, if any were, all halves'
        output, float32, and what ControlNets gave, if they ran."""
        self.full = call.full
        if call.full:
            self.kept.keep(call.index, features, call.pictures)
        if residuals is not None:
            self.residuals = residuals
        for memory in self.memories.values():
            memory.keep(call, output)

    @property
    def arrays(self) -> dict[str, list[mx.array]]:
        """All that is remembered, by the name of the policy that does."""
        when, attention = self.caches.when, self.caches.attention
        arrays = {when.name: [*self.kept.arrays, *self.memories[when].arrays, *self.residuals]}
        return arrays if attention is None else arrays | {attention.name: self.memories[attention].arrays}
