"""Typed values read from text: what a command line, a policy's text or a picture's settings may say."""

from __future__ import annotations

import argparse
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
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("expected text in UTF-8") from None
    return text


def positive(text: str) -> int:
    return _whole(text, 1)


def natural(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, got {text!r}")
    return value


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def file_and_scale(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE; other colons are the file's own."""
    file, _, last = text.rpartition(":")
    if not file or Path(text).exists():
        return Path(text), 1.0
    try:
        scale = float(last)
    except ValueError:
        return Path(text), 1.0
    if not abs(scale) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected FILE or FILE:SCALE with a finite number, got {text!r}")
    return Path(file), scale


def file_and_word(text: str) -> tuple[Path, str | None]:
    """FILE or FILE:WORD; other colons are the file's own."""
    file, _, word = text.rpartition(":")
    if not file or not word or "/" in word or "\\" in word or Path(text).exists():
        return Path(text), None
    return Path(file), word
