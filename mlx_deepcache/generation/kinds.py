"""The kinds of values that options have: how each is read from text, taken from Python, and recorded for JSON."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from ..checkpoints.names import BUNDLED_NAMES
from ..fields import file_and_scale, file_and_word, finite, unicode_text
from ..media.pictures import are_pictures, is_picture


@dataclass(frozen=True)
class Check:
    """What a value should be, in words, and whether one is; least, most: between which numbers it lies, where there is
    such an end, which itself need not hold."""

    words: str
    holds: Callable[[Any], bool]
    least: float | None = None
    most: float | None = None


def at_least(least: int) -> Check:
    return Check(f"a whole number, {least} or more", lambda value: value >= least, least)


SHARE = Check("above 0 and at most 1", lambda value: 0 < value <= 1, 0, 1)
PART = Check("a share of the steps, from 0 to 1", lambda value: 0 <= value <= 1, 0, 1)
BETWEEN = Check("between 0 and 1", lambda value: 0 < value < 1, 0, 1)
DECIBELS = Check("a number of dB above 0, such as 30", lambda value: value > 0, 0)


@dataclass(frozen=True)
class Kind:
    """A kind of value: in words, and as the help of a flag shows it; read from a flag's text, or taken from a caller in
    Python (ValueError if it is none); as JSON has it; one: whether what a caller gives for several is one; and the file
    or folder that it names, if it names one."""

    words: str
    metavar: str | None
    read: Callable[[str], Any]
    take: Callable[[Any], Any] = lambda value: value
    record: Callable[[Any], Any] = lambda value: value
    one: Callable[[Any], bool] = lambda value: False
    file: Callable[[Any], Any] | None = None


def _exactly(kind: type, make: Callable) -> Callable[[Any], Any]:
    """Takes what equals a number of this kind: 2.0 steps are 2, and True is none; an array's, if it has but one."""

    def take(value: Any) -> Any:
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, kind) or make(value) != value:
            raise ValueError
        return make(value)

    return take


def _bool(value: Any) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # Python's or NumPy's
        raise ValueError
    return bool(value)


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return unicode_text(value)


def that(holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """Takes a value of which this is true, as it is."""

    def take(value: Any) -> Any:
        if not holds(value):
            raise ValueError
        return value

    return take


def _is_file(value: Any) -> bool:
    return isinstance(value, os.PathLike) or (isinstance(value, str) and value != "")


def _is_latents(value: Any) -> bool:
    """A file, or an array of any library."""
    return _is_file(value) or isinstance(getattr(value, "shape", None), tuple)


def _is_policy(value: Any) -> bool:
    return isinstance(value, str) or (is_dataclass(value) and not isinstance(value, type))


def _file_and(read: Callable[[str], tuple], take: Callable[[Any], Any]) -> Callable[[Any], tuple]:
    """Takes a file, or one and its second half."""

    def pair(value: Any) -> tuple:
        file, *second = value if isinstance(value, (tuple, list)) else (value,)
        if not _is_file(file) or len(second) > 1:
            raise ValueError
        return (file, take(second[0])) if second else read(os.fspath(file))

    return pair


def _is_file_and_number(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[1], Real)


def _name(file: Any) -> str | None:
    """A file's bare name: a picture is handed on without the folders that it was drawn in."""
    return Path(file).name if isinstance(file, (str, Path)) else None


def _itself(value: Any) -> Any:
    return value


def _file_of_pair(item: Any) -> Any:
    return item[0]


def _told(file: Any) -> str:
    """What a picture tells of a file or folder: never a whole path, but the way to it from here, begun with a dot so
    that it is taken for nothing else; of what lies elsewhere altogether only the name. A hub id stays as it is."""
    text = str(file)
    if not os.path.exists(text):
        return os.path.basename(text) if os.path.isabs(text) else text
    path, here = os.path.abspath(text), os.getcwd()
    together = os.path.commonpath([path, here])
    way = os.path.basename(path) if os.path.dirname(together) == together else os.path.relpath(path, here)
    return way if way.startswith(os.pardir) else os.path.join(os.curdir, way)


def _told_model(name: str) -> str:
    return name if name in BUNDLED_NAMES else _told(name)


def _take_motion(value: Any) -> tuple[float, float]:
    x, y = value.split(",") if isinstance(value, str) else map(_exactly(Real, finite), value)
    return finite(x), finite(y)


def _told_motion(motion: tuple[float, float]) -> str:
    return ",".join(str(distance).removesuffix(".0") for distance in motion)


def _take_sides(value: Any) -> tuple[int, int, int, int]:
    """One number is all sides'."""
    if isinstance(value, str):
        sides = tuple(map(int, value.split(",")))
    else:
        sides = tuple(map(_exactly(Real, int), value if isinstance(value, (tuple, list)) else [value]))
    sides = sides * 4 if len(sides) == 1 else sides
    if len(sides) != 4 or min(sides) < 0 or not any(sides):
        raise ValueError
    return sides


def _told_sides(sides: tuple[int, ...]) -> str:
    return ",".join(map(str, sides))


def _pair(item: Any) -> tuple[Path, Any]:
    file, second = item if isinstance(item, tuple) else (item, None)
    return Path(file), second


def tagged(file: str, second: Any) -> str:
    """A LoRA's file with its scale, an embedding's with its word, as a flag has it."""
    return file if second in (None, "") else f"{file}:{second if isinstance(second, str) else format(second, 'g')}"


def _tagged(item: Any) -> str:
    file, second = _pair(item)
    return tagged(_told(file), second)


def _seed(text: str) -> int | str:
    return text if text == "random" else int(text)


def _drawn_seed(value: Any) -> int:
    """A seed as others write them, of 32 bits, for `random`."""
    return secrets.randbelow(2**32) if isinstance(value, str) and value == "random" else _exactly(Real, int)(value)


def _label(text: str) -> int | str:
    return int(text) if text.strip().isdecimal() else _str(text)


def _take_label(value: Any) -> int | str:
    return _label(value) if isinstance(value, str) else _exactly(Real, int)(value)


KINDS = {
    "str": Kind("text in UTF-8", "TEXT", unicode_text, _str),
    "int": Kind("a whole number", "N", int, _exactly(Real, int)),
    "float": Kind("a number", "X", finite, _exactly(Real, finite)),
    "bool": Kind("True or False", None, str, _bool),
    "Seed": Kind("a whole number, or random", "S", _seed, _drawn_seed),
    "Model": Kind(
        "a folder or file, or a name",
        "M",
        unicode_text,
        lambda value: _str(os.fspath(value)),
        _told_model,
        file=_itself,
    ),
    "Picture": Kind(
        "a picture: a file or its bytes, Pillow's, or an array (H, W, 3) of uint8",
        "FILE",
        Path,
        that(is_picture),
        _name,
        file=_itself,
    ),
    "Pictures": Kind(
        "a picture (a file or its bytes, Pillow's, or an array (H, W, 3) of uint8), or one a frame",
        "FILE",
        Path,
        that(are_pictures),
        _name,
        file=_itself,
    ),
    "Latents": Kind(
        "a file, or an array (N, height, width, channels)", "FILE", Path, that(_is_latents), _name, file=_itself
    ),
    "Lora": Kind(
        "FILE or FILE:SCALE with a finite number",
        "FILE[:SCALE]",
        file_and_scale,
        _file_and(file_and_scale, _exactly(Real, finite)),
        _tagged,
        _is_file_and_number,
        _file_of_pair,
    ),
    "Embedding": Kind(
        "FILE or FILE:WORD",
        "FILE[:WORD]",
        file_and_word,
        _file_and(file_and_word, lambda word: None if word is None else _str(word)),
        _tagged,
        file=_file_of_pair,
    ),
    "Label": Kind("a class's number or name", "N|NAME", _label, _take_label),
    "Motion": Kind("two numbers, X,Y", "X,Y", _take_motion, _take_motion, _told_motion),
    "Sides": Kind(
        "pixels, 0 or more: one number, or LEFT,TOP,RIGHT,BOTTOM", "N|L,T,R,B", _take_sides, _take_sides, _told_sides
    ),
    "Policy": Kind(
        "one of the policies, such as DeepCache(interval=3), or its text",
        "NAME[:key=value,...]",
        str,
        that(_is_policy),
        str,
    ),
}
