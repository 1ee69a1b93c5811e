"""Arrays at another size, by the filters of torch.nn.functional.interpolate (align_corners=False), as A1111 enlarges
latents."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

# Name -> the half width of a smooth filter, or None, and whether it widens where things get smaller
FILTERS = {
    "bilinear": (1, False),
    "bilinear-antialias": (1, True),
    "bicubic": (2, False),
    "bicubic-antialias": (2, True),
    "nearest": (None, False),
    "nearest-exact": (None, False),
}


def resample(x: np.ndarray, height: int, width: int, how: str) -> np.ndarray:
    """x: (N, h, w, C) -> (N, height, width, C) float32; how: one of `FILTERS`."""
    rows, columns = weights(x.shape[1], height, how), weights(x.shape[2], width, how)
    return np.einsum("yh,nhwc,xw->nyxc", rows, x.astype(np.float32), columns, optimize=True)


@lru_cache(16)
def weights(n: int, m: int, how: str) -> np.ndarray:
    """How much each of n places counts in each of m: (m, n) float32."""
    reach, antialias = FILTERS[how]
    scale, out = n / m, np.zeros((m, n), np.float32)
    for place in range(m):
        if reach is None:
            out[place, min(int((place + 0.5 * (how == "nearest-exact")) * scale), n - 1)] = 1
            continue
        center = (place + 0.5) * scale - 0.5
        wide = max(scale, 1) if antialias else 1
        first, last = math.floor(center - reach * wide), math.ceil(center + reach * wide)
        taps = {i: _kernel((i - center) / wide, reach, antialias) for i in range(first, last + 1)}
        if antialias:  # only what is there counts; else the edge stands for what is not
            taps = {i: weight for i, weight in taps.items() if 0 <= i < n}
        for i, weight in taps.items():
            out[place, min(max(i, 0), n - 1)] += weight / (sum(taps.values()) if antialias else 1)
    return out


def _kernel(x: float, reach: int, antialias: bool) -> float:
    """A triangle, or Keys' cubic (1981), whose parameter in PyTorch is another one with antialiasing, as in Pillow."""
    x = abs(x)
    if x >= reach:
        return 0.0
    if reach == 1:
        return 1 - x
    a = -0.5 if antialias else -0.75
    return ((a + 2) * x - (a + 3)) * x * x + 1 if x < 1 else a * (((x - 5) * x + 8) * x - 4)
