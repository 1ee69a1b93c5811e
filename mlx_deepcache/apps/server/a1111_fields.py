"""AUTOMATIC1111's requests: what they may say, and what it comes to here.

Sources: AUTOMATIC1111/stable-diffusion-webui, modules/api/models.py and modules/processing.py;
Mikubill/sd-webui-controlnet, internal_controlnet/args.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict

from ...errors import Failure
from ...fields import suggest
from ...generation.options import A1111_RNGS, A1111_SAMPLERS, Control, Options, options_of
from ...generation.record import from_a1111
from ...media.pictures import FITS
from . import pictures
from .jobs import Wanted
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
NO_CONTROL_MODE = (0, "0", "Balanced", None)
_FITS = dict(zip(("Just Resize", "Crop and Resize", "Resize and Fill"), FITS, strict=True))
_FITS |= {"Envelope (Outer Fit)": "pad", "Scale to Fit (Inner Fit)": "crop", "Inner Fit (Scale to Fit)": "crop"}
_FITS |= {"Outer Fit (Shrink to Fit)": "pad"} | dict(enumerate(FITS))
MOST_UNITS = 3
_TASK = re.compile(r"[A-Za-z0-9()_-]{1,64}")
Number = float | None


class Common(BaseModel):
    """What both kinds of request may say; whatever else they do is not looked at."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), coerce_numbers_to_str=True)
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


class _TextToImage(Common):
    enable_hr: bool | None = False


class _ImageToImage(Common):
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
TextToImage = body("TextToImage", _TextToImage, _CACHES)
ImageToImage = body("ImageToImage", _ImageToImage, _CACHES)


def refuse(what: str, param: str) -> Refused:
    return Refused(422, f"{what} is not supported here", "unsupported", param)


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
            model = value if value in service.offers.models.found else stem(str(value))
            service.offers.models.path(model)
            chosen = replace(chosen, model=model)
        elif name == "sd_vae" and value is not None:
            automatic = value in ("Automatic", "None", "")
            if not automatic:
                service.offers.vaes.path(value)
            chosen = replace(chosen, vae=None if automatic else value)
        elif name == "CLIP_stop_at_last_layers" and value not in (None, 0, 1):
            raise refuse("clip skip (CLIP_stop_at_last_layers above 1)", name)
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
    options |= options_from(asked.model_dump(include=set(CACHING)))
    if isinstance(asked, _ImageToImage):
        options |= _start(asked, ignored)
    units = _units(asked, options.get("image"))
    if units:
        controls, fit = units
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
    for name in ("restore_faces", "tiling", "enable_hr"):
        if getattr(asked, name, None):
            raise refuse(name, name)
    if asked.script_name and asked.script_name != "None":
        raise Refused(422, "Script not found", "not_found", "script_name")
    if (asked.clip_skip or 1) > 1:
        raise refuse("clip skip above 1", "clip_skip")
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


def _start(asked: Any, ignored: list[str]) -> dict[str, Any]:
    """What img2img starts from."""
    if not asked.init_images:
        raise Refused(404, "Init image not found", "not_found", "init_images")
    if len(asked.init_images) > 1:
        raise Refused(422, "init_images should be one picture", "unsupported", "init_images")
    if asked.resize_mode not in range(len(FITS)):
        raise refuse("resize_mode 3 (in latents)", "resize_mode")
    if asked.initial_noise_multiplier not in (None, 1):
        raise refuse("initial_noise_multiplier other than 1", "initial_noise_multiplier")
    if asked.image_cfg_scale not in (None, 1.5) or asked.latent_mask is not None:
        raise refuse("image_cfg_scale or latent_mask", "image_cfg_scale")
    picture = pictures.read(pictures.unpacked(asked.init_images[0]))
    strength = 0.75 if asked.denoising_strength is None else asked.denoising_strength
    start = {"image": picture, "strength": strength, "fit": FITS[asked.resize_mode]}
    if asked.width is None:
        start["width"] = picture.width // 8 * 8
    if asked.height is None:
        start["height"] = picture.height // 8 * 8
    if asked.mask is None:
        return start
    if asked.inpainting_fill not in (0, 1):
        raise refuse("inpainting_fill 2 or 3 (latent noise, latent nothing)", "inpainting_fill")
    ignored += ["inpainting_fill"] if asked.inpainting_fill == 0 else []
    ignored += ["inpaint_full_res"] if asked.inpaint_full_res else []
    mask = mask_of(pictures.unpacked(asked.mask, "mask")).resize(picture.size)
    start["mask"] = ImageOps.invert(mask) if asked.inpainting_mask_invert else mask
    start["mask_blur"] = 4.0 if asked.mask_blur is None else asked.mask_blur
    return start


def mask_of(data: bytes) -> Image.Image:
    """Upstream's create_binary_mask: where a picture is transparent anywhere, its alpha is the mask, cut at 128; else
    its grey."""
    pictures.read(data, "mask")  # which refuses what is none
    with Image.open(BytesIO(data)) as image:
        if image.mode == "RGBA" and image.getextrema()[-1] != (255, 255):
            return image.getchannel("A").point(lambda value: 255 * (value > 128))
        return image.convert("L")


def _units(asked: Common, image: Any) -> tuple[list[Control], str] | None:
    """ControlNets that are switched on, and how their pictures are fitted; None if there are none."""
    scripts = {name.lower(): script for name, script in (asked.alwayson_scripts or {}).items()}
    args = (scripts.get("controlnet") or {}).get("args") or []
    units = [unit for unit in args if isinstance(unit, dict) and unit.get("enabled", True)]
    if len(units) > MOST_UNITS:
        raise Refused(422, f"there can be {MOST_UNITS} ControlNets, got {len(units)}", "invalid_value", "ControlNet")
    if not units:
        return None
    fits = {_fit(unit) for unit in units}
    if len(fits) > 1:
        raise Refused(422, "ControlNets' pictures are all fitted in the same way (resize_mode)", "unsupported")
    return [_control(unit, image) for unit in units], fits.pop()


def _fit(unit: dict) -> str:
    mode = unit.get("resize_mode", 1)
    if not isinstance(mode, (str, int)) or mode not in _FITS:
        raise Refused(422, f"resize_mode should be one of {', '.join(map(str, _FITS))}", "invalid_value", "resize_mode")
    return _FITS[mode]


def _control(unit: dict, image: Any) -> Control:
    if str(unit.get("module") or "none").lower() != "none":
        raise refuse(f"the preprocessor {unit['module']!r}", "module")
    if unit.get("control_mode") not in NO_CONTROL_MODE:
        raise refuse("control_mode other than Balanced", "control_mode")
    given = unit.get("image") or unit.get("input_image")
    mask = unit.get("mask") or (given.get("mask") if isinstance(given, dict) else None)
    if mask:
        raise refuse("a ControlNet's mask", "mask")
    given = given.get("image") if isinstance(given, dict) else given
    if not given and image is None:
        raise Refused(422, "a ControlNet needs an image", "invalid_value", "image")
    return Control(
        stem(str(unit.get("model") or "None")),
        pictures.read(pictures.unpacked(given)) if given else image,
        scale=unit.get("weight", 1.0),
        start=unit.get("guidance_start", 0.0),
        end=unit.get("guidance_end", 1.0),
    )
