"""Where the parts of a checkpoint come from: a folder in the diffusers layout, or one file in the original layout."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..errors import CheckpointError
from ..fields import parse_json
from ..media.files import read_text
from .families import VQVAE
from .tokenizer import CLIPTokenizer, load_tokenizer
from .weights import fill, read_component


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        data = parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; expected a checkpoint in the diffusers layout") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold a JSON object, got {type(data).__name__}")
    return data


Tensors = tuple[dict[str, mx.array], dict[str, str]]
"""Tensors by name, read when first used, and their file's metadata (see `weights.fill`)."""


@dataclass(frozen=True)
class Part:
    """A part of a checkpoint: its config as in the diffusers layout, what to call its place in a message, and its
    tensors, by the names of the diffusers layout."""

    config: dict
    where: str
    tensors: Callable[[], Tensors]

    @classmethod
    def of(cls, folder: Path) -> Part:
        """A component's folder; raises CheckpointError if its config cannot be read."""
        return cls(read_json(folder / "config.json"), str(folder), partial(read_component, folder))

    def load(self, module: nn.Module, dtype: mx.Dtype | None) -> nn.Module:
        """Raises CheckpointError: see `weights.fill`."""
        return fill(module, *self.tensors(), self.where, dtype)


class Source(Protocol):
    """Where the parts of a checkpoint come from.

    path: where it is on the disk; index: what model_index.json says.
    """

    path: Path
    index: dict

    def part(self, name: str) -> Part:
        """A part by its name in the diffusers layout: `unet`, `vae`, `text_encoder`, ...

        Raises:
            CheckpointError: there is no such part; says what lacks.
        """

    def scheduler(self) -> dict:
        """The scheduler's config."""

    def tokenizer(self, name: str) -> CLIPTokenizer:
        """A text encoder's tokenizer, by its folder's name."""

    def write_tokenizer(self, name: str, folder: Path) -> None:
        """Write a tokenizer's files to a folder that exists."""


FLAT = "UNet2DModel"  # may lie in its repository without a folder of its own


def is_flat(folder: Path) -> bool:
    """Whether a U-Net lies there without a folder of its own."""
    file = folder / "config.json"
    return not (folder / "unet").is_dir() and file.is_file() and read_json(file).get("_class_name") == FLAT


@dataclass(frozen=True)
class Folder:
    """A folder in the diffusers layout, or as `convert` wrote it. Of a DDPM that may be flat: the U-Net's files and the
    scheduler's config lie in it as they are, with model_index.json or without.

    prediction_type: what the U-Net predicts, if not what the scheduler's config says.
    """

    path: Path
    prediction_type: str | None = None

    @cached_property
    def index(self) -> dict:
        if not (self.path / "model_index.json").is_file():
            if self._flat:
                return {"_class_name": "DDPMPipeline", "unet": ["diffusers", FLAT]}
            raise CheckpointError(
                f"{self.path} is no checkpoint: expected a folder in the diffusers layout, with model_index.json in it"
                ", or a .safetensors file"
            )
        return read_json(self.path / "model_index.json")

    def part(self, name: str) -> Part:
        return Part.of(self._folder(name))

    def scheduler(self) -> dict:
        config = read_json(self.path / ("" if self._flat else "scheduler") / "scheduler_config.json")
        return config if self.prediction_type is None else config | {"prediction_type": self.prediction_type}

    def tokenizer(self, name: str) -> CLIPTokenizer:
        return load_tokenizer(self.path / name)

    def write_tokenizer(self, name: str, folder: Path) -> None:
        for file in self._folder(name).iterdir():
            if file.suffix in (".json", ".txt"):
                shutil.copyfile(file, folder / file.name)

    @cached_property
    def _flat(self) -> bool:
        return is_flat(self.path)

    def _folder(self, name: str) -> Path:
        if name == "unet" and self._flat:
            return self.path
        if name == "vae" and not (self.path / name).is_dir() and (self.path / VQVAE).is_dir():
            return self.path / VQVAE
        if not (self.path / name).is_dir():
            raise CheckpointError(f"{self.path} is no whole checkpoint: it lacks the folder {name}")
        return self.path / name


PROMPTS = "prompts.txt"  # what a model draws, if that is a short list: a thing a line, its names separated by commas


def read_prompts(model: Path) -> list[list[str]]:
    """The names of each thing that a model draws, the plain one first; none where a prompt may be anything.

    Raises:
        Failure: the file cannot be read.
    """
    if not (model / PROMPTS).is_file():
        return []
    lines = [line for line in read_text(model / PROMPTS).splitlines() if line.strip() and not line.startswith("#")]
    return [[name.strip() for name in line.split(",")] for line in lines]


PRICES = "cache_front.json"  # what caches cost a model in picture, where that was measured; see `cache.prices`


def price_places(model: Path) -> list[Path]:
    """Where the prices of a model may lie, best first: in its folder, and in the user's cache folder. A hub's snapshot
    and a single file's folder are not ours to add to.

    model: where the model is on the disk, see `Source.path`.
    """
    room = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_deepcache" / "fronts"
    snapshot = next((part for part in model.parts if part.startswith("models--")), None)
    if snapshot is not None:
        return [room / f"{snapshot.removeprefix('models--')}.json"]
    own = room / f"{model.stem}-{hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:8]}.json"
    return [own] if model.is_file() else [model / PRICES, own]


def find_prices(model: Path) -> Path | None:
    """The file with a model's prices, if there is one."""
    return next((file for file in price_places(model) if file.is_file()), None)
