"""What drawing would do, before anything is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...checkpoints.checkpoint import Checkpoint
    from ...generation.settings import Leg, Settings

FULL, CACHED, DECIDED = "F", "c", "?"  # while it is drawn
TOKENS = 77  # of a prompt that is not long


def plan_of(settings: Settings, checkpoint: Checkpoint) -> dict:
    """Settings, a letter a step, and the U-Net's share of the work of an uncached run: None where it is not known
    beforehand, because a cache decides on the way or leaves out other work than DeepCache does."""
    from ...generation.options import Options, options_of

    letters = [_letters(settings, leg) for leg in settings.legs]
    steps = "".join(letters)
    said = {o.key: o.record(settings.options) for o in options_of(Options) if o.recorded}
    return {
        "settings": {"prompt": settings.prompts[0], **said, "seed": list(settings.seeds)},
        "steps": steps,
        "full_steps": steps.count(FULL),
        "cached_steps": steps.count(CACHED),
        "unet_macs_share": _share(settings, checkpoint, letters),
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


def _share(settings: Settings, checkpoint: Checkpoint, letters: list[str]) -> float | None:
    from ...cache.macs import unet_macs

    cache, refined = settings.cache, any(leg.model for leg in settings.legs)
    if (
        any(DECIDED in steps for steps in letters)
        or cache.attention is not None
        or cache.guidance is not None
        or refined
    ):
        return None
    unet, done, all_of_it = checkpoint.module("unet"), 0, 0
    for leg, steps in zip(settings.legs, letters, strict=True):
        full, cached = unet_macs(unet, settings.latent_size(leg), cache.branch, TOKENS)
        done += steps.count(FULL) * full + steps.count(CACHED) * cached
        all_of_it += len(steps) * full
    return done / all_of_it
