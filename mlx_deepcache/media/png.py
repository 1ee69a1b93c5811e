"""Pictures as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .files import whole


def write_image(file: Path, image: np.ndarray, *, replace: bool = True, **options) -> None:
    """Write (H, W, 3) uint8 as PNG, whole or not at all; replace: see `whole`; options: Pillow's.

    Raises:
        FileExistsError: there is such a file, and it should not be replaced.
        Failure: the file cannot be written.
    """
    with whole(file, replace=replace) as part:
        Image.fromarray(image).save(part, format="PNG", **options)
