"""The few helpers that scripts take from diffusers.utils."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image

from ..media.pictures import read_picture
from ..media.video import write_video


def load_image(image: str | os.PathLike | Image.Image) -> Image.Image:
    """A picture from a file or a web address, upright, in RGB.

    Raises:
        Failure: it cannot be read.
    """
    if isinstance(image, str) and image.startswith(("https://", "http://")):
        with urlopen(image, timeout=60) as answer:
            return read_picture(answer.read())
    return read_picture(image)


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Pictures side by side, row by row, each in the first one's size or a square of `resize` pixels."""
    if len(images) != rows * cols:
        raise ValueError(f"{rows} x {cols} pictures are {rows * cols}, got {len(images)}")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % cols * width, i // cols * height))
    return grid


def export_to_video(frames: Sequence, output_video_path: str | None = None, fps: int = 10) -> str:
    """Write frames (Pillow's, or arrays (H, W, 3) in [0, 1]) as an .mp4, or as `media.video.write_video` does by the
    suffix; returns the path."""
    if output_video_path is None:
        output_video_path = tempfile.mkstemp(suffix=".mp4")[1]
    pixels = [np.asarray(frame) for frame in frames]
    pixels = [frame if frame.dtype == np.uint8 else (frame * 255).round().astype(np.uint8) for frame in pixels]
    write_video(Path(output_video_path), pixels, fps)
    return output_video_path
