"""A checkpoint: of which family it is, which components it has, and loading them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..diffusion.schedule import NoiseSchedule
from ..diffusion.schedulers import schedule
from ..errors import CheckpointError, UsageError, called
from ..nets.autoencoder import VAEConfig
from ..nets.clip import CLIPConfig, CLIPTextModel, CLIPVisionConfig
from ..nets.clip_vision import CLIPVisionModelWithProjection
from ..nets.labels import LabelConfig, LabelEmbedding
from ..nets.pixels import PixelConfig
from ..nets.temporal_vae import TemporalVAEConfig
from ..nets.tiny import TinyVAEConfig
from ..nets.unet_parts import UNetConfig
from ..unet import UNet2DConditionModel
from .families import EPSILON, LDM, LDM_CLASS, SVD, Family, FewStep, V, check_pipeline, family_of, few_step, of_pixels
from .folder import FLAT, Folder, Part, Source
from .hub import find_source
from .names import BUNDLED_NAME, BUNDLED_NAMES
from .part import OtherVAE, vae_config, vae_module

BUNDLED = Path(__file__).parent / "bundled" / BUNDLED_NAME
PREDICTION_TYPES = (EPSILON, V)


def _family(unet: UNetConfig, index: dict) -> Family:
    if unet.video:
        return SVD
    if unet.cross_attention_dim is None:
        return of_pixels(index) or LDM
    if any(index.get(LDM_CLASS.labelled) or ()):
        return LDM_CLASS
    refines, adds = bool(index.get("requires_aesthetics_score")), unet.addition_embed_type == "text_time"
    return family_of(adds, unet.use_linear_projection, lambda family: family.refines == refines)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's description, and its parts to be loaded from where they are."""

    source: Source
    unet_config: UNetConfig
    vae_config: VAEConfig | TinyVAEConfig | PixelConfig
    name_or_path: str | None = None  # what the U-Net's config says that it was loaded from
    other_vae: Part | None = None  # in place of the source's own
    other_scheduler: dict | None = None  # a config in place of the source's own, taken as it is

    @classmethod
    def open(
        cls, model: str | None, *, half: bool = False, prediction_type: str | None = None, vae: str | None = None
    ) -> Checkpoint:
        """Find a model (see `hub.find`; None is the bundled "emoji") and read what it is, without its weights.

        prediction_type: `epsilon` or `v_prediction`, if not what the model says of itself; vae: see `OtherVAE.open`.

        Raises:
            CheckpointError: it cannot be found, is no checkpoint, or is of a kind that is not supported.
            UsageError: no such prediction type, or a VAE for a model that has no use for one.
        """
        if prediction_type not in (None, *PREDICTION_TYPES):
            raise UsageError(
                f"{called('prediction_type')} should be {' or '.join(PREDICTION_TYPES)}, got {prediction_type!r}"
            )
        if model not in (None, *BUNDLED_NAMES):  # a folder of that name is ./emoji
            source = find_source(model, half=half, prediction_type=prediction_type)
        elif ((bundled := BUNDLED.with_name(model or BUNDLED_NAME)) / "model_index.json").is_file():
            source = Folder(bundled, prediction_type)
        else:
            raise CheckpointError(
                f"the bundled model {bundled.name} is not installed; name another as {called('model')}, such as sd15"
            )
        check_pipeline(source.index, source.path)
        if (family := of_pixels(source.index)) is not None:
            return cls._of_pixels(source, family, vae)
        try:
            latents = vae_config(source.part("vae").config)
        except CheckpointError:
            if vae is None:
                raise
            latents = None  # it has none that could be used, and needs none
        described = source.part("unet").config
        unet = UNetConfig.from_dict(described)
        family = _family(unet, source.index)
        scale = family.scaling_factor
        other = None if vae is None else OtherVAE.open(vae, latents, half=half, scale=scale)
        latents = latents if other is None else other.config
        fits = isinstance(latents, VAEConfig) if unet.video else not isinstance(latents, TemporalVAEConfig)
        if not fits:
            which = f"AutoencoderKL{'TemporalDecoder' * unet.video} or Autoencoder{'KL' if unet.video else 'Tiny'}"
            raise CheckpointError(f"the VAE that goes with this U-Net is an {which}, and this one is another")
        channels = latents.latent_channels
        fills = [2 * channels + 1] if family.text else []
        if unet.in_channels not in ((2 * channels,) if unet.video else (channels, *fills)):
            raise CheckpointError(
                f"the U-Net reads {unet.in_channels} channels where the VAE's latents have {latents.latent_channels}; "
                "of variants with further inputs only inpainting is supported, with a mask and a second picture"
            )
        if unet.out_channels != channels:
            raise CheckpointError(
                f"the U-Net gives {unet.out_channels} channels where the VAE's latents have {channels}; learned "
                "variances are not supported"
            )
        checkpoint = cls(source, unet, latents, described.get("_name_or_path"), other and other.part)
        for name in checkpoint.components:
            checkpoint.part(name)
        if (labels := checkpoint.labels) is not None and labels.embedding_dim != unet.cross_attention_dim:
            raise CheckpointError(
                f"the embedding of classes has a width of {labels.embedding_dim}, and the U-Net reads "
                f"{unet.cross_attention_dim}; they do not go together"
            )
        return checkpoint

    @classmethod
    def _of_pixels(cls, source: Source, family: Family, vae: str | None) -> Checkpoint:
        """A model whose latents are pictures."""
        if vae is not None:
            raise UsageError(f"{family.name} draws pixels, which need no {called('vae')}; leave it out")
        described = source.part("unet").config
        unet = UNetConfig.from_dict(described)
        if unet.cross_attention_dim is not None:
            raise CheckpointError(
                f"{source.path}: the U-Net of a {family.name} should be a {FLAT}, and this one is not"
            )
        channels, given = PixelConfig.latent_channels, (unet.in_channels, unet.out_channels)
        if given != (channels, channels):
            raise CheckpointError(
                f"the U-Net reads {given[0]} channels and gives {given[1]}; of those that draw pixels only "
                "nets of red, green and blue are supported, without learned variances"
            )
        return cls(source, unet, PixelConfig(), described.get("_name_or_path"))

    @property
    def index(self) -> dict:
        """What model_index.json says."""
        return self.source.index

    @property
    def family(self) -> Family:
        """The row of the table of families that its configs tell."""
        return _family(self.unet_config, self.index)

    @property
    def inpainting(self) -> bool:
        """Whether the U-Net also reads a mask and the latents of the picture under it."""
        return not self.video and self.unet_config.in_channels > self.vae_config.latent_channels

    @property
    def video(self) -> bool:
        """Whether it draws videos."""
        return self.unet_config.video

    @property
    def labels(self) -> LabelConfig | None:
        """Of the classes that it draws, if it draws these."""
        name = self.family.labelled
        return None if name is None else LabelConfig.from_dict(self.part(name).config)

    @property
    def components(self) -> tuple[str, ...]:
        """Folder names of all that has weights."""
        return self.family.networks

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the U-Net was trained for."""
        if self.family.size is not None:
            return self.family.size
        size = self.unet_config.sample_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return height * self.vae_config.factor, width * self.vae_config.factor

    @property
    def multiple(self) -> int:
        """What a picture's sides should be multiples of, in pixels: of a UNet2DModel all levels halve exactly."""
        unet, factor = self.unet_config, self.vae_config.factor
        return factor if unet.cross_attention_dim is not None else factor * 2 ** (unet.levels - 1)

    @property
    def native_height(self) -> int:
        return self.native_size[0]

    @property
    def native_width(self) -> int:
        return self.native_size[1]

    @property
    def frames(self) -> int | None:
        """How many frames the U-Net was trained for; None for pictures."""
        return self.unet_config.num_frames

    @property
    def fps(self) -> int:
        return self.family.told["fps"]

    @property
    def motion_bucket(self) -> int:
        return self.family.told["motion_bucket"]

    @property
    def noise_aug(self) -> float:
        return self.family.told["noise_aug"]

    @property
    def min_guidance_scale(self) -> float:
        return self.family.told["min_guidance_scale"]

    @property
    def few_step(self) -> FewStep | None:
        """The defaults of a model made for few steps, or None."""
        path = self.source.path
        hub = next((part for part in path.parts if part.startswith("models--")), "")
        names = [hub, path.name, self.index.get("_name_or_path"), self.name_or_path]
        scheduler = self.source.scheduler()
        texts = (name for name in names if isinstance(name, str))
        return few_step(texts, scheduler, self.unet_config.time_cond_proj_dim is not None)

    @property
    def steps(self) -> int:
        """The default: what a few-step model wants, or its family's usual number."""
        return (self.few_step or self.family).steps

    @property
    def guidance_scale(self) -> float:
        """The default: what the checkpoint says, or its family's usual one."""
        usual = (self.few_step or self.family).guidance_scale
        scale = self.index.get("default_guidance_scale", usual)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise CheckpointError(f"model_index.json: default_guidance_scale should be a number, got {scale!r}")
        return float(scale)

    def schedule(self, name: str | None, **asked: Any) -> NoiseSchedule:
        """The noise schedule of one of `SCHEDULERS`, or of the checkpoint's own scheduler; asked: see `schedule`.

        The family's corrections are made in what its config says.
        """
        if self.other_scheduler is not None:
            return schedule(self.other_scheduler, name, **asked)
        config = self.source.scheduler()
        config |= {key: value for key, value in self.family.corrections.items() if name is None or key in config}
        return schedule(config, name, **asked)

    def part(self, name: str) -> Part:
        """A component as it is stored, see `Source.part`."""
        if name == "vae" and not self.family.decodes:
            return Part({}, str(self.source.path), lambda: ({}, {}))
        return self.other_vae if name == "vae" and self.other_vae is not None else self.source.part(name)

    def module(self, name: str) -> nn.Module:
        """A component with weights yet to be loaded."""
        module = self._module(name)
        # Its random weights are never computed, but MLX would remember for ever how their keys came about
        mx.eval(mx.random.state[0])
        return module

    def _module(self, name: str) -> nn.Module:
        if name == "unet":
            return UNet2DConditionModel(self.unet_config)
        if name == "vae":
            return vae_module(self.vae_config)
        if name == self.family.sees:
            return CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(self.part(name).config))
        if name == self.family.labelled:
            return LabelEmbedding(self.labels)
        return CLIPTextModel(CLIPConfig.from_dict(self.part(name).config))

    def load(self, name: str, dtype: mx.Dtype | None) -> nn.Module:
        """A component with its weights, strictly loaded; dtype None keeps the file's types.

        Raises:
            CheckpointError: see `weights.fill`.
        """
        return self.part(name).load(self.module(name), dtype)

    def check_files(self) -> None:
        """Read the files' headers only: a damaged VAE is better found before drawing than after.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        for name in self.components:
            self.part(name).tensors()
