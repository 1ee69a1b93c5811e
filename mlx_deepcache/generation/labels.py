"""Classes by number and by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ..errors import UsageError, called
from ..fields import shown, suggest
from ..nets.labels import LabelConfig

NAMES = Path(__file__).with_name("imagenet.txt")


@cache
def imagenet() -> tuple[str, ...]:
    """The names of ImageNet's classes, by number."""
    lines = NAMES.read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if not line.startswith("#"))


def names_of(config: LabelConfig) -> tuple[str, ...]:
    """Of the classes that a model draws: ImageNet's, where there are as many, else unknown."""
    return imagenet() if config.without == len(imagenet()) else ()


def number_of(label: int | str, config: LabelConfig) -> int:
    """A class's number, from itself or from its name, in capitals or not.

    Raises:
        UsageError: there is no such class; suggests the nearest.
    """
    option, names, last = called("class_label"), names_of(config), config.without
    if isinstance(label, int):
        if not 0 <= label <= last:
            raise UsageError(f"{option} should be from 0 to {last - 1}, or {last} for none of them, got {label}")
        return label
    if not names:
        raise UsageError(f"{option} should be a number from 0 to {last}: this model's classes have no names here")
    if label in names:
        return names.index(label)
    small = [name.lower() for name in names]
    if (wanted := label.strip().lower()) in small:
        return small.index(wanted)
    raise UsageError(f"{option}: there is no class called {shown(label, 60)!r}{suggest(label, names)}")
