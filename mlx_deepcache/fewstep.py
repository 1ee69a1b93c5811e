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
