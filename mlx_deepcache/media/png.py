"""Pictures as PNG files, with the settings that drew them inside."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import Failure


def write_image(file: Path, image: np.ndarray, **options) -> None:
    """Write (H, W, 3) uint8 as PNG, whole or not at all; options: Pillow's.

    Raises:
        Failure: the file cannot be written.
    """
    temporary = file.with_name(f".{os.getpid()}.part")  # a short name, however long the file's own is
    try:
        Image.fromarray(image).save(temporary, format="PNG", **options)
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Failure(f"cannot write {file}: {error.strerror or error}") from None
