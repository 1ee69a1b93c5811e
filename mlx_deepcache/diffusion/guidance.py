"""Classifier-free guidance."""

from __future__ import annotations

import mlx.core as mx


def guide(without: mx.array, given: mx.array, scale: float | mx.array) -> mx.array:
    """Away from the unconditional prediction, towards the conditional one (Ho and Salimans 2022, equation 6)."""
    return without + scale * (given - without)
