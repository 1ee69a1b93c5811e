"""Where the parts of a checkpoint come from: a folder in the diffusers layout, or one file in the original layout."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from .config import read_json
from .errors import CheckpointError
from .hub import find
from .prompts import load_tokenizer
from .singlefile import SingleFile
from .weights import PICKLES, read_component


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


def find_source(model: str, *, half: bool = False, prediction_type: str | None = None) -> Source:
    """A model's source: see `hub.find`.

    Raises:
        CheckpointError: it cannot be found, or is a file that is no checkpoint.
    """
    path = find(model, half=half)
    single = path.is_file() and path.suffix in (".safetensors", *PICKLES)
    return SingleFile(path, prediction_type) if single else Folder(path, prediction_type)
