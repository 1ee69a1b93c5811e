"""A generation's settings: the options with nothing left open, and what follows from them; all checked beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..cache import prices
from ..cache.composition import Caches
from ..cache.deepcache import DeepCache
from ..cache.text import parse, write
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import find_prices
from ..diffusion.schedule import NoiseSchedule, Plan
from ..errors import UsageError, called
from ..fields import unicode_text, valued
from ..media.pictures import FITS, around, extended, read_mask, read_picture, rounded, size_for, source
from ..media.video import read_frames
from ..nets.attend import compute, to_first_frame
from .labels import number_of
from .options import CLIPS, FREE, LABELLED, PICTURES, VIDEO, VIDEOS, Control, Options, option_of, options_of, taken
from .starts import (
    Draw,
    Enlarged,
    FirstFrame,
    FromNoise,
    FromPicture,
    Moved,
    Redraw,
    SameNoise,
    go_on,
    read_latents,
    take_latents,
)

DEFAULT_INTERVAL = 3
FEWEST_STEPS_TO_CACHE = 10  # below this, steps differ too much for features to be reused
DEFAULT_HANDOVER = 0.8
DEFAULT_HIRES = 0.7  # strength, as A1111 has it
VIDEO_MULTIPLE = 64  # pixels, of the sides of a video that are chosen for it
DDIM = "ddim"  # draws videos of a prompt, and with what its own code can be asked for
CLIP_FPS = 4
CLIP_MOTION = 12.0, 12.0
CLIP_LEVELS = 0.88, 0.94  # shares of the steps that follow t0 and t1


@dataclass(frozen=True)
class Leg:
    """A share of the steps, with caches of its own. model: which one takes them, 0, or 1 for the refiner; start: what
    a later leg starts from; frames: (F,) of a video, else (); scale: of the picture's sides, to the settings' own;
    where it is not 1, noise is drawn from the seeds anew; attend: how attention layers are run; guidance_scale: applied
    to the U-Net's outputs, of Stable Video Diffusion's one a frame, or None where it is run as it is; told: the scale
    that an LCM's U-Net is told instead; controls: ControlNets, their pictures read and fitted."""

    plan: Plan
    guidance_scale: float | tuple[float, ...] | None
    told: float | None = None
    controls: tuple[Control, ...] = ()
    model: int = 0
    start: Callable[[Sequence[mx.array], Draw, Redraw], mx.array] = go_on
    frames: tuple[int, ...] = ()
    scale: float = 1
    attend: Callable[..., mx.array] = compute

    @property
    def redraws(self) -> bool:
        """Whether it starts from a picture of what the one before it drew."""
        return isinstance(self.start, Enlarged) and self.start.how is None


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


def grown(side: int, scale: float) -> int:
    """So many times as long, in whole latents."""
    return round(side * scale)


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
    kind = _check_kind(checkpoint, asked, prompt, refiner)
    prompts = _prompts("" if prompt is None else prompt, len(asked.seeds))
    family = checkpoint.family
    if not family.second_prompt and not (asked.prompt_2 is None and asked.negative_prompt_2 is None):
        raise UsageError("a second prompt is for SDXL's second text encoder, and this model has only one")
    for model in (checkpoint,) if refiner is None else (checkpoint, refiner):
        _check_skip(model, asked.clip_skip or 0)

    moved = kind == CLIPS and not asked.controls
    schedule = _schedule(checkpoint, asked, moved)
    steps, scale = _filled(asked, checkpoint, "steps"), _filled(asked, checkpoint, "guidance_scale")
    strength, left_out = _share(checkpoint, steps, asked)
    stop, handover, second = None, None, None
    if refiner is not None:
        handover = DEFAULT_HANDOVER if asked.refiner_start is None else asked.refiner_start
        stop, second = _handover(schedule, refiner, steps, left_out, handover, asked)
    elif asked.refiner_start is not None:
        raise UsageError(f"{called('refiner_start')} has no meaning without a {called('refiner')}")

    read = partial(read_frames, frames=asked.frames) if kind == CLIPS else _only
    picture, followed = asked.image, [read(control.image) for control in asked.controls]
    fit = None if picture is None and not followed else asked.fit or FITS[0]
    if picture is not None:
        picture = read_picture(picture)
    mask = None if asked.mask is None else read_mask(asked.mask)
    if asked.outpaint is not None:
        picture, mask = extended(picture, mask, asked.outpaint)
    if asked.mask_padding is not None:
        if asked.fit is not None:
            name, padding = called("fit"), called("mask_padding")
            raise UsageError(f"{name} does not go with {padding}: what is drawn is cut out in its proportions")
        height, width = _size(checkpoint, asked)
    elif asked.outpaint is not None and asked.height is None and asked.width is None:  # its pixels are to stay
        height, width = (rounded(side, checkpoint.multiple) for side in (picture.height, picture.width))
    else:
        height, width = _size(
            checkpoint, asked, *([] if picture is None else [picture]), *(pictures[0] for pictures in followed)
        )
    start = FromNoise()
    said = {}
    if checkpoint.video:
        said = {name: _filled(asked, checkpoint, name) for name in _OF_VIDEOS}
        shown = source(picture, None, height, width, fit).image
        start = FirstFrame(shown, np.asarray(picture), said["noise_aug"], checkpoint.vae_config.scaling_factor)
    elif kind == CLIPS:
        said = _of_clip(asked, steps)
    elif kind == LABELLED:
        said = {"class_label": number_of(asked.class_label, checkpoint.labels)}
    if picture is not None and not checkpoint.video:
        if asked.mask_padding is None:
            given = source(picture, mask, height, width, fit, asked.mask_blur)
        else:
            given, fit = around(picture, mask, height, width, asked.mask_padding, asked.mask_blur), "pad"
            followed = [[image.resize(picture.size).crop(given.box) for image in pictures] for pictures in followed]
        start = FromPicture(given, strength, checkpoint.inpainting)

    def controls(height: int, width: int) -> tuple[Control, ...]:
        return tuple(
            replace(control, image=np.stack([source(image, None, height, width, fit).image for image in pictures]))
            for control, pictures in zip(asked.controls, followed, strict=True)
        )

    models = [checkpoint] if refiner is None else [checkpoint, refiner]
    plans = [schedule.plan(steps, left_out, stop), *([] if second is None else [second])]
    legs = [
        Leg(plan, None, told=scale, model=number)
        if model.unet_config.time_cond_proj_dim is not None
        else Leg(plan, _guidance(scale, said), model=number)
        for number, (model, plan) in enumerate(zip(models, plans, strict=True))
    ]
    legs[0] = replace(legs[0], controls=controls(height, width))  # a ControlNet is for the base model
    if kind == VIDEOS:
        legs[0] = replace(legs[0], frames=(said["frames"],))
    elif kind == CLIPS and not moved:
        legs[0] = replace(legs[0], frames=(said["frames"],), attend=to_first_frame)
    elif kind == CLIPS:
        legs = _loops(legs[0], schedule, said)
    if asked.hires_scale is not None:
        said, factor = _of_hires(asked, steps, refiner), checkpoint.vae_config.factor
        over = _over(legs[0], schedule, said, height, width, factor)
        legs.append(replace(over, controls=controls(over.start.height * factor, over.start.width * factor)))
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
        fit=fit if asked.mask_padding is None else None,
        refiner_start=handover,
        cache=None if asked.cache is None else tuple(write(policy) for policy in cache.policies),
        cache_interval=getattr(cache.when, "interval", None),
        cache_branch=cache.branch,
        **said,
    )
    noise = asked.latents
    if noise is not None:
        noise = read_latents(Path(noise)) if isinstance(noise, (str, Path)) else take_latents(noise)
    latent = checkpoint.vae_config
    latent_shape = (height // latent.factor, width // latent.factor, latent.latent_channels)
    if kind == CLIPS and not moved:
        start = SameNoise(asked.frames, latent_shape)
    return Settings(complete, prompts, asked.seeds, tuple(legs), latent_shape, cache, start, noise, choice)


_OF_VIDEOS = tuple(o.name for o in options_of(Options) if o.group == VIDEO and VIDEOS in o.only and o.model is not None)


def _check_kind(checkpoint: Checkpoint, asked: Options, prompt: object, refiner: Checkpoint | None) -> str:
    """What is drawn: pictures, of a prompt, of a class or of neither, videos, or videos of a prompt.

    Raises:
        UsageError: for what has no meaning with these, or lacks.
    """
    family = checkpoint.family
    if family.text:
        kind = PICTURES if asked.frames is None else CLIPS
    else:
        kind = VIDEOS if checkpoint.video else FREE if family.labelled is None else LABELLED
    for o in options_of(Options):
        value = getattr(asked, o.name)
        same = value is None or value is o.default or (type(value) is type(o.default) and value == o.default)
        unguided = o.name == "guidance_scale" and value == 1
        if o.only is None or kind in o.only or same or unguided:  # an array is never compared
            continue
        if kind == PICTURES and CLIPS in o.only:
            raise UsageError(
                f"{called(o.name)} is for {CLIPS}: {family.name} draws a picture without {called('frames')}"
            )
        if kind == CLIPS:
            raise UsageError(f"{called(o.name)} does not go with {called('frames')}: it has no meaning for {CLIPS}")
        if kind in (FREE, LABELLED):
            raise UsageError(f"{called(o.name)} has no meaning for {family.name}, which draws {kind}")
        raise UsageError(f"{called(o.name)} is for models of {o.only[0]}, and this one, {family.name}, draws {kind}")
    if family.text:
        if prompt is None:
            raise UsageError(f"{family.name} draws from text: give it a {called('prompt')}")
        if kind == CLIPS:
            _check_clip(checkpoint, asked, refiner)
        return kind
    prompted = any(prompt if isinstance(prompt, (list, tuple)) else [prompt])
    if kind in (FREE, LABELLED):
        _check_unprompted(checkpoint, asked, prompted)
        return kind
    if prompted:
        raise UsageError(
            f"{family.name} reads a picture and no prompt; leave the prompt out, and give {called('image')}"
        )
    if asked.image is None:
        raise UsageError(f"{family.name} makes a video of a picture: give {called('image')}")
    if refiner is not None:
        raise UsageError(f"{called('refiner')} is for pictures, and {family.name} draws videos")
    if asked.vae_tiling == "on":
        raise UsageError(f"videos are not decoded in tiles; {called('decode_chunk')} takes less memory too")
    return kind


def _check_unprompted(checkpoint: Checkpoint, asked: Options, prompted: bool) -> None:
    """Raises UsageError for what has no meaning without a prompt, or without a VAE, or for a class that lacks."""
    name, decodes, labels = checkpoint.family.name, checkpoint.family.decodes, checkpoint.labels
    if labels is not None and asked.class_label is None:
        raise UsageError(
            f"{name} draws one of {labels.without} classes: give {called('class_label')}, its number or name"
            + (", and no prompt" if prompted else "")
        )
    if prompted:
        raise UsageError(f"{name} reads no prompt: leave the prompt out")
    if asked.image is not None and not decodes:
        raise UsageError(f"{name} draws from noise alone: leave {called('image')} out")
    if asked.vae_tiling == "on" and not decodes:
        raise UsageError(f"{name} has no VAE: leave {called('vae_tiling', 'on')} out")


def _check_clip(checkpoint: Checkpoint, asked: Options, refiner: Checkpoint | None) -> None:
    """Raises UsageError for what cannot make a video of a prompt."""
    family, frames = checkpoint.family, called("frames")
    if asked.image is not None:
        svd = called("model", "svd")
        raise UsageError(f"{family.name} makes a video of a prompt alone: leave out {called('image')}, or use {svd}")
    if family.refines or refiner is not None:
        raise UsageError(f"{called('refiner')} is for pictures: it has no meaning for {CLIPS}")
    if checkpoint.inpainting or checkpoint.unet_config.time_cond_proj_dim is not None:
        other = "fills in pictures" if checkpoint.inpainting else "draws in a few steps of its own"
        raise UsageError(f"{CLIPS} need an ordinary model, and this one {other}; leave out {frames}")
    if asked.frames < 2:
        raise UsageError(f"{frames} should be 2 or more for {CLIPS}, got {asked.frames}; without it one is drawn")
    if asked.controls:
        for name in ("motion", "t0", "t1"):
            if getattr(asked, name) is not None:
                raise UsageError(f"{called(name)} does not go with {called('controls')}: its pictures say what moves")
    elif asked.scheduler not in (None, DDIM):
        raise UsageError(f"{CLIPS} are drawn with {DDIM}; leave out {called('scheduler', asked.scheduler)}")


def _of_clip(asked: Options, steps: int) -> dict[str, Any]:
    """What is said of a video of a prompt; t0 and t1 are the paper's share of the steps. Where ControlNets say what
    moves, nothing else does."""
    if asked.controls:
        return {"frames": asked.frames, "fps": asked.fps or CLIP_FPS}
    t1 = min(max(round(CLIP_LEVELS[1] * steps), 1), steps - 1) if asked.t1 is None else asked.t1
    t0 = max(min(round(CLIP_LEVELS[0] * steps), t1 - 1), 0) if asked.t0 is None else asked.t0
    if not t0 < t1 < steps:
        names = f"{called('t0')}, {called('t1')} and {called('steps')}"
        raise UsageError(f"{names} should rise from one to the next, got {t0}, {t1} and {steps}")
    fps, motion = asked.fps or CLIP_FPS, asked.motion or CLIP_MOTION
    return {"frames": asked.frames, "fps": fps, "motion": motion, "t0": t0, "t1": t1}


def _of_hires(asked: Options, steps: int, refiner: Checkpoint | None) -> dict[str, Any]:
    """What is said of a second pass over what was drawn small.

    Raises:
        UsageError: for what does not go with it.
    """
    scale = called("hires_scale")
    if asked.image is not None:
        raise UsageError(f"{scale} enlarges what is drawn from a prompt alone: leave out {called('image')}")
    if refiner is not None:
        raise UsageError(f"{scale} and a refiner do not go together; refine the result as another's {called('image')}")
    upscaler = asked.hires_upscaler or ("latent" if asked.hires_net is None else "lanczos")
    if asked.hires_net is not None and upscaler != "lanczos":
        latents = called("hires_upscaler", upscaler)
        raise UsageError(f"{called('hires_net')} enlarges the picture, and {latents} its latents; leave one out")
    strength = DEFAULT_HIRES if asked.hires_strength is None else asked.hires_strength
    return {
        "hires_scale": asked.hires_scale,
        "hires_steps": asked.hires_steps or steps,
        "hires_strength": strength,
        "hires_upscaler": upscaler,
        "hires_net": asked.hires_net,
    }


def _over(first: Leg, schedule: NoiseSchedule, said: dict, height: int, width: int, factor: int) -> Leg:
    """The second pass: the last steps of as many more as make them this share of all, as A1111 counts."""
    run, upscaler = said["hires_steps"], said["hires_upscaler"]
    total = int(run / said["hires_strength"])
    try:
        plan = schedule.plan(total, total - run)
    except UsageError as error:
        steps, strength = called("hires_steps", run), called("hires_strength", said["hires_strength"])
        raise UsageError(f"{steps} at {strength} are the last of {total}: {error}") from None
    how = None if upscaler == "lanczos" else _LATENT[upscaler]
    size = (grown(side // factor, said["hires_scale"]) for side in (height, width))
    start = Enlarged(how, *size, factor, plan.steps[0].here, said["hires_net"])
    return replace(first, plan=plan, start=start, scale=said["hires_scale"])


_LATENT = {"latent": "bilinear", "latent-antialias": "bilinear-antialias"} | {
    f"latent-{how}": how for how in ("bicubic", "bicubic-antialias", "nearest", "nearest-exact")
}


def _loops(whole: Leg, schedule: NoiseSchedule, said: dict) -> list[Leg]:
    """Text2Video-Zero's: the first frame to the level t1, on to t0, and all frames from t1 on."""
    steps = whole.plan.steps
    t1, t0 = (len(steps) - said[name] - 1 for name in ("t1", "t0"))
    moved = Moved(said["frames"], said["motion"], schedule.kept(int(steps[t0].here.t), int(steps[t1].here.t)))
    first, back, last = (
        replace(whole, plan=replace(whole.plan, steps=part)) for part in (steps[:t1], steps[t1:t0], steps[t1:])
    )
    last = replace(last, start=moved, frames=(said["frames"],), attend=to_first_frame)
    return [*([first] if t1 else []), back, last]


def _guidance(scale: float, said: dict) -> float | tuple[float, ...] | None:
    """A leg's guidance: of a video it rises from the first frame to the last."""
    if "min_guidance_scale" not in said:
        return scale if scale > 1 else None
    scales = np.linspace(said["min_guidance_scale"], scale, said["frames"], dtype=np.float32).tolist()
    return tuple(scales) if max(scales) > 1 else None


def _only(pictures: object) -> list[Image.Image]:
    """The one picture of an image that is to follow a picture.

    Raises:
        UsageError: there are several.
        Failure: it cannot be read.
    """
    several = isinstance(pictures, (list, tuple)) or len(getattr(pictures, "shape", ())) == 4
    if several and len(pictures) > 1:
        raise UsageError(f"a picture follows one picture, got {len(pictures)}; for a video, give {called('frames')}")
    return [read_picture(pictures[0] if several else pictures)]


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


def _filled(asked: Options, checkpoint: Checkpoint, name: str) -> Any:
    """An option's value, or the model's own."""
    value = getattr(asked, name)
    return getattr(checkpoint, option_of(Options, name).model) if value is None else value


def _schedule(checkpoint: Checkpoint, asked: Options, moved: bool) -> NoiseSchedule:
    """The noise schedule: of what is asked for, and else the model's own."""
    said = {"timesteps": asked.timesteps} if asked.timesteps is not None else {}
    said |= {"eta": asked.eta} if asked.eta else {}
    name = DDIM if moved or (said and asked.scheduler is None) else asked.scheduler
    said |= {"clip": asked.clip == "on"} if asked.clip != "auto" else {}
    return checkpoint.schedule(name, **said)


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


def _size(checkpoint: Checkpoint, asked: Options, *pictures) -> tuple[int, int]:
    """(height, width): what was asked for, or the model's own, in the first picture's proportions."""
    factor = checkpoint.multiple
    if pictures:
        multiple = VIDEO_MULTIPLE if checkpoint.video else factor
        height, width = size_for(pictures[0], checkpoint.native_size, asked.height, asked.width, multiple)
    else:
        height, width = (_filled(asked, checkpoint, name) for name in ("height", "width"))
    for name, value in (("height", height), ("width", width)):
        if value % factor:
            near = max(factor, round(value / factor) * factor)
            raise UsageError(
                f"{called(name)} should be a positive multiple of {factor} pixels, got {value}; try {near}"
            )
    return height, width


def _handover(
    schedule: NoiseSchedule, refiner: Checkpoint, steps: int, start: int, share: float, asked: Options
) -> tuple[int, Plan]:
    """The step at which the base model stops, and the refiner's plan."""
    if asked.mask is not None or asked.outpaint is not None:
        raise UsageError(f"a mask and a refiner do not go together; refine the result as another's {called('image')}")
    its = _schedule(refiner, asked, False)
    stop, first = schedule.handover(steps, share), its.handover(steps, share)
    if stop <= start:
        raise UsageError(
            f"{called('refiner_start')} = {share} leaves the base model no steps; make it larger, or use more steps"
        )
    if first >= len(its.plan(steps).steps):
        raise UsageError(
            f"{called('refiner_start')} = {share} leaves the refiner no steps; make it smaller, or use more steps"
        )
    return stop, its.plan(steps, first)


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
