"""Files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import Failure


@contextmanager
def whole(file: Path, suffix: str = "") -> Iterator[Path]:
    """Somewhere to write to, which becomes `file` once all is there, and is gone if anything fails.

    Raises:
        Failure: the file cannot be written.
    """
    part = file.with_name(f".{os.getpid()}.part{suffix}")  # a short name, however long the file's own is
    try:
        yield part
        part.replace(file)
    except (OSError, RuntimeError) as error:  # MLX raises the latter
        raise Failure(f"cannot write {file}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        part.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Raises Failure if the file cannot be written."""
    with whole(file) as part:
        part.write_text(text, encoding="utf-8")


def check_writable(file: Path) -> None:
    """Raises Failure before the work rather than after it, if the file cannot be written."""
    try:
        if file.is_dir():
            raise Failure(f"cannot write {file}: it is a folder")
        if not file.parent.is_dir():
            raise Failure(f"cannot write {file}: there is no folder {file.parent}")
        if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
            raise Failure(f"cannot write {file}: permission denied")
        if "\0" in str(file):
            raise Failure(f"cannot write {str(file)!r}: it has a null character")
    except OSError as error:  # such as a name that is too long
        raise Failure(f"cannot write {file}: {error.strerror or error}") from None
