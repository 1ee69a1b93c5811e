"""What to draw and how: the checkpoint's defaults filled in, and everything checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL.Image import Image

from ..cache import prices
from ..cache.composition import KINDS, Caches, Policy
from ..cache.deepcache import DeepCache
from ..cache.text import parse
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import find_prices
from ..diffusion.noise import GENERATORS
from ..diffusion.schedule import NoiseSchedule, Plan
from ..errors import UsageError
from ..media.pictures import FITS, Given, read_mask, read_picture, size_for, source
from ..nets.tiling import TILINGS
from .options import DEFAULT_INTERVAL, DEFAULT_STEPS, FEWEST_STEPS_TO_CACHE, Control


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
    cache: Caches
    plan: Plan
    vae_tiling: str
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    prompt_weights: bool = True
    long_prompt: bool = False
    source: Given | None = None
    strength: float | None = None
    fit: str | None = None
    controls: tuple[Control, ...] = ()
    control_every_step: bool = False
    refiner_start: float | None = None
    refiner_plan: Plan | None = None
    cache_choice: str | None = None


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
    prompt_2: str | None = None,
    negative_prompt_2: str | None = None,
    prompt_weights: bool = True,
    long_prompt: bool = False,
    image: Path | str | Image | None = None,
    mask: Path | str | Image | None = None,
    strength: float | None = None,
    fit: str | None = None,
    controls: Sequence[Control] = (),
    control_every_step: bool = False,
    refiner: Checkpoint | None = None,
    refiner_start: float | None = None,
    cache: Policy | str | Sequence[Policy | str] | None = None,
    min_psnr: float | None = None,
    max_macs: float | None = None,
) -> Settings:
    """Fill in the checkpoint's defaults and check everything, before any work is done.

    prompt: one for all seeds, or one a seed; steps: 50, or what a few-step model wants; guidance_scale: the
    checkpoint's, 1 or less turns guidance off; height, width: pixels, the checkpoint's own size; scheduler: one of
    `SCHEDULERS`, the checkpoint's own; rng: torch, torch-cuda or mlx; cache_interval: 3, or 1 (no caching) below 10
    steps and for a few-step model (see `fewstep`); cache: policies in place of that default, as values or as text, see
    `policies` and `policy_text.parse`; cache_interval and cache_branch join them; vae_tiling: auto (when memory is
    short), on or off.

    prompt_2, negative_prompt_2: what SDXL's second text encoder reads in place of the others; prompt_weights: read
    (word:1.3) and [word], see `emphasis`; long_prompt: use all of a prompt of more than 75 tokens.

    image: a picture to start from, a file or Pillow's; the default size is then its own, see `pictures.size_for`;
    mask: white where it should change; strength: how much to change, in (0, 1]: the share of the steps that is run,
    the last ones; 0.8, for SDXL 0.3, with a mask 1, for SDXL 0.9999 (diffusers' own); fit: one of `FITS`.

    controls: ControlNets; without an `image`, the first one's picture gives the default size; control_every_step: run
    them on cached steps too, where else the last full step's residuals serve.

    refiner: takes over when `refiner_start` (0.8) of the noise schedule has gone by.

    cache "auto": the cheapest one of which every calibrated picture had min_psnr (dB) or more to the uncached one, or
    the nearest within max_macs (a share of the multiply-adds), see `cache.prices`; `cache_choice` says why.

    Raises:
        UsageError: a value that cannot be; says which are possible.
        Failure: a picture cannot be read.
    """
    few = checkpoint.few_step
    if steps is None:
        steps = DEFAULT_STEPS if few is None else few.steps
    schedule = checkpoint.schedule(scheduler)
    for control in controls:
        if not abs(control.scale) < math.inf:
            raise UsageError(f"a ControlNet's scale should be a number, got {control.scale}")
        if not 0 <= control.start < control.end <= 1:
            raise UsageError(
                f"a ControlNet should start before it ends, both in [0, 1], got {control.start} and {control.end}"
            )
    if fit is not None and fit not in FITS:
        raise UsageError(f"fit should be one of {', '.join(FITS)}, got {fit!r}")
    if fit is not None and image is None and not controls:
        raise UsageError("fit has no meaning without an image")
    if checkpoint.refiner and image is None:
        raise UsageError("this model refines pictures: give it an image, or name it as another model's refiner")
    strength, start = _start(checkpoint, steps, image, mask, strength)
    followed = [read_picture(control.image) for control in controls]
    if image is not None:
        image = read_picture(image)
        mask = None if mask is None else read_mask(mask)
    if image is not None or followed:
        first = followed[0] if image is None else image
        height, width = size_for(first, height, width, checkpoint.vae_config.factor)
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
    if not checkpoint.xl and not (prompt_2 is None and negative_prompt_2 is None):
        raise UsageError("a second prompt is for SDXL's second text encoder, and this model has only one")
    if not seeds:
        raise UsageError("at least one seed is needed, one a picture")
    scale = checkpoint.guidance_scale if guidance_scale is None else guidance_scale
    stop, refiner_plan = None, None
    if refiner is not None:
        refiner_start = 0.8 if refiner_start is None else refiner_start
        stop, refiner_plan = _handover(schedule, refiner, steps, start, refiner_start, scheduler)
        if mask is not None:
            raise UsageError("a mask and a refiner do not go together; refine the result with --image")
    elif refiner_start is not None:
        raise UsageError("refiner_start has no meaning without a refiner")
    plan = schedule.plan(steps, start, stop)
    branches = min(c.unet_config.branches for c in (checkpoint, refiner) if c is not None)

    def check(caches: Caches) -> None:
        for part in (plan, refiner_plan):
            if part is not None:
                caches.check(len(part.steps), scale > 1 and checkpoint.unet_config.time_cond_proj_dim is None)
        if caches.branch >= branches:
            raise UsageError(f"cache branch must be in [0, {branches}) for this U-Net, got {caches.branch}")

    choice = None
    if prices.wanted(cache, cache_interval, cache_branch, min_psnr, max_macs):
        price, choice = prices.choose(
            checkpoint.source.path,
            find_prices(checkpoint.source.path),
            min_psnr,
            max_macs,
            check,
            steps=len(plan.steps) if start else steps,
            scheduler=schedule.name,
            guidance_scale=scale,
            height=height,
            width=width,
        )
        cache = price.cache
    caches = _caches(cache, cache_interval, cache_branch, off=few is not None or steps - start < FEWEST_STEPS_TO_CACHE)
    check(caches)
    prompts = (prompt,) * len(seeds) if isinstance(prompt, str) else tuple(prompt)
    if len(prompts) != len(seeds):
        raise UsageError(f"there should be one prompt, or one a seed ({len(seeds)}), got {len(prompts)}")
    return Settings(
        prompts,
        negative_prompt,
        steps,
        scale,
        height,
        width,
        tuple(seeds),
        schedule.name,
        rng,
        caches,
        plan,
        vae_tiling,
        prompt_2,
        negative_prompt_2,
        prompt_weights,
        long_prompt,
        None if image is None else source(image, mask, height, width, fit or FITS[0]),
        strength,
        None if image is None and not controls else fit or FITS[0],
        tuple(
            replace(control, image=source(picture, None, height, width, fit or FITS[0]).image)
            for control, picture in zip(controls, followed, strict=True)
        ),
        control_every_step,
        refiner_start,
        refiner_plan,
        choice,
    )


def _handover(schedule: NoiseSchedule, refiner: Checkpoint, steps: int, start: int, share: float, name: str | None):
    """The step at which the base model stops, and the refiner's plan."""
    if not 0 < share < 1:
        raise UsageError(f"refiner_start should be between 0 and 1, got {share}")
    its = refiner.schedule(name)
    stop, first = schedule.handover(steps, share), its.handover(steps, share)
    if stop <= start:
        raise UsageError(f"refiner_start = {share} leaves the base model no steps; make it larger, or use more steps")
    if first >= len(its.plan(steps).steps):
        raise UsageError(f"refiner_start = {share} leaves the refiner no steps; make it smaller, or use more steps")
    return stop, its.plan(steps, first)


def _start(checkpoint: Checkpoint, steps: int, image, mask, strength) -> tuple[float | None, int]:
    """The strength, and how many steps are left out at the start."""
    if image is None:
        for name, value in (("mask", mask), ("strength", strength)):
            if value is not None:
                raise UsageError(f"{name} has no meaning without an image to start from")
        if checkpoint.inpainting:
            raise UsageError("this model fills in parts of a picture: it needs an image and a mask")
        return None, 0
    if mask is None and checkpoint.inpainting:
        raise UsageError("this model fills in parts of a picture: it needs a mask beside the image")
    if strength is None:
        strength = (0.3 if checkpoint.xl else 0.8) if mask is None else 0.9999 if checkpoint.xl else 1.0
    if not 0 < strength <= 1:
        raise UsageError(f"strength should be above 0 and at most 1, got {strength}")
    run = min(int(steps * strength), steps)
    if run < 1 <= steps:
        raise UsageError(
            f"a strength of {strength} leaves none of {steps} steps to run; the least that works is "
            f"{math.ceil(1e4 / steps) / 1e4:g}, or {math.ceil(1 / strength)} steps"
        )
    return strength, steps - run


def _caches(given: Policy | str | Sequence | None, interval: int | None, branch: int, *, off: bool) -> Caches:
    """What `cache`, `cache_interval` and `cache_branch` come to; off: by default there is none."""
    if isinstance(given, (str, *KINDS)):
        given = [given]
    policies = [parse(policy) if isinstance(policy, str) else policy for policy in given or ()]
    if given is None and interval is None:
        interval = 1 if off else DEFAULT_INTERVAL
    if interval is not None:
        policies.append(DeepCache(interval, branch))
    elif branch:
        raise UsageError("a cache branch belongs to a cache interval: give that too, or write branch= into the policy")
    return Caches.of(policies)
