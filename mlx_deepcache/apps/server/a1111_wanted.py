"""What AUTOMATIC1111's requests come to here."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import Failure
from ...generation.declared import options_of
from ...generation.options import Options
from ...generation.record import from_a1111
from .a1111_fields import Common, ImageToImageBase, changed, refuse, scheduler_of, skipped
from .a1111_start import enlarged, start, units
from .jobs import Wanted
from .offers import stem
from .refused import Refused
from .schema import CACHING, options_from
from .service import Service

_TASK = re.compile(r"[A-Za-z0-9()_-]{1,64}")


def wanted(service: Service, asked: Common) -> Wanted:
    """What a request asks for; see `Service.wanted`."""
    ignored: list[str] = []
    _refuse_what_lacks(asked, ignored)
    chosen, unread = changed(service, service.chosen, asked.override_settings or {})
    ignored += [f"override_settings.{name}" for name in unread]
    options = _from_infotext(asked)
    prompt = options.pop("prompt", "") if "prompt" not in asked.model_fields_set else asked.prompt
    seed = options.pop("seed", -1) if "seed" not in asked.model_fields_set else asked.seed
    options |= {"scheduler": found} if (found := scheduler_of(asked)) else {}
    said = {"steps": asked.steps, "guidance_scale": asked.cfg_scale, "negative_prompt": asked.negative_prompt or None}
    options |= {name: value for name, value in said.items() if value is not None}
    options |= {name: value // 8 * 8 for name in ("width", "height") if (value := getattr(asked, name)) is not None}
    options |= {} if asked.clip_skip is None else {"clip_skip": skipped(asked.clip_skip, "clip_skip")}
    options |= options_from(asked.model_dump(include=set(CACHING)))
    if isinstance(asked, ImageToImageBase):
        options |= start(asked, ignored)
    elif asked.enable_hr:
        options |= enlarged(asked, service.offers.upscalers)
    nets = units(asked, options.get("image"))
    if nets:
        controls, fit = nets
        options["controls"] = controls
        options.setdefault("fit", fit)
    refiner = None
    if asked.refiner_checkpoint and asked.refiner_checkpoint != "None":
        refiner = stem(asked.refiner_checkpoint)
        options["refiner_start"] = 0.8 if asked.refiner_switch_at is None else asked.refiner_switch_at
    if asked.save_images and service.outputs is None:
        ignored.append("save_images")
    if min(asked.batch_size, asked.n_iter) < 1:
        raise Refused(422, "batch_size and n_iter should be 1 or more", "invalid_value", "batch_size")
    made = service.wanted(
        prompt,
        options,
        seed=seed,
        n=asked.batch_size * asked.n_iter,
        together=asked.batch_size,
        refiner=refiner,
        tags=not asked.disable_extra_networks,
        chosen=chosen,
        ignored=ignored,
    )
    if asked.override_settings_restore_afterwards is False:
        service.chosen = replace(service.chosen, model=chosen.model)
    return made


def task(asked: Common) -> str | None:
    """The job's name, if the client gives it one."""
    if asked.force_task_id is not None and not _TASK.fullmatch(asked.force_task_id):
        told = "force_task_id should be 1 to 64 letters, digits, brackets, _ or -"
        raise Refused(422, told, "invalid_value", "force_task_id")
    return asked.force_task_id


def _refuse_what_lacks(asked: Common, ignored: list[str]) -> None:
    if asked.styles:
        raise refuse("styles", "styles")
    if asked.subseed_strength or (asked.seed_resize_from_w or 0) > 0 or (asked.seed_resize_from_h or 0) > 0:
        raise refuse("a variation of a seed (subseed_strength, seed_resize_from)", "subseed_strength")
    for name in ("restore_faces", "tiling"):
        if getattr(asked, name):
            raise refuse(name, name)
    if asked.script_name and asked.script_name != "None":
        raise Refused(422, "Script not found", "not_found", "script_name")
    neutral = {"eta": (None, 0, 1), "s_noise": (None, 1)}
    for name in ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "s_min_uncond"):
        if getattr(asked, name) not in neutral.get(name, (None, 0)):
            ignored.append(name)
    for name, script in (asked.alwayson_scripts or {}).items():
        if name.lower() != "controlnet" and _switched_on(script):
            raise refuse(f"the script {name[:60]!r}", "alwayson_scripts")


def _switched_on(script: Any) -> bool:
    args = script.get("args") if isinstance(script, dict) else script
    first = args[0] if isinstance(args, list) and args else args
    if isinstance(first, dict):
        return first.get("enabled", first.get("enable", True)) is not False
    return bool(args) and first is not False


def _from_infotext(asked: Common) -> dict[str, Any]:
    """The options of a `parameters` text, with prompt and seed among them."""
    if not asked.infotext:
        return {}
    try:
        said, _ = from_a1111(asked.infotext, Path("infotext"), networks=False)
        known = {o.key: o for o in options_of(Options)}
        read = {known[key].name: known[key].read(value) for key, value in said.items() if key in known}
    except (Failure, ValueError) as error:
        raise Refused(422, str(error), "invalid_value", "infotext") from None
    seeds = read.pop("seeds", None)
    read |= {"cache": [read["cache"]]} if "cache" in read else {}
    return read | {"prompt": said["prompt"]} | ({} if seeds is None else {"seed": seeds})
