"""What attention layers gave in earlier calls, kept while one picture is drawn, and when it is used again.

All layers of a part of the U-Net run together, so what each kind of attention does in a call is decided once for the
part. A part that does not run, as the deep one on a cached step, counts no call.
"""

from __future__ import annotations

import mlx.core as mx

from ..nets.attend import Attend, Do, Kind
from .policy import DEEP, PARTS, Call, Memory

Entry = tuple[mx.array, ...]


class AttentionMemory(Memory):
    """What the caches of attention outputs share: what is kept of each layer, the latest last."""

    def __init__(self):
        self.calls = [0 for _ in PARTS]
        self.kept: list[list[list[Entry]]] = [[[] for _ in Kind] for _ in PARTS]  # of each part's layers, by kind
        self.pictures = [[0 for _ in Kind] for _ in PARTS]  # in the batch that this was kept of

    def wanted(self, kind: Kind, calls: int, index: int, t: float) -> Do:
        """What a kind of attention should do at a part's call number `calls`, from 0, on step `index`, timestep t."""

    def recall(self, entry: Entry, index: int, pictures: int) -> mx.array:
        """What a layer is given, for the last pictures of the batch, which the conditional half are."""
        return entry[-1][-pictures:]

    def entry(self, old: Entry, out: mx.array, do: Do, index: int) -> Entry:
        """What is kept of a layer that gave `out`, or was given it."""
        return old if do is Do.REUSE else (out,)

    def attend(self, index: int, t: float, pictures: int) -> tuple[Attend, ...]:
        return tuple(self._attend(part, index, t, pictures) for part in PARTS)

    def _attend(self, part: int, index: int, t: float, pictures: int) -> Attend:
        todo, given = [], []
        for kind, kept, there in zip(Kind, self.kept[part], self.pictures[part], strict=True):
            do = self.wanted(kind, self.calls[part], index, t)
            if do is Do.REUSE and there < pictures:
                do = Do.KEEP  # never run before, or without the half that is wanted now
            todo.append(do)
            given.append([self.recall(entry, index, pictures) for entry in kept] if do is Do.REUSE else [])
        return Attend(tuple(todo), given)

    def keep(self, call: Call, output: mx.array) -> None:
        for part, attend in enumerate(call.attend):
            if part == DEEP and not call.full:
                continue
            self.calls[part] += 1
            for kind, do in enumerate(attend.do):
                if do is Do.KEEP:
                    self.pictures[part][kind] = call.pictures
                if do is not Do.COMPUTE and call.halves:  # else another machine has the outputs
                    outputs = attend.given[kind] if do is Do.REUSE else attend.kept[kind]
                    entries = self.kept[part][kind] or [()] * len(outputs)
                    self.kept[part][kind] = [
                        self.entry(old, out, do, call.index) for old, out in zip(entries, outputs, strict=True)
                    ]

    @property
    def arrays(self) -> list[mx.array]:
        return [array for kinds in self.kept for entries in kinds for entry in entries for array in entry]
