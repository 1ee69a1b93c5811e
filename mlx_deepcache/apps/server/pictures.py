"""Pictures in requests and answers: base64 and bytes, never a path or an address."""

from __future__ import annotations

import base64
import binascii
import re
from io import BytesIO
from typing import TYPE_CHECKING

from ...errors import Failure
from ...generation.record import png_texts
from ...media.pictures import read_mask, read_picture
from .refused import ADDRESS, BAD_PICTURE, Refused

if TYPE_CHECKING:
    from PIL.Image import Image

    from .jobs import Drawn

_PREFIX = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_ADDRESS = re.compile(r"\s*(https?|ftp|file):", re.IGNORECASE)
_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")  # PNG, JPEG, WebP
FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def unpacked(text: object, what: str = "image") -> bytes:
    """A picture's bytes from base64, with or without a data prefix.

    Raises:
        Refused: it is none; an address is never asked.
    """
    if not isinstance(text, str):
        raise Refused(422, f"{what} should be a picture in base64", "invalid_value", what)
    if _ADDRESS.match(text):
        raise Refused(500, "Requests not allowed", ADDRESS, what)
    try:
        data = base64.b64decode("".join(_PREFIX.sub("", text, count=1).split()), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data.startswith(_STARTS):
        raise Refused(500, "Invalid encoded image", BAD_PICTURE, what)
    return data


def read(data: bytes, what: str = "image") -> Image:
    """A picture, or a mask, from its bytes.

    Raises:
        Refused: it is none that can be read.
    """
    try:
        if not data.startswith(_STARTS):
            raise Failure("it is no PNG, JPEG or WebP")
        return read_mask(data) if what == "mask" else read_picture(data)
    except Failure as error:
        raise Refused(500, f"Invalid encoded image: {error}", BAD_PICTURE, what) from None


def packed(image: Image, kind: str = "png", quality: int = 100, settings: dict | None = None) -> bytes:
    """A picture's bytes; settings: see `record.describe`, which a PNG says."""
    buffer = BytesIO()
    about = {"pnginfo": None if settings is None else png_texts(settings)} if kind == "png" else {"quality": quality}
    image.save(buffer, kind.upper(), **about)
    return buffer.getvalue()


def png(drawn: Drawn) -> bytes:
    """The file that generate.py would have written."""
    return packed(drawn.pixels, settings=drawn.settings)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def preview(image: Image, kind: str = "jpeg") -> str:
    return text(packed(image, kind, 85))
