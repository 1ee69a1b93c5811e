"""What drawing would do, before anything is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...checkpoints.checkpoint import Checkpoint
    from ...generation.settings import Leg, Settings

FULL, CACHED, DECIDED = "F", "c", "?"  # while it is drawn
TOKENS = 77  # of a prompt that is not long


def plan_of(settings: Settings, checkpoint: Checkpoint) -> dict:
    """Settings, a letter a step, the U-Net's multiply-adds, and their share of an uncached run's: None where it is not
    known beforehand, because a cache decides on the way or leaves out other work than DeepCache does."""
    from ...generation.declared import options_of
    from ...generation.options import Options

    letters = [_letters(settings, leg) for leg in settings.legs]
    steps = "".join(letters)
    macs = _macs(settings, checkpoint, letters)
    said = {o.key: o.record(settings.options) for o in options_of(Options) if o.recorded}
    return {
        "settings": {"prompt": settings.prompts[0], **said, "seed": list(settings.seeds)},
        "steps": steps,
        "full_steps": steps.count(FULL),
        "cached_steps": steps.count(CACHED),
        "unet_macs": None if macs is None else macs[0],
        "unet_macs_share": None if macs is None else macs[0] / macs[1],
        "cache_choice": settings.cache_choice,
    }


def _letters(settings: Settings, leg: Leg) -> str:
    from ...cache.composition import CacheRun

    run = CacheRun(settings.cache, leg.plan, len(settings.seeds), leg.guidance_scale is not None, leg.attend)
    memories, letters = run.memories.values(), ""
    for index in range(len(leg.plan.steps)):
        full = any(memory.full(index) for memory in memories)
        letters += FULL if full else DECIDED if any(m.decide is not None for m in memories) else CACHED
    return letters


def _macs(settings: Settings, checkpoint: Checkpoint, letters: list[str]) -> tuple[int, int] | None:
    """The U-Net's multiply-adds, and those of an uncached run."""
    from ...cache.macs import unet_macs

    cache, refined = settings.cache, any(leg.model for leg in settings.legs)
    if (
        any(DECIDED in steps for steps in letters)
        or cache.attention is not None
        or cache.guidance is not None
        or refined
    ):
        return None
    unet, done, uncached = checkpoint.module("unet"), 0, 0
    for leg, steps in zip(settings.legs, letters, strict=True):
        batch = len(settings.seeds) * (1 if leg.guidance_scale is None else 2)
        size = settings.latent_size(leg)
        full, cached = (batch * macs for macs in unet_macs(unet, size, cache.branch, TOKENS))
        done += steps.count(FULL) * full + steps.count(CACHED) * cached
        uncached += len(steps) * full
    return done, uncached
