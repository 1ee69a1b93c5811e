"""The caching policies beside DeepCache's own: frozen values, each answering one question per step or per layer.

They hold no arrays and know no MLX. `Caches` puts policies together. What they remember while a picture is drawn lives
in the sampler's `CacheRun`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from .cache import Adaptive, DeepCache, check_window
from .errors import UsageError
from .forecast import Spectrum, TaylorSeer

ATTENTION = {"attention": "which attention outputs are used again"}
GUIDANCE = {"guidance": "on which steps the unconditional half runs"}


def keyed(default: Any, key: str) -> Any:
    """A field that is called `key` for short on the command line."""
    return field(default=default, metadata={"key": key})


@dataclass(frozen=True)
class PyramidAttentionBroadcast:
    """An attention layer's output is used again for a range of calls, inside a window of timesteps (Zhao et al. 2024).

    Names and counters are diffusers': a skip range N computes every N-th call of a layer (1: every call; None: this
    kind is left alone) while lo < timestep < hi; a layer counts its own calls, outside the window too. spatial is
    self-attention, cross the attention to the prompt, 2 and 6 as in the paper.

    Raises:
        UsageError: a range that cannot be.
    """

    name: ClassVar[str] = "pab"
    slots: ClassVar[dict[str, str]] = ATTENTION
    about: ClassVar[str] = (
        "Pyramid Attention Broadcast: self-attention (spatial) runs every 2nd time, cross-attention every 6th, or off"
    )

    spatial_attention_block_skip_range: int | None = keyed(2, "spatial")
    cross_attention_block_skip_range: int | None = keyed(6, "cross")
    spatial_attention_timestep_skip_range: tuple[int, int] = keyed((100, 800), "spatial_window")
    cross_attention_timestep_skip_range: tuple[int, int] = keyed((100, 800), "cross_window")

    def __post_init__(self):
        check_skip_range(self.name, "spatial", self.spatial_attention_block_skip_range)
        check_skip_range(self.name, "cross", self.cross_attention_block_skip_range)
        check_timesteps(self.name, "spatial_window", self.spatial_attention_timestep_skip_range)
        check_timesteps(self.name, "cross_window", self.cross_attention_timestep_skip_range)

    def remembers(self, cross: bool) -> bool:
        """Whether outputs of this kind of attention are ever used again."""
        every = self.cross_attention_block_skip_range if cross else self.spatial_attention_block_skip_range
        return every is not None and every > 1

    def computes(self, cross: bool, iteration: int, t: float) -> bool:
        """Whether a layer runs at its call number `iteration` (from 0), at timestep t."""
        if cross:
            every, window = self.cross_attention_block_skip_range, self.cross_attention_timestep_skip_range
        else:
            every, window = self.spatial_attention_block_skip_range, self.spatial_attention_timestep_skip_range
        return every is None or iteration % every == 0 or not window[0] < t < window[1]


@dataclass(frozen=True)
class FasterCache:
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
            if item.name.endswith("timestep_skip_range") or item.name.endswith("timestep_range"):
                check_timesteps(self.name, item.metadata["key"], getattr(self, item.name))
        if not (self.alpha_low_frequency > 0 and self.alpha_high_frequency > 0):
            raise UsageError(
                "fastercache's alpha_low and alpha_high must be above 0, got "
                f"{self.alpha_low_frequency:g} and {self.alpha_high_frequency:g}"
            )

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


def check_skip_range(policy: str, key: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UsageError(f"{policy}'s {key} must be at least 1 (every time), got {value}")


def check_timesteps(policy: str, key: str, window: tuple[int, int]) -> None:
    if len(window) != 2 or not window[0] < window[1]:
        raise UsageError(f"{policy}'s {key} should be two timesteps, the lower first, such as 100..800, got {window}")
