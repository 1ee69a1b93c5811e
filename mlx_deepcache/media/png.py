"""Pictures as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .files import whole


def write_image(file: Path, image: np.ndarray, **options) -> None:
    """Write (H, W, 3) uint8 as PNG, whole or not at all; options: Pillow's.

    Raises:
        Failure: the file cannot be written.
    """
    with whole(file) as part:
        Image.fromarray(image).save(part, format="PNG", **options)
