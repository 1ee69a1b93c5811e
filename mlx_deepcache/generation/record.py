"""A picture's settings: written into it, and read from it to draw it again."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .._version import __version__
from ..checkpoints.names import BUNDLED_NAME, BUNDLED_NAMES, may_be_fetched
from ..errors import Failure, UsageError
from ..fields import file_and_scale, parse_json, shown
from ..media.pictures import FORMATS
from ..media.png import write_image
from ..media.video import DESCRIPTION, read_comment, write_video
from .declared import Option, options_of
from .kinds import KINDS, tagged
from .options import A1111_RNGS, A_CONTROL, Control, ModelOptions, Options

JSON_KEY = "mlx_deepcache"
LONGEST = 100_000  # characters of settings: a picture that comes from anywhere does not decide how much is printed
_NAME = re.compile(r"\s*(\w[\w \-/+.]{0,60}):\s*")  # of a pair in A1111's last line
_TAG = re.compile(r"<(lora|lyco|hypernet):([^:<>]+)(?::([^<>]*))?>")  # A1111's, which name networks in a prompt
_ON_CPU = ("ComfyUI", "Fooocus")  # write A1111's text, and draw their noise there
# What A1111's samplers take "Automatic" for
_AUTOMATIC = {"DPM++ 2M": "Karras", "DPM++ 2M SDE": "Exponential"}
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
    if model.loras:
        files = (Path(lora[0] if isinstance(lora, tuple) else lora) for lora in model.loras)
        record["lora_hashes"] = {file.stem: lora_hash(file) for file in files if file.is_file()}
    return record | {
        "seed": seed,
        "model": KINDS["Model"].record(model.model or BUNDLED_NAME),
        "dtype": dtype,
        "version": f"mlx_deepcache {__version__}",
    }


def parameters_text(settings: dict) -> str:
    """Settings as the `parameters` text of AUTOMATIC1111's web UI, which most programs read."""
    tags = (f"<lora:{name}:{scale:g}>" for name, scale in _named(settings.get("lora") or []))
    lines = [" ".join([settings["prompt"], *(tag for tag in tags if tag not in settings["prompt"])])]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    pairs = {"Size": f"{settings['width']}x{settings['height']}"}
    for o in recorded():
        value = settings.get(o.key)
        if o.a1111 is not None and value not in (None, []):
            value = " + ".join(value) if isinstance(value, list) else value
            pairs[o.a1111] = value if o.a1111_values is None else o.a1111_values[value]
    if settings.get("hires_net"):
        pairs["Hires upscaler"] = Path(settings["hires_net"]).stem
    if settings.get("mask_padding") is not None:
        pairs["Inpaint area"] = "Only masked"
    if hashes := settings.get("lora_hashes"):
        pairs["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, digest in hashes.items())
    order = [*(name for name in _A1111_ORDER if name in pairs), *(name for name in pairs if name not in _A1111_ORDER)]
    pairs = {name: pairs[name] for name in order} | {"Version": settings["version"]}
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items()))
    return "\n".join(lines)


def save_png(file: Path, image: np.ndarray, settings: dict | None, *, replace: bool = True) -> None:
    """Write (H, W, 3) uint8, whole or not at all; `settings` go in as `parameters` text and as JSON; replace: see
    `media.files.whole`.

    Raises:
        FileExistsError: there is such a file, and it should not be replaced.
        Failure: the file cannot be written.
    """
    write_image(file, image, replace=replace, pnginfo=None if settings is None else png_texts(settings))


def png_texts(settings: dict) -> PngInfo:
    """What a PNG says of these settings, twice: as `parameters` text and as JSON."""
    info = PngInfo()
    info.add_itxt("parameters", parameters_text(settings))
    info.add_itxt(JSON_KEY, json.dumps(settings, ensure_ascii=False))
    return info


def save_video(
    file: Path, frames: Sequence[np.ndarray], fps: int, settings: dict | None, *, replace: bool = True
) -> None:
    """Write frames (H, W, 3) uint8 with their settings where the file's format has a place for them, see `write_video`.

    Raises:
        FileExistsError: there is such a file, and it should not be replaced.
        Failure: the file cannot be written.
    """
    texts = {}
    if settings is not None:  # in ASCII, which is all that some formats hold
        texts = {"parameters": parameters_text(settings), JSON_KEY: json.dumps(settings)}
    write_video(file, frames, fps, texts, replace=replace)


def read(file: Path, loras: str | None = None, *, networks: bool = True) -> tuple[dict, list[str]]:
    """The settings in a picture, by the names of `describe`, and the names of those that mean nothing here.

    Read is what this package writes, or else the `parameters` text of AUTOMATIC1111's web UI and its like, see
    `from_a1111`, where `networks` is told of.

    Raises:
        Failure: it is missing, no PNG, or carries no settings that can be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            texts = _texts(file)
    except Failure:
        raise
    except UnidentifiedImageError:
        raise Failure(f"{file} is no picture; expected a PNG file with settings in it") from None
    except Exception as error:  # decoders raise whatever the broken file led to
        raise Failure(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    for key in (JSON_KEY, "parameters"):
        if len(texts.get(key, "")) > LONGEST:
            raise Failure(f"{file} has {len(texts[key]):,} characters of settings ({key}); up to {LONGEST:,} are read")
    if JSON_KEY in texts:
        try:
            settings = parse_json(texts[JSON_KEY])
        except ValueError:
            settings = None
        if not isinstance(settings, dict):
            raise Failure(f"{file}: its settings ({JSON_KEY}) are damaged; expected a JSON object")
        known = {"prompt", "version", "lora_hashes", *(o.key for o in recorded())}
        return {k: v for k, v in settings.items() if k in known}, sorted(settings.keys() - known)
    if "parameters" in texts:
        return from_a1111(texts["parameters"], file, loras, networks=networks)
    raise Failure(f"{file} carries no settings: neither {JSON_KEY}'s nor a `parameters` text")


def _texts(file: Path) -> dict[str, str]:
    """A picture's metadata, or a video's, of which the only text is our own if it looks like that."""
    if Path(file).suffix.lower() == ".mp4":
        text = read_comment(file)
    else:
        with Image.open(file, formats=FORMATS) as image:
            if image.format == "PNG":
                image.load()  # an animation's texts may follow its first frame
                return dict(image.text)
            if image.format != "WEBP":
                raise Failure(
                    f"{file} is a {image.format} picture; settings are read from PNG, WebP and MP4 files only"
                )
            text = image.getexif().get(DESCRIPTION)
    return {JSON_KEY: text} if isinstance(text, str) and text.startswith("{") else {}


def from_a1111(text: str, file: Path, loras: str | None = None, *, networks: bool = True) -> tuple[dict, list[str]]:
    """The same from a `parameters` text: the prompt, "Negative prompt: ", and a line of "Name: value" pairs.

    LoRAs that the prompts name are taken out of them, and looked for here, beside `file` and in the folder `loras`;
    without `networks` they stay where they are.
    Warns if the text does not say whose random numbers were used: then they are A1111's default, the GPU's.

    Raises:
        Failure: the line of pairs lacks, so the settings are not to be told from the prompt.
    """
    lines = text.strip().replace("\r\n", "\n").split("\n")
    last = next((i for i in range(len(lines) - 1, -1, -1) if _holds_settings(lines[i])), None)
    if last is None:
        raise Failure(
            f"{file}: its `parameters` should end in a line that begins with Steps, got {shown(lines[-1], 60)!r}"
        )
    pairs, after = _pairs(lines[last]), [line.partition(":")[0] for line in lines[last + 1 :]]
    lines = lines[:last]
    start = next((i for i, line in enumerate(lines) if line.strip().startswith("Negative prompt:")), len(lines))
    settings = {"prompt": "\n".join(lines[:start])}
    if start < len(lines):
        settings["negative_prompt"] = "\n".join(lines[start:]).strip().removeprefix("Negative prompt:").strip()
    lost = []
    if networks:
        lost = _take_networks(settings, [Path(), file.parent, *([] if loras is None else [Path(loras)])])
    if "Size" in pairs:
        settings["width"], _, settings["height"] = pairs.pop("Size").partition("x")
    if "Sampler" in pairs:
        kind, sampler = pairs.pop("Schedule type", ""), pairs["Sampler"]
        kind = _AUTOMATIC.get(sampler, "") if kind == "Automatic" else kind
        pairs["Sampler"] += f" {kind}" if kind not in ("", "Uniform") else ""
    if pairs.get("RNG", "GPU").upper() in ("GPU", "CUDA"):
        on_cpu = "RNG" not in pairs and any(name in pairs.get("Version", "") for name in _ON_CPU)
        if "RNG" not in pairs and not on_cpu:
            warnings.warn(
                "it does not say whose random numbers it was drawn with (RNG), so they are taken for the GPU's, which "
                "is A1111's default: --rng torch-cuda",
                stacklevel=3,
            )
        pairs["RNG"] = A1111_RNGS["torch" if on_cpu else "torch-cuda"]
    said = {o.name for o in options_of(Options) if o.a1111 in pairs and not o.needs}
    for o in options_of(Options):
        known = not o.needs or said & set(o.needs)  # which of two has a name that both have
        if o.a1111 in pairs and known and (o.nargs is not None or not o.many):
            value = pairs.pop(o.a1111)
            ours = {theirs.lower(): our for our, theirs in (o.a1111_values or {}).items()}
            settings[o.key] = ours.get(value.lower(), value)
    if lost or "lora" in settings:
        pairs.pop("Lora hashes", None)  # of what the prompts name
    return settings, [*pairs, *after, *lost]


def a1111_pairs(text: str) -> dict[str, str]:
    """The prompt, the negative one and all pairs of a `parameters` text, by the names that it has for them."""
    lines = text.strip().replace("\r\n", "\n").split("\n")
    last = next((i for i in range(len(lines) - 1, -1, -1) if _holds_settings(lines[i])), len(lines))
    prompt, _, negative = "\n".join(lines[:last]).partition("Negative prompt:")
    pairs = _pairs(lines[last]) if last < len(lines) else {}
    return {"Prompt": prompt.strip(), "Negative prompt": negative.strip(), **pairs}


def _holds_settings(line: str) -> bool:
    """Whether it is the line of pairs, which a prompt's could look like."""
    pairs = _pairs(line)
    return "Steps" in pairs and (len(pairs) > 2 or line.lstrip().startswith("Steps"))


def _pairs(line: str) -> dict[str, str]:
    """Names and values, which may be JSON, of whatever commas."""
    found, at, decoder = {}, 0, json.JSONDecoder()
    while at < len(line):
        if match := _NAME.match(line, at):
            at = match.end()
            try:
                value, end = decoder.raw_decode(line, at) if line[at : at + 1] in ('"', "{", "[") else (None, at)
            except (ValueError, RecursionError):
                value, end = None, at
            end = line.find(",", end) if "," in line[end:] else len(line)
            found[match[1]] = value if isinstance(value, str) else line[at:end].strip()
            at = end + 1
        else:
            at = line.find(",", at) + 1 or len(line)
    return found


def _take_networks(settings: dict, folders: list[Path]) -> list[str]:
    """Take the networks out of the prompts; LoRAs that are in one of the folders become a setting. Returns what those
    that are not are called."""
    lost = []

    def take(tag: re.Match) -> str:
        kind, name, (scale, *unet) = tag[1], Path(tag[2]).name, (tag[3] or "1").split(":")
        found = _first(*(folder / f"{name}.safetensors" for folder in folders))
        if kind != "hypernet" and found is not None and unet in ([], [scale]) and _is_number(scale):
            settings.setdefault("lora", []).append(f"{found}:{scale}")
        else:
            lost.append(f"{'hypernetwork' if kind == 'hypernet' else 'LoRA'} {tag[2]} ({tag[3] or 1})")
        return ""

    for key in ("prompt", "negative_prompt"):
        if _TAG.search(settings.get(key, "")):
            settings[key] = _TAG.sub(take, settings[key]).strip()
    return lost


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _named(loras: list[str]) -> Iterator[tuple[str, float]]:
    """What A1111 calls these files, and their scales."""
    for file, scale in map(file_and_scale, loras):
        yield (file.stem if file.suffix == ".safetensors" else file.name), scale


def lora_hash(file: Path) -> str:
    """What A1111 tells a LoRA by: SHA-256 of a safetensors file without its header, as kohya's scripts wrote it into
    the metadata or else computed; the first 12 digits."""
    found = file.stat()
    return _lora_hash(file.absolute(), found.st_size, found.st_mtime_ns)


@cache
def _lora_hash(file: Path, size: int, modified: int) -> str:
    """It is computed once, until the file is another."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        told = header.get("__metadata__", {}).get("sshs_model_hash")
        digest = sha256()
        while told is None and (block := opened.read(1 << 20)):
            digest.update(block)
    return (told or digest.hexdigest())[:12]


def as_flags(settings: dict, file: Path, given: set[str]) -> list[str]:
    """What to put before the given flags so that they draw the picture again; a later flag overrides an earlier one.

    given: the names of the options on the command line. Of those that can be repeated, and of what else would add up
    with them, nothing is taken from the picture if they are given. Files are looked for here and beside `file`:
    pictures and latents by their bare names only.

    Raises:
        UsageError: a picture or latents are nowhere to be found, a value is of the wrong kind, or something is to be
            had from the hub only, which a picture does not decide.
        Failure: another file is nowhere to be found.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    if settings.get("model") == BUNDLED_NAME:
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
        return [f"{o.flag}={_found(o, value, file)}"]
    if not isinstance(value, list):
        raise UsageError(f"{file}: its settings are damaged: {o.key} = {value!r} should be a list")
    if o.kind is not A_CONTROL:
        return [f"{o.flag}={_found(o, item, file)}" for item in value]
    try:
        parts = [(part, item[part.name]) for item in value for part in options_of(Control)]
    except (KeyError, TypeError):
        raise UsageError(f"{file}: its settings are damaged: {o.key} = {value!r}") from None
    return [flag for part, given in parts for flag in flags_of(part, given, file)]


def _found(o: Option, value: object, file: Path) -> object:
    """A value, of which the file that it names, if it names one, is found here or beside the picture."""
    if o.kind.file is None:
        if value == "list" and o.kind is KINDS["Policy"]:
            raise UsageError(f"{file}: its settings are damaged: {o.key} = {value!r}")
        return value
    told = str(value)
    if o.kind in (KINDS["Picture"], KINDS["Pictures"], KINDS["Latents"]):
        bare = Path(told).name
        found = _first(Path(bare), file.parent / bare)
        if found is None or not (found.is_file() or (found.is_dir() and o.kind is KINDS["Pictures"])):
            where = "which is neither here nor beside it"
            raise UsageError(f"{file} was drawn from {bare}, {where}; name it with {o.flag}")
        return found
    try:
        read = o.kind.read(told)
    except ValueError as error:
        raise UsageError(f"{file}: its settings are damaged: {o.key} = {told!r}: {error}") from None
    named = str(o.kind.file(read))
    if o.kind is KINDS["Model"] and named in BUNDLED_NAMES:
        return named
    ways = [Path(named), file.parent / named, Path(Path(named).name), file.parent / Path(named).name]
    if named and (found := _first(*ways)) is not None:
        return tagged(str(found), read[1]) if isinstance(read, tuple) else os.path.join(os.curdir, found)
    if may_be_fetched(named):
        raise UsageError(
            f"{file} was drawn with {named} of the Hugging Face hub, which is asked for what you name only: "
            f"{o.flag} {told} does"
        )
    raise Failure(
        f"no {o.key} {shown(named, 60)!r} here or beside the picture: {file} was drawn with this {o.key}; "
        f"{o.flag} names another"
    )


def _first(*places: Path) -> Path | None:
    return next((place for place in places if os.path.exists(place)), None)


def _quoted(value) -> str:
    """A1111 quotes a value that its own separators occur in."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:"\n') else text
