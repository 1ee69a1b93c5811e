"""What the pipelines' calls take: the arguments of diffusers' own with its defaults, and DeepCache's."""

from __future__ import annotations

from typing import Any

from ..fields import suggest, valued

Arguments = dict[str, Any]
"""Names and defaults, in diffusers' order as far as they may be given by position."""

LAST_POSITIONAL = "num_inference_steps"  # diffusers has others between it and the rest

# What diffusers takes and is here only what changes nothing
NEUTRAL: Arguments = {
    "timesteps": None,
    "sigmas": None,
    "denoising_start": None,
    "denoising_end": None,
    "prompt_embeds": None,
    "negative_prompt_embeds": None,
    "pooled_prompt_embeds": None,
    "negative_pooled_prompt_embeds": None,
    "ip_adapter_image": None,
    "ip_adapter_image_embeds": None,
    "masked_image_latents": None,
    "latents": None,  # of pipelines from a picture
    "guidance_rescale": 0.0,
    "guess_mode": False,
    "crops_coords_top_left": (0, 0),
    "negative_crops_coords_top_left": (0, 0),
    "aesthetic_score": 6.0,
    "negative_aesthetic_score": 2.5,
    "callback": None,
    "callback_steps": None,
    "callback_on_step_end_tensor_inputs": ["latents"],
}
SIZES = ("original_size", "target_size", "negative_original_size", "negative_target_size")  # (height, width) or None

_OUT: Arguments = {"output_type": "pil", "return_dict": True, "callback_on_step_end": None}
_DRAWN: Arguments = {"generator": None, "latents": None, **_OUT}
_CACHE: Arguments = {
    "cache_interval": None,
    "cache_layer_id": None,
    "cache_block_id": None,
    "uniform": True,
    "pow": None,
    "center": None,
}


def _prompted(
    *pictures: str, xl: bool = False, sized: bool = True, strength: float | None = None, guidance: float | None = None
) -> Arguments:
    """What every pipeline of a prompt takes, with these pictures."""
    made: Arguments = {"prompt": None}
    made |= {"prompt_2": None} if xl else {}
    made |= dict.fromkeys(pictures)
    made |= {"height": None, "width": None} if sized else {}
    made |= {"padding_mask_crop": None} if "mask_image" in pictures else {}
    made |= {} if strength is None else {"strength": strength}
    made |= {"num_inference_steps": 50, "guidance_scale": guidance or (5.0 if xl else 7.5), "negative_prompt": None}
    made |= {"negative_prompt_2": None, **dict.fromkeys(SIZES)} if xl else {}
    made |= {"num_images_per_prompt": 1, "eta": 0.0, **_DRAWN, "cross_attention_kwargs": None, "clip_skip": None}
    if strength is not None and "mask_image" not in pictures:
        del made["latents"]  # noise is always drawn there
    return made | _CACHE


def _controlled(scale: float) -> Arguments:
    return {"controlnet_conditioning_scale": scale, "control_guidance_start": 0.0, "control_guidance_end": 1.0}


PROMPTED = {
    "StableDiffusionPipeline": _prompted(),
    "StableDiffusionImg2ImgPipeline": _prompted("image", sized=False, strength=0.8),
    "StableDiffusionInpaintPipeline": _prompted("image", "mask_image", strength=1.0),
    "StableDiffusionControlNetPipeline": _prompted("image") | _controlled(1.0),
    "StableDiffusionControlNetImg2ImgPipeline": _prompted("image", "control_image", strength=0.8) | _controlled(0.8),
    "StableDiffusionControlNetInpaintPipeline": _prompted("image", "mask_image", "control_image", strength=1.0)
    | _controlled(0.5),
    "StableDiffusionXLPipeline": _prompted(xl=True),
    "StableDiffusionXLImg2ImgPipeline": _prompted("image", xl=True, sized=False, strength=0.3),
    "StableDiffusionXLInpaintPipeline": _prompted("image", "mask_image", xl=True, strength=0.9999, guidance=7.5),
    "StableDiffusionXLControlNetPipeline": _prompted("image", xl=True) | _controlled(1.0),
    "StableDiffusionXLControlNetImg2ImgPipeline": _prompted("image", "control_image", xl=True, strength=0.8)
    | _controlled(0.8),
    "StableDiffusionXLControlNetInpaintPipeline": _prompted(
        "image", "mask_image", "control_image", xl=True, strength=0.9999
    )
    | _controlled(1.0),
}
VIDEO: Arguments = {
    "image": None,
    "height": 576,
    "width": 1024,
    "num_frames": None,
    "num_inference_steps": 25,
    "min_guidance_scale": 1.0,
    "max_guidance_scale": 3.0,
    "fps": 7,
    "motion_bucket_id": 127,
    "noise_aug_strength": 0.02,
    "decode_chunk_size": None,
    "num_videos_per_prompt": 1,
    **_DRAWN,
    "cache_interval": None,
    "cache_branch": None,
}


def bound(who: str, takes: Arguments, args: tuple, given: Arguments) -> Arguments:
    """All arguments of a call of `who`, which takes these.

    Raises:
        TypeError: there is no such argument, or its value cannot be honoured here; names it.
    """
    names = list(takes)
    places = names[: names.index(LAST_POSITIONAL) + 1]
    if len(args) > len(places):
        raise TypeError(f"{who} takes {', '.join(places)} by position; give what follows by name")
    asked = dict(zip(places, args, strict=False))
    for name, value in given.items():
        if name in asked:
            raise TypeError(f"{who} got {name} twice")
        if name in takes:
            asked[name] = value
        elif name not in NEUTRAL:
            raise TypeError(f"{who} has no argument {name!r}{suggest(name, names)}")
        elif not is_neutral(name, value):
            refuse(who, name, value)
    return takes | asked


def is_neutral(name: str, value: Any) -> bool:
    """Whether a value of one of `NEUTRAL` changes nothing; an array is never compared."""
    if name == "callback_on_step_end_tensor_inputs":
        return value is None or list(value) == NEUTRAL[name]
    return value is NEUTRAL[name] or (isinstance(value, (bool, int, float, tuple)) and value == NEUTRAL[name])


def refuse(who: str, name: str, value: Any) -> None:
    """Raises TypeError for what diffusers does with an argument and is not done here."""
    raise TypeError(f"{who}: {name}={valued(value)} cannot be honoured here; see docs/diffusers.md")
