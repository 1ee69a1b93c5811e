"""Which VAE: what a config describes, and a VAE from elsewhere in place of a checkpoint's own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from ..errors import CheckpointError
from ..nets.autoencoder import AutoencoderKL, VAEConfig
from ..nets.controlnet import ControlNetConfig, ControlNetModel
from ..nets.tiny import AutoencoderTiny, TinyVAEConfig
from . import weights

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
from .folder import Folder, Source, read_json
from .hub import find, find_source


def vae_config(data: dict) -> VAEConfig | TinyVAEConfig:
    """Raises CheckpointError for a VAE of another kind, or with a value that cannot be honoured."""
    kind = data.get("_class_name", "AutoencoderKL")
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise CheckpointError(f"a VAE of kind {kind} is not supported, only AutoencoderKL and AutoencoderTiny")
    return (TinyVAEConfig if kind == "AutoencoderTiny" else VAEConfig).from_dict(data)


def vae_module(config: VAEConfig | TinyVAEConfig) -> AutoencoderKL | AutoencoderTiny:
    """A VAE with weights yet to be loaded."""
    return AutoencoderTiny(config) if isinstance(config, TinyVAEConfig) else AutoencoderKL(config)


@dataclass(frozen=True)
class OtherVAE:
    """A VAE by itself: the part `name` of a source. `beside` makes a source of it and all the rest of another."""

    source: Source
    name: str
    config: VAEConfig | TinyVAEConfig

    @classmethod
    def open(cls, model: str, own: VAEConfig | TinyVAEConfig, *, half: bool = False) -> OtherVAE:
        """model: a folder or hub id of a VAE, or a model with a `vae` folder; own: the config of the VAE that it stands
        in for.

        Raises:
            CheckpointError: it cannot be had, is no VAE, or its latents have other channels or another scale.
        """
        path = find(model, half=half, alone=True)
        if path.is_file() or (path / "vae").is_dir():
            source, name = find_source(str(path), half=half), "vae"
        elif (path / "config.json").is_file():
            source, name = Folder(Path(path.resolve().parent)), path.resolve().name
        else:
            raise CheckpointError(f"{path} is no VAE: expected a folder with config.json, or a model with a folder vae")
        config = vae_config(source.config(name))
        for what in ("latent_channels", "factor"):
            if getattr(config, what) != getattr(own, what):
                raise CheckpointError(
                    f"{source.where(name)} does not fit the model: its {what.replace('_', ' ')} should be "
                    f"{getattr(own, what)}, got {getattr(config, what)}"
                )
        if isinstance(config, type(own)) and config.scaling_factor != own.scaling_factor:
            warnings.warn(
                f"{source.where(name)} scales latents by {config.scaling_factor:g}, the model's own VAE by "
                f"{own.scaling_factor:g}; it may be of another family",
                stacklevel=2,
            )
        return cls(source, name, config)

    def load(self, dtype: mx.Dtype | None) -> nn.Module:
        """The VAE with its weights, strictly loaded.

        Raises:
            CheckpointError: see `weights.fill`.
        """
        tensors = self.source.tensors(self.name)
        return weights.fill(vae_module(self.config), *tensors, self.source.where(self.name), dtype)

    def beside(self, rest: Source) -> Source:
        return _Mixed(rest, self)


@dataclass(frozen=True)
class _Mixed:
    """A source whose `vae` is from elsewhere."""

    rest: Source
    vae: OtherVAE

    @property
    def path(self) -> Path:
        return self.rest.path

    @property
    def index(self) -> dict:
        return self.rest.index

    def _of(self, name: str) -> tuple[Source, str]:
        return (self.vae.source, self.vae.name) if name == "vae" else (self.rest, name)

    def has(self, name: str) -> bool:
        source, name = self._of(name)
        return source.has(name)

    def require(self, name: str) -> None:
        source, name = self._of(name)
        source.require(name)

    def config(self, name: str) -> dict:
        source, name = self._of(name)
        return source.config(name)

    def tensors(self, name: str) -> tuple[dict[str, mx.array], dict[str, str]]:
        source, name = self._of(name)
        return source.tensors(name)

    def where(self, name: str) -> str:
        source, name = self._of(name)
        return source.where(name)

    def tokenizer(self, name: str):
        return self.rest.tokenizer(name)

    def write_tokenizer(self, name: str, folder: Path) -> None:
        self.rest.write_tokenizer(name, folder)


def load_controlnet(model: str, checkpoint: Checkpoint, dtype: mx.Dtype) -> ControlNetModel:
    """A ControlNet by a folder or a hub id, strictly loaded, for use with `checkpoint`.

    Raises:
        CheckpointError: it cannot be had, is damaged or not supported, or is for another kind of U-Net.
    """
    folder, config = find_controlnet(model, checkpoint, dtype)
    return weights.load(ControlNetModel(config), folder, dtype)


def find_controlnet(model: str, checkpoint: Checkpoint, dtype: mx.Dtype) -> tuple[Path, ControlNetConfig]:
    """Where a ControlNet is and what it is, without its weights; raises as `load_controlnet`."""
    folder = find(model, half=dtype == mx.float16, alone=True)
    if folder.is_file() or (folder / "model_index.json").is_file():
        what = "a file" if folder.is_file() else "a whole model"
        raise CheckpointError(f"{folder} is {what}; expected a ControlNet, a folder with its config.json")
    config = ControlNetConfig.from_dict(read_json(folder / "config.json"))
    for name in ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type"):
        its, ours = getattr(config, name), getattr(checkpoint.unet_config, name)
        if its != ours:
            raise CheckpointError(f"{folder} is for another kind of model: its {name} is {its}, the model's {ours}")
    if config.picture_factor != checkpoint.vae_config.factor:
        raise CheckpointError(
            f"{folder} makes {config.picture_factor} pixels of its picture into one, the model's VAE "
            f"{checkpoint.vae_config.factor}; they do not go together"
        )
    return folder, config
