"""How an option is declared, as a field of a dataclass, and what is taken for one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from itertools import islice
from typing import Any

from ..errors import UnknownOption, UsageError, called
from ..fields import suggest, valued
from .kinds import KINDS, Check, Kind

MOST = 100_000  # of a repeated option; so many pictures take days


@dataclass(frozen=True)
class Option:
    """One option. alone: what its flag means without a value, if it may be given so; needs: others of which it needs at
    least one; model: the attribute of a `Checkpoint` that gives the default; only: what is drawn for which it has a
    meaning, if not for all; recorded: whether a picture carries it; many: whether it is a sequence; span: what a slider
    goes from, to and by."""

    name: str
    kind: Kind
    many: bool
    optional: bool
    default: Any
    help: str
    group: str
    flag: str
    metavar: str | None = None
    nargs: str | None = None
    alone: Any = None
    choices: Sequence | None = None
    check: Check | None = None
    needs: tuple[str, ...] = ()
    model: str | None = None
    only: tuple[str, ...] | None = None
    a1111: str | None = None
    a1111_values: dict | None = None
    recorded: bool = True
    span: tuple[float, float, float] | None = None

    @property
    def key(self) -> str:
        """What a picture's settings call it."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def words(self) -> str:
        """What it should be."""
        if self.choices is not None:
            return f"one of {', '.join(map(str, self.choices))}"
        return self.kind.words if self.check is None else self.check.words

    def read(self, text: str) -> Any:
        """A value, or one of several, from text.

        Raises:
            ValueError: it is none; says what was expected.
        """
        try:
            value = self.kind.read(text)
            if self.check is not None and not self.check.holds(value):
                raise ValueError
        except ValueError:
            raise ValueError(f"expected {self.words}, got {text!r}") from None
        return value

    def take(self, value: Any) -> Any:
        """A value from a caller in Python.

        Raises:
            UsageError: it cannot be.
        """
        if value is None and (self.optional or (self.default is not None and not self.default)):
            return self.default
        if self.many:
            one = isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable) or self.kind.one(value)
            items = tuple(islice([value] if one or getattr(value, "ndim", 1) == 0 else value, MOST + 1))
            if len(items) > MOST:
                raise UsageError(f"{called(self.name)} should be at most {MOST:,}, got more")
            return tuple(map(self._take, items))
        return self._take(value)

    def _take(self, value: Any) -> Any:
        try:
            value = self.kind.take(value)
            if self.choices is not None and value not in self.choices:
                raise ValueError
            if self.check is not None and not self.check.holds(value):
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise UsageError(f"{called(self.name)} should be {self.words}, got {valued(value)}") from None
        return value

    def record(self, owner: Any) -> Any:
        """What a picture says of it, for JSON; owner: what has it as an attribute."""
        value = getattr(owner, self.name)
        if self.many and value is not None:
            return [self.kind.record(item) for item in value]
        return None if value is None else self.kind.record(value)


def option(default: Any, help: str, group: str, *, flag: str | None = None, **about) -> Any:
    """Declare a field as an option; about: the rest of an `Option`."""
    return field(default=default, metadata={"help": help, "group": group, "flag": flag, **about})


@cache
def options_of(cls: type) -> tuple[Option, ...]:
    """The options that a class declares."""
    found = []
    for item in fields(cls):
        about = dict(item.metadata)
        if not about:
            continue
        annotation, _, optional = str(item.type).partition(" | ")
        many = annotation.startswith("tuple[")
        name = annotation.removeprefix("tuple[").removesuffix(", ...]")
        kind = about.pop("kind", None) or KINDS[name]
        about["flag"] = about["flag"] or "--" + item.name.replace("_", "-")
        if "choices" not in about:
            about.setdefault("metavar", kind.metavar)
        default = None if item.default is MISSING else item.default
        found.append(Option(item.name, kind, many, bool(optional), default, **about))
    return tuple(found)


def option_of(cls: type, name: str) -> Option:
    return next(o for o in options_of(cls) if o.name == name)


def taken(cls: type, values: dict[str, Any]):
    """`cls` from keywords, each checked.

    Raises:
        UsageError: there is no such option, a value cannot be, or has no meaning without another; says which.
    """
    known = {o.name: o for o in options_of(cls)}
    for o in known.values():
        if o.key in values and o.key not in known:  # one seed, one LoRA, by the flag's name
            if o.name in values:
                raise UsageError(f"{o.key} and {o.name} are the same; give one of them")
            values = {o.name if name == o.key else name: value for name, value in values.items()}
    for name in values:
        if name not in known:
            raise UnknownOption(f"there is no option {name!r}{_elsewhere(name) or suggest(name, known)}")
    made = cls(**{name: known[name].take(value) for name, value in values.items()})
    for o in known.values():
        if not set(o.needs) & known.keys():  # what a model has is checked with it
            continue
        if (value := getattr(made, o.name)) is o.default or (type(value) is type(o.default) and value == o.default):
            continue  # an array is never compared
        if all(getattr(made, other) is known[other].default for other in o.needs):
            article = "an" if o.needs[0][0] in "aeio" else "a"
            raise UsageError(
                f"{called(o.name)} has no meaning without {article} {called(o.needs[0]).removesuffix('s')}"
            )
    return made


_THEIRS = {
    "num_inference_steps": "steps",
    "generator": "seeds",
    "num_images_per_prompt": "seeds",
    "mask_image": "mask",
    "control_image": "controls",
}


def _elsewhere(name: str) -> str:
    """What another library's keyword is called here."""
    return f"; here it is {_THEIRS[name]}" if name in _THEIRS else ""
