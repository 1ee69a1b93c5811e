"""Options of the package as inputs of nodes, derived from their declaration; and the values back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from mlx_deepcache.errors import UsageError
from mlx_deepcache.fields import suggest
from mlx_deepcache.generation.declared import Option
from mlx_deepcache.generation.kinds import KINDS

from .shelves import Shelf

NUMBERS = {KINDS["int"]: io.Int, KINDS["float"]: io.Float}


def told(option: Option) -> str:
    """Its help, where flags are called as in Python."""
    return re.sub(r"--([a-z][a-z0-9-]*)", lambda flag: flag[1].replace("-", "_"), option.help)


@dataclass(frozen=True)
class Asked:
    """An option as an input. id: what the node calls it; none: what a list says for a value that is left open; default:
    where it begins, if not with the option's own; least, most: ends of a number that the option has none of; step: of a
    number; lines: whether text has several; shelf: of the files that it names; also: said beside the option's help."""

    id: str
    option: Option
    none: str | None = None
    default: Any = None
    least: float | None = None
    most: float | None = None
    step: float | None = None
    lines: bool = False
    shelf: Shelf | None = None
    optional: bool = False
    advanced: bool = False
    also: str = ""

    @property
    def open(self) -> Any:
        """What stands for a value that is left open: a number that none can be, since ComfyUI's have no other way."""
        o = self.option
        if self.shelf is not None or o.choices is not None:
            return self.none
        if o.kind not in NUMBERS:
            return ""
        return 0 if o.check is not None and not o.check.holds(0) else -1

    @property
    def tooltip(self) -> str:
        notes = [self.also] if self.also else []
        if self._may_be_open and isinstance(self.open, int):
            notes.append(f"{self.open} leaves it open")
        return "; ".join([told(self.option), *notes])

    @property
    def _may_be_open(self) -> bool:
        return self.option.optional and self.default is None

    def input(self) -> io.Input:
        """As ComfyUI has it."""
        o = self.option
        begin = self.default if self.default is not None else self.open if o.default is None or o.many else o.default
        about = {"tooltip": self.tooltip, "optional": self.optional, "default": begin}
        if self.shelf is not None or o.choices is not None:
            offered = o.choices if self.shelf is None else self.shelf.names()
            first = [self.none] if self.none is not None else []
            made = io.Combo.Input(self.id, options=[*first, *map(str, offered)], **about)
        elif o.kind is KINDS["bool"]:
            made = io.Boolean.Input(self.id, **about)
        elif o.kind in NUMBERS:
            least = self.open if self._may_be_open else self.least if o.check is None else o.check.least
            most = self.most if o.check is None or o.check.most is None else o.check.most
            made = NUMBERS[o.kind].Input(self.id, min=least, max=most, step=self.step, **about)
        else:
            made = io.String.Input(self.id, multiline=self.lines, **about)
        if self.advanced:  # older versions have no such argument
            made.extra_dict["advanced"] = True
        return made

    def value(self, given: Any) -> Any:
        """The option's value, or None if it is left open.

        Raises:
            UsageError: it cannot be.
        """
        o = self.option
        if given == self.open and (o.optional or o.many):
            return None
        if self.shelf is not None:
            return self.shelf.path(given)
        if o.choices is not None:
            known = {str(choice): choice for choice in o.choices}
            if given not in known:
                raise UsageError(f"{self.id} should be {o.words}, got {given!r}{suggest(given, known)}")
            return known[given]
        return o.take([line for line in given.splitlines() if line.strip()] if o.many else given)


def values(asked: Iterable[Asked], given: dict[str, Any]) -> dict[str, Any]:
    """The options that an execution was given, by their own names; those that are left open are not among them."""
    found = {one.option.name: one.value(given[one.id]) for one in asked if one.id in given}
    return {name: value for name, value in found.items() if value is not None}
