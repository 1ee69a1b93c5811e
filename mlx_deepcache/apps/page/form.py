"""From the page's fields to a job, and from a picture's settings to the fields."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from ...cache.prices import AUTO
from ...errors import UsageError
from ...fields import file_and_scale
from ...generation import record
from ...generation.options import Control
from ..server.jobs import Wanted
from ..server.schema import SERVED
from ..server.service import Service
from .facts import Facts
from .widgets import OWN, label, read

PIECES = ("image", "mask", "controls")  # options that several fields make up
PLAIN = tuple(o for o in SERVED if o.name not in PIECES)  # those that are one field each
DIAL = ("cache_interval", "cache_branch")
CANVAS = (800, 800)  # pixels of an editor without a picture, which is white
BY_PRICE = ("min_psnr", "max_macs")


def wanted(service: Service, facts: Facts, given: Mapping[str, Any], **instead: Any) -> Wanted:
    """What is asked for by fields, of which any may be absent; instead: options, in place of what the fields say.

    Raises:
        UsageError: a value that cannot be.
        Refused: a name that is not offered, or more than is allowed.
    """
    if facts.problem is not None:
        raise UsageError(facts.problem)
    return service.wanted(
        given.get("prompt") if facts.reads else None,
        {name: value for name, value in (options(facts, given) | instead).items() if value is not None},
        model=given.get("model") or None,
        vae=given.get("vae") or None,
        refiner=given.get("refiner") or None,
        seed=given.get("seed"),
        n=int(given.get("pictures") or 1),
        loras=loras(given.get("loras")),
        compare=bool(given.get("compare")),
    )


def options(facts: Facts, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that these fields say; those that have no meaning for the model, or without another, are left out."""
    image, mask = painted(given.get("editor"), given.get("mask"), bool(given.get("invert")))
    said = {"image": image, "mask": mask, "controls": controls(given)}
    said |= {o.name: read(o, given.get(o.name)) for o in PLAIN if o.name in facts.options}
    said = {name: value for name, value in said.items() if value is not None}
    said |= {"refiner": True} if given.get("refiner") else {}
    needs = {o.name: o.needs for o in SERVED if o.needs}
    for name in [name for name in said if name in needs and not said.keys() & set(needs[name])]:
        del said[name]
    said.pop("refiner", None)
    policies = said.get("cache", ())
    for name in DIAL if policies else ():
        said.pop(name, None)
    for name in BY_PRICE if AUTO not in policies else ():
        said.pop(name, None)
    return said


def painted(
    editor: Mapping[str, Any] | None, file: Image.Image | None, invert: bool
) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture to start from and its mask, white where it is to change: what was painted over it, or a file's.

    Raises:
        UsageError: a mask without a picture, of another size than it, or two masks.
    """
    image, mask = (editor or {}).get("background"), None
    if image is None or ("A" in image.getbands() and image.getchannel("A").getextrema()[1] == 0):
        return None, None
    for layer in editor.get("layers") or ():
        if layer.size != image.size:
            sizes = f"{layer.width} x {layer.height}, and the picture {image.width} x {image.height}"
            raise UsageError(f"the painted mask is {sizes}; clear the editor and paint again")
        alpha = layer.convert("RGBA").getchannel("A").point(lambda value: 255 if value else 0)
        mask = alpha if mask is None else ImageChops.lighter(mask, alpha)
    if mask is not None and mask.getextrema()[1] == 0:
        mask = None
    if image.size == CANVAS and all(low == 255 for low, _ in image.convert("RGB").getextrema()):  # nobody gave one
        if mask is not None:
            raise UsageError(
                "a mask is painted, and there is no picture under it; upload one first, or clear the editor"
            )
        return None, None
    if file is not None:
        if mask is not None:
            raise UsageError("there are two masks: one is painted, and one is a file; take one away")
        if file.size != image.size:
            sizes = f"{file.width} x {file.height}, and the picture {image.width} x {image.height}"
            raise UsageError(f"the mask is {sizes}; they should have one size")
        mask = file.convert("L")
    return image, ImageChops.invert(mask) if invert and mask is not None else mask


def controls(given: Mapping[str, Any]) -> list[Control] | None:
    """Raises UsageError for a ControlNet without its picture."""
    if not given.get("control"):
        return None
    if given.get("control_image") is None:
        raise UsageError("a ControlNet needs a picture to follow; give it one, or choose none")
    parts = {name: given.get(f"control_{name}") for name in ("scale", "start", "end")}
    parts = {name: value for name, value in parts.items() if value is not None}
    return [Control(given["control"], given["control_image"], **parts)]


def loras(rows: Any) -> list[tuple[str, float]]:
    """Of the table of LoRAs and strengths, those that are on."""
    if rows is None:
        return []
    rows = rows if isinstance(rows, list) else rows.values.tolist()
    try:
        return [(str(name), float(scale)) for name, scale in rows if name and scale not in (None, "") and float(scale)]
    except (TypeError, ValueError):
        raise UsageError("a LoRA's strength should be a number, such as 0.8; 0 leaves it out") from None


def restored(file: Path, service: Service) -> tuple[dict[str, Any], list[str]]:
    """Values of fields from what a picture says, see `values`, and in words what has no meaning here.

    Raises:
        Failure: it says nothing.
    """
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        settings, lost = record.read(file, networks=False)
    values, unknown = fields_of(settings, service)
    return values, [*unknown, *lost, *(str(note.message) for note in notes)]


def fields_of(settings: Mapping[str, Any], service: Service) -> tuple[dict[str, Any], list[str]]:
    """Values of fields from settings as a picture has them; and what is not offered here, in words."""
    offers, lost = service.offers, []
    values: dict[str, Any] = {"prompt": settings.get("prompt", ""), "loras": {}}
    for o in PLAIN:
        value = settings.get(o.key)
        if value is None:
            values[o.name] = None
            continue
        try:
            if isinstance(value, str) and not o.many:
                value = o.read(value)
            o.take(value)
        except (UsageError, ValueError) as error:
            lost.append(f"{label(o.name)}: {error}")
            continue
        values[o.name] = o.record(_Holding(o.name, o.take(value)))
    for name in ("upscale", "hires_net"):
        if values.get(name) and values[name] not in offers.upscalers.names():
            lost.append(f"{label(name)}: {values.pop(name)} is not offered here")
    if values.get("cache"):
        values |= dict.fromkeys(DIAL)
    seed = settings.get("seed")
    seed = seed[0] if isinstance(seed, list) and seed else seed
    values["seed"] = int(seed) if str(seed).lstrip("-").isdecimal() else None
    for name, shelf in (("model", offers.models), ("vae", offers.vaes), ("refiner", offers.refiners)):
        told = settings.get(name)
        if told is None:
            values[name] = None
        elif (found := _offered(str(told), shelf.names())) is not None:
            values[name] = found
        else:
            lost.append(f"{label(name)}: {Path(str(told)).name} is not offered here")
    for text in settings.get("lora") or ():
        path, scale = file_and_scale(str(text))
        if (found := _offered(str(path), offers.loras.names())) is not None:
            values["loras"][found] = scale
        else:
            lost.append(f"LoRA: {path.name} is not offered here")
    for key in ("image", "mask", "controls", "embedding"):
        if settings.get(key):
            lost.append(f"{label(key)}: give it again, as a picture does not hold it")
    return values, lost


class _Holding:
    """An option's value as an attribute, for `Option.record`."""

    def __init__(self, name: str, value: Any):
        setattr(self, name, value)


def _offered(told: str, names: list[str]) -> str | None:
    """A name that is offered, from what a picture has of a model or file."""
    plain = [told, Path(told).name, Path(told).name.removesuffix(".safetensors")]
    return next((name for name in plain if name in names), None)


def kept(values: Mapping[str, Any], service: Service) -> dict[str, Any]:
    """Of fields that a browser kept, those that are still possible."""
    known = {o.name: o for o in PLAIN}
    offers, found = service.offers, {}
    shelves = {"model": offers.models, "vae": offers.vaes, "refiner": offers.refiners}
    shelves |= {"upscale": offers.upscalers, "hires_net": offers.upscalers}
    for name, value in values.items():
        if name in shelves and value != OWN and value not in shelves[name].names():
            continue
        if name in known and (said := read(known[name], value)) is not None:
            try:
                known[name].take(said)
            except UsageError:
                continue
        found[name] = value
    return found
