"""What can be asked for: every option, declared once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL.Image import Image

DEFAULT_STEPS = 50


DEFAULT_INTERVAL = 3


FEWEST_STEPS_TO_CACHE = 10  # below this, steps differ too much for features to be reused


@dataclass(frozen=True)
class Control:
    """A ControlNet and what it is to do. model: a folder or hub id; image: what it follows (a file or Pillow's; in
    complete settings (H, W, 3) uint8); scale: the factor on what it adds; start, end: the share of the steps that it
    takes part in."""

    model: str
    image: Path | str | Image | np.ndarray
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
