"""Classifier-free guidance: which halves of the batch a call of the U-Net runs, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx


class Guidance:
    """Ho and Salimans 2022, equation 6, on the steps that it is wanted on.

    scale: the guidance scale; wanted: step -> whether there is guidance. A call with guidance has a batch of twice as
    many pictures as are drawn, first the unconditional half, then the conditional one; a call without, the latter.
    """

    def __init__(self, scale: float, wanted: Callable[[int], bool] = lambda c: True):
        self.scale, self.wanted = scale, wanted

    def begin(self, c: int, t: float) -> bool:
        """A call on step c at timestep t begins: whether it runs both halves."""
        self.both = self.wanted(c)
        return self.both

    def __call__(self, output: mx.array) -> mx.array:
        """The U-Net's output (N or 2N, h, w, C) float32 -> (N, h, w, C)."""
        return self.guide(*mx.split(output, 2)) if self.both else output

    def guide(self, without: mx.array, given: mx.array) -> mx.array:
        return without + self.scale * (given - without)

    @property
    def arrays(self) -> list[mx.array]:
        """All that is remembered."""
        return []
