"""The settings of a picture, and how they become flags again: what `--from-image` does."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .._version import __version__
from ..errors import Failure, UsageError
from ..media.png import write_image

JSON_KEY = "mlx_deepcache"


# What other programs call the samplers
A1111_SAMPLERS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler-a": "Euler a",
    "heun": "Heun",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-karras": "DPM++ 2M Karras",
    "dpm++2m-sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
    "ddpm": "DDPM",
}


A1111_RNGS = {"torch": "CPU", "torch-cuda": "NV", "mlx": "MLX"}


def parameters_text(settings: dict) -> str:
    """Settings as the `parameters` text of AUTOMATIC1111's web UI, which most programs read."""
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    pairs = {
        "Steps": settings["steps"],
        "Sampler": A1111_SAMPLERS[settings["scheduler"]],
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        **({} if settings.get("strength") is None else {"Denoising strength": settings["strength"]}),
        "Model": settings["model"],
        "RNG": A1111_RNGS[settings["rng"]],
        "DeepCache interval": settings["cache_interval"],
        "DeepCache branch": settings["cache_branch"],
        "Caches": " + ".join(settings.get("cache") or []) or None,
        "Version": settings["version"],
    }
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def _quoted(value) -> str:
    """A1111 quotes a value that its own separators occur in."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:"\n') else text


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


_VALUES = (
    *("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "model", "vae", "quantize", "seed", "steps"),
    *("guidance_scale", "height", "width", "scheduler", "rng", "prediction_type", "dtype"),
)


_SWITCHES = ("plain_prompt", "long_prompt")


_REST = ("lora", "embedding", "cache", "cache_interval", "cache_branch", "latents", "image", "mask", "strength", "fit")


_REST += ("controls", "control_every_step", "refiner", "refiner_start", "version")


KEYS = {*_VALUES, *_SWITCHES, *_REST}  # of the settings that a picture carries


_PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


_A1111_FLAGS = {"Steps": "steps", "CFG scale": "guidance_scale", "Seed": "seed"}


def describe(args: argparse.Namespace, settings, pipe, prompt: str, seed: int) -> dict:
    """All settings of one picture."""
    from ..cache.text import write

    return {
        "prompt": prompt,
        "negative_prompt": settings.negative_prompt,
        "prompt_2": settings.prompt_2,
        "negative_prompt_2": settings.negative_prompt_2,
        "plain_prompt": args.plain_prompt,
        "long_prompt": args.long_prompt,
        "quantize": args.quantize,
        "model": args.model or "emoji",
        "seed": seed,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "height": settings.height,
        "width": settings.width,
        "scheduler": settings.scheduler,
        "rng": settings.rng,
        "cache_interval": getattr(settings.cache.when, "interval", None),
        "cache_branch": settings.cache.branch,
        "prediction_type": args.prediction_type,
        "lora": [f"{file}:{scale:g}" for file, scale in args.lora],
        "embedding": [f"{file}:{word}" if word else str(file) for file, word in args.embedding],
        "cache": None if args.cache is None else [write(policy) for policy in settings.cache.policies],
        "dtype": str(pipe.dtype).removeprefix("mlx.core."),
        "latents": args.latents.name if args.latents else None,
        "image": args.image.name if args.image else None,
        "mask": args.mask.name if args.mask else None,
        "strength": settings.strength,
        "fit": settings.fit,
        "controls": [
            {"model": c.model, "image": file.name, "scale": c.scale, "start": c.start, "end": c.end}
            for c, file in zip(settings.controls, args.control_image, strict=True)
        ],
        "control_every_step": settings.control_every_step,
        "refiner": args.refiner,
        "vae": args.vae,
        "refiner_start": settings.refiner_start,
        "version": f"mlx_deepcache {__version__}",
    }


def read(file: Path) -> tuple[dict, list[str]]:
    """The settings in a picture, by the names of `describe`, and the names of those that mean nothing here.

    Read is what this package writes, or else the `parameters` text of AUTOMATIC1111's web UI and its like.

    Raises:
        Failure: it is missing, no PNG, or carries no settings that can be read.
    """
    try:
        with Image.open(file) as image:
            if image.format != "PNG":
                raise Failure(f"{file} is a {image.format} picture; settings are read from PNG files only")
            texts = dict(image.text)
    except UnidentifiedImageError:
        raise Failure(f"{file} is no picture; expected a PNG file with settings in it") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise Failure(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    if JSON_KEY in texts:
        try:
            settings = json.loads(texts[JSON_KEY])
        except ValueError:
            settings = None
        if not isinstance(settings, dict):
            raise Failure(f"{file}: its settings ({JSON_KEY}) are damaged; expected a JSON object")
        return {k: v for k, v in settings.items() if k in KEYS}, sorted(settings.keys() - KEYS)
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
    for name, key in _A1111_FLAGS.items():
        if name in pairs:
            settings[key] = pairs.pop(name)
    if "Size" in pairs:
        size = pairs.pop("Size")
        settings["width"], _, settings["height"] = size.partition("x")
    if "RNG" in pairs:
        settings["rng"] = {theirs: ours for ours, theirs in A1111_RNGS.items()}.get(pairs["RNG"], pairs["RNG"])
        del pairs["RNG"]
    if "Sampler" in pairs:
        name, kind = pairs.pop("Sampler"), pairs.pop("Schedule type", "")
        karras = kind == "Karras" or (kind == "Automatic" and name == "DPM++ 2M")  # what Automatic means there
        name += " Karras" if karras else f" {kind}" if kind not in ("", "Automatic", "Uniform") else ""
        ours = {theirs.lower(): ours for ours, theirs in A1111_SAMPLERS.items()}
        settings["scheduler"] = ours.get(name.lower(), name)
    for ours, theirs in (("cache_interval", "DeepCache interval"), ("cache_branch", "DeepCache branch")):
        if theirs in pairs:
            settings[ours] = pairs.pop(theirs)
    return settings, list(pairs)


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value


def as_flags(settings: dict, file: Path, given: argparse.Namespace) -> list[str]:
    """What to put before the given flags so that they draw the picture again; a later flag overrides an earlier one.

    given: the flags on the command line. Of those that can be repeated, and of what else would add up with them,
    nothing is taken from the picture if they are given. Pictures and latents are known by their names only, and looked
    for here and beside `file`.

    Raises:
        UsageError: one of those is nowhere to be found, or a value is of the wrong kind.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    if settings.get("model") == "emoji" and not Path("emoji").exists():
        del settings["model"]
    if given.prompt_file is not None:
        settings.pop("prompt", None)
    if given.cache is not None or "cache" in settings:
        settings.pop("cache_interval", None)
        settings.pop("cache_branch", None)
    if given.cache is not None or given.cache_interval is not None:
        settings.pop("cache", None)
    if "refiner" not in settings and given.refiner is None:
        settings.pop("refiner_start", None)
    flags = [f"--{_dashed(key)}={settings[key]}" for key in _VALUES if key in settings]
    flags += [f"--{_dashed(key)}" for key in _SWITCHES if settings.get(key) is True]
    flags += [f"--{_dashed(k)}={settings[k]}" for k in ("cache_interval", "refiner", "refiner_start") if k in settings]
    if "cache_branch" in settings and settings["cache_branch"] != 0:
        flags.append(f"--cache-branch={settings['cache_branch']}")
    for key in ("lora", "embedding", "cache"):
        if not getattr(given, key):
            flags += [f"--{key}={value}" for value in _list(settings, key, file)]
    for key in ("latents", "image", "mask"):
        if key in settings and getattr(given, key) is None:
            flags.append(f"--{key}={_near(settings[key], file, key)}")
    controls = [] if given.controlnet else _list(settings, "controls", file)
    for control in controls:
        try:
            flags += [f"--controlnet={control['model']}"]
            flags += [f"--control-image={_near(control['image'], file, 'control-image')}"]
            flags += [f"--control-{key}={control[key]}" for key in ("scale", "start", "end")]
        except (KeyError, TypeError):
            raise UsageError(f"{file}: its settings are damaged: controls = {control!r}") from None
    if controls and settings.get("control_every_step") is True:
        flags.append("--control-every-step")
    if "image" in settings or given.image is not None:
        flags += [f"--strength={settings['strength']}"] if "strength" in settings else []
    if "image" in settings or given.image is not None or controls or given.controlnet:
        flags += [f"--fit={settings['fit']}"] if "fit" in settings else []
    return flags


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def _list(settings: dict, key: str, file: Path) -> list:
    value = settings.get(key, [])
    if not isinstance(value, list):
        raise UsageError(f"{file}: its settings are damaged: {key} = {value!r} should be a list")
    return value


def _near(name: object, file: Path, flag: str) -> Path:
    """A file by its bare name, here or beside the picture."""
    bare = Path(str(name)).name
    for place in (Path(bare), file.parent / bare):
        if place.is_file():
            return place
    raise UsageError(f"{file} was drawn from {bare}, which is neither here nor beside it; name it with --{flag}")
