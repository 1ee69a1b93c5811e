"""Typed values read from text and from JSON: what a command line, a policy's text or a model's config may say. What
reads text raises ValueError for what is none."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple


def composed(text: str) -> str:
    """Text with each letter and its accent in one, as it is typed: on a Mac the names of files have them apart."""
    return unicodedata.normalize("NFC", text)


def suggest(text: object, known: Iterable[object]) -> str:
    """ "; did you mean X?" for the nearest of what is known, or nothing if none is near."""
    names = {str(name).lower(): str(name) for name in known}
    wanted = str(text).lower().replace("_", "-")
    near = get_close_matches(wanted, names, n=3, cutoff=0.6) or [n for n in names if len(wanted) > 2 and wanted in n]
    near.sort(key=lambda name: sorted(name) != sorted(wanted))  # two letters exchanged come first
    return f"; did you mean {names[near[0]]}?" if near else ""


def shown(text: object, most: int = 1000) -> str:
    """Text from anywhere, fit for a terminal: on one line, nothing that steers it, and at most so many characters."""
    text = str(text)
    cut = f" ... ({len(text):,} characters)" if len(text) > most else ""
    escaped = (c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text[:most])
    return "".join(escaped) + cut


def parse_json(text: str) -> Any:
    """Raises ValueError for what is no JSON, or is nested too deeply to be meant."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def valued(value: object) -> str:
    """A value in a message: on one line, and not long; of an array, what it is."""
    if isinstance(shape := getattr(value, "shape", None), tuple) and shape:
        return f"an array {shape} of {getattr(value, 'dtype', 'objects')}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


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
    """FILE or FILE:WORD; other colons are the file's own, or say which of a repository's files it is."""
    file, _, word = text.rpartition(":")
    if not file or not word or re.search(r"[/\\]|\.safetensors$", word) or Path(text).exists():
        return Path(text), None
    return Path(file), word


# By a field's annotation


class TextKind(NamedTuple):
    """A type of value: what it is in words, how text is read (raises ValueError) and how it is written."""

    words: str
    read: Callable[[str], Any]
    write: Callable[[Any], str]


def from_text(annotation: str, text: str) -> Any:
    """The value of a field with this annotation, such as "int | None".

    Raises:
        ValueError: the text is none; says what was expected.
    """
    kind, _, optional = annotation.partition(" | ")
    if optional and text in ("off", "none"):
        return None
    try:
        return TEXT[kind].read(text)
    except ValueError:
        raise ValueError(TEXT[kind].words + (" or off" if optional else "")) from None


def to_text(annotation: str, value: Any) -> str:
    """The shortest text that `from_text` reads as this value."""
    return "off" if value is None else TEXT[annotation.partition(" | ")[0]].write(value)


def _pair(text: str) -> tuple[int, int]:
    low, high = text.split("..")
    return int(low), int(high)


def _numbers(text: str) -> tuple[float, float]:
    low, dots, high = text.partition("..")
    return finite(low), finite(high if dots else low)


def _steps(text: str) -> tuple[int, ...]:
    if re.fullmatch(r"[F.]+", text):
        return tuple(i for i, letter in enumerate(text) if letter == "F")
    steps: list[int] = []
    for part in text.split("+"):
        run = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        if run is None or int(run[2] or run[1]) < int(run[1]):
            raise ValueError
        steps += range(int(run[1]), int(run[2] or run[1]) + 1)
    return tuple(steps)


def _write(value: float) -> str:
    return repr(value) if isinstance(value, float) and not value.is_integer() else str(int(value))


def _write_pair(pair: tuple[float, float]) -> str:
    return "..".join(map(_write, pair[:1] if pair[0] == pair[1] else pair))


def _write_steps(steps: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for step in steps:
        if runs and runs[-1][1] == step - 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return "+".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


TEXT = {
    "int": TextKind("a whole number", int, _write),
    "float": TextKind("a number", finite, _write),
    "tuple[int, int]": TextKind("two whole numbers, such as 100..800", _pair, _write_pair),
    "tuple[float, float]": TextKind("a number, or two such as 0..1", _numbers, _write_pair),
    "tuple[int, ...]": TextKind("steps such as 0-9+12+15, or a mask such as F..F..", _steps, _write_steps),
}


def is_json(annotation: str, value: Any) -> bool:
    """Whether a JSON value, with its lists as tuples, is one of a field with this annotation; whole numbers are 0 or
    more."""
    return any(_is(kind, value) for kind in annotation.split(" | "))


def json_words(annotation: str) -> str:
    """What such a value is, in words."""
    return " or ".join("a list" if kind.startswith("tuple") else JSON[kind][0] for kind in annotation.split(" | "))


def _is(kind: str, value: Any) -> bool:
    if kind.startswith("tuple["):
        kinds = kind.removeprefix("tuple[").removesuffix("]").split(", ")
        if kinds[-1] == "...":
            return isinstance(value, tuple) and len(value) > 0 and all(_is(kinds[0], v) for v in value)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is, kinds, value))
    if isinstance(value, bool):  # which Python counts among the whole numbers
        return kind == "bool"
    if not isinstance(value, JSON[kind][1]):
        return False
    if kind in ("int", "float"):  # more MLX cannot count to, or hold in float32
        return (0 if kind == "int" else -(2**128)) <= value < (2**31 if isinstance(value, int) else 2**128)
    return True


JSON = {
    "int": (TEXT["int"].words, int),
    "float": (TEXT["float"].words, (int, float)),
    "bool": ("true or false", bool),
    "str": ("text", str),
    "None": ("null", type(None)),
}
