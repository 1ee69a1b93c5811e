"""What attention layers gave in earlier calls, kept while one picture is drawn, and when it is used again.

Each class here is a function that the U-Net is given to run its attention layers: `attend(layer, x, keys_values)`
returns what `layer(x, keys_values)` would, computed or remembered; without `keys_values` it is self-attention. A layer
that does not run, as the deep ones on a cached step, is not asked about, and its count of calls stands still. MLX is
lazy: of a layer that is not run, not even the normalised x is computed.
"""

from __future__ import annotations

import mlx.core as mx

from .blocks import Attention
from .macs import attention_macs
from .policies import FasterCache, PyramidAttentionBroadcast, TGate

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


class Broadcast(AttentionCache):
    """Pyramid Attention Broadcast."""

    def __init__(self, policy: PyramidAttentionBroadcast):
        super().__init__()
        self.policy = policy

    def __call__(self, layer: Attention, x: mx.array, keys_values: KeysValues = None) -> mx.array:
        cross = keys_values is not None
        if not self.policy.remembers(cross):
            return layer(x, keys_values)
        due, kept = self.policy.computes(cross, self.count(layer), self.t), self.usable(layer, len(x))
        if due or not kept:
            self.kept[id(layer)] = (layer(x, keys_values),)
            return self.kept[id(layer)][0]
        self.skip(layer, x, keys_values)
        return kept[0]


class Extrapolated(AttentionCache):
    """FasterCache's self-attention. It is extrapolated only in calls that run the conditional half alone, or where
    there is no guidance at all, and only conditional outputs are kept: extrapolated ones too."""

    def __init__(self, policy: FasterCache, pictures: int, guided: bool, n: int):
        """pictures: how many are drawn, which a batch with guidance holds twice; n: steps."""
        super().__init__()
        self.policy, self.pictures, self.guided, self.n = policy, pictures, guided, n

    def __call__(self, layer: Attention, x: mx.array, keys_values: KeysValues = None) -> mx.array:
        if keys_values is not None:
            return layer(x, keys_values)
        skippable = not self.guided or len(x) == self.pictures
        kept = self.kept.get(id(layer), ())
        if self.policy.skips_attention(self.count(layer), self.t) and skippable and kept:
            before, last = kept
            out = last + (last - before) * self.policy.weight(self.c, self.n)
            self.skip(layer, x, keys_values)
        else:
            out = layer(x)
        latest = out[-self.pictures :]
        self.kept[id(layer)] = (kept[-1] if kept else latest, latest)
        return out


class Gate(AttentionCache):
    """T-GATE."""

    def __init__(self, policy: TGate, guided: bool):
        super().__init__()
        self.policy, self.guided = policy, guided

    def __call__(self, layer: Attention, x: mx.array, keys_values: KeysValues = None) -> mx.array:
        action, kept = self.policy.action(keys_values is not None, self.c), self.usable(layer, len(x))
        if action == "reuse" and kept:
            self.skip(layer, x, keys_values)
            return kept[0]
        out = layer(x, keys_values)
        if action == "gate" and self.guided:
            without, given = mx.split(out, 2)
            self.kept[id(layer)] = ((without + given) / 2,)
        elif action != "compute":  # also where a layer that a cached step left out has nothing yet to use again
            self.kept[id(layer)] = (out,)
        return out
