"""diffusers' pipelines by name: how each one's arguments are read into the options of `StableDiffusion`."""

from __future__ import annotations

from typing import Any, ClassVar

from ..errors import UsageError
from ..fields import valued
from ..generation.options import Control
from .arguments import SIZES, VIDEO, Arguments, refuse
from .base import DiffusionPipeline, for_task
from .model import Model
from .tensors import picture, rounded_size


class _Prompted(DiffusionPipeline):
    """Pictures of prompts."""

    def _options(self, asked: Arguments) -> dict[str, Any]:
        given = asked["prompt"]
        if given is None:
            raise UsageError("prompt should be a text, or a list of texts, got None")
        given = list(given) if isinstance(given, (list, tuple)) else [given]
        prompts = [prompt for prompt in given for _ in range(asked["num_images_per_prompt"])]
        options = {
            "prompts": prompts,
            "count": len(prompts),
            "steps": asked["num_inference_steps"],
            "guidance_scale": asked["guidance_scale"],
            "clip_skip": asked["clip_skip"],
            "plain_prompt": True,
        }
        names = ("negative_prompt", "prompt_2", "negative_prompt_2")
        options |= {name: self._all(asked, name) for name in names if name in asked}
        if self._scheduler.row == "ddim":
            options["eta"] = asked["eta"]
        start = {name: picture(name, asked[name]) for name in _STARTS if name in asked and name != self.controlled}
        followed = self._followed(asked)
        options |= self._sizes(asked, start, followed)
        if followed:
            options |= {"controls": self._controls(asked, followed), "control_every_step": True}  # as the helper has it
        if "image" in start:
            options |= {"image": start["image"], "strength": asked["strength"]}
        if "mask_image" in start:
            options |= {"mask": start["mask_image"], "mask_padding": asked["padding_mask_crop"]}
        return options

    def _all(self, asked: Arguments, name: str) -> str | None:
        """A text that is one for all pictures."""
        texts = asked[name]
        if not isinstance(texts, (list, tuple)):
            return texts
        if len(set(texts)) != 1:
            raise TypeError(f"{name}: one for all pictures can be honoured here, got {valued(texts)}")
        return texts[0]

    def _sizes(self, asked: Arguments, start: dict[str, Any], followed: list) -> dict[str, int]:
        """The size of pictures to draw: what is asked for, and else the model's own, or the given picture's where
        diffusers takes that."""
        checkpoint = self.model.checkpoint
        height, width = asked.get("height"), asked.get("width")
        if height is None or width is None:
            given = [] if "mask_image" in start and not followed else [*start.values(), *followed]
            own = rounded_size(given[0], checkpoint.multiple) if given else checkpoint.native_size
            height, width = height or own[0], width or own[1]
        for name in SIZES:
            if asked.get(name) is not None and tuple(asked[name]) != (height, width):
                refuse(type(self).__name__, name, asked[name])
        return {"height": height, "width": width}

    def _followed(self, asked: Arguments) -> list:
        """What each ControlNet follows."""
        if self.controlled is None:
            return []
        images = asked[self.controlled]
        if len(self.controlnets) == 1:
            return [picture(self.controlled, images)]
        if not isinstance(images, (list, tuple)) or len(images) != len(self.controlnets):
            raise UsageError(f"{self.controlled} should be one a ControlNet, a list of {len(self.controlnets)}")
        return [picture(self.controlled, image) for image in images]

    def _controls(self, asked: Arguments, followed: list) -> list[Control]:
        names = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
        rows = []
        for name in names:
            value = asked[name]
            rows.append(list(value) if isinstance(value, (list, tuple)) else [value] * len(followed))
            if len(rows[-1]) != len(followed):
                raise UsageError(f"{name} should be one number a ControlNet ({len(followed)}), got {valued(value)}")
        nets = [net.name for net in self.controlnets]
        return [Control(net, image, *numbers) for net, image, *numbers in zip(nets, followed, *rows, strict=True)]


_STARTS = ("image", "mask_image")


class StableDiffusionPipeline(_Prompted):
    """Pictures of prompts, by Stable Diffusion 1.x and 2.x."""


class StableDiffusionImg2ImgPipeline(_Prompted):
    """From a picture."""


class StableDiffusionInpaintPipeline(_Prompted):
    """In a picture, where a mask is white."""


class StableDiffusionControlNetPipeline(_Prompted):
    """Of prompts, steered by ControlNets."""


class StableDiffusionControlNetImg2ImgPipeline(_Prompted):
    """From a picture, steered by ControlNets."""


class StableDiffusionControlNetInpaintPipeline(_Prompted):
    """In a picture, steered by ControlNets."""


class StableDiffusionXLPipeline(_Prompted):
    """The same by SDXL."""


class StableDiffusionXLImg2ImgPipeline(_Prompted):
    """The same by SDXL, or by its refiner."""


class StableDiffusionXLInpaintPipeline(_Prompted):
    """The same by SDXL."""


class StableDiffusionXLControlNetPipeline(_Prompted):
    """The same by SDXL."""


class StableDiffusionXLControlNetImg2ImgPipeline(_Prompted):
    """The same by SDXL."""


class StableDiffusionXLControlNetInpaintPipeline(_Prompted):
    """The same by SDXL."""


class StableVideoDiffusionPipeline(DiffusionPipeline):
    """Videos of a picture."""

    takes = VIDEO
    video = True

    def _options(self, asked: Arguments) -> dict[str, Any]:
        if asked["num_videos_per_prompt"] != 1:
            raise TypeError("num_videos_per_prompt: one can be honoured here; call once for each")
        return {
            "count": 1,
            "prompts": None,
            "image": picture("image", asked["image"]),
            "height": asked["height"] or self.model.checkpoint.native_height,
            "width": asked["width"] or self.model.checkpoint.native_width,
            "steps": asked["num_inference_steps"],
            "frames": asked["num_frames"],
            "min_guidance_scale": asked["min_guidance_scale"],
            "guidance_scale": asked["max_guidance_scale"],
            "fps": asked["fps"],
            "motion_bucket": asked["motion_bucket_id"],
            "noise_aug": asked["noise_aug_strength"],
            "decode_chunk": asked["decode_chunk_size"],
        }


class _Auto(DiffusionPipeline):
    """Opens a model as the pipeline that suits it."""

    task: ClassVar[str]

    @classmethod
    def _suited(cls, model: Model, controlled: bool) -> type[DiffusionPipeline]:
        return for_task(cls.task, model, controlled)


class AutoPipelineForText2Image(_Auto):
    task = ""


class AutoPipelineForImage2Image(_Auto):
    task = "Img2Img"


class AutoPipelineForInpainting(_Auto):
    task = "Inpaint"
