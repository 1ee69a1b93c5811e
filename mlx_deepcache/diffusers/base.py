"""What diffusers' pipelines share: opening a model, a call's way through `StableDiffusion`, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from ..errors import UsageError
from ..fields import valued
from ..generation.generation import Generation
from ..generation.pipeline import StableDiffusion
from ..generation.settings import Settings
from ..sampler import Progress
from . import schedulers
from .adapters import Adaptable
from .arguments import PROMPTED, Arguments, bound, refuse
from .helper import older
from .model import Model, dtype_named
from .noise import Noise
from .notes import note, note_all
from .parts import ControlNetModel, Part, located, refuse_networks
from .tensors import OUTPUT_TYPES, array, latents_in, latents_out, pictures_out, tensor


@dataclass
class _Output:
    """What diffusers' outputs are: attributes, and by place or name."""

    def to_tuple(self) -> tuple:
        return tuple(getattr(self, item.name) for item in fields(self))

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class ImageOutput(_Output):
    """images: as output_type says; nothing is looked at for what it shows."""

    images: Any
    nsfw_content_detected: None = None


@dataclass
class VideoOutput(_Output):
    """frames: a list of frames each, or as output_type says."""

    frames: Any


PIPELINES: dict[str, type] = {}
"""The classes by their names."""


class DiffusionPipeline(Adaptable):
    """What all pipelines share. As a class by itself it opens any of their models.

    takes: the arguments of its call; video: whether it draws videos; xl: whether it is for SDXL's family; controlled:
    whether a ControlNet steers it, by the argument that it follows.
    """

    takes: ClassVar[Arguments] = {}
    video: ClassVar[bool] = False
    xl: ClassVar[bool] = False
    controlled: ClassVar[str | None] = None

    def __init_subclass__(cls):
        PIPELINES[cls.__name__] = cls
        cls.takes = PROMPTED.get(cls.__name__, cls.takes)
        cls.xl = "prompt_2" in cls.takes
        if "controlnet_conditioning_scale" in cls.takes:
            cls.controlled = "control_image" if "control_image" in cls.takes else "image"

    def __init__(
        self,
        model: Model,
        scheduler: Any = None,
        controlnet: ControlNetModel | Sequence[ControlNetModel] | None = None,
        **others: Any,
    ):
        """model, scheduler, controlnet: another pipeline's `components` have them; others: what diffusers has beside
        them, such as a safety checker, of which there is none."""
        refuse_networks(others)
        name, family = type(self).__name__, model.checkpoint.family
        if (self.video, self.xl) != (model.checkpoint.video, family.time_ids is not None):
            raise UsageError(f"{name} is for other models than {model.name}, which is {family.name}")
        if (self.controlled is None) != (controlnet is None):
            what = "needs a" if self.controlled else "takes no"
            raise UsageError(f"{name} {what} controlnet")
        self.model, self._interrupt, self._num_timesteps = model, False, 0
        self.controlnets = [controlnet] if isinstance(controlnet, ControlNetModel) else list(controlnet or ())
        made = schedulers.own(model.checkpoint.source.scheduler()) if scheduler is None else schedulers.taken(scheduler)
        self._scheduler = made.corrected(family.corrections)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        torch_dtype: Any = None,
        dtype: Any = None,
        vae: Part | None = None,
        scheduler: Any = None,
        controlnet: ControlNetModel | Sequence[ControlNetModel] | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        safety_checker: Any = None,
        revision: str | None = None,
        **ignored: Any,
    ) -> DiffusionPipeline:
        """model: a folder, a file or a hub id; torch_dtype, dtype: float32 if neither is given; variant,
        use_safetensors, safety_checker: of no account, as the files are picked by themselves, pickles are never read,
        and nothing is checked; ignored: the rest of diffusers', which is noted once.

        Raises:
            CheckpointError: the model cannot be had or is not supported.
            TypeError: for networks of PyTorch's.
        """
        refuse_networks(ignored)
        if not isinstance(vae, (Part, type(None))):
            raise TypeError(f"vae should be an AutoencoderKL or AutoencoderTiny of this module, got {valued(vae)}")
        note_all("from_pretrained", ignored)
        named = dtype_named(torch_dtype if dtype is None else dtype)
        opened = Model(located(model, revision), named, None if vae is None else vae.name)
        return cls._suited(opened, controlnet is not None)(opened, scheduler, controlnet)

    @classmethod
    def from_single_file(cls, model: str, **options: Any) -> DiffusionPipeline:
        """The same, from a file in the original layout, on the disk or the hub."""
        return cls.from_pretrained(model, **options)

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline, **changed: Any) -> DiffusionPipeline:
        """Another pipeline over the same model."""
        parts = pipe.components | changed
        suited = cls._suited(pipe.model, parts.get("controlnet") is not None)
        if suited.controlled is None:
            parts.pop("controlnet", None)
        return suited(**parts)

    @classmethod
    def _suited(cls, model: Model, controlled: bool) -> type[DiffusionPipeline]:
        """The class for a model."""
        if cls is not DiffusionPipeline:
            return cls
        checkpoint = model.checkpoint
        if checkpoint.video:
            return PIPELINES["StableVideoDiffusionPipeline"]
        task = "Inpaint" if checkpoint.inpainting else "Img2Img" if checkpoint.family.refines else ""
        return for_task(task, model, controlled)

    @property
    def components(self) -> dict[str, Any]:
        """What another pipeline over the same model is made of."""
        parts = {"model": self.model, "scheduler": self._scheduler}
        return parts | ({"controlnet": self.controlnets} if self.controlnets else {})

    @property
    def scheduler(self) -> schedulers.Scheduler:
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._scheduler = schedulers.taken(scheduler)

    @property
    def vae(self) -> _VAE:
        """What has enable_tiling and enable_slicing."""
        return _VAE(self)

    @vae.setter
    def vae(self, vae: Part) -> None:
        if not isinstance(vae, Part):
            raise TypeError(f"vae should be an AutoencoderKL or AutoencoderTiny of this module, got {valued(vae)}")
        self.model.use_vae(vae.name)

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_networks({name: value})
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{type(self).__name__} here has no {name!r}: of diffusers' pipelines it has what docs/diffusers.md lists"
        )

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked for no more steps, by `_interrupt`."""
        return self._interrupt

    def to(self, *places: Any, **more: Any) -> DiffusionPipeline:
        """A dtype is taken; MLX's device is its own."""
        for place in (*places, *more.values()):
            if str(place).startswith("torch.f") or str(place).startswith("torch.b"):
                self.model.use_dtype(dtype_named(place))
            elif isinstance(place, (str, int)) or hasattr(place, "type"):
                note(f".to({str(place)!r})", "changes nothing: MLX uses its own device")
        return self

    def enable_vae_tiling(self) -> None:
        """Decode in overlapping parts."""
        self.model.tiling = "on"

    def disable_vae_tiling(self) -> None:
        self.model.tiling = "off"

    def __call__(self, *args: Any, **given: Any) -> ImageOutput | VideoOutput | tuple:
        """Draw; see `arguments`, and diffusers' own for what each means.

        Raises:
            TypeError: an argument that there is not, or that cannot be honoured; names it.
            UsageError: a value that cannot be.
        """
        asked = bound(type(self).__name__, self.takes, args, given)
        if asked["output_type"] not in OUTPUT_TYPES:
            raise UsageError(f"output_type should be one of {', '.join(OUTPUT_TYPES)}, got {asked['output_type']!r}")
        cache = older(asked)
        core = self.model.drawing(self.model.adapters.loras(self._lora_scale(asked)))
        core.use_scheduler(self._scheduler.stored)
        options = self._options(asked)
        count, prompts = options.pop("count"), options.pop("prompts")
        noise = Noise(asked["generator"], count, self.model.dtype, alone="mask_image" in asked or self.video)

        def settings(cache: Any) -> Settings:
            return core.settings(prompts, seeds=range(count), cache=[cache], vae_tiling=self.model.tiling, **options)

        ready = settings("deepcache:interval=1" if cache is None else cache)
        if cache is None and self.model.helper is not None:
            whole = core.checkpoint.schedule(None).plan(ready.steps).steps
            run = [step.here.t for step in ready.legs[0].plan.steps]
            ready = settings(self.model.helper.over([step.here.t for step in whole], run))
        latents = asked.get("latents")
        drawing = core.denoise(ready, None if latents is None else latents_in(latents), noise)
        self._run(drawing, asked["callback_on_step_end"])
        made = self._out(core, drawing, asked)
        if asked["return_dict"]:
            return made
        if self.video:
            return made.frames
        return made.to_tuple()[: 1 if self.xl else 2]  # as diffusers has it

    def _run(self, drawing: Generation, callback: Callable | None) -> None:
        """All steps, or those until a callback asks for no more."""
        steps = drawing.settings.legs[0].plan.steps
        self._interrupt, self._num_timesteps = False, len(steps)
        for progress in drawing:
            if callback is not None:
                self._call_back(callback, progress, steps[progress.index].here.t)
            if self._interrupt:
                drawing.close()
                break

    def _call_back(self, callback: Callable, progress: Progress, t: float) -> None:
        latents = latents_out(progress.latents)
        shown = {"latents": tensor(latents.copy())}
        number = np.array(t, np.float32 if t % 1 else np.int64)
        answer = callback(self, progress.index, tensor(number), shown) or {}
        changed = [name for name in answer if name != "latents"]
        if changed or not np.array_equal(array(answer.get("latents", latents)), latents):
            name = changed[0] if changed else "latents"
            raise TypeError(f"callback_on_step_end: other {name} than it was shown cannot be honoured here")

    def _out(self, core: StableDiffusion, drawing: Generation, asked: Arguments) -> ImageOutput | VideoOutput:
        if asked["output_type"] == "latent":
            made = tensor(latents_out(drawing.latents))
        else:
            made = pictures_out(self._decoded(core, drawing, asked), asked["output_type"])
        return VideoOutput(made) if self.video else ImageOutput(made)

    def _decoded(self, core: StableDiffusion, drawing: Generation, asked: Arguments) -> np.ndarray:
        """As diffusers has it, the picture's own pixels are put back around what was cut out of it only."""
        if asked.get("padding_mask_crop") is not None:
            return drawing.decode()
        return core.decode(drawing.latents, self.model.tiling, None, drawing.settings.decode_chunk)

    def _lora_scale(self, asked: Arguments) -> float:
        told = dict(asked.get("cross_attention_kwargs") or {})
        scale = told.pop("scale", None)
        if told:
            refuse(type(self).__name__, "cross_attention_kwargs", told)
        return 1.0 if scale is None else scale

    def _options(self, asked: Arguments) -> dict[str, Any]:
        """`Options` of ours, beside them how many pictures (count) and their prompts."""
        raise NotImplementedError


def for_task(task: str, model: Model, controlled: bool) -> type[DiffusionPipeline]:
    """The class for pictures of prompts; task: "", "Img2Img" or "Inpaint"."""
    xl = "XL" if model.checkpoint.family.time_ids is not None else ""
    return PIPELINES[f"StableDiffusion{xl}{'ControlNet' * controlled}{task}Pipeline"]


class _VAE:
    """A pipeline's VAE, as far as scripts steer it."""

    def __init__(self, pipe: DiffusionPipeline):
        self.enable_tiling, self.disable_tiling = pipe.enable_vae_tiling, pipe.disable_vae_tiling
        self.enable_slicing = self.disable_slicing = lambda: None  # pictures are decoded one by one as it is
        self.to = lambda *_, **__: self


def _without_effect(name: str) -> Callable:
    def method(self: DiffusionPipeline, *_: Any, **__: Any) -> None:
        note(name)

    method.__name__ = name
    return method


for _name in (
    "enable_attention_slicing",
    "disable_attention_slicing",
    "enable_xformers_memory_efficient_attention",
    "disable_xformers_memory_efficient_attention",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_vae_slicing",
    "disable_vae_slicing",
    "set_progress_bar_config",
):
    setattr(DiffusionPipeline, _name, _without_effect(_name))
