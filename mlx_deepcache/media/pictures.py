"""Pictures to start from: read whatever a camera or a program wrote, and make it the size that is drawn."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps, ImageSequence

from ..errors import Failure, UsageError


def to_uint8(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) in [-1, 1] -> the same in 0-255, rounded as diffusers does."""
    return (np.clip(images / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)


# Kinds of files that are opened: Pillow knows others, some of which start other programs
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "AVIF", "JPEG2000", "PPM", "TGA", "QOI", "ICO")
# Where a file of another kind says so: (the byte, what is there, its name)
_OTHERS = (
    (4, rb"ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", "HEIC"),
    (4, rb"ftypavi[fs]", "AVIF"),
    (0, rb"%!PS|\xc5\xd0\xd3\xc6", "EPS"),
    (0, rb"%PDF", "PDF"),
    (0, rb"\s*<(\?xml|svg)", "SVG"),
    (0, rb"8BPS", "Photoshop"),
)

FITS = ("stretch", "crop", "pad")


MOST_SLENDER = 4  # sides of a picture, the longer by the shorter; further off, models draw nothing sensible
MOST_PIXELS = Image.MAX_IMAGE_PIXELS  # above this, Pillow takes a file for a decompression bomb


@dataclass(frozen=True)
class Given:
    """A picture to start from, at the size that is drawn.

    image: (H, W, 3) uint8; mask: (H, W) bool, True where something new should be drawn, or None for everywhere; soft:
    (H, W) in [0, 1], how much of the new is seen at last, if that is not all of it inside the mask; whole: of what this
    is a part, at its own size, and box: which, (left, top, right, bottom).
    """

    image: np.ndarray
    mask: np.ndarray | None = None
    soft: np.ndarray | None = None
    whole: Given | None = None
    box: tuple[int, int, int, int] | None = None

    def paste(self, images: np.ndarray) -> np.ndarray:
        """images: (N, H, W, 3) uint8 -> the same, with this picture's own pixels wherever the mask is not; of a part,
        the whole picture with it."""
        if self.whole is not None:
            left, top, right, bottom = self.box
            placed = np.repeat(self.whole.image[None], len(images), axis=0)
            for picture, image in zip(placed, images, strict=True):
                picture[top:bottom, left:right] = fit(Image.fromarray(image), bottom - top, right - left, "crop")
            return self.whole.paste(placed)
        if self.soft is not None:
            return (
                (self.image + self.soft[..., None] * (images - self.image.astype(np.float32))).round().astype(np.uint8)
            )
        return images if self.mask is None else np.where(self.mask[..., None], images, self.image)


def is_picture(value: object) -> bool:
    """Whether `read_picture` takes it: a file or its contents, Pillow's, or an array (H, W), (H, W, 1), (H, W, 3) or
    (H, W, 4) of uint8 in 0-255, of floating point in [0, 1], or of bool."""
    if isinstance(value, (str, os.PathLike)):
        return str(value) != ""
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple):
        return isinstance(value, (bytes, bytearray, Image.Image)) or hasattr(value, "read")
    pixels = _array(value)
    if len(shape) not in (2, 3) or 0 in shape or shape[2:] not in ((), (1,), (3,), (4,)) or pixels is None:
        return False
    return pixels.dtype in (np.uint8, np.bool_) or bool(np.all((pixels >= 0) & (pixels <= 1)))


def are_pictures(value: object) -> bool:
    """Whether it is one (a folder's or a video's name too), or several in a list or an array (F, H, W, 3)."""
    shape = getattr(value, "shape", ())
    several = isinstance(value, (list, tuple)) or (isinstance(shape, tuple) and len(shape) == 4)
    return len(value) > 0 and all(map(is_picture, value)) if several else is_picture(value)


def _array(value: object) -> np.ndarray | None:
    """Any library's array as uint8, bool or float32, or None if it is none of these."""
    try:
        pixels = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    if pixels.dtype.kind == "f":
        return pixels.astype(np.float32)
    return pixels if pixels.dtype in (np.uint8, np.bool_) else None


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8:
        pixels = (pixels.astype(np.float32) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def read_picture(picture: Path | str | Image.Image | np.ndarray | bytes) -> Image.Image:
    """What `is_picture` takes, upright, in RGB: turned as its EXIF data say, transparency over white, 16-bit grey in 8
    bits, the first frame of an animation.

    Raises:
        Failure: it is missing, damaged, no picture, or suspiciously large.
    """
    return _flatten(_open(picture), "white").convert("RGB")


def read_mask(picture: Path | str | Image.Image | np.ndarray | bytes) -> Image.Image:
    """The same in shades of grey (white: draw here), but where it is transparent a mask is black."""
    image = _flatten(_open(picture), "black")
    return image if image.mode == "RGB" else image.convert("L")


def size_for(
    picture: Image.Image, native: tuple[int, int], height: int | None, width: int | None, multiple: int
) -> tuple[int, int]:
    """(height, width) to draw a picture at, in its proportions (at most 4 : 1) and multiples of `multiple` pixels: of
    as many pixels as the model's `native` (height, width) has, or to the side that is given; given both, these."""
    if height is not None and width is not None:
        return height, width
    proportion = picture.height / picture.width
    used = min(max(proportion, 1 / MOST_SLENDER), MOST_SLENDER)
    if used != proportion:
        warnings.warn(
            f"a picture of {picture.width} x {picture.height} is drawn as 4 : 1, the longest that is drawn by itself; "
            "give both height and width for another size",
            stacklevel=2,
        )
    if height is None and width is None:
        height = math.sqrt(math.prod(native) * used)
        width = height / used
    elif height is None:
        return rounded(width * used, multiple), width
    else:
        return height, rounded(height / used, multiple)
    return rounded(height, multiple), rounded(width, multiple)


def rounded(side: float, multiple: int) -> int:
    """The nearest multiple that is a size."""
    return max(multiple, round(side / multiple) * multiple)


def fit(picture: Image.Image, height: int, width: int, how: str = "stretch") -> Image.Image:
    """A picture at another size, resampled by Lanczos' filter as diffusers' VaeImageProcessor does.

    how: stretch to the new proportions, crop what is over, or pad by repeating the edges.

    Raises:
        UsageError: no such way.
    """
    if how not in FITS:
        raise UsageError(f"fit should be one of {', '.join(FITS)}, got {how!r}")
    wider = picture.width * height > picture.height * width  # than what is wanted
    to_height = how == "stretch" or wider == (how == "crop")
    to_width = how == "stretch" or not to_height
    new_width = width if to_width else max(1, picture.width * height // picture.height)
    new_height = height if to_height else max(1, picture.height * width // picture.width)
    resized = picture.resize((new_width, new_height), Image.Resampling.LANCZOS)
    left, top = width // 2 - new_width // 2, height // 2 - new_height // 2
    if how != "pad":
        return resized.crop((-left, -top, width - left, height - top))
    edges = [(top, height - new_height - top), (left, width - new_width - left)]
    pixels = np.asarray(resized)
    return Image.fromarray(np.pad(pixels, edges + [(0, 0)] * (pixels.ndim - 2), mode="edge"))


def source(picture: Image.Image, mask: Image.Image | None, height: int, width: int, how: str, blur: float = 0) -> Given:
    """What `read_picture` and `read_mask` gave, at the size to be drawn; a mask of another size is fitted to the
    picture's first, so that both are resized alike, and is then black or white (128 and above: draw here).

    blur: the deviation, in pixels, of a Gaussian that softens the mask (VaeImageProcessor.blur), with which the new
    fades.

    Raises:
        UsageError: the size is too large.
    """
    check_pixels(height, width)
    soft = None
    if mask is not None:
        if mask.size != picture.size and how != "stretch":
            mask = mask.resize(picture.size, Image.Resampling.LANCZOS)
        grey = _blurred(fit(mask, height, width, how).convert("L"), blur)
        if blur:
            soft = np.asarray(grey).astype(np.float32) / 255
        mask = np.asarray(grey).astype(np.float32) / 255 >= 0.5
    return Given(np.asarray(fit(picture, height, width, how)), mask, soft)


def extended(
    picture: Image.Image, mask: Image.Image | None, sides: tuple[int, int, int, int]
) -> tuple[Image.Image, Image.Image]:
    """A picture made larger on its (left, top, right, bottom) side by so many pixels, its edges repeated, and the mask
    with white there.

    Raises:
        UsageError: it would be too large.
    """
    left, top, right, bottom = sides
    width, height = picture.width + left + right, picture.height + top + bottom
    check_pixels(height, width)
    if mask is None:
        mask = Image.new("L", picture.size)
    larger = Image.new("L", (width, height), 255)
    larger.paste(mask.resize(picture.size, Image.Resampling.LANCZOS).convert("L"), (left, top))
    pixels = np.pad(np.asarray(picture), [(top, bottom), (left, right), (0, 0)], mode="edge")
    return Image.fromarray(pixels), larger


def check_pixels(height: int, width: int) -> None:
    """Raises UsageError for a picture that is too large to be made."""
    if height * width > MOST_PIXELS:
        raise UsageError(
            f"{width} x {height} pixels are more than the {MOST_PIXELS:,} that a picture can be resized to"
        )


def around(picture: Image.Image, mask: Image.Image, height: int, width: int, padding: int, blur: float = 0) -> Given:
    """The mask's surroundings, to be drawn at (height, width): its box and so many pixels more on each side, widened to
    the proportions that are drawn as far as the picture goes, and padded with its edges beyond. The rest as in
    `source`; `blur` is in the picture's own pixels.

    Raises:
        UsageError: the mask is black everywhere, or the picture too large.
    """
    whole = source(picture, mask, picture.height, picture.width, "stretch", blur)
    grey = _blurred(mask.resize(picture.size, Image.Resampling.LANCZOS).convert("L"), blur)
    if (inside := grey.getbbox()) is None:
        raise UsageError("the mask is black everywhere, so there is nothing to draw")
    left, top, right, bottom = inside
    left, right = max(left - padding, 0), min(right + padding, picture.width)
    top, bottom = max(top - padding, 0), min(bottom + padding, picture.height)
    proportion = width / height
    if (right - left) / (bottom - top) > proportion:
        top, bottom = _widened(top, bottom, (right - left) / proportion, picture.height)
    else:
        left, right = _widened(left, right, (bottom - top) * proportion, picture.width)
    box = left, top, right, bottom
    part = source(picture.crop(box), grey.crop(box), height, width, "pad")
    return replace(part, whole=whole, box=box)


def _widened(start: int, end: int, length: float, limit: int) -> tuple[int, int]:
    """A stretch of a line that is made so long, or as long as the line from 0 to limit: diffusers' and A1111's way."""
    more = int(length - (end - start))
    start, end = start - more // 2, end + more - more // 2
    over = max(end - limit, 0)
    start, end = start - over, end - over
    under = max(-start, 0)
    return start + under, min(end + under, limit)


def _blurred(mask: Image.Image, blur: float) -> Image.Image:
    return mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask


def _open(picture: Path | str | Image.Image | np.ndarray | bytes) -> Image.Image:
    """Decoded and upright, in whatever mode it has."""
    return _from_array(_array(picture)) if hasattr(picture, "shape") else _decoded(picture, _upright)


def read_animation(picture: Path | str | Image.Image | bytes, check: Callable[[int], None]) -> list[Image.Image]:
    """The frames of an animation, one of a picture that stands still, each as from `read_picture`; check: called with
    how many there are, before they are decoded.

    Raises:
        Failure: see `read_picture`.
    """

    def take(file: Image.Image) -> list[Image.Image]:
        check(getattr(file, "n_frames", 1))
        return [_upright(frame) for frame in ImageSequence.all_frames(file)]

    return [_flatten(frame, "white").convert("RGB") for frame in _decoded(picture, take)]


def _upright(file: Image.Image) -> Image.Image:
    file.load()
    return ImageOps.exif_transpose(_in_8_bits(file))


def _decoded(picture: Path | str | Image.Image | bytes, take: Callable[[Image.Image], Any]) -> Any:
    """What `take` makes of an opened file.

    Raises:
        Failure: it is missing, damaged, no picture, or suspiciously large.
    """
    what = picture if isinstance(picture, (str, os.PathLike)) else "what was given"
    if isinstance(picture, (bytes, bytearray)):
        picture = BytesIO(picture)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if not isinstance(picture, Image.Image):
                with Image.open(picture, formats=FORMATS) as file:
                    return take(file)
            return take(picture)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Failure(f"{what} has more than {MOST_PIXELS:,} pixels; make it smaller first") from None
    except FileNotFoundError:
        raise Failure(f"there is no picture {picture}") from None
    except Image.UnidentifiedImageError:
        if (kind := _other_kind(picture)) is not None:
            raise Failure(f"{what} is a file of the kind {kind}, which is not read; save it as PNG or JPEG") from None
        raise Failure(f"{what} is no picture of a kind that can be read, such as PNG or JPEG") from None
    except (Failure, UsageError):
        raise
    except Exception as error:  # decoders raise whatever the broken file led to
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Failure(f"{what} cannot be read: {reason.splitlines()[0]}") from None


def _other_kind(picture: object) -> str | None:
    """What a file is that Pillow was not let open, if its first bytes say so."""
    if hasattr(picture, "seek"):
        picture.seek(0)
        start = picture.read(32)
    else:
        with open(picture, "rb") as file:
            start = file.read(32)
    return next((name for at, pattern, name in _OTHERS if re.match(pattern, start[at:])), None)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of more bits in 8, by what its file says is white; other pictures as they are."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values, tags = np.asarray(image).astype(np.float64), getattr(image, "tag_v2", {})
    if image.mode == "F":
        white = 1
        if not ((values >= 0) & (values <= 1)).all():
            raise Failure("a picture of floating point numbers has no known white outside [0, 1]; save it with 16 bits")
    else:
        bits = tags.get(_BITS, (16 if values.max(initial=0) < 2**16 else 32,))[0]
        signed = tags.get(_SAMPLES, (1 if bits == 16 else 2,))[0] == 2
        white = 2 ** (bits - signed) - 1
        values = values if signed else values % 2**bits  # Pillow's whole numbers have a sign
    grey = Image.fromarray((np.clip(values / white, 0, 1) * 255).round().astype(np.uint8))
    grey.info = {"exif": image.getexif().tobytes()}
    return grey


_BITS, _SAMPLES = 258, 339  # TIFF's tags BitsPerSample and SampleFormat (2: with a sign)


def _flatten(image: Image.Image, behind: str) -> Image.Image:
    """8 bits a channel and nothing transparent: L or RGB."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, behind), image).convert("RGB")
    return image if image.mode == "L" else image.convert("RGB")
