"""Files written whole or not at all."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def read_text(file: Path | str) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark; "-" is standard input.

    Raises:
        Failure: it cannot be read, or is no text.
    """
    name = "standard input" if file == "-" else str(file)
    try:
        if file != "-":
            data = Path(file).read_bytes()
        elif sys.stdin is None:
            raise Failure("cannot read standard input: it is closed")
        else:
            data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
        marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if marked else "utf-8-sig")
        if "\0" in text:
            raise ValueError
    except OSError as error:
        raise Failure(f"cannot read {name}: {error.strerror or error}") from None
    except ValueError:
        raise Failure(f"cannot read {name}: expected text in UTF-8") from None
    return text


def real_path(file: Path) -> Path:
    """Where a path leads, also if nothing is there yet.

    Raises:
        OSError: nowhere, as with links in a circle or a name that is too long.
    """
    with suppress(FileNotFoundError):
        file.stat()
    return Path(os.path.realpath(file))


def check_writable(file: Path) -> None:
    """Raises Failure before the work rather than after it, if the file cannot be written."""
    try:
        if "\0" not in str(file):
            real_path(file)
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
