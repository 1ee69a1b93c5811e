"""Caching policies as text, `NAME[:key=value,...]`: read, written and explained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, fields
from difflib import get_close_matches
from typing import Any

from ..errors import UsageError
from ..fields import from_text, to_text
from .composition import KINDS
from .policy import Policy

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
            parts.append(f"{_key(item)}={to_text(item.type, value)}")
    return ":".join([policy.name, ",".join(parts)]) if parts else policy.name


def explain() -> Iterable[str]:
    """Two lines about each policy: its text with all defaults, and what it does."""
    for kind in KINDS:
        values = [(item, getattr(kind(), item.name)) for item in fields(kind)]
        settings = ",".join(f"{_key(item)}={to_text(item.type, value)}" for item, value in values if value is not None)
        yield f"{kind.name}:{settings}"
        yield f"    {kind.about}"


def keys_of(name: str) -> list[str]:
    """What can be set of the policy of this name, if there is one."""
    return [_key(item) for item in fields(NAMES[name])] if name in NAMES else []


def _key(item: Field) -> str:
    return item.metadata.get("key", item.name)


def _example(item: Field) -> str:
    given = {"interval": 3, "center": 15, "power": 1.4, "steps": (*range(10), 12, 15)}
    return to_text(item.type, given.get(item.name, item.default) if item.default is None else item.default)


def _nearest(word: str, known: Iterable[str]) -> str:
    near = get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def _read(policy: str, key: str, item: Field, text: str) -> Any:
    try:
        return from_text(item.type, text)
    except ValueError as expected:
        raise UsageError(f"{policy}'s {key} should be {expected}, got {text!r}") from None
