"""Requests' fields, derived from the options as they are declared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from ...errors import UsageError
from ...generation.declared import Option, options_of
from ...generation.kinds import KINDS
from ...generation.options import CACHE, VIDEO, Control, Options
from . import pictures

NOT_SERVED = {"latents"}  # a file
APART = {"seeds"}  # which requests say in their own ways
SERVED = tuple(o for o in options_of(Options) if o.group != VIDEO and o.name not in NOT_SERVED | APART)
NETS = tuple(o.name for o in SERVED if o.kind is KINDS["Model"])  # by the name of an upscaler
CACHING = tuple(o.name for o in SERVED if o.group == CACHE)
_TYPES = {
    KINDS["str"]: str,
    KINDS["int"]: int,
    KINDS["float"]: float,
    KINDS["bool"]: bool,
    KINDS["Picture"]: str,
    KINDS["Pictures"]: str,
    KINDS["Model"]: str,
    KINDS["Policy"]: str,
    KINDS["Label"]: int | str,
}


def _field(o: Option, kind: type) -> tuple:
    """One of pydantic's fields; whether a value can be is asked of the option."""
    kind = list[kind] | kind if o.many else kind
    extra = {"enum": [*o.choices, None]} if o.choices is not None and kind is str else None
    about = o.help + (", in base64" if o.kind in (KINDS["Picture"], KINDS["Pictures"]) else "")
    return kind | None, Field(None, description=about, json_schema_extra=extra)


Steering = create_model(
    "Control",
    __config__=ConfigDict(extra="forbid", protected_namespaces=()),
    **{o.name: _field(o, _TYPES[o.kind]) for o in options_of(Control)},
)


class NamedLora(BaseModel):
    """A LoRA by its name in the list."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    name: str
    scale: float = 1.0


def body(name: str, base: type[BaseModel], only: Iterable[Option] = SERVED) -> type[BaseModel]:
    """A request's fields: those of `base`, and these options by their own names."""
    mine = [o for o in only if o.name not in base.model_fields]
    return create_model(name, __base__=base, **{o.name: _field(o, _TYPES.get(o.kind, Steering)) for o in mine})


def options_from(values: dict[str, Any]) -> dict[str, Any]:
    """The options among a request's values, checked and with pictures decoded; null leaves one out.

    Raises:
        UsageError: a value that cannot be.
        Refused: a picture that cannot be read.
    """
    return {o.name: _taken(o, values[o.name]) for o in SERVED if values.get(o.name) is not None}


def _taken(o: Option, value: Any) -> Any:
    if o.kind is KINDS["Picture"]:
        value = pictures.read(pictures.unpacked(value, o.name), o.name) if isinstance(value, str) else value
    elif o.name == "controls":
        value = [_control(one) for one in ([value] if isinstance(value, dict) else value)]
    return o.take(value)


def _control(values: dict[str, Any] | Control) -> Control:
    if isinstance(values, Control):
        return values
    values = {name: value for name, value in values.items() if value is not None}
    for name in ("model", "image"):
        if name not in values:
            raise UsageError(f"a control needs {'an image' if name == 'image' else 'a model'}")
    values["image"] = pictures.read(pictures.unpacked(values["image"]))
    return Control(**values)
