"""What AUTOMATIC1111's requests start from and follow: pictures, masks, ControlNets.

Sources: AUTOMATIC1111/stable-diffusion-webui, modules/processing.py; Mikubill/sd-webui-controlnet,
internal_controlnet/args.py.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

from PIL import Image, ImageOps

from ...generation.options import A1111_UPSCALERS, Control
from ...media.pictures import FITS
from . import pictures
from .a1111_fields import Common, ImageToImageBase, TextToImageBase, refuse
from .offers import Shelf, stem
from .refused import Refused

NO_CONTROL_MODE = (0, "0", "Balanced", None)
_FITS = dict(zip(("Just Resize", "Crop and Resize", "Resize and Fill"), FITS, strict=True))
_FITS |= {"Envelope (Outer Fit)": "pad", "Scale to Fit (Inner Fit)": "crop", "Inner Fit (Scale to Fit)": "crop"}
_FITS |= {"Outer Fit (Shrink to Fit)": "pad"} | dict(enumerate(FITS))
MOST_UNITS = 3


def start(asked: ImageToImageBase, ignored: list[str]) -> dict[str, Any]:
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
    said = {"image": picture, "strength": strength, "fit": FITS[asked.resize_mode]}
    if asked.width is None:
        said["width"] = picture.width // 8 * 8
    if asked.height is None:
        said["height"] = picture.height // 8 * 8
    if asked.mask is None:
        return said
    if asked.inpainting_fill not in (0, 1):
        raise refuse("inpainting_fill 2 or 3 (latent noise, latent nothing)", "inpainting_fill")
    ignored += ["inpainting_fill"] if asked.inpainting_fill == 0 else []
    mask = mask_of(pictures.unpacked(asked.mask, "mask")).resize(picture.size)
    said["mask"] = ImageOps.invert(mask) if asked.inpainting_mask_invert else mask
    said["mask_blur"] = 4.0 if asked.mask_blur is None else asked.mask_blur
    if asked.inpaint_full_res:
        del said["fit"]  # as what is drawn is cut out in its proportions
        said["mask_padding"] = asked.inpaint_full_res_padding
    return said


def enlarged(asked: TextToImageBase, upscalers: Shelf) -> dict[str, Any]:
    """Hires fix."""
    for name in ("checkpoint_name", "sampler_name", "scheduler", "prompt", "negative_prompt"):
        own = getattr(asked, f"hr_{name}")
        if own and not own.startswith("Use same") and own != getattr(asked, name, None):
            raise refuse(f"hires fix with another {name}", f"hr_{name}")
    strength = 0.75 if asked.denoising_strength is None else asked.denoising_strength
    said = {"hires_scale": _scale(asked), "hires_strength": strength}
    said |= {"hires_steps": asked.hr_second_pass_steps} if asked.hr_second_pass_steps else {}
    named = {theirs.lower(): ours for ours, theirs in A1111_UPSCALERS.items()} | {"none": "lanczos"}
    if (upscaler := asked.hr_upscaler) is None:
        return said
    if upscaler.lower() in named:
        return said | {"hires_upscaler": named[upscaler.lower()]}
    if stem(upscaler) not in upscalers.found:
        there = ", ".join([*A1111_UPSCALERS.values(), *upscalers.names()])
        raise Refused(
            422, f"there is no upscaler {upscaler[:60]!r} here; there are {there}", "unsupported", "hr_upscaler"
        )
    return said | {"hires_net": stem(upscaler)}


def _scale(asked: TextToImageBase) -> float:
    """How many times as long the sides become."""
    wanted = [(new, side) for new, side in ((asked.hr_resize_x, asked.width), (asked.hr_resize_y, asked.height)) if new]
    if not wanted:
        return asked.hr_scale
    if any(not side for _, side in wanted):
        raise Refused(422, "hr_resize needs the width and height to start from", "invalid_value", "hr_resize_x")
    scales = [new / (side // 8 * 8) for new, side in wanted]
    if max(scales) - min(scales) > 0.01 * max(scales):
        raise Refused(422, "hr_resize_x and hr_resize_y should keep the proportions", "unsupported", "hr_resize_x")
    return scales[0]


def mask_of(data: bytes) -> Image.Image:
    """Upstream's create_binary_mask: where a picture is transparent anywhere, its alpha is the mask, cut at 128; else
    its grey."""
    pictures.read(data, "mask")  # which refuses what is none
    with Image.open(BytesIO(data)) as image:
        if image.mode == "RGBA" and image.getextrema()[-1] != (255, 255):
            return image.getchannel("A").point(lambda value: 255 * (value > 128))
        return image.convert("L")


def units(asked: Common, image: Any) -> tuple[list[Control], str] | None:
    """ControlNets that are switched on, and how their pictures are fitted; None if there are none."""
    scripts = {name.lower(): script for name, script in (asked.alwayson_scripts or {}).items()}
    script = scripts.get("controlnet")
    args = script.get("args") if isinstance(script, dict) else script
    args = args if isinstance(args, list) else []
    nets = [unit for unit in args if isinstance(unit, dict) and unit.get("enabled", True)]
    if len(nets) > MOST_UNITS:
        raise Refused(422, f"there can be {MOST_UNITS} ControlNets, got {len(nets)}", "invalid_value", "ControlNet")
    if not nets:
        return None
    fits = {_fit(unit) for unit in nets}
    if len(fits) > 1:
        raise Refused(422, "ControlNets' pictures are all fitted in the same way (resize_mode)", "unsupported")
    return [_control(unit, image) for unit in nets], fits.pop()


def _fit(unit: dict) -> str:
    mode = unit.get("resize_mode", 1)
    if not isinstance(mode, (str, int)) or mode not in _FITS:
        raise Refused(422, f"resize_mode should be one of {', '.join(map(str, _FITS))}", "invalid_value", "resize_mode")
    return _FITS[mode]


def _control(unit: dict, image: Any) -> Control:
    if str(unit.get("module") or "none").lower() != "none":
        raise refuse(f"the preprocessor {str(unit['module'])[:60]!r}", "module")
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
