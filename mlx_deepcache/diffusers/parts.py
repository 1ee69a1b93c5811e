"""Models that diffusers loads beside a pipeline; here they are names, and read when they are needed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..fields import valued


@dataclass(frozen=True)
class Part:
    """name: a folder, a file, or a hub id."""

    name: str

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *, subfolder: str | None = None, **unused: Any):
        """A folder or hub id; unused: how diffusers should read it."""
        return cls(within(located(name), subfolder))

    @classmethod
    def from_single_file(cls, name: str | os.PathLike, **unused: Any):
        return cls(located(name))

    def to(self, *unused: Any):
        return self


class ControlNetModel(Part):
    """A ControlNet."""


class AutoencoderKL(Part):
    """A VAE in place of a model's own."""


class AutoencoderTiny(Part):
    """A small one."""


def located(name: str | os.PathLike, revision: str | None = None) -> str:
    """A folder, file or hub id as this package has it; a file's page on the hub is its repository and name."""
    name = os.fspath(name)
    page = re.fullmatch(r"https://(?:huggingface|hf)\.co/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/([^?]+)(?:\?.*)?", name)
    if page is not None:
        repository, branch, file = page.groups()
        return f"{repository}{'' if branch == 'main' else '@' + branch}:{file}"
    return name if revision is None or os.path.exists(name) else f"{name}@{revision}"


def within(name: str, subfolder: str | None) -> str:
    """A folder in a model's folder; of a hub id only a VAE's and where parts lie is known by itself."""
    if subfolder is None:
        return name
    if os.path.isdir(name):
        return os.path.join(name, subfolder)
    if subfolder == "vae":  # a model that has one will do
        return name
    raise UsageError(f"subfolder={subfolder!r} of {name!r}: give a folder on the disk, or a repository of its own")


def weights(name: str | os.PathLike, weight_name: str | None, subfolder: str | None) -> str:
    """A LoRA's or an embedding's file: of a folder or a repository."""
    if isinstance(name, dict):
        raise TypeError("weights are taken as a file, a folder or a hub id, and not as a dict of tensors")
    name = located(name)
    inside = "/".join(filter(None, (subfolder, weight_name)))
    if not inside:
        return name
    return os.path.join(name, inside) if os.path.isdir(name) else f"{name}:{inside}"


NETWORKS = ("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder")


def refuse_networks(given: dict[str, Any]) -> None:
    """Raises TypeError for PyTorch's modules, which are not what is drawn with here."""
    for name in NETWORKS:
        if given.get(name) is not None:
            got = valued(given[name])
            raise TypeError(f"{name} cannot be given: networks are MLX's, read from the model; got {got}")
