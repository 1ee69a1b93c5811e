"""Files written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import Failure


def check_writable(file: Path) -> None:
    """Fail before the work rather than after it."""
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


def write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{os.getpid()}.part")
    try:
        temporary.write_text(text)
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Failure(f"cannot write {file}: {error.strerror or error}") from None
