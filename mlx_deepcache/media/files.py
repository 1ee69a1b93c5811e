"""Files written whole or not at all; devices and pipes are written to, and never replaced."""

from __future__ import annotations

import codecs
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import Failure

# What a process has opened, under a name: where it leads to a plain file, that one is not to be replaced either
_OPENED = re.compile(r"/dev/(stdout|stderr|fd/\d+)|/proc/[^/]+/fd/\d+")


def is_stream(file: Path) -> bool:
    """Whether a file is a device or a pipe, such as /dev/null."""
    if _OPENED.fullmatch(str(file)):
        return True
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


@contextmanager
def whole(file: Path, suffix: str = "", *, replace: bool = True) -> Iterator[Path]:
    """Somewhere to write to, which becomes `file` once all is there, and is gone if anything fails. What `file` was is
    replaced, unless it is a device or a pipe: these get what was written.

    Raises:
        FileExistsError: there is such a file, and it should not be replaced.
        Failure: the file cannot be written.
    """
    stream = is_stream(file)
    # a short name, however long the file's own is
    part = Path(tempfile.mkdtemp(), "part") if stream else file.with_name(f".{os.getpid()}.part")
    part = part.with_name(part.name + suffix)
    try:
        yield part
        if stream:
            with part.open("rb") as source, os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND), "wb") as sink:
                shutil.copyfileobj(source, sink)
        elif replace:
            part.replace(file)
        else:
            _put(part, file)
    except FileExistsError:
        raise
    except (OSError, RuntimeError) as error:  # MLX raises the latter
        raise Failure(f"cannot write {file}: {why(error)}") from None
    finally:
        part.unlink(missing_ok=True)
        if stream:
            part.parent.rmdir()


def why(error: OSError | RuntimeError) -> str:
    """Why something could not be written. MLX tells no reason; it is nearly always the same one."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    full = "Unable to write" in str(error)
    return "No space left on device, or a file larger than is allowed" if full else str(error)


def _put(part: Path, file: Path) -> None:
    """Give a file its name, if that is free: another program may have taken it meanwhile."""
    try:
        os.link(part, file)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(file, os.O_CREAT | os.O_EXCL))
        part.replace(file)


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
        if file.is_block_device() or file.is_socket():
            raise Failure(f"cannot write {file}: it is a {'disk' if file.is_block_device() else 'socket'}")
        if not file.parent.is_dir():
            raise Failure(f"cannot write {file}: there is no folder {file.parent}")
        if not (is_stream(file) or os.access(file.parent, os.W_OK)) or (file.exists() and not os.access(file, os.W_OK)):
            raise Failure(f"cannot write {file}: permission denied")
        if "\0" in str(file):
            raise Failure(f"cannot write {str(file)!r}: it has a null character")
    except OSError as error:  # such as a name that is too long
        raise Failure(f"cannot write {file}: {error.strerror or error}") from None
    except UnicodeError:
        raise Failure(f"cannot write {str(file)!r}: it is no text that a file can be called") from None
