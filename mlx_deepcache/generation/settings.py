"""A generation's settings: the options with nothing left open, and what follows from them; all checked beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache import prices
from ..cache.composition import Caches
from ..cache.deepcache import DeepCache
from ..cache.text import parse, write
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import find_prices
from ..errors import UsageError, called
from ..fields import unicode_text, valued
from .canvas import Canvas
from .declared import option_of, options_of, taken
from .labels import number_of
from .legs import Leg, grown, handover, legs_for, of_clip, of_hires, schedule_for
from .options import CLIPS, LABELLED, VIDEO, VIDEOS, Options, filled
from .starts import FirstFrame, FromNoise, FromPicture, SameNoise, read_latents, take_latents
from .subject import subject_of

DEFAULT_INTERVAL = 3
FEWEST_STEPS_TO_CACHE = 10  # below this, steps differ too much for features to be reused
DEFAULT_HANDOVER = 0.8


@dataclass(frozen=True)
class Settings:
    """What to draw and how, complete and checked; `settings_for` makes it. The options are attributes too.

    prompts, seeds: one of each a picture; legs: the steps, where models, frames or caches change; latent_shape: of one
    picture or frame, (h, w, C); cache: what is reused, and when; start: what it starts from; noise: of `shape`, given
    instead of the seeds' own; cache_choice: why `cache auto` chose what it did.
    """

    options: Options
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    legs: tuple[Leg, ...]
    latent_shape: tuple[int, ...]
    cache: Caches
    start: FromNoise | FromPicture | FirstFrame | SameNoise
    noise: mx.array | None = None
    cache_choice: str | None = None

    def __post_init__(self):
        if self.noise is not None and self.noise.shape != self.shape:
            want, got = self.shape, self.noise.shape
            what = "pictures" if len(want) == 4 else "videos"
            note = f", (N, {'frames, ' * (what == 'videos')}height, width, channels),"
            if isinstance(self.options.latents, (str, Path)):  # a file has PyTorch's layout
                want, got, note = *((*n, c, h, w) for *n, h, w, c in (want, got)), ""
            elif got[:-3] + got[-2:] + got[-3:-2] == want:
                last = len(got) - 1
                note += f" and these have channels first: transpose{(*range(last - 2), last - 1, last, last - 2)} them;"
            raise UsageError(
                f"latents should have shape {want}{note} for {len(self.seeds)} {what} of {self.width} x {self.height}"
                f", got {got}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the latents that the batch starts from, (N, h, w, C) or, where all frames are there, (N, F, h, w, C)."""
        return len(self.seeds), *self.legs[0].frames, *self.latent_shape

    def latent_size(self, leg: Leg) -> tuple[int, int]:
        """(h, w) of a leg's latents."""
        height, width, _ = self.latent_shape
        return grown(height, leg.scale), grown(width, leg.scale)

    def size(self, leg: Leg) -> tuple[int, int]:
        """(height, width) of its pictures."""
        factor = self.height // self.latent_shape[0]
        return tuple(factor * side for side in self.latent_size(leg))

    def __getattr__(self, name: str) -> Any:
        if name == "options" or name.startswith("__"):  # while it is copied there is none yet
            raise AttributeError(name)
        return getattr(self.options, name)

    def batch(self, prompt: str, rows: slice) -> Settings:
        """The same for some of the pictures, all with this prompt."""
        seeds = self.seeds[rows]
        noise = None if self.noise is None else self.noise[rows]
        return replace(self, prompts=(prompt,) * len(seeds), seeds=seeds, noise=noise)


def settings_for(
    checkpoint: Checkpoint, prompt: str | Sequence[str] | None = None, *, refiner: Checkpoint | None = None, **options
) -> Settings:
    """Fill in the checkpoint's defaults and check everything, before any work is done.

    prompt: one for all seeds, or one a seed; None for a model that reads a picture; refiner: takes over when
    `refiner_start` (0.8) of the noise schedule has gone by; options: see `Options`. Of those, `cache` takes policies as
    values or as text, see `cache.text.parse`, in place of the default (an interval of 3, or 1 below 10 steps and for a
    few-step model); `cache_interval` and `cache_branch` join them. "auto" is the cheapest one of which every calibrated
    picture had `min_psnr` (dB) or more to the uncached one, or the nearest within `max_macs`, see `cache.prices`.

    Raises:
        UsageError: a value that cannot be; says which are possible.
        Failure: a picture cannot be read.
    """
    if "prompt_weights" in options:  # its name until 0.1
        options["plain_prompt"] = not option_of(Options, "plain_prompt").take(options.pop("prompt_weights"))
    asked: Options = taken(Options, options)
    if not asked.seeds:
        raise UsageError("at least one seed is needed, one a picture")
    kind = subject_of(checkpoint, asked, prompt, refiner)
    prompts = _prompts("" if prompt is None else prompt, len(asked.seeds))
    family = checkpoint.family
    if not family.second_prompt and not (asked.prompt_2 is None and asked.negative_prompt_2 is None):
        raise UsageError("a second prompt is for SDXL's second text encoder, and this model has only one")
    for model in (checkpoint,) if refiner is None else (checkpoint, refiner):
        _check_skip(model, asked.clip_skip or 0)

    schedule = schedule_for(checkpoint, asked, moved=kind == CLIPS and not asked.controls)
    steps, scale = filled(asked, checkpoint, "steps"), filled(asked, checkpoint, "guidance_scale")
    strength, left_out = _share(checkpoint, steps, asked)
    share = asked.refiner_start
    if refiner is not None:
        share = DEFAULT_HANDOVER if share is None else share
        models, plans = [checkpoint, refiner], handover(schedule, refiner, steps, left_out, share, asked)
    elif share is None:
        models, plans = [checkpoint], [schedule.plan(steps, left_out)]
    else:
        raise UsageError(f"{called('refiner_start')} has no meaning without a {called('refiner')}")
    canvas = Canvas.of(checkpoint, asked, asked.frames if kind == CLIPS else None)
    height, width, latent = canvas.height, canvas.width, checkpoint.vae_config
    latent_shape = (height // latent.factor, width // latent.factor, latent.latent_channels)
    said = _said(checkpoint, asked, kind, steps, refiner)
    start = _start(checkpoint, asked, canvas, said, strength, latent_shape)
    legs = legs_for(models, plans, schedule, asked, scale, said, canvas)
    run = len(plans[0].steps) if left_out else steps
    here = {"steps": run, "scheduler": schedule.name, "guidance_scale": scale, "height": height, "width": width}
    cache, choice = _cache(checkpoint, asked, models, legs, here, off=steps - left_out < FEWEST_STEPS_TO_CACHE)
    complete = replace(
        asked,
        steps=steps,
        scheduler=schedule.name,
        guidance_scale=scale,
        height=height,
        width=width,
        strength=strength,
        fit=canvas.fit if asked.mask_padding is None else None,
        refiner_start=share,
        cache=None if asked.cache is None else tuple(write(policy) for policy in cache.policies),
        cache_interval=getattr(cache.when, "interval", None),
        cache_branch=cache.branch,
        **said,
    )
    noise = asked.latents
    if noise is not None:
        noise = read_latents(Path(noise)) if isinstance(noise, (str, Path)) else take_latents(noise)
    return Settings(complete, prompts, asked.seeds, tuple(legs), latent_shape, cache, start, noise, choice)


def _said(checkpoint: Checkpoint, asked: Options, kind: str, steps: int, refiner: Checkpoint | None) -> dict[str, Any]:
    """Those options, complete, that only some drawings have: a video's, a class, a second pass's."""
    if kind == VIDEOS:
        return {name: filled(asked, checkpoint, name) for name in _OF_VIDEOS}
    if kind == CLIPS:
        return of_clip(asked, steps)
    if kind == LABELLED:
        return {"class_label": number_of(asked.class_label, checkpoint.labels)}
    return {} if asked.hires_scale is None else of_hires(asked, steps, refiner)


_OF_VIDEOS = tuple(o.name for o in options_of(Options) if o.group == VIDEO and VIDEOS in o.only and o.model is not None)


def _start(
    checkpoint: Checkpoint,
    asked: Options,
    canvas: Canvas,
    said: dict[str, Any],
    strength: float | None,
    latent_shape: tuple[int, ...],
) -> FromNoise | FromPicture | FirstFrame | SameNoise:
    """What it starts from."""
    if checkpoint.video:
        scaling = checkpoint.vae_config.scaling_factor
        return FirstFrame(canvas.given.image, np.asarray(canvas.picture), said["noise_aug"], scaling)
    if canvas.given is not None:
        return FromPicture(canvas.given, strength, checkpoint.inpainting)
    if "frames" in said and "t0" not in said:
        return SameNoise(said["frames"], latent_shape)
    return FromNoise()


def _check_skip(checkpoint: Checkpoint, layers: int) -> None:
    """Raises UsageError if none of a text encoder's layers would be left."""
    for name in checkpoint.family.encoders if layers else ():
        most = checkpoint.part(name).config["num_hidden_layers"] - 1 - checkpoint.family.penultimate
        if layers > most:
            raise UsageError(f"{called('clip_skip')} should be at most {most} for this model's {name}, got {layers}")


def _prompts(prompt: object, n: int) -> tuple[str, ...]:
    """One prompt a seed."""
    several = isinstance(prompt, Iterable) and not isinstance(prompt, (str, bytes, Mapping))
    prompts = tuple(prompt) if several else (prompt,) * n
    for text in prompts:
        try:
            unicode_text(text)
        except (AttributeError, UnicodeError):
            raise UsageError(f"prompt should be text in UTF-8, or several in a list, got {valued(text)}") from None
    if len(prompts) != n:
        raise UsageError(f"there should be one prompt, or one a seed ({n}), got {len(prompts)}")
    return prompts


def _share(checkpoint: Checkpoint, steps: int, asked: Options) -> tuple[float | None, int]:
    """The strength, and how many steps are left out at the start."""
    masked = asked.mask is not None or asked.outpaint is not None
    if checkpoint.inpainting and not (asked.image is not None and masked):
        lacking = "an image and a mask" if asked.image is None else "a mask beside the image"
        raise UsageError(f"this model fills in parts of a picture: it needs {lacking}")
    if asked.image is None or checkpoint.video:
        if checkpoint.family.refines:
            raise UsageError("this model refines pictures: give it an image, or name it as another model's refiner")
        return None, 0
    strength = asked.strength
    if strength is None:
        family = checkpoint.family
        strength = family.inpainting_strength if masked else family.strength
    run = min(int(steps * strength), steps)
    if run < 1:
        raise UsageError(
            f"a strength of {strength} leaves none of {steps} steps to run; the least that works is "
            f"{math.ceil(1e4 / steps) / 1e4:g}, or {math.ceil(1 / strength)} steps"
        )
    return strength, steps - run


def _cache(
    checkpoint: Checkpoint, asked: Options, models: list[Checkpoint], legs: list[Leg], here: dict, *, off: bool
) -> tuple[Caches, str | None]:
    """What `cache`, `cache_interval` and `cache_branch` come to, and why; off: too few steps for a default."""
    branches = min(model.unet_config.branches for model in models)

    def check(caches: Caches) -> None:
        for leg in legs:
            try:
                caches.check(leg.plan, legs[0].guidance_scale is not None)
            except UsageError as error:
                n = len(leg.plan.steps)
                if asked.hires_scale is not None:
                    which = "first" if leg is legs[0] else "second"
                    raise UsageError(f"the {which} pass has {n} steps, with a cache of its own: {error}") from None
                if leg.model == legs[-1].model and leg is not legs[-1]:
                    raise UsageError(f"{CLIPS} begin with {n} steps that have a cache of their own: {error}") from None
                raise
        if caches.branch >= branches:
            raise UsageError(f"cache branch must be in [0, {branches}) for this U-Net, got {caches.branch}")

    given, interval, choice = asked.cache, asked.cache_interval, None
    if prices.wanted(given, interval, asked.cache_branch, asked.min_psnr, asked.max_macs):
        path = checkpoint.source.path
        price, choice = prices.choose(path, find_prices(path), asked.min_psnr, asked.max_macs, check, **here)
        given = price.cache
    policies = [parse(policy) if isinstance(policy, str) else policy for policy in given or ()]
    if given is None and interval is None:
        interval = 1 if off or checkpoint.few_step is not None else DEFAULT_INTERVAL
    if interval is not None:
        policies.append(DeepCache(interval, asked.cache_branch))
    elif asked.cache_branch:
        raise UsageError(
            f"a cache branch belongs to a cache interval: give {called('cache_interval')} too, or write branch= into "
            "the policy"
        )
    caches = Caches.of(policies)
    for policy in caches.policies:
        if checkpoint.video and not policy.videos:
            raise UsageError(f"{policy.name} is for pictures: its timesteps are those of other models than this one's")
        if checkpoint.unet_config.cross_attention_dim is None and not policy.alone:
            raise UsageError(f"{policy.name} is for models that read a prompt or a class, and this one reads nothing")
    check(caches)
    return caches, choice
