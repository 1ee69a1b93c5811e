"""The steps of a generation, in legs: where the model, the frames, the size or the caches change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.checkpoint import Checkpoint
from ..diffusion.schedule import NoiseSchedule, Plan
from ..errors import UsageError, called
from ..nets.attend import compute, to_first_frame
from .canvas import Canvas
from .options import Control, Options
from .starts import Draw, Enlarged, Moved, Redraw, go_on
from .subject import DDIM

DEFAULT_HIRES = 0.7  # strength, as A1111 has it
CLIP_FPS = 4
CLIP_MOTION = 12.0, 12.0
CLIP_LEVELS = 0.88, 0.94  # shares of the steps that follow t0 and t1
_LATENT = {"latent": "bilinear", "latent-antialias": "bilinear-antialias"} | {
    f"latent-{how}": how for how in ("bicubic", "bicubic-antialias", "nearest", "nearest-exact")
}


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


def legs_for(
    models: Sequence[Checkpoint],
    plans: Sequence[Plan],
    schedule: NoiseSchedule,
    asked: Options,
    scale: float,
    said: dict[str, Any],
    canvas: Canvas,
) -> list[Leg]:
    """models, and the plan of each: the model, and perhaps its refiner; schedule: the model's; scale: guidance's; said:
    options, complete, that only a video, a class or a second pass has.

    Raises:
        UsageError: a second pass has no steps.
    """
    legs = [
        Leg(plan, None, told=scale, model=number)
        if model.unet_config.time_cond_proj_dim is not None
        else Leg(plan, _guidance(scale, said), model=number)
        for number, (model, plan) in enumerate(zip(models, plans, strict=True))
    ]
    legs[0] = replace(legs[0], controls=canvas.controls(asked, canvas.height, canvas.width))  # for the base model
    if "t0" in said:
        return _loops(legs[0], schedule, said)
    if "frames" in said:
        attend = compute if models[0].video else to_first_frame
        legs[0] = replace(legs[0], frames=(said["frames"],), attend=attend)
    if "hires_scale" in said:
        factor = models[0].vae_config.factor
        over = _over(legs[0], schedule, said, canvas.height, canvas.width, factor)
        size = over.start.height * factor, over.start.width * factor
        legs.append(replace(over, controls=canvas.controls(asked, *size)))
    return legs


def grown(side: int, scale: float) -> int:
    """So many times as long, in whole latents."""
    return round(side * scale)


def schedule_for(checkpoint: Checkpoint, asked: Options, moved: bool = False) -> NoiseSchedule:
    """The noise schedule: of what is asked for, and else the model's own; moved: for a video whose latents are."""
    said = {"timesteps": asked.timesteps} if asked.timesteps is not None else {}
    said |= {"eta": asked.eta} if asked.eta else {}
    name = DDIM if moved or (said and asked.scheduler is None) else asked.scheduler
    said |= {"clip": asked.clip == "on"} if asked.clip != "auto" else {}
    return checkpoint.schedule(name, **said)


def handover(
    schedule: NoiseSchedule, refiner: Checkpoint, steps: int, start: int, share: float, asked: Options
) -> list[Plan]:
    """The base model's plan, which stops when this share of the noise schedule has gone by, and the refiner's.

    Raises:
        UsageError: one of them has no steps, or there is a mask.
    """
    if asked.mask is not None or asked.outpaint is not None:
        raise UsageError(f"a mask and a refiner do not go together; refine the result as another's {called('image')}")
    its = schedule_for(refiner, asked)
    stop, first = schedule.handover(steps, share), its.handover(steps, share)
    if stop <= start:
        raise UsageError(
            f"{called('refiner_start')} = {share} leaves the base model no steps; make it larger, or use more steps"
        )
    if first >= len(its.plan(steps).steps):
        raise UsageError(
            f"{called('refiner_start')} = {share} leaves the refiner no steps; make it smaller, or use more steps"
        )
    return [schedule.plan(steps, start, stop), its.plan(steps, first)]


def of_clip(asked: Options, steps: int) -> dict[str, Any]:
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


def of_hires(asked: Options, steps: int, refiner: Checkpoint | None) -> dict[str, Any]:
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
