"""Which steps should be full, found and not guessed: `mlx-deepcache-calibrate --search`.

How far the deep features move from step to step is measured, and how much of that reaches the picture. From both
follows what any schedule should cost, so the best one is found by dynamic programming. As what the steps do to each
other is left out of that, it is then drawn and moved, a step at a time, while the pictures come nearer. All of it sees
one half of the prompts; whether it was luck is told by the other half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import numpy as np

from ..cache.deepcache import DeepCache
from ..cache.forecast import Forecast, Kept, Spectrum, TaylorSeer
from ..cache.text import write
from ..diffusion.schedule import Plan
from ..nets.blocks import Features

if TYPE_CHECKING:
    from ..generation.pipeline import StableDiffusion

COPY = TaylorSeer(0)
TRACED = 2**16  # values of the features, spread evenly, that stand for all of them
FORECASTS = ((), ("taylorseer",), ("taylorseer:order=2",), ("spectrum",))
TUNED = tuple(
    (write(Spectrum(weight, ridge=ridge, history=history)),)
    for weight, ridge, history in product((0.2, 0.4), (0.01, 0.001), (4, 6))
)

Score = Callable[[tuple[str, ...]], float]  # of policies as text; higher is better


@dataclass(frozen=True, eq=False)
class Trace(Forecast):
    """No forecast: hands the features of every full step, as float32 values, to `seen`."""

    name: ClassVar[str] = "trace"
    about: ClassVar[str] = "keeps the deep features for whoever measures them"
    seen: ClassVar[list[np.ndarray]]
    history: ClassVar[int] = 1

    def __post_init__(self):
        object.__setattr__(self, "seen", [])

    def weights(self, kept: Sequence[int], step: int, n: int) -> list[float]:
        return [1.0]

    def memory(self, plan: Plan, pictures: int, guided: bool) -> Kept:
        return _Traced(self, len(plan.steps))


class _Traced(Kept):
    def keep(self, step: int, features: Features, pictures: int) -> None:
        super().keep(step, features, pictures)
        self.forecast.seen.append(_values(features))


def _values(features: Features) -> np.ndarray:
    """(B, at most TRACED): of each picture of the batch."""
    rows = mx.concatenate([part.reshape(len(part), -1) for part in features if part.size], axis=1)
    return np.array(rows[:, :: -(-rows.shape[1] // TRACED)].astype(mx.float32))


def likeness(pipe: StableDiffusion, prompt: str, seed: int, **options) -> np.ndarray:
    """The products of the deep features of every two steps, (n, n), n calls of the U-Net: how wrong any weighted sum of
    some steps' features is at another one follows from them. Guidance's halves are combined as their outputs are."""
    trace = Trace()
    settings = pipe.settings(prompt, seeds=[seed], **options | {"cache": [DeepCache(interval=1), trace]})
    for _ in pipe.denoise(settings):
        pass
    steps = np.stack(trace.seen).astype(np.float64)  # (n, B, values)
    if (scale := settings.legs[0].guidance_scale) is not None:
        steps = (1 - scale) * steps[:, :1] + scale * steps[:, 1:]
    values = steps.reshape(len(steps), -1)
    return values @ values.T


def windows(n: int, length: int) -> list[range]:
    """Runs of cached steps that together are all but the first one."""
    return [range(at, min(at + length, n)) for at in range(1, n, length)]


def without(n: int, window: range) -> tuple[str, ...]:
    """All n steps full but these."""
    return (write(DeepCache(steps=tuple(i for i in range(n) if i not in window))),)


def gains(likenesses: np.ndarray, runs: Sequence[range], errors: np.ndarray) -> np.ndarray:
    """How much of the features' error at each of n steps reaches the picture, (n,). likenesses: (P, n, n); errors:
    (windows, P), squared, of the pictures where only these steps copied the features."""
    n = likenesses.shape[-1]
    ratios = []
    for run, error in zip(runs, errors, strict=True):
        wrong = np.zeros(n)
        wrong[list(run)] = 1
        wrong[run[0] - 1] = -len(run)
        features = np.einsum("i,pij,j->p", wrong, likenesses, wrong)
        ratios.append(math.log(max(error.sum(), 1e-12) / max(features.sum(), 1e-12)) / 2)
    return np.exp(np.interp(np.arange(n), [(run[0] + run[-1]) / 2 for run in runs], ratios))


def costs(likenesses: np.ndarray, gain: np.ndarray, forecast: Forecast, longest: int) -> dict[tuple, np.ndarray]:
    """(the full step before, a full step) -> (m,): what it costs to take the next 0 to m - 1 steps from these two.
    Errors of neighbouring steps point the same way, so they are added up before they are squared."""
    n, mean = likenesses.shape[-1], likenesses.mean(0)
    table = {}
    for last in range(n):
        for before in range(max(0, last - longest), last + 1):
            kept = sorted({before, last})[-forecast.history :]
            wrong, product, cost = np.zeros(n), np.zeros(n), [0.0]
            for step in range(last + 1, min(last + longest, n)):
                error = np.zeros(n)
                error[kept] = -np.array(forecast.weights(kept, step, n))
                error[step] = 1
                wrong += gain[step] * error
                product += gain[step] * (mean[:, step] + mean[:, kept] @ error[kept])
                cost.append(float(wrong @ product))
            table[before, last] = np.array(cost)
    return table


def cheapest(table: dict[tuple, np.ndarray], n: int, full: int) -> tuple[int, ...] | None:
    """The `full` of n steps, the first among them, whose cached ones cost least; None where no table reaches so far.
    By dynamic programming over the last two full steps (Bellman 1957)."""
    best = {(0, 0): (0.0, (0,))}
    for _ in range(full - 1):
        after: dict[tuple, tuple] = {}
        for (before, last), (spent, steps) in best.items():
            for gap, cost in enumerate(table[before, last]):
                key = last, last + gap + 1
                if key[1] < n and (key not in after or spent + cost < after[key][0]):
                    after[key] = spent + cost, (*steps, key[1])
        best = after
    ends = (
        (spent + table[key][n - 1 - key[1]], steps)
        for key, (spent, steps) in best.items()
        if n - 1 - key[1] < len(table[key])
    )
    return min(ends, default=(0.0, None))[1]


def evenly(n: int, full: int) -> tuple[int, ...]:
    """As an interval would have them, up to the last but one step."""
    return tuple(sorted({round(at) for at in np.linspace(0, max(n - 2, 0), full)}))


def found(
    likenesses: np.ndarray, gain: np.ndarray, full: int, score: Score, say: Callable[[str], None]
) -> tuple[str, ...]:
    """The policies that draw best with so many full steps, as text."""
    n = likenesses.shape[-1]
    longest = min(n, 4 * -(-n // full))
    starts = {evenly(n, full)}
    for forecast in (COPY, TaylorSeer(1)):
        starts.add(cheapest(costs(likenesses, gain, forecast, longest), n, full))
    value, steps, forecast = max(
        (score(policies(steps, forecast)), steps, forecast) for steps in starts - {None} for forecast in FORECASTS
    )
    say(f"{full} full steps: {value:.2f} with {' '.join(policies(steps, forecast))}")
    before = -math.inf
    while value > before:
        before = value
        for at in range(1, full):
            for by in (-1, 1):
                moved = (*steps[:at], steps[at] + by, *steps[at + 1 :])
                if len({*moved}) == full and moved[-1] < n and (come := score(policies(moved, forecast))) > value:
                    value, steps = come, moved
        value, forecast = max((score(policies(steps, forecast)), forecast) for forecast in {*FORECASTS, *TUNED})
        say(f"{full} full steps: {value:.2f} with {' '.join(policies(steps, forecast))}")
    return policies(steps, forecast)


def policies(steps: Sequence[int], forecast: tuple[str, ...]) -> tuple[str, ...]:
    """With these full steps, as text."""
    return (write(DeepCache(steps=tuple(steps))), *forecast)
