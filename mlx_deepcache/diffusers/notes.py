"""Warnings, each given once, of what a script asks for and has no effect here."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

_noted: set[str] = set()


def note(what: str, words: str = "has no effect here") -> None:
    if what not in _noted:
        _noted.add(what)
        warnings.warn(f"{what} {words}", stacklevel=3)


def note_all(call: str, names: Iterable[str]) -> None:
    """Of arguments of a call."""
    for name in names:
        note(f"{name} in {call}")
