"""Typed values read from text: what a command line, a policy's text or a picture's settings may say. A reader raises
ValueError for what is none."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def suggest(text: object, known: Iterable[object]) -> str:
    """ "; did you mean X?" for the nearest of what is known, or nothing if none is near."""
    names = {str(name).lower(): str(name) for name in known}
    wanted = str(text).lower().replace("_", "-")
    near = get_close_matches(wanted, names, n=1, cutoff=0.6) or [n for n in names if len(wanted) > 2 and wanted in n]
    return f"; did you mean {names[near[0]]}?" if near else ""


def unicode_text(text: str) -> str:
    text.encode()
    return text


def positive(text: str) -> int:
    value = int(text) if text.strip().lstrip("+").isdecimal() else 0
    if value < 1:
        raise ValueError(f"expected a whole number, 1 or more, got {text!r}")
    return value


def finite(value: str | float) -> float:
    number = float(value)
    if not abs(number) < float("inf"):
        raise ValueError
    return number


def file_and_scale(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE; other colons are the file's own."""
    file, _, last = text.rpartition(":")
    if not file or Path(text).exists():
        return Path(text), 1.0
    try:
        scale = float(last)
    except ValueError:
        return Path(text), 1.0
    return Path(file), finite(scale)


def file_and_word(text: str) -> tuple[Path, str | None]:
    """FILE or FILE:WORD; other colons are the file's own."""
    file, _, word = text.rpartition(":")
    if not file or not word or "/" in word or "\\" in word or Path(text).exists():
        return Path(text), None
    return Path(file), word
