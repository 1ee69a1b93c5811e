"""A1111's tools beside drawing: enlarging without a net, and reading what a PNG says of itself."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from fastapi import APIRouter
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ...generation.record import a1111_pairs
from ...media.pictures import MOST_PIXELS, fit
from . import pictures
from .refused import Refused

FILTERS = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
NONE = "None"


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


def add(routes: APIRouter) -> None:
    @routes.get("/upscalers")
    def upscalers() -> list[dict]:
        nothing = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
        return [{"name": name} | nothing for name in (NONE, *FILTERS)]

    @routes.post("/extra-single-image")
    def single(asked: One) -> dict:
        return {"html_info": "", "image": _enlarged(asked, asked.image)}

    @routes.post("/extra-batch-images")
    def batch(asked: Several) -> dict:
        return {"html_info": "", "images": [_enlarged(asked, one.get("data")) for one in asked.imageList]}

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


def _enlarged(asked: Extras, text: object) -> str:
    image = pictures.read(pictures.unpacked(text))
    if asked.gfpgan_visibility > 0 or asked.codeformer_visibility > 0:
        raise Refused(422, "no face restorer is installed", "unsupported", "gfpgan_visibility")
    how = _filter(asked.upscaler_1, "upscaler_1")
    other = _filter(asked.upscaler_2, "upscaler_2") if asked.extras_upscaler_2_visibility > 0 else None
    if asked.resize_mode == 0:
        width, height = (round(side * asked.upscaling_resize) for side in image.size)
    else:
        width, height = asked.upscaling_resize_w, asked.upscaling_resize_h
    if min(width, height) < 1 or width * height > MOST_PIXELS:
        raise Refused(422, f"pictures have 1 to {MOST_PIXELS:,} pixels, got {width} x {height}", "invalid_value")
    sized = _sized(image, width, height, how, asked)
    if other is not None:
        sized = Image.blend(sized, _sized(image, width, height, other, asked), asked.extras_upscaler_2_visibility)
    return pictures.text(pictures.packed(sized))


def _sized(image: Image.Image, width: int, height: int, how: Image.Resampling | None, asked: Extras) -> Image.Image:
    if how is None:
        return image
    if asked.resize_mode == 1 and asked.upscaling_crop and how is Image.Resampling.LANCZOS:
        return fit(image, height, width, "crop")
    return image.resize((width, height), how)


def _filter(name: str | None, param: str) -> Image.Resampling | None:
    if name in (None, "", NONE):
        return None
    if name not in FILTERS:
        raise Refused(
            422, f"no upscaler {name[:60]!r} is installed; there are {', '.join(FILTERS)}", "unsupported", param
        )
    return FILTERS[name]
