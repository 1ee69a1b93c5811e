"""What the caches of one generation remember and decide; made by the sampler and gone with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from .attention_cache import AttentionCache, Broadcast, Extrapolated, Gate
from .blocks import Attention, Fixed
from .cache import Adaptive
from .guidance import Guidance, RebuiltGuidance
from .policies import Caches, FasterCache, PyramidAttentionBroadcast, TGate
from .schedulers import Plan


class Call(NamedTuple):
    """One call of the U-Net: whether all of it ran, for how many pictures, and the multiply-adds of the attention
    layers that it left out."""

    full: bool
    pictures: int
    saved: int


class Features:
    """The deep features of the last full steps, and what a cached step is given for them.

    Kept is `Fixed`, what the resnet at the cut makes of the features, as that is all that a cached step needs. Its
    convolution comes after a normalisation and an activation, so a forecast of it is not quite that of the features;
    it saves doing that work again on each cached step.
    """

    def __init__(self, caches: Caches, n: int):
        self.forecast, self.n = caches.forecast, n
        self.steps: list[int] = []
        self.kept: list[Fixed] = []

    def keep(self, step: int, features: Fixed) -> None:
        """Of a full call; the last one of a step counts."""
        pictures = len(features.shortcut)
        if self.kept and len(self.kept[-1].shortcut) < pictures:  # the unconditional half of those was never computed
            self.steps, self.kept = [], []
        if step in self.steps:
            self.steps.pop(), self.kept.pop()
        room = 1 if self.forecast is None else self.forecast.history
        self.steps, self.kept = [*self.steps, step][-room:], [*self.kept, features][-room:]

    def reuse(self, step: int, pictures: int) -> Fixed | None:
        """For the last `pictures` of the batch, which the conditional half are; None if there are fewer."""
        if not self.kept or len(self.kept[-1].shortcut) < pictures:
            return None
        weights = [1.0] if self.forecast is None else self.forecast.weights(self.steps, step, self.n)
        if [w for w in weights if w] == [1.0]:
            return Fixed(*(part[-pictures:] for part in self.kept[weights.index(1.0)]))
        return Fixed(
            *(_weighted([part[-pictures:] for part in parts], weights) for parts in zip(*self.kept, strict=True))
        )

    @property
    def arrays(self) -> list[mx.array]:
        return [part for features in self.kept for part in features]


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
        self.kept = Features(caches, n)
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


def relative_change(now: mx.array, then: mx.array) -> float:
    """mean |now - then| / mean |then| of the picture where it is largest; (B, H, W, C) each. Waits for the device."""
    now, then = now.astype(mx.float32), then.astype(mx.float32)
    change = mx.abs(now - then).mean(axis=(1, 2, 3)) / mx.maximum(mx.abs(then).mean(axis=(1, 2, 3)), 1e-12)
    return change.max().item()


def _weighted(arrays: list[mx.array], weights: list[float]) -> mx.array:
    """Their weighted sum, in float32 on the way."""
    total = sum((w * a.astype(mx.float32) for w, a in zip(weights, arrays, strict=True)), mx.array(0.0))
    return total.astype(arrays[0].dtype)
