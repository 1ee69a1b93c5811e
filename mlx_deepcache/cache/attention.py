"""What attention layers gave in earlier calls, kept while one picture is drawn, and when it is used again.

Each class here is a function that the U-Net is given to run its attention layers: `attend(layer, x, keys_values)`
returns what `layer(x, keys_values)` would, computed or remembered; without `keys_values` it is self-attention. A layer
that does not run, as the deep ones on a cached step, is not asked about, and its count of calls stands still. MLX is
lazy: of a layer that is not run, not even the normalised x is computed.
"""

from __future__ import annotations

import mlx.core as mx

from ..nets.blocks import Attention
from .macs import attention_macs

KeysValues = tuple[mx.array, mx.array] | None


class AttentionCache:
    """What the caches of attention outputs share.

    c, t: step and timestep of the call that is under way; saved: multiply-adds of the layers that it left out.
    """

    def __init__(self):
        self.kept: dict[int, tuple[mx.array, ...]] = {}  # latest last, by the layer's identity
        self.calls: dict[int, int] = {}
        self.c, self.t, self.saved = 0, 0.0, 0

    def begin(self, c: int, t: float) -> None:
        """A call of the U-Net begins."""
        self.c, self.t, self.saved = c, t, 0

    @property
    def arrays(self) -> list[mx.array]:
        """All that is remembered."""
        return [array for arrays in self.kept.values() for array in arrays]

    def count(self, layer: Attention) -> int:
        """Which call of this layer this is, from 0."""
        number = self.calls.get(id(layer), 0)
        self.calls[id(layer)] = number + 1
        return number

    def usable(self, layer: Attention, batch: int) -> tuple[mx.array, ...]:
        """The layer's remembered outputs for the last `batch` pictures, which the conditional half are; none if there
        are fewer."""
        kept = self.kept.get(id(layer), ())
        return tuple(array[-batch:] for array in kept) if kept and min(map(len, kept)) >= batch else ()

    def skip(self, layer: Attention, x: mx.array, keys_values: KeysValues) -> None:
        """Count what is saved."""
        positions = x.shape[1]
        keys = positions if keys_values is None else keys_values[0].shape[2]
        self.saved += len(x) * attention_macs(layer, positions, keys)
