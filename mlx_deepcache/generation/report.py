"""What a generation cost."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

import mlx.core as mx

from .._version import __version__
from ..backend.memory import peak, reset_peak
from ..cache.macs import unet_macs, work_macs
from ..cache.text import write
from ..sampler import Progress
from .components import Components
from .settings import Settings

PHASES = ("load", "encode", "denoise", "decode")


class Clock:
    """Seconds and peak memory (bytes) of each phase. A phase within another one counts by itself: the outer one stands
    still meanwhile. A phase may have nothing to do."""

    def __init__(self):
        self.seconds, self.peaks = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0)
        self._phases: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._count()
        self._phases.append(name)
        try:
            yield
        finally:
            self._count()
            self._phases.pop()

    def _count(self) -> None:
        """What has gone by is the innermost phase's."""
        now = time.perf_counter()
        if self._phases:
            name = self._phases[-1]
            self.seconds[name] += now - self._since
            self.peaks[name] = max(self.peaks[name], peak())
        reset_peak()
        self._since = now


def stats(
    settings: Settings,
    models: Sequence[Components],
    steps: Sequence[Progress],
    control_macs: int,
    clock: Clock,
    estimated: dict[str, int],
) -> dict:
    """What these steps cost: the seeds, seconds by phase, each step's kind, U-Net
    multiply-adds against an uncached run, and those of ControlNets, the most bytes that each cache remembered, what an
    adaptive cache decided and from which relative change, peak memory, what it was estimated to be beforehand, and
    where it ran."""
    macs, macs_uncached = (sum(counts) for counts in zip(*_macs(settings, models, steps), strict=True))
    return {
        "seeds": list(settings.seeds),
        "seconds": {phase: round(seconds, 4) for phase, seconds in clock.seconds.items()},
        "steps": ["full" if step.full else "cached" for step in steps],
        "full_steps": sum(step.full for step in steps),
        "cached_steps": sum(not step.full for step in steps),
        "unet_macs": macs,
        "unet_macs_uncached": macs_uncached,
        "controlnet_macs": control_macs,
        "caches": [write(policy) for policy in settings.cache.policies],
        "cache_bytes": {name: max(step.cache_bytes[name] for step in steps) for name in steps[-1].cache_bytes},
        "decisions": [
            {"step": step.index, "change": step.change, "full": step.full} for step in steps if step.change is not None
        ],
        "peak_memory_bytes": max(clock.peaks.values()),
        "peak_memory_bytes_by_phase": dict(clock.peaks),
        "estimated_memory_bytes_by_phase": estimated,
        "device": device_name(),
        "dtype": dtype_name(models[0].dtype),
        "versions": {
            "mlx_deepcache": __version__,
            "mlx": version("mlx"),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
    }


def _macs(settings: Settings, models: Sequence[Components], steps: Sequence[Progress]) -> Iterator[tuple[int, int]]:
    """Each leg's multiply-adds, and those of an uncached run."""
    first = 0
    for leg in settings.legs:
        components = models[leg.model]
        own, first = steps[first : first + len(leg.plan.steps)], first + len(leg.plan.steps)
        size = (*leg.frames, *settings.latent_size(leg))
        unet, branch = components.checkpoint.module("unet"), settings.cache.branch
        work = [call for step in own for call in step.work]
        batch = len(settings.seeds) * (1 if leg.guidance_scale is None else 2)
        full, _ = unet_macs(unet, size, branch, work[0].tokens)  # which are the same on all steps
        yield work_macs(unet, size, branch, work), batch * len(work) * full


def device_name() -> str:
    """The device that MLX computes on, in words."""
    device = mx.default_device()
    info = mx.device_info(device)
    return str(info.get("device_name", platform.processor() or platform.machine())) + f" ({device.type.name})"


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
