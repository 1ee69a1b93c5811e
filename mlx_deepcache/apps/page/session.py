"""What the page holds for one visitor: jobs under way, and the pictures drawn, as the files that are shown."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ..server import pictures
from ..server.jobs import Drawn, Job

MOST = 200  # pictures
RECENT = 8  # previews that a browser may still ask for


@dataclass(frozen=True)
class Shot:
    """A picture that was drawn. file: a PNG with its settings; uncached: the same drawn without a cache."""

    file: Path
    caption: str
    settings: dict[str, Any]
    uncached: Path | None = None


class Session:
    """folder: in which its files lie."""

    def __init__(self, folder: Path):
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.jobs: list[Job] = []
        self.shots: list[Shot] = []
        self.shown: Shot | None = None
        self._count = 0

    def preview(self, image: Image) -> Path:
        """A file with this preview; older ones go."""
        self._count += 1
        file = self.folder / f"preview-{self._count}.jpg"
        file.write_bytes(pictures.packed(image, "jpeg", 90))
        (self.folder / f"preview-{self._count - RECENT}.jpg").unlink(missing_ok=True)
        return file

    def add(self, drawn: Drawn, caption: str) -> Shot:
        """Keep a picture, as the server would send it."""
        self._count += 1
        file, other = self.folder / f"{self._count:04}-{drawn.seed}.png", None
        file.write_bytes(pictures.png(drawn))
        if drawn.uncached is not None:
            other = file.with_stem(f"{file.stem}-uncached")
            other.write_bytes(pictures.packed(drawn.uncached))
        shot = Shot(file, caption, drawn.settings, other)
        self.shots.insert(0, shot)
        for old in self.shots[MOST:]:
            old.file.unlink(missing_ok=True)
        del self.shots[MOST:]
        return shot

    def gallery(self) -> list[tuple[str, str]]:
        """The newest first."""
        return [(str(shot.file), shot.caption) for shot in self.shots]

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
