"""How the U-Net's attention layers are run: each computes, or is given what it gave in an earlier call.

Functions that run a layer, `(layer, x, keys_values) -> output`, compose: one that attends in a way of its own goes
inside an `Attend`, which says whether a layer is run at all. Without `keys_values` it is self-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, IntEnum

import mlx.core as mx

KeysValues = tuple[mx.array, mx.array] | None


class Do(Enum):
    """What an attention layer does in a call."""

    COMPUTE = "run"
    KEEP = "run, and hand out what it gave"
    REUSE = "give what is handed in"


class Kind(IntEnum):
    """What an attention layer attends to: other positions of a picture, the prompt, or a video's other frames."""

    SPATIAL = 0
    CROSS = 1
    TEMPORAL = 2


def compute(layer: Callable, x: mx.array, keys_values: KeysValues = None) -> mx.array:
    return layer(x, keys_values)


def to_first_frame(layer: Callable, x: mx.array, keys_values: KeysValues = None) -> mx.array:
    """Self-attention of a video's frames, (B, F, S, C), to the first of them (Khachatryan et al. 2023, Text2Video-Zero,
    equation 8)."""
    return layer(x, layer.keys_values(x[:, 0]) if keys_values is None else keys_values)


class Attend:
    """Runs the attention layers of one part of the U-Net in one call.

    do: what each kind of attention does. given: the outputs, (B, S, C) each, of the layers that reuse; kept: of those
    that keep, filled as they run; for each kind a list in the order that layers are run in. `do` and `inner` can be
    hashed, and arrays come in and go out: so a call can be compiled.
    """

    def __init__(
        self,
        do: tuple[Do, ...] = (Do.COMPUTE,) * len(Kind),
        given: Sequence[Sequence[mx.array]] = ((),) * len(Kind),
        inner: Callable[..., mx.array] = compute,
    ):
        self.do, self.given, self.inner = do, given, inner
        self.kept: tuple[list[mx.array], ...] = tuple([] for _ in Kind)
        self._next = [iter(outputs) for outputs in given]

    def around(self, inner: Callable[..., mx.array]) -> Attend:
        """The same, with each layer run in another way."""
        return Attend(self.do, self.given, inner)

    @property
    def plain(self) -> bool:
        """Whether every layer computes, and nothing is kept."""
        return set(self.do) == {Do.COMPUTE}

    def __call__(
        self, kind: Kind, layer: Callable, norm: Callable, x: mx.array, keys_values: KeysValues = None
    ) -> mx.array:
        """What the layer makes of norm(x): neither is computed where an output is reused."""
        if self.do[kind] is Do.REUSE:
            return next(self._next[kind])
        out = self.inner(layer, norm(x), keys_values)
        if self.do[kind] is Do.KEEP:
            self.kept[kind].append(out)
        return out


PLAIN = Attend()  # every layer computes, and nothing is kept
