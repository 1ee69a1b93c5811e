"""Parts from elsewhere than the checkpoint: a VAE in place of its own, a ControlNet, an upscaler."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from ..nets.autoencoder import AutoencoderKL, VAEConfig
from ..nets.controlnet import ControlNetConfig, ControlNetModel
from ..nets.pixels import PixelConfig, Pixels
from ..nets.temporal_vae import AutoencoderKLTemporalDecoder, TemporalVAEConfig
from ..nets.tiny import AutoencoderTiny, TinyVAEConfig
from ..nets.unet_parts import UNetConfig
from ..nets.upscaler import CompactConfig, RRDBConfig, RRDBNet, SRVGGNetCompact
from ..nets.vq import VQConfig, VQModel
from .families import VQVAE
from .folder import Part, read_json
from .hub import find, find_source, of_weights
from .original import alone
from .original.singlefile import is_checkpoint
from .weights import read_tensors

SCALE = VAEConfig.scaling_factor  # of most families' latents


def described(file: Path) -> Part | None:
    """A file of weights with its config.json beside it, as diffusers and `convert` write both, or None."""
    config, kind = file.with_name("config.json"), file.name.partition(".")[0]
    if not config.is_file() or kind not in ("diffusion_pytorch_model", "weights"):
        return None
    return Part(read_json(config), str(file), partial(read_tensors, file))


_VAES = {
    "AutoencoderKL": (VAEConfig, AutoencoderKL),
    "AutoencoderTiny": (TinyVAEConfig, AutoencoderTiny),
    "AutoencoderKLTemporalDecoder": (TemporalVAEConfig, AutoencoderKLTemporalDecoder),
    "VQModel": (VQConfig, VQModel),
}


def vae_config(data: dict) -> VAEConfig | TinyVAEConfig:
    """Raises CheckpointError for a VAE of another kind, or with a value that cannot be honoured."""
    kind = data.get("_class_name", "AutoencoderKL")
    if kind not in _VAES:
        raise CheckpointError(f"a VAE of kind {kind} is not supported, only {', '.join(_VAES)}")
    return _VAES[kind][0].from_dict(data)


def vae_module(config: VAEConfig | TinyVAEConfig | PixelConfig) -> AutoencoderKL | AutoencoderTiny | Pixels:
    """A VAE with weights yet to be loaded."""
    kinds = (*_VAES.values(), (PixelConfig, Pixels))
    return next(module for kind, module in kinds if type(config) is kind)(config)


@dataclass(frozen=True)
class OtherVAE:
    """A VAE by itself, which may stand in for a model's own."""

    part: Part
    config: VAEConfig | TinyVAEConfig

    @classmethod
    def open(
        cls, model: str, own: VAEConfig | TinyVAEConfig | None, *, half: bool = False, scale: float = SCALE
    ) -> OtherVAE:
        """model: a folder, file or hub id of a VAE, or a model with one; own: the config of the VAE that it stands in
        for, None if there is none; scale: of the family's latents, for a file that does not say.

        Raises:
            CheckpointError: it cannot be had, is no VAE, or its latents have other channels or another scale.
        """
        path = find(model, half=half, alone=True)
        if of_weights(path) and not is_checkpoint(path):
            scale = own.scaling_factor if isinstance(own, VAEConfig) else scale
            part = described(path) or alone.vae(path, scale)
        elif path.is_file() or (path / "vae").is_dir() or (path / VQVAE).is_dir():
            part = find_source(str(path), half=half).part("vae")
        elif (path / "config.json").is_file():
            part = Part.of(path.resolve())
        else:
            raise CheckpointError(
                f"{path} is no VAE: expected a folder with config.json, a .safetensors file, or a model with a VAE"
            )
        config = vae_config(part.config)
        if own is None:
            return cls(part, config)
        for what in ("latent_channels", "factor"):
            if getattr(config, what) != getattr(own, what):
                raise CheckpointError(
                    f"{part.where} does not fit the model: its {what.replace('_', ' ')} should be "
                    f"{getattr(own, what)}, got {getattr(config, what)}"
                )
        if isinstance(config, type(own)) and config.scaling_factor != own.scaling_factor:
            warnings.warn(
                f"{part.where} scales latents by {config.scaling_factor:g}, the model's own VAE by "
                f"{own.scaling_factor:g}; it may be of another family",
                stacklevel=2,
            )
        return cls(part, config)

    def load(self, dtype: mx.Dtype | None) -> AutoencoderKL | AutoencoderTiny:
        """The VAE with its weights, strictly loaded.

        Raises:
            CheckpointError: see `weights.fill`.
        """
        return self.part.load(vae_module(self.config), dtype)


def load_controlnet(model: str, unet: UNetConfig, factor: int, dtype: mx.Dtype) -> ControlNetModel:
    """A ControlNet, strictly loaded; see `find_controlnet`.

    Raises:
        CheckpointError: it cannot be had, is damaged or not supported, or is for another kind of U-Net.
    """
    part, config = find_controlnet(model, unet, factor, dtype)
    return part.load(ControlNetModel(config), dtype)


def find_controlnet(model: str, unet: UNetConfig, factor: int, dtype: mx.Dtype) -> tuple[Part, ControlNetConfig]:
    """Where a ControlNet is and what it is, without its weights; raises as `load_controlnet`.

    model: a folder, a file or a hub id; unet: the config of the U-Net that it is to steer; factor: pixels along one
    side of a latent.
    """
    folder = find(model, half=dtype == mx.float16, alone=True)
    single = folder.is_file()
    if (folder / "model_index.json").is_file() or (single and (not of_weights(folder) or is_checkpoint(folder))):
        what = "a file" if single and not of_weights(folder) else "a whole model"
        raise CheckpointError(
            f"{folder} is {what}; expected a ControlNet, a folder with its config.json or a .safetensors file"
        )
    part = described(folder) if single else Part.of(folder)
    if part is None:
        part, config = alone.controlnet(folder, unet)
    else:
        config = ControlNetConfig.from_dict(part.config)
    for name in ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type"):
        its, ours = getattr(config, name), getattr(unet, name)
        if its != ours:
            raise CheckpointError(f"{folder} is for another kind of model: its {name} is {its}, the model's {ours}")
    if config.picture_factor != factor:
        raise CheckpointError(
            f"{folder} makes {config.picture_factor} pixels of its picture into one, the model's VAE {factor}; "
            "they do not go together"
        )
    return part, config


def load_upscaler(model: str, dtype: mx.Dtype | None) -> RRDBNet | SRVGGNetCompact:
    """A net that enlarges pictures, strictly loaded; see `find_upscaler`.

    Raises:
        CheckpointError: it cannot be had, is damaged or not supported.
    """
    part, config = find_upscaler(model)
    return part.load(upscaler_module(config), dtype)


def upscaler_module(config: RRDBConfig | CompactConfig) -> RRDBNet | SRVGGNetCompact:
    """A net that enlarges pictures with weights yet to be loaded."""
    return (RRDBNet if isinstance(config, RRDBConfig) else SRVGGNetCompact)(config)


def find_upscaler(model: str) -> tuple[Part, RRDBConfig | CompactConfig]:
    """Where a net that enlarges pictures is and what it is, without its weights; raises as `load_upscaler`.

    model: a file, or one of a repository, `owner/name:file`.
    """
    file = find(model, alone=True)
    if not of_weights(file):
        raise CheckpointError(f"{file} is no .safetensors file; expected one of an upscaler such as Real-ESRGAN")
    return alone.upscaler(file)
