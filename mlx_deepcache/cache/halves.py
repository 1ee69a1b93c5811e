"""Guidance's two halves on one machine, or on two."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import mlx.core as mx

from .policy import Call


class Halves:
    """Who runs guidance's halves, 0 the unconditional one and 1 the conditional one: here this machine runs both.

    at_once: how many of a call's it runs, where each may be run without the other."""

    at_once = 2

    def take(self, call: Call) -> Call:
        """The call as this machine is to make it: with those of its halves that are left to it."""
        return call

    def complete(self, call: Call, output: mx.array | None, shape: tuple[int, ...]) -> tuple[Call, mx.array]:
        """The call as it was decided, and its whole output, (pictures, *shape) float32; output: of this machine's
        halves, None where it has none."""
        return call, output

    def total(self, count: int) -> int:
        """Of what each machine has counted of its own halves."""
        return count


class Peer(Protocol):
    """The machine that runs the other half. Both take part in each exchange; what is received is float32."""

    def swap(self, x: mx.array) -> mx.array:
        """Give x, and get the other's, of the same shape."""

    def send(self, x: mx.array) -> None: ...

    def receive(self, shape: tuple[int, ...]) -> mx.array: ...


class SharedHalves(Halves):
    """Each of two machines runs one half, and both then hold the whole output, so that all that follows is done alike
    on both. What needs both halves in one call, or the conditional one only, is run by the machine that has that one.

    half: this machine's."""

    at_once = 1

    def __init__(self, half: int, peer: Peer):
        self.half, self.peer, self.waited = half, peer, False

    def take(self, call: Call) -> Call:
        if call.both and call.apart:
            return replace(call, halves=(self.half,), decide=call.decide and self._both_decide(call.decide))
        return call if self.half == 1 else replace(call, halves=())

    def _both_decide(self, decide: Callable) -> Callable:
        """An adaptive cache's decision for both halves, of which the one that changed most decides."""

        def together(index: int, skip: mx.array) -> tuple[bool, float | None]:
            full, change = decide(index, skip)
            if change is None:  # nothing was decided, on neither machine
                return full, change
            own = mx.array([full, change], dtype=mx.float32)
            full, change = mx.maximum(own, self.peer.swap(own)).tolist()
            return bool(full), change

        return together

    def complete(self, call: Call, output: mx.array | None, shape: tuple[int, ...]) -> tuple[Call, mx.array]:
        if call.both and call.apart:
            parts = output, self.peer.swap(output)
            return call, mx.concatenate(parts if self.half == 0 else parts[::-1])
        if self.half == 1:
            told = [call.full, math.nan if call.change is None else call.change]
            self.peer.send(mx.concatenate([mx.array(told, dtype=mx.float32), output.reshape(-1)]))
            return call, output
        if not self.waited:
            self.waited = True
            warnings.warn("on steps that run one of guidance's halves only, one of two machines waits", stacklevel=2)
        told = self.peer.receive((2 + call.pictures * math.prod(shape),))
        full, change = told[:2].tolist()
        call = replace(call, full=bool(full), change=None if math.isnan(change) else change)
        return call, told[2:].reshape(call.pictures, *shape)

    def total(self, count: int) -> int:
        own = mx.array([count], dtype=mx.int64)
        return (own + self.peer.swap(own)).item()
