"""Caching policies as text, `NAME[:key=value,...]`: read, written and explained."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import Field, fields
from difflib import get_close_matches
from typing import Any

from ..errors import UsageError
from .composition import KINDS, Policy

NAMES = {kind.name: kind for kind in KINDS}


def parse(text: str) -> Policy:
    """A policy from `NAME[:key=value,...]`: keys are the fields of the policy, or their short names.

    Whole numbers and numbers as usual; two of them as `100..800`; steps as `0-9+12+15`, or a mask such as `F..F.`;
    `off` for no value.

    Raises:
        UsageError: no such name or key (the nearest one is suggested), or a value that cannot be.
    """
    name, _, rest = text.strip().partition(":")
    if name not in NAMES:
        raise UsageError(f"there is no cache called {name!r}{_nearest(name, NAMES)}; --cache list explains them")
    kind, values = NAMES[name], {}
    keys = {key: item for item in fields(kind) for key in (item.name, _key(item))}
    for part in rest.split(",") if rest else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in keys:
            known = ", ".join(_key(item) for item in fields(kind))
            raise UsageError(f"{name} has no setting {key!r}{_nearest(key, keys)}; it has {known}")
        item = keys[key]
        if not equals or not value:
            raise UsageError(f"{name}'s {key} needs a value, such as {name}:{key}={_example(item)}")
        if item.name in values:
            raise UsageError(f"{name}'s {key} is given twice")
        values[item.name] = _read(name, key, item, value)
    return kind(**values)


def write(policy: Policy) -> str:
    """The shortest text that `parse` reads as this policy; DeepCache's interval is always said."""
    parts = []
    for item in fields(policy):
        value = getattr(policy, item.name)
        if value != item.default:
            parts.append(f"{_key(item)}={_write(item, value)}")
    return ":".join([policy.name, ",".join(parts)]) if parts else policy.name


def explain() -> Iterable[str]:
    """Two lines about each policy: its text with all defaults, and what it does."""
    for kind in KINDS:
        values = [(item, getattr(kind(), item.name)) for item in fields(kind)]
        settings = ",".join(f"{_key(item)}={_write(item, value)}" for item, value in values if value is not None)
        yield f"{kind.name}:{settings}"
        yield f"    {kind.about}"


def _key(item: Field) -> str:
    return item.metadata.get("key", item.name)


def _example(item: Field) -> str:
    given = {"interval": 3, "center": 15, "power": 1.4, "steps": (*range(10), 12, 15)}
    return _write(item, given.get(item.name, item.default) if item.default is None else item.default)


def _nearest(word: str, known: Iterable[str]) -> str:
    near = get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "tuple[int, int]": "two whole numbers, such as 100..800",
    "tuple[float, float]": "a number, or two such as 0..1",
    "tuple[int, ...]": "steps such as 0-9+12+15, or a mask such as F..F..",
}


def _read(policy: str, key: str, item: Field, text: str) -> Any:
    kind, _, optional = str(item.type).partition(" | ")
    if optional and text in ("off", "none"):
        return None
    try:
        return _READERS[kind](text)
    except ValueError:
        wanted = _WANTED[kind] + (" or off" if optional else "")
        raise UsageError(f"{policy}'s {key} should be {wanted}, got {text!r}") from None


def _number(text: str) -> float:
    value = float(text)
    if not abs(value) < float("inf"):
        raise ValueError
    return value


def _pair(text: str) -> tuple[int, int]:
    low, high = text.split("..")
    return int(low), int(high)


def _numbers(text: str) -> tuple[float, float]:
    low, dots, high = text.partition("..")
    return _number(low), _number(high if dots else low)


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


_READERS = {
    "int": int,
    "float": _number,
    "tuple[int, int]": _pair,
    "tuple[float, float]": _numbers,
    "tuple[int, ...]": _steps,
}


def _write(item: Field, value: Any) -> str:
    if value is None:
        return "off"
    if isinstance(value, tuple) and str(item.type).startswith("tuple[int, ...]"):
        return _write_steps(value)
    if isinstance(value, tuple):
        return "..".join(_plain(v) for v in (value[:1] if value[0] == value[1] else value))
    return _plain(value)


def _plain(value: float) -> str:
    return repr(value) if isinstance(value, float) and not value.is_integer() else str(int(value))


def _write_steps(steps: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for step in steps:
        if runs and runs[-1][1] == step - 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return "+".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
