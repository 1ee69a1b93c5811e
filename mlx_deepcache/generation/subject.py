"""What a model draws: pictures, of a prompt, of a class or of neither, or videos; and what has no meaning with that."""

from __future__ import annotations

from ..checkpoints.checkpoint import Checkpoint
from ..errors import UsageError, called
from .declared import options_of
from .options import CLIPS, FREE, LABELLED, PICTURES, VIDEOS, Options

DDIM = "ddim"  # draws videos of a prompt, and with what its own code can be asked for


def subject_of(checkpoint: Checkpoint, asked: Options, prompt: object, refiner: Checkpoint | None) -> str:
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
