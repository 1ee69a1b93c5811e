"""Classifier-free guidance: which halves of the batch a call of the U-Net runs, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .policies import FasterCache


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


class RebuiltGuidance(Guidance):
    """FasterCache: the unconditional half is left out of most calls, and rebuilt from the conditional one.

    Kept is by what the two halves differed, its low and its high frequencies apart (equations 9 and 10 of the paper).
    Both grow with every call in which they are used, as in diffusers' hook. They are kept as pictures, not as spectra:
    the Fourier transform is linear, so adding one is adding the other.
    """

    def __init__(self, scale: float, policy: FasterCache):
        super().__init__(scale)
        self.policy, self.calls, self.t = policy, 0, 0.0
        self.low = self.high = None

    def begin(self, c: int, t: float) -> bool:
        self.both, self.t = not self.policy.skips_unconditional(self.calls, t), t
        self.calls += 1
        return self.both

    def __call__(self, output: mx.array) -> mx.array:
        if self.both:
            without, given = mx.split(output, 2)
            self.low = low_pass(without - given)
            self.high = without - given - self.low
        else:
            given = output
            low, high = self.policy.growth(self.t)
            self.low, self.high = self.low * low, self.high * high
            without = given + self.low + self.high
        return self.guide(without, given)

    @property
    def arrays(self) -> list[mx.array]:
        return [] if self.low is None else [self.low, self.high]


def low_pass(x: mx.array) -> mx.array:
    """(N, h, w, C) float32 -> its frequencies within a disc of radius min(h, w) // 5 around zero.

    A disc holds (i, j) along with (-i, j) and (i, -j), so the real Fourier basis of cosines and sines, separable, does
    what masking the complex spectrum does.
    """
    h, w = x.shape[1:3]
    radius = min(h, w) // 5
    (rows, i), (columns, j) = fourier_basis(h, radius), fourier_basis(w, radius)
    disc = mx.array(i[:, None] ** 2 + j**2 <= radius**2)
    rows, columns = mx.array(rows), mx.array(columns)
    spectrum = mx.where(disc, rows @ x.transpose(0, 3, 1, 2) @ columns.T, 0)
    return (rows.T @ spectrum @ columns).transpose(0, 2, 3, 1)


def fourier_basis(n: int, highest: int) -> tuple[np.ndarray, np.ndarray]:
    """The orthonormal waves over n positions up to a frequency below n / 2: (2 highest + 1, n), and their
    frequencies."""
    k = np.arange(1, highest + 1)
    angles = 2 * np.pi / n * k[:, None] * np.arange(n)
    waves = np.concatenate([np.full((1, n), 0.5**0.5), np.cos(angles), np.sin(angles)]) * (2 / n) ** 0.5
    return waves.astype(np.float32), np.concatenate([[0], k, k])
