"""What to draw and how: the checkpoint's defaults filled in, and everything checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cache import CacheSchedule
from .checkpoint import Checkpoint
from .errors import UsageError
from .noise import GENERATORS
from .schedulers import Plan
from .tiling import TILINGS

DEFAULT_STEPS = 50
DEFAULT_INTERVAL = 3
FEWEST_STEPS_TO_CACHE = 10  # below this, steps differ too much for features to be reused


@dataclass(frozen=True)
class Settings:
    """What to draw and how, complete and checked: `settings_for` makes it. One picture a seed."""

    prompts: tuple[str, ...]
    negative_prompt: str | None
    steps: int
    guidance_scale: float
    height: int
    width: int
    seeds: tuple[int, ...]
    scheduler: str
    rng: str
    cache: CacheSchedule
    plan: Plan
    vae_tiling: str

    @property
    def full_steps(self) -> list[bool]:
        """For each step of the sampler, whether the whole U-Net runs."""
        return self.cache.full_steps(len(self.plan.steps))


def settings_for(
    checkpoint: Checkpoint,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seeds: Sequence[int] = (0,),
    scheduler: str | None = None,
    rng: str = "torch",
    cache_interval: int | None = None,
    cache_branch: int = 0,
    vae_tiling: str = "auto",
) -> Settings:
    """Fill in the checkpoint's defaults and check everything, before any work is done.

    prompt: one for all seeds, or one a seed; steps: 50; guidance_scale: the checkpoint's, 1 or less turns guidance
    off; height, width: pixels, the checkpoint's own size; scheduler: one of `SCHEDULERS`, the checkpoint's own;
    rng: torch, torch-cuda or mlx; cache_interval: 3, or 1 (no caching) below 10 steps;
    vae_tiling: auto (when memory is short), on or off.

    Raises:
        UsageError: a value that cannot be; says which are possible.
    """
    steps = DEFAULT_STEPS if steps is None else steps
    schedule = checkpoint.schedule(scheduler)
    native = checkpoint.native_size
    height, width = (given if given is not None else own for given, own in zip((height, width), native, strict=True))
    factor = checkpoint.vae_config.factor
    for name, value in (("height", height), ("width", width)):
        if value < factor or value % factor:
            near = max(factor, round(value / factor) * factor)
            raise UsageError(f"{name} should be a positive multiple of {factor} pixels, got {value}; try {near}")
    if rng not in GENERATORS:
        raise UsageError(f"rng should be one of {', '.join(GENERATORS)}, got {rng!r}")
    if vae_tiling not in TILINGS:
        raise UsageError(f"vae_tiling should be one of {', '.join(TILINGS)}, got {vae_tiling!r}")
    if not seeds:
        raise UsageError("at least one seed is needed, one a picture")
    if cache_interval is None:
        cache_interval = DEFAULT_INTERVAL if steps >= FEWEST_STEPS_TO_CACHE else 1
    cache = CacheSchedule(cache_interval, cache_branch)
    branches = checkpoint.unet_config.branches
    if cache_branch >= branches:
        raise UsageError(f"cache branch must be in [0, {branches}) for this U-Net, got {cache_branch}")
    prompts = (prompt,) * len(seeds) if isinstance(prompt, str) else tuple(prompt)
    if len(prompts) != len(seeds):
        raise UsageError(f"there should be one prompt, or one a seed ({len(seeds)}), got {len(prompts)}")
    return Settings(
        prompts,
        negative_prompt,
        steps,
        checkpoint.guidance_scale if guidance_scale is None else guidance_scale,
        height,
        width,
        tuple(seeds),
        schedule.name,
        rng,
        cache,
        schedule.plan(steps),
        vae_tiling,
    )
