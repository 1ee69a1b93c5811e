"""FasterCache (Lv et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import mlx.core as mx
import numpy as np

from ..diffusion.schedule import Plan
from ..nets.attend import Do, Kind
from .attention import AttentionMemory, Entry
from .policy import ATTENTION, GUIDANCE, Call, Memory, Policy, check_skip_range, check_timesteps, keyed, require


@dataclass(frozen=True)
class FasterCache(Policy):
    """The unconditional half is skipped, and rebuilt from the conditional one; in such calls, self-attention is
    extrapolated from its two latest outputs (Lv et al. 2024). Names, defaults and counters are diffusers'.

    unconditional_batch_skip_range: that half runs every N-th call inside its window of timesteps;
    spatial_attention_block_skip_range: so does self-attention, in the calls without that half, or in all calls where
    there is no guidance. What the halves differ by is kept for low and high frequencies apart, and grows by the alphas
    on each skip inside their windows (equations 9 and 10). attention_weight: of the extrapolation, from the first step
    to the last; 0.5 is diffusers', (0, 1) the paper's.

    Raises:
        UsageError: a value that cannot be.
    """

    name: ClassVar[str] = "fastercache"
    slots: ClassVar[dict[str, str]] = ATTENTION | GUIDANCE
    alone: ClassVar[bool] = False
    about: ClassVar[str] = (
        "runs guidance's unconditional half every 5th time and rebuilds it between; extrapolates self-attention"
    )

    spatial_attention_block_skip_range: int = keyed(2, "spatial")
    spatial_attention_timestep_skip_range: tuple[int, int] = keyed((-1, 681), "spatial_window")
    unconditional_batch_skip_range: int = keyed(5, "uncond")
    unconditional_batch_timestep_skip_range: tuple[int, int] = keyed((-1, 641), "uncond_window")
    low_frequency_weight_update_timestep_range: tuple[int, int] = keyed((99, 901), "low_window")
    high_frequency_weight_update_timestep_range: tuple[int, int] = keyed((-1, 301), "high_window")
    alpha_low_frequency: float = keyed(1.1, "alpha_low")
    alpha_high_frequency: float = keyed(1.1, "alpha_high")
    attention_weight: tuple[float, float] = keyed((0.5, 0.5), "weight")

    def __post_init__(self):
        check_skip_range(self.name, "spatial", self.spatial_attention_block_skip_range)
        check_skip_range(self.name, "uncond", self.unconditional_batch_skip_range)
        for item in fields(self):
            if item.name.endswith(("timestep_skip_range", "timestep_range")):
                check_timesteps(self.name, item.metadata["key"], getattr(self, item.name))
        low, high = self.alpha_low_frequency, self.alpha_high_frequency
        got = f"got {low:g} and {high:g}"
        require(low > 0 and high > 0, f"fastercache's alpha_low and alpha_high must be above 0, {got}")

    def skips_unconditional(self, iteration: int, t: float) -> bool:
        """Whether call number `iteration` (from 0) of the U-Net, at timestep t, runs the conditional half only."""
        low, high = self.unconditional_batch_timestep_skip_range
        return iteration > 0 and low < t < high and iteration % self.unconditional_batch_skip_range != 0

    def skips_attention(self, iteration: int, t: float) -> bool:
        """Whether a layer would be skipped at its call number `iteration`, if the batch lets it."""
        low, high = self.spatial_attention_timestep_skip_range
        return low < t < high and (iteration == 0 or iteration % self.spatial_attention_block_skip_range != 0)

    def growth(self, t: float) -> tuple[float, float]:
        """What the halves' difference in low and in high frequencies is multiplied by on a skipped call."""
        low, high = self.low_frequency_weight_update_timestep_range, self.high_frequency_weight_update_timestep_range
        return (
            self.alpha_low_frequency if low[0] < t < low[1] else 1.0,
            self.alpha_high_frequency if high[0] < t < high[1] else 1.0,
        )

    def weight(self, step: int, n: int) -> float:
        """Of the extrapolation, at one of n steps."""
        first, last = self.attention_weight
        return first + (last - first) * step / max(n - 1, 1)

    def memory(self, plan: Plan, pictures: int, guided: bool) -> Memory:
        return Extrapolated(self, len(plan.steps), pictures)


class Extrapolated(AttentionMemory):
    """The two latest outputs of each self-attention layer, extrapolated ones too, for the conditional half alone: so
    they serve only calls without the other one. And by what the two halves differed, its low and its high frequencies
    apart (equations 9 and 10 of the paper).

    Both grow with every call in which they are used, as in diffusers' hook. They are kept as pictures, not as spectra:
    the Fourier transform is linear, so adding one is adding the other.
    """

    def __init__(self, policy: FasterCache, n: int, pictures: int):
        """n: steps; pictures: how many are drawn, which a batch with guidance holds twice."""
        super().__init__()
        self.policy, self.n, self.drawn = policy, n, pictures
        self.asked, self.alone = 0, True  # whether the conditional half is
        self.apart: tuple[mx.array, ...] = ()  # unconditional less conditional output: low frequencies, high ones

    def wanted(self, kind: Kind, calls: int, index: int, t: float) -> Do:
        if kind is not Kind.SPATIAL:
            return Do.COMPUTE
        return Do.REUSE if self.alone and self.policy.skips_attention(calls, t) else Do.KEEP

    def recall(self, entry: Entry, index: int, pictures: int) -> mx.array:
        before, last = entry
        return last + (last - before) * self.policy.weight(index, self.n)

    def entry(self, old: Entry, out: mx.array, do: Do, index: int) -> Entry:
        latest = out[-self.drawn :]
        return (old[-1] if old else latest), latest

    def both(self, index: int, t: float) -> bool:
        both = not self.policy.skips_unconditional(self.asked, t)
        self.asked, self.alone = self.asked + 1, not both
        if not both:
            self.apart = tuple(part * by for part, by in zip(self.apart, self.policy.growth(t), strict=True))
        return both

    def differences(self) -> tuple[mx.array, ...]:
        return self.apart

    def keep(self, call: Call, output: mx.array) -> None:
        super().keep(call, output)
        if call.both:
            without, given = mx.split(output, 2)
            low = low_pass(without - given)
            self.apart = low, without - given - low

    @property
    def arrays(self) -> list[mx.array]:
        return [*super().arrays, *self.apart]


def low_pass(x: mx.array) -> mx.array:
    """(N, ..., h, w, C) float32 -> its frequencies within a disc of radius min(h, w) // 5 around zero.

    A disc holds (i, j) along with (-i, j) and (i, -j), so the real Fourier basis of cosines and sines, separable, does
    what masking the complex spectrum does.
    """
    h, w = x.shape[-3:-1]
    radius = min(h, w) // 5
    (rows, i), (columns, j) = fourier_basis(h, radius), fourier_basis(w, radius)
    disc = mx.array(i[:, None] ** 2 + j**2 <= radius**2)
    rows, columns = mx.array(rows), mx.array(columns)
    spectrum = mx.where(disc, rows @ mx.moveaxis(x, -1, -3) @ columns.T, 0)
    return mx.moveaxis(rows.T @ spectrum @ columns, -3, -1)


def fourier_basis(n: int, highest: int) -> tuple[np.ndarray, np.ndarray]:
    """The orthonormal waves over n positions up to a frequency below n / 2: (2 highest + 1, n), and their
    frequencies."""
    k = np.arange(1, highest + 1)
    angles = 2 * np.pi / n * k[:, None] * np.arange(n)
    waves = np.concatenate([np.full((1, n), 0.5**0.5), np.cos(angles), np.sin(angles)]) * (2 / n) ** 0.5
    return waves.astype(np.float32), np.concatenate([[0], k, k])
