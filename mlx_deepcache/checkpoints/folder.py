"""Where the parts of a checkpoint come from: a folder in the diffusers layout, or one file in the original layout."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from ..errors import CheckpointError
from .tokenizer import load_tokenizer
from .weights import read_component


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; expected a checkpoint in the diffusers layout") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold a JSON object, got {type(data).__name__}")
    return data


class Source(Protocol):
    """A checkpoint's parts by the names that they have in the diffusers layout: `unet`, `vae`, `text_encoder`, ...

    path: where it is on the disk; index: what model_index.json says.
    """

    path: Path
    index: dict

    def has(self, name: str) -> bool:
        """Whether there is such a part."""

    def require(self, name: str) -> None:
        """Raises CheckpointError, saying what lacks, if there is no such part."""

    def config(self, name: str) -> dict:
        """A part's config, as in the diffusers layout; the scheduler's too."""

    def tensors(self, name: str) -> tuple[dict[str, mx.array], dict[str, str]]:
        """A part's tensors, read when first used, and its file's metadata (see `weights.fill`)."""

    def where(self, name: str) -> str:
        """What to call the place of a part in a message."""

    def tokenizer(self, name: str):
        """transformers' CLIPTokenizer."""

    def write_tokenizer(self, name: str, folder: Path) -> None:
        """Write a tokenizer's files to a folder that exists."""


@dataclass(frozen=True)
class Folder:
    """A folder in the diffusers layout, or as `convert` wrote it.

    prediction_type: what the U-Net predicts, if not what the scheduler's config says.
    """

    path: Path
    prediction_type: str | None = None

    @cached_property
    def index(self) -> dict:
        if not (self.path / "model_index.json").is_file():
            raise CheckpointError(
                f"{self.path} is no checkpoint: expected a folder in the diffusers layout, with model_index.json in it"
                ", or a .safetensors file"
            )
        return read_json(self.path / "model_index.json")

    def has(self, name: str) -> bool:
        return (self.path / name).is_dir()

    def require(self, name: str) -> None:
        if not self.has(name):
            raise CheckpointError(f"{self.path} is no whole checkpoint: it lacks the folder {name}")

    def config(self, name: str) -> dict:
        if name != "scheduler":
            return read_json(self.path / name / "config.json")
        config = read_json(self.path / name / "scheduler_config.json")
        return config if self.prediction_type is None else config | {"prediction_type": self.prediction_type}

    def tensors(self, name: str) -> tuple[dict[str, mx.array], dict[str, str]]:
        return read_component(self.path / name)

    def where(self, name: str) -> str:
        return str(self.path / name)

    def tokenizer(self, name: str):
        return load_tokenizer(self.path / name)

    def write_tokenizer(self, name: str, folder: Path) -> None:
        self.require(name)
        for file in (self.path / name).iterdir():
            if file.suffix in (".json", ".txt"):
                shutil.copyfile(file, folder / file.name)


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
