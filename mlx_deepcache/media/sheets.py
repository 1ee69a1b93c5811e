"""Several pictures in one, with captions, and how near two pictures are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def side_by_side(images: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Pictures (H, W, 3) of one size as one picture, row by row; columns: all, unless given; a last row's rest is
    white."""
    columns = columns or len(images)
    rows = -(-len(images) // columns)
    height, width, _ = images[0].shape
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * height, i % columns * width
        sheet[y : y + height, x : x + width] = image
    return sheet


def stacked(images: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures below each other, with white beside those that are not as wide as the widest."""
    width = max(image.shape[1] for image in images)
    room = [((0, 0), (0, width - image.shape[1]), (0, 0)) for image in images]
    return np.concatenate([np.pad(image, pad, constant_values=255) for image, pad in zip(images, room, strict=True)])


def grid(images: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures as one picture, about as many columns as rows."""
    return side_by_side(images, math.ceil(math.sqrt(len(images))))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures in 0-255, in dB; infinite for equal ones."""
    mse = np.mean((one.astype(np.float64) - other) ** 2)
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def captioned(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """A picture with lines of text under it, in Pillow's own font, of a size that its width allows if it can."""
    height, width, _ = image.shape
    for size in range(20, 8, -1):
        font = ImageFont.load_default(size)
        room = 8 + math.ceil(max(font.getlength(line) for line in lines))
        if room <= width:
            break
    step = round(size * 1.4)
    sheet = Image.new("RGB", (max(width, room), height + step * len(lines) + 6), "white")
    sheet.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((4, height + 3 + i * step), line, fill="black", font=font)
    return np.asarray(sheet)
