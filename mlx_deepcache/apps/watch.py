"""Pictures of a generation under way, written after each step."""

from __future__ import annotations

from pathlib import Path

from ..generation.preview import Decode
from ..media.png import write_image
from ..media.sheets import side_by_side
from ..sampler import Progress


class Watcher:
    """Writes the picture so far after each step: to one file, over and over, or to one file a step.

    decode: None if nothing is to be written; file: rewritten whole, never half; folder: gets step-001.png,
    step-002.png, ... Several pictures lie side by side.
    """

    def __init__(self, decode: Decode | None, file: Path | None = None, folder: Path | None = None):
        self.decode, self.file, self.folder = decode, file, folder
        self.begin()

    def begin(self, prefix: str = "") -> None:
        """Other pictures come now: number their steps from 1, in files whose names start with `prefix`."""
        self.prefix, self.steps = prefix, 0

    def __call__(self, progress: Progress) -> None:
        """Raises Failure if a file cannot be written."""
        if self.decode is None:
            return
        self.steps += 1
        latents = progress.denoised
        if latents.ndim == 5:  # of videos the middle frames
            latents = latents[:, latents.shape[1] // 2]
        image = side_by_side(list(self.decode(latents)))
        files = [self.file, self.folder and self.folder / f"{self.prefix}step-{self.steps:03}.png"]
        for file in filter(None, files):
            write_image(file, image, compress_level=1)  # speed counts here
