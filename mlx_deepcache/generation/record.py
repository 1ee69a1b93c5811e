"""A picture's settings: written into it, and read from it to draw it again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .._version import __version__
from ..errors import Failure, UsageError
from ..fields import parse_json
from ..media.pictures import FORMATS
from ..media.png import write_image
from .options import KINDS, Control, ModelOptions, Option, Options, options_of

JSON_KEY = "mlx_deepcache"
_PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
# A1111 writes its own pairs in this order; the others come after them
_A1111_ORDER = ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Denoising strength", "Model", "RNG")


def recorded() -> Iterator[Option]:
    """The options that a picture carries."""
    return (o for cls in (Options, ModelOptions) for o in options_of(cls) if o.recorded)


def describe(settings, model: ModelOptions, dtype: str, prompt: str, seed: int) -> dict:
    """All settings of one picture, for JSON; dtype: what it was drawn in."""
    record = {"prompt": prompt}
    record |= {o.key: o.record(settings.options) for o in options_of(Options) if o.recorded}
    record |= {o.key: o.record(model) for o in options_of(ModelOptions) if o.recorded}
    return record | {
        "seed": seed,
        "model": model.model or "emoji",
        "dtype": dtype,
        "version": f"mlx_deepcache {__version__}",
    }


def parameters_text(settings: dict) -> str:
    """Settings as the `parameters` text of AUTOMATIC1111's web UI, which most programs read."""
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    pairs = {"Size": f"{settings['width']}x{settings['height']}"}
    for o in recorded():
        value = settings.get(o.key)
        if o.a1111 is not None and value not in (None, []):
            value = " + ".join(value) if isinstance(value, list) else value
            pairs[o.a1111] = value if o.a1111_values is None else o.a1111_values[value]
    order = [*(name for name in _A1111_ORDER if name in pairs), *(name for name in pairs if name not in _A1111_ORDER)]
    pairs = {name: pairs[name] for name in order} | {"Version": settings["version"]}
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items()))
    return "\n".join(lines)


def save_png(file: Path, image: np.ndarray, settings: dict | None) -> None:
    """Write (H, W, 3) uint8, whole or not at all; `settings` go in as `parameters` text and as JSON.

    Raises:
        Failure: the file cannot be written.
    """
    info = None
    if settings is not None:
        info = PngInfo()
        info.add_itxt("parameters", parameters_text(settings))
        info.add_itxt(JSON_KEY, json.dumps(settings, ensure_ascii=False))
    write_image(file, image, pnginfo=info)


def read(file: Path) -> tuple[dict, list[str]]:
    """The settings in a picture, by the names of `describe`, and the names of those that mean nothing here.

    Read is what this package writes, or else the `parameters` text of AUTOMATIC1111's web UI and its like.

    Raises:
        Failure: it is missing, no PNG, or carries no settings that can be read.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.format != "PNG":
                raise Failure(f"{file} is a {image.format} picture; settings are read from PNG files only")
            texts = dict(image.text)
    except UnidentifiedImageError:
        raise Failure(f"{file} is no picture; expected a PNG file with settings in it") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise Failure(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    if JSON_KEY in texts:
        try:
            settings = parse_json(texts[JSON_KEY])
        except ValueError:
            settings = None
        if not isinstance(settings, dict):
            raise Failure(f"{file}: its settings ({JSON_KEY}) are damaged; expected a JSON object")
        known = {"prompt", "version", *(o.key for o in recorded())}
        return {k: v for k, v in settings.items() if k in known}, sorted(settings.keys() - known)
    if "parameters" in texts:
        return from_a1111(texts["parameters"], file)
    raise Failure(f"{file} carries no settings: neither {JSON_KEY}'s nor a `parameters` text")


def from_a1111(text: str, file: Path) -> tuple[dict, list[str]]:
    """The same from a `parameters` text: the prompt, "Negative prompt: ", and a last line of "Name: value" pairs.

    Raises:
        Failure: that line lacks, so the settings are not to be told from the prompt.
    """
    lines = text.strip().split("\n")
    if not re.match(r"\s*Steps: ", lines[-1]):
        raise Failure(f"{file}: its `parameters` should end in a line that begins with Steps, got {lines[-1][:60]!r}")
    pairs = {name: _unquoted(value.strip()) for name, value in _PAIR.findall(lines.pop())}
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    settings = {"prompt": "\n".join(lines[:start])}
    if start < len(lines):
        settings["negative_prompt"] = "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    if "Size" in pairs:
        settings["width"], _, settings["height"] = pairs.pop("Size").partition("x")
    if "Sampler" in pairs:
        kind = pairs.pop("Schedule type", "")
        karras = kind == "Karras" or (kind == "Automatic" and pairs["Sampler"] == "DPM++ 2M")  # what it means there
        pairs["Sampler"] += " Karras" if karras else f" {kind}" if kind not in ("", "Automatic", "Uniform") else ""
    for o in options_of(Options):
        if o.a1111 in pairs and not o.needs and (o.nargs is not None or not o.many):
            value = pairs.pop(o.a1111)
            ours = {theirs.lower(): our for our, theirs in (o.a1111_values or {}).items()}
            settings[o.key] = ours.get(value.lower(), value)
    return settings, list(pairs)


def as_flags(settings: dict, file: Path, given: set[str]) -> list[str]:
    """What to put before the given flags so that they draw the picture again; a later flag overrides an earlier one.

    given: the names of the options on the command line. Of those that can be repeated, and of what else would add up
    with them, nothing is taken from the picture if they are given. Pictures and latents are known by their names only,
    and looked for here and beside `file`.

    Raises:
        UsageError: one of those is nowhere to be found, or a value is of the wrong kind.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    if settings.get("model") == "emoji" and not Path("emoji").exists():
        del settings["model"]
    if "cache" in given or "cache" in settings:  # which says all of it
        settings.pop("cache_interval", None)
        settings.pop("cache_branch", None)
    if "cache_interval" in given:
        settings.pop("cache", None)
    flags = [] if "prompt_file" in given or "prompt" not in settings else [f"--prompt={settings['prompt']}"]
    for o in recorded():
        value = settings.get(o.key, o.default)
        if o.name in given or value == o.default:
            continue
        if o.needs and not any(name in given or settings.get(name) for name in o.needs):
            continue
        flags += flags_of(o, value, file)
    return flags


def flags_of(o: Option, value: Any, file: Path) -> list[str]:
    """An option's value, as JSON has it, on a command line."""
    if o.kind is KINDS["bool"]:
        return [o.flag] if value is True else []
    if o.nargs is not None or not o.many:
        found = _near(value, file, o.flag) if o.kind in (KINDS["Picture"], KINDS["Latents"]) else value
        return [f"{o.flag}={found}"]
    if not isinstance(value, list):
        raise UsageError(f"{file}: its settings are damaged: {o.key} = {value!r} should be a list")
    if o.kind is not KINDS["Control"]:
        return [f"{o.flag}={item}" for item in value]
    try:
        parts = [(part, item[part.name]) for item in value for part in options_of(Control)]
    except (KeyError, TypeError):
        raise UsageError(f"{file}: its settings are damaged: {o.key} = {value!r}") from None
    return [flag for part, given in parts for flag in flags_of(part, given, file)]


def _near(name: object, file: Path, flag: str) -> Path:
    """A file by its bare name, here or beside the picture."""
    bare = Path(str(name)).name
    for place in (Path(bare), file.parent / bare):
        if place.is_file():
            return place
    raise UsageError(f"{file} was drawn from {bare}, which is neither here nor beside it; name it with {flag}")


def _quoted(value) -> str:
    """A1111 quotes a value that its own separators occur in."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:"\n') else text


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value
