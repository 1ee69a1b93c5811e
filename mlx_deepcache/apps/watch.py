"""Pictures of a generation under way, written after each step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..generation.preview import Decode
from ..media.png import write_image
from ..media.sheets import side_by_side
from ..sampler import Progress


class Watcher:
    """Writes the picture so far after each step: to one file, over and over, or to one file a step.

    decode: None if nothing is to be written; file: rewritten whole, never half; folder: gets step-001.png,
    step-002.png, ... Several pictures lie side by side. keeps: not written but kept, by name, (H, W, 3) uint8, for
    another machine to `write`.
    """

    def __init__(
        self, decode: Decode | None, file: Path | None = None, folder: Path | None = None, keeps: bool = False
    ):
        self.decode, self.file, self.folder, self.keeps = decode, file, folder, keeps
        self.begin()

    def begin(self, prefix: str = "") -> None:
        """Other pictures come now: number their steps from 1, in files whose names start with `prefix`."""
        self.prefix, self.steps = prefix, 0
        self.kept: dict[str, np.ndarray] = {}

    def __call__(self, progress: Progress) -> None:
        """Raises Failure if a file cannot be written."""
        if self.decode is None:
            return
        self.steps += 1
        latents = progress.denoised
        if latents.ndim == 5:  # of videos the middle frames
            latents = latents[:, latents.shape[1] // 2]
        image = side_by_side(list(self.decode(latents)))
        name = f"{self.prefix}step-{self.steps:03}.png"
        if self.keeps:
            self.kept[name] = image
        else:
            self.write(self.file, image)
            self.write(self.folder and self.folder / name, image)

    @staticmethod
    def write(file: Path | None, image: np.ndarray) -> None:
        """Raises Failure if the file cannot be written."""
        if file is not None:
            write_image(file, image, compress_level=1)  # speed counts here
