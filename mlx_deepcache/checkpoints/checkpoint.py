"""A checkpoint: which components it has, loading them, and writing it anew in MLX's layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..diffusion.schedule import NoiseSchedule
from ..diffusion.schedulers import schedule
from ..errors import CheckpointError, UsageError
from ..nets.autoencoder import VAEConfig
from ..nets.clip import CLIPConfig, CLIPTextModel
from ..nets.tiny import TinyVAEConfig
from ..nets.unet_parts import UNetConfig
from ..unet import UNet2DConditionModel
from . import weights
from .families import FewStep, few_step
from .folder import Folder, Source
from .hub import find_source
from .part import OtherVAE, vae_config, vae_module

BUNDLED = Path(__file__).parent / "bundled" / "emoji"


PREDICTION_TYPES = ("epsilon", "v_prediction")


_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LatentConsistencyModelPipeline",
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's description, and its parts to be loaded from where they are."""

    source: Source
    unet_config: UNetConfig
    vae_config: VAEConfig | TinyVAEConfig
    name_or_path: str | None = None  # what the U-Net's config says that it was loaded from

    @classmethod
    def open(
        cls, model: str | None, *, half: bool = False, prediction_type: str | None = None, vae: str | None = None
    ) -> Checkpoint:
        """Find a model (see `hub.find`; None is the bundled one) and read what it is, without its weights.

        prediction_type: `epsilon` or `v_prediction`, if not what the model says of itself; vae: see `OtherVAE.open`.

        Raises:
            CheckpointError: it cannot be found, is no checkpoint, or is of a kind that is not supported.
            UsageError: no such prediction type.
        """
        if prediction_type not in (None, *PREDICTION_TYPES):
            raise UsageError(f"prediction type should be {' or '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
        if model is not None:
            source = find_source(model, half=half, prediction_type=prediction_type)
        elif (BUNDLED / "model_index.json").is_file():
            source = Folder(BUNDLED, prediction_type)
        else:
            raise CheckpointError("the bundled model is not installed; name another with --model, such as sd15")
        kind = source.index.get("_class_name", _PIPELINES[0])
        if kind not in _PIPELINES:
            raise CheckpointError(f"{source.path} holds a {kind}, which is not supported, only {', '.join(_PIPELINES)}")
        for name in ("unet", "vae", "text_encoder_2" if _refines(source.index) else "text_encoder"):
            source.require(name)
        described = source.config("unet")
        unet = UNetConfig.from_dict(described)
        own = vae_config(source.config("vae"))
        if vae is not None:
            source = OtherVAE.open(vae, own, half=half).beside(source)
        latents = vae_config(source.config("vae"))
        if unet.in_channels not in (latents.latent_channels, 2 * latents.latent_channels + 1):
            raise CheckpointError(
                f"the U-Net reads {unet.in_channels} channels where the VAE's latents have {latents.latent_channels}; "
                "of variants with further inputs only inpainting is supported, with a mask and a second picture"
            )
        return cls(source, unet, latents, described.get("_name_or_path"))

    @property
    def index(self) -> dict:
        """What model_index.json says."""
        return self.source.index

    @property
    def xl(self) -> bool:
        """Whether this is SDXL: two text encoders, and a U-Net that is told sizes."""
        return self.unet_config.addition_embed_type == "text_time"

    @property
    def inpainting(self) -> bool:
        """Whether the U-Net also reads a mask and the latents of the picture under it."""
        return self.unet_config.in_channels > self.vae_config.latent_channels

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Folder names of the text encoders; each has a tokenizer of the same ending."""
        if self.refiner:
            return ("text_encoder_2",)
        return ("text_encoder", "text_encoder_2") if self.xl else ("text_encoder",)

    @property
    def refiner(self) -> bool:
        """Whether this is SDXL's refiner: one text encoder, and a U-Net that is told how good the picture should be."""
        return _refines(self.index)

    @property
    def components(self) -> tuple[str, ...]:
        """Folder names of all that has weights."""
        return (*self.text_encoders, "unet", "vae")

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the U-Net was trained for."""
        size = self.unet_config.sample_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return height * self.vae_config.factor, width * self.vae_config.factor

    @property
    def native_height(self) -> int:
        return self.native_size[0]

    @property
    def native_width(self) -> int:
        return self.native_size[1]

    @property
    def steps(self) -> int:
        """The default: 50, or what a few-step model wants."""
        return 50 if self.few_step is None else self.few_step.steps

    @property
    def few_step(self) -> FewStep | None:
        """The defaults of a model made for few steps, or None."""
        path = self.source.path
        hub = next((part for part in path.parts if part.startswith("models--")), "")
        names = [hub, path.name, self.index.get("_name_or_path"), self.name_or_path]
        scheduler = self.source.config("scheduler")
        texts = (name for name in names if isinstance(name, str))
        return few_step(texts, scheduler, self.unet_config.time_cond_proj_dim is not None)

    @property
    def guidance_scale(self) -> float:
        """The default: what the checkpoint says, or its family's usual one."""
        usual = 5.0 if self.xl else 7.5
        if (few := self.few_step) is not None:
            usual = few.guidance_scale
        scale = self.index.get("default_guidance_scale", usual)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise CheckpointError(f"model_index.json: default_guidance_scale should be a number, got {scale!r}")
        return float(scale)

    def schedule(self, name: str | None) -> NoiseSchedule:
        """The noise schedule of one of `SCHEDULERS`, or of the checkpoint's own scheduler.

        SD's published configs had two mistakes, which diffusers' pipeline corrects as it loads them; so does this. It
        leaves SDXL's as they are.
        """
        config = self.source.config("scheduler")
        corrections = {} if self.xl else {"steps_offset": 1, "clip_sample": False}
        config |= {key: value for key, value in corrections.items() if name is None or key in config}
        return schedule(config, name)

    def module(self, name: str) -> nn.Module:
        """A component with weights yet to be loaded."""
        if name == "unet":
            return UNet2DConditionModel(self.unet_config)
        if name == "vae":
            return vae_module(self.vae_config)
        return CLIPTextModel(CLIPConfig.from_dict(self.source.config(name)))

    def load(self, name: str, dtype: mx.Dtype | None) -> nn.Module:
        """A component with its weights, strictly loaded; dtype None keeps the file's types.

        Raises:
            CheckpointError: see `weights.fill`.
        """
        return weights.fill(self.module(name), *self.source.tensors(name), self.source.where(name), dtype)

    def check_files(self) -> None:
        """Read the files' headers only: a damaged VAE is better found before drawing than after.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        for name in self.components:
            self.source.tensors(name)


def _refines(index: dict) -> bool:
    return bool(index.get("requires_aesthetics_score"))
