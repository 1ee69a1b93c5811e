"""Model descriptions: frozen dataclasses read from the JSON configs that diffusers and transformers write.

A key that this code does not know is ignored only if it cannot change the result. A known key with a value that is
not supported is an error that names it, so a checkpoint is never run with a part of its description dropped.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, fields

from ..errors import CheckpointError
from ..fields import is_json, json_words

MOST_LAYERS = 1000  # of one kind, one after the other


def per_level(value, levels: int, name: str) -> tuple:
    """A config value given once for all levels, or as one value a level, as a tuple of one a level."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if len(values) != levels:
        raise CheckpointError(f"{name} should have one value for each of the {levels} levels, got {list(values)}")
    return values


def build_config(cls, data: dict, supported: dict[str, tuple]):
    """cls from the keys it knows; `supported` lists, for other keys, the values that leave the model as it is."""
    for key, allowed in supported.items():
        if key in data and data[key] not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise CheckpointError(f"{key} = {data[key]!r} is not supported in a {cls.__name__}, only {choices}")
    known = {f.name: f for f in fields(cls)}
    lacking = [n for n, f in known.items() if f.default is MISSING and n not in data]
    if lacking:
        raise CheckpointError(f"this is no complete {cls.__name__}: it lacks {', '.join(lacking)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
    for name, value in values.items():
        if not is_json(known[name].type, value):
            raise CheckpointError(
                f"{name} = {data[name]!r} in a {cls.__name__} should be {json_words(known[name].type)}"
            )
        least, most = _range(name, known[name].type)
        if any(
            type(v) in (int, float) and not least <= v <= most for v in (value if type(value) is tuple else [value])
        ):
            upper = "" if most == math.inf else f" and at most {most}"
            raise CheckpointError(f"{name} = {data[name]!r} in a {cls.__name__} should be {least:g} or more{upper}")
    return cls(**values)


def _range(name: str, annotation: str) -> tuple[float, float]:
    """What numbers of this name can be: sizes and counts start at 1, and nets have not many thousand layers."""
    if name.endswith("_eps"):
        return 1e-30, math.inf
    if "int" not in annotation or name.endswith(("_id", "_padding")):
        return -math.inf, math.inf
    return 1, MOST_LAYERS if "layers" in name or "blocks" in name else math.inf


def check_split(widths, heads, name: str) -> None:
    """Widths are split among heads or groups."""
    for width, n in zip(widths, heads, strict=True):
        if n < 1 or width < 1 or width % n:
            raise CheckpointError(f"a width of {width} cannot be split evenly as {name} = {n} says")
