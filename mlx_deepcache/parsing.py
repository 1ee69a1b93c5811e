"""Reading a command line: a parser whose errors suggest what may have been meant, and the types of flags' values."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """Errors take one line and name the nearest flag or value; exit code 2.

    origin: where the arguments come from, if not from the command line.
    """

    origin: str | None = None

    def __init__(self, script: str, command: str, **options):
        """script, command: what it is called from a clone, and once it is installed."""
        installed = Path(sys.argv[0]).stem == command
        super().__init__(prog=command if installed else script, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        args, rest = self.parse_known_args(args, namespace)
        if rest:
            flag = next((arg for arg in rest if arg.startswith("-")), None)
            nearest = "" if flag is None else suggest(flag.split("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(rest)}{nearest}")
        return args

    def _check_value(self, action, value):
        choices = action.choices
        if choices is not None and value not in choices:
            known = ", ".join(map(str, choices))
            raise argparse.ArgumentError(action, f"expected one of {known}, got {value!r}{suggest(value, choices)}")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {'' if self.origin is None else f'{self.origin}: '}{message}\n")


def suggest(text: object, known: Iterable[object]) -> str:
    """ "; did you mean X?" for the nearest of what is known, or nothing if none is near."""
    names = {str(name).lower(): str(name) for name in known}
    wanted = str(text).lower().replace("_", "-")
    near = get_close_matches(wanted, names, n=1, cutoff=0.6) or [n for n in names if len(wanted) > 2 and wanted in n]
    return f"; did you mean {names[near[0]]}?" if near else ""


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks what could come next, if argcomplete is installed."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(parser)


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
