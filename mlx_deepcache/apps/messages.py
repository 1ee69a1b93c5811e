"""Values as bytes for another machine: what JSON has, tuples, arrays, pictures, and dataclasses the reader names."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image


def pack(value: Any) -> bytes:
    """For another machine, which `unpack`s it. Arrays arrive as NumPy's.

    Raises:
        TypeError: it holds something else.
    """
    arrays: list[np.ndarray] = []
    told = json.dumps(_told(value, arrays))
    packed = io.BytesIO()
    np.savez(packed, np.frombuffer(told.encode(), np.uint8), *arrays)
    return packed.getvalue()


def unpack(packed: bytes, kinds: Iterable[type] = ()) -> Any:
    """What was packed; kinds: the dataclasses that may be in it."""
    known = {kind.__name__: kind for kind in kinds}
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return _untold(json.loads(arrays["arr_0"].tobytes()), lambda i: arrays[f"arr_{i}"], known)


def _told(value: Any, arrays: list[np.ndarray]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_told(item, arrays) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_told(item, arrays) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_told(item, arrays) for item in pair] for pair in value.items()]}
    if isinstance(value, (np.ndarray, mx.array, Image.Image)):
        arrays.append(np.array(value))
        return {"picture" if isinstance(value, Image.Image) else "array": len(arrays)}
    if is_dataclass(value):
        own = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        return {"kind": type(value).__name__, "fields": _told(own, arrays)}
    raise TypeError(f"{type(value).__name__} cannot be sent to another machine")


def _untold(told: Any, array: Callable[[int], np.ndarray], known: dict[str, type]) -> Any:
    if isinstance(told, list):
        return [_untold(item, array, known) for item in told]
    if not isinstance(told, dict):
        return told
    if "kind" in told:
        return known[told["kind"]](**_untold(told["fields"], array, known))
    ((what, inner),) = told.items()
    if what in ("array", "picture"):
        return array(inner) if what == "array" else Image.fromarray(array(inner))
    items = _untold(inner, array, known)
    return tuple(items) if what == "tuple" else dict(items)
