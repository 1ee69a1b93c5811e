"""AUTOMATIC1111's words: the fields of its requests, its samplers, and its settings.

Source: AUTOMATIC1111/stable-diffusion-webui, modules/api/models.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from ...fields import suggest, valued
from ...generation.options import A1111_RNGS, A1111_SAMPLERS, A1111_SKIPS
from .offers import stem
from .refused import Refused
from .schema import CACHING, SERVED, body, options_from
from .service import Chosen, Service

ALIASES = {
    "euler": ["k_euler"],
    "euler-a": ["k_euler_a", "k_euler_ancestral"],
    "heun": ["k_heun"],
    "dpm++2m": ["k_dpmpp_2m"],
    "dpm++2m-sde": ["k_dpmpp_2m_sde"],
    "pndm": ["plms"],
    "lcm": ["k_lcm"],
}
SPACINGS = ("automatic", "uniform", "normal", "karras")
Number = float | None


class Common(BaseModel):
    """What both kinds of request may say; whatever else they do is not looked at."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), coerce_numbers_to_str=True, allow_inf_nan=False)
    prompt: str = ""
    negative_prompt: str = ""
    styles: list[str] | None = []
    seed: int = -1
    subseed: int | None = -1
    subseed_strength: float | None = 0
    seed_resize_from_w: int | None = -1
    seed_resize_from_h: int | None = -1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: int = 1
    n_iter: int = 1
    steps: int | None = None
    cfg_scale: Number = None
    width: int | None = None
    height: int | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: Number = None
    eta: Number = None
    s_churn: Number = None
    s_tmin: Number = None
    s_tmax: Number = None
    s_noise: Number = None
    s_min_uncond: Number = None
    override_settings: dict[str, Any] | None = {}
    override_settings_restore_afterwards: bool | None = True
    script_name: str | None = None
    script_args: list | None = []
    alwayson_scripts: dict[str, Any] | None = {}
    infotext: str | None = None
    send_images: bool = True
    save_images: bool = False
    force_task_id: str | None = None
    disable_extra_networks: bool = False
    clip_skip: int | None = None
    denoising_strength: Number = None


class TextToImageBase(Common):
    enable_hr: bool | None = False
    hr_scale: float = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = 0
    hr_resize_x: int | None = 0
    hr_resize_y: int | None = 0
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = ""
    hr_negative_prompt: str | None = ""


class ImageToImageBase(Common):
    init_images: list[str] | None = None
    resize_mode: int = 0
    mask: str | None = None
    mask_blur: Number = None
    inpainting_mask_invert: int = 0
    inpainting_fill: int = 0
    inpaint_full_res: bool | int = True
    inpaint_full_res_padding: int = 0
    initial_noise_multiplier: Number = None
    image_cfg_scale: Number = None
    latent_mask: str | None = None
    include_init_images: bool = False


_CACHES = [o for o in SERVED if o.name in CACHING]
TextToImage = body("TextToImage", TextToImageBase, _CACHES)
ImageToImage = body("ImageToImage", ImageToImageBase, _CACHES)


def refuse(what: str, param: str) -> Refused:
    return Refused(422, f"{what} is not supported here", "unsupported", param)


def skipped(layers: Any, param: str) -> int | None:
    """A1111's clip skip, which counts the last layer too, as ours; None where it leaves none out.

    Raises:
        Refused: it is no such number.
    """
    found = {theirs: ours for ours, theirs in A1111_SKIPS.items()} | {"0": 0}
    if isinstance(layers, bool) or str(layers) not in found:
        told = f"clip skip is a whole number from 1 to {len(A1111_SKIPS)}, got {valued(layers)}"
        raise Refused(422, told, "invalid_value", param)
    return found[str(layers)] or None


def scheduler_of(asked: Common) -> str | None:
    """Our name for a sampler and how its steps are spread; None for the model's own.

    Raises:
        Refused: there is none of this name, or it has no such spread.
    """
    sent = asked.model_fields_set
    sampler = asked.sampler_name or (asked.sampler_index if "sampler_index" in sent else None)
    spacing = (asked.scheduler or "automatic").strip().lower()
    if spacing not in SPACINGS:
        raise Refused(422, f"scheduler should be one of {', '.join(SPACINGS)}, got {spacing!r}", "unsupported")
    if not sampler:
        if spacing == "karras":
            raise Refused(422, "scheduler karras needs the sampler DPM++ 2M", "unsupported", "scheduler")
        return None
    found = samplers().get(sampler.strip().lower())
    if found is None:
        raise Refused(400, f"Sampler not found{suggest(sampler, A1111_SAMPLERS.values())}", "not_found", "sampler_name")
    if found == "dpm++2m":  # of which automatic is Karras, as upstream
        return "dpm++2m-karras" if spacing in ("automatic", "karras") else found
    if spacing == "karras" and not found.endswith("-karras"):
        raise Refused(422, f"scheduler karras goes with the sampler DPM++ 2M only, got {sampler!r}", "unsupported")
    return found


def samplers() -> dict[str, str]:
    """Our names by all names that a sampler goes by, in small letters."""
    named = {name.lower(): our for our, name in A1111_SAMPLERS.items()} | {our: our for our in A1111_SAMPLERS}
    return named | {alias: our for our, aliases in ALIASES.items() for alias in aliases}


def changed(service: Service, chosen: Chosen, settings: dict[str, Any]) -> tuple[Chosen, list[str]]:
    """What is chosen after A1111's settings of these names, and those with no meaning here.

    Raises:
        Refused: a model or VAE that is not offered, or what is not supported.
    """
    cache, ignored = dict(chosen.cache), []
    for name, value in settings.items():
        if name == "sd_model_checkpoint" and value is not None:
            model = str(value) if str(value) in service.offers.models.found else stem(str(value))
            service.offers.models.path(model)
            chosen = replace(chosen, model=model)
        elif name == "sd_vae" and value is not None:
            automatic = value in ("Automatic", "None", "")
            if not automatic:
                service.offers.vaes.path(value)
            chosen = replace(chosen, vae=None if automatic else value)
        elif name == "CLIP_stop_at_last_layers" and value is not None:
            chosen = replace(chosen, clip_skip=skipped(value, name))
        elif name == "randn_source":
            rng = {theirs: ours for ours, theirs in A1111_RNGS.items()}.get(str(value).upper())
            ignored += [name] if rng is None and value is not None else []
            chosen = replace(chosen, rng=rng)
        elif name in ("deep_cache_interval", "deep_cache_branch", "deep_cache_policy"):
            key = {"deep_cache_policy": "cache"}.get(name, name.replace("deep_cache", "cache"))
            if value is None:
                cache.pop(key, None)
            else:
                cache |= options_from({key: value})
    return replace(chosen, cache=cache), ignored
