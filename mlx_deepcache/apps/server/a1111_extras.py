"""A1111's tools beside drawing: enlarging, and reading what a PNG says of itself."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from fastapi import APIRouter
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ...checkpoints.part import find_upscaler
from ...errors import Failure
from ...generation.record import a1111_pairs
from ...media.pictures import MOST_PIXELS, fit
from . import pictures
from .offers import Shelf
from .refused import Refused
from .service import Service

FILTERS = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
NONE = "None"
ROUNDS = 3  # of a net, at most, as upstream


class Extras(BaseModel):
    """How pictures are enlarged; whatever else a client says is not looked at."""

    model_config = ConfigDict(allow_inf_nan=False)
    resize_mode: int = 0
    upscaling_resize: float = Field(2, gt=0, le=64)
    upscaling_resize_w: int = 512
    upscaling_resize_h: int = 512
    upscaling_crop: bool = True
    upscaler_1: str | None = NONE
    upscaler_2: str | None = NONE
    extras_upscaler_2_visibility: float = Field(0, ge=0, le=1)
    gfpgan_visibility: float = 0
    codeformer_visibility: float = 0


class One(Extras):
    image: str


class Several(Extras):
    imageList: list[dict[str, Any]]  # noqa: N815 (upstream's name)


class Told(BaseModel):
    image: str


def add(routes: APIRouter, service: Service) -> None:
    @routes.get("/upscalers")
    def upscalers() -> list[dict]:
        """None first, as clients insert after it."""
        nothing = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
        nets = service.offers.upscalers.found.items()
        named = [{"name": name} | nothing for name in (NONE, *FILTERS)]
        return named + [{"name": name} | nothing | {"model_name": name, "scale": _factor(path)} for name, path in nets]

    @routes.post("/extra-single-image")
    def single(asked: One) -> dict:
        return {"html_info": "", "image": _enlarged(service, asked, asked.image)}

    @routes.post("/extra-batch-images")
    def batch(asked: Several) -> dict:
        return {"html_info": "", "images": [_enlarged(service, asked, one.get("data")) for one in asked.imageList]}

    @routes.post("/png-info")
    def png_info(asked: Told) -> dict:
        """The settings in a PNG, as they are."""
        data = pictures.unpacked(asked.image)
        pictures.read(data)
        with Image.open(BytesIO(data)) as image:
            image.load()
            items = {key: value for key, value in image.info.items() if isinstance(value, str)}
        info = items.get("parameters", "")
        return {"info": info, "items": items, "parameters": a1111_pairs(info) if info else {}}


def _factor(path: str) -> int | None:
    """How many times as large a net makes pictures; None for a file that is none."""
    try:
        return find_upscaler(path)[1].factor
    except Failure:
        return None


def _enlarged(service: Service, asked: Extras, text: object) -> str:
    image = pictures.read(pictures.unpacked(text))
    if asked.gfpgan_visibility > 0 or asked.codeformer_visibility > 0:
        raise Refused(422, "no face restorer is installed", "unsupported", "gfpgan_visibility")
    upscalers = [_known(service.offers.upscalers, asked.upscaler_1, "upscaler_1")]
    if asked.extras_upscaler_2_visibility > 0:
        upscalers.append(_known(service.offers.upscalers, asked.upscaler_2, "upscaler_2"))
    if asked.resize_mode == 0:
        width, height = (round(side * asked.upscaling_resize) for side in image.size)
    else:
        width, height = asked.upscaling_resize_w, asked.upscaling_resize_h
    if min(width, height) < 1 or width * height > MOST_PIXELS:
        raise Refused(422, f"pictures have 1 to {MOST_PIXELS:,} pixels, got {width} x {height}", "invalid_value")
    crop = asked.resize_mode == 1 and asked.upscaling_crop
    sized = [_sized(service, image, width, height, upscaler, crop) for upscaler in upscalers]
    if len(sized) > 1:
        sized = [Image.blend(*sized, asked.extras_upscaler_2_visibility)]
    return pictures.text(pictures.packed(sized[0]))


def _sized(service: Service, image: Image.Image, width: int, height: int, upscaler: str, crop: bool) -> Image.Image:
    if upscaler == NONE:
        return image
    if upscaler == "Nearest":
        return image.resize((width, height), FILTERS[upscaler])
    for _ in range(ROUNDS if upscaler not in FILTERS else 0):
        if image.width >= width and image.height >= height:
            break
        pixels = np.asarray(image)
        image = Image.fromarray(service.worker.call(partial(service.painter.enlarge, pixels, upscaler)).result())
    return fit(image, height, width, "crop" if crop else "stretch")


def _known(nets: Shelf, name: str | None, param: str) -> str:
    name = name or NONE
    if name not in (NONE, *FILTERS, *nets.found):
        there = ", ".join([*FILTERS, *nets.names()])
        raise Refused(422, f"no upscaler {name[:60]!r} is installed; there are {there}", "unsupported", param)
    return name
