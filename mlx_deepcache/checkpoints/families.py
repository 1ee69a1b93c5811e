"""Models that are made to draw in a few steps, told from what a checkpoint says about itself.

Distilled models (Turbo, Lightning, Hyper-SD, latent consistency) need other defaults than the ones they were made of:
few steps, no guidance beside what is built in, and no cache, as neighbouring steps have little in common.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

STEPS = 4


LCM_GUIDANCE = 8.5  # diffusers' default for a U-Net that is told the scale


_NAMES = re.compile(r"(?<![a-z])(turbo|lightning|hyper[-_ ]?sd|lcm)(?![a-z])")


_COUNT = re.compile(r"(?<!\d)([1-9]|1\d)[-_ ]?steps?(?![a-z])")


@dataclass(frozen=True)
class FewStep:
    """The defaults of such a model, and by what it was known."""

    steps: int
    guidance_scale: float
    reason: str


def few_step(names: Iterable[str], scheduler: dict, told_guidance: bool) -> FewStep | None:
    """What a checkpoint says, or None if it is no such model.

    names: what it is called, by its user, in its folder's name and as `_name_or_path` in its files; scheduler: its
    scheduler_config.json; told_guidance: the U-Net reads the guidance scale (time_cond_proj_dim).

    Signs, the first that is there counts: a U-Net that is told the guidance scale; a name with turbo, lightning,
    hyper-sd or lcm in it; LCMScheduler; Euler's method from the very last timestep (timestep_spacing
    "trailing"), as Turbo has it, unless the schedule has zero terminal SNR or predicts v, which is why ordinary models
    start there.
    A name that also says for how many steps ("4step", "8-steps") decides that.
    """
    names = [name.lower() for name in names if name]
    counts = [int(match[1]) for name in names if (match := _COUNT.search(name))]
    steps = counts[0] if counts else STEPS
    if told_guidance:
        return FewStep(steps, LCM_GUIDANCE, "its U-Net is told the guidance scale")
    for name in names:
        if match := _NAMES.search(name):
            return FewStep(steps, 1.0, f"its name says {match[1]}")
    kind = str(scheduler.get("_class_name", ""))
    if kind == "LCMScheduler":
        return FewStep(steps, 1.0, "its scheduler is LCMScheduler")
    if (
        kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
        and scheduler.get("timestep_spacing") == "trailing"
        and not scheduler.get("rescale_betas_zero_snr")
        and scheduler.get("prediction_type", "epsilon") != "v_prediction"
    ):
        return FewStep(steps, 1.0, "its scheduler starts at the last timestep")
    return None


CLIP, OPEN_CLIP = "clip", "open_clip"  # the two layouts of text encoders


_OPEN_CLIP_H_LAYERS = 23  # SD 2.x uses the last but one layer's output of 24, so the last is not loaded


@dataclass(frozen=True)
class Family:
    """What the tensors of all its checkpoints have in common, and what they do not show.

    text: component -> the prefixes that its tensors may have, with their layout; head_size: of attention, or None where
    there are 8 heads everywhere.
    """

    name: str
    pipeline: str
    text: dict[str, dict[str, str]]
    head_size: int | None
    scaling_factor: float
    size: int


_SD = {"cond_stage_model.transformer.": CLIP, "cond_stage_model.model.": OPEN_CLIP}


_SD1 = Family("Stable Diffusion 1.x", "StableDiffusion", {"text_encoder": _SD}, None, 0.18215, 512)


_SD2 = Family("Stable Diffusion 2.x", "StableDiffusion", {"text_encoder": _SD}, 64, 0.18215, 768)


_XL_TEXT = {
    "text_encoder": {"conditioner.embedders.0.transformer.": CLIP},
    "text_encoder_2": {"conditioner.embedders.1.model.": OPEN_CLIP},
}


_XL = Family("SDXL", "StableDiffusionXL", _XL_TEXT, 64, 0.13025, 1024)


_REFINER_TEXT = {"text_encoder_2": {"conditioner.embedders.0.model.": OPEN_CLIP}}


_REFINER = Family("SDXL refiner", "StableDiffusionXLImg2Img", _REFINER_TEXT, 64, 0.13025, 1024)


_SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
