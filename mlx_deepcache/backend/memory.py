"""How much memory MLX may take and keep."""

from __future__ import annotations

import os

import mlx.core as mx

from ..errors import UsageError, called
from .ops import on_gpu

CACHE_SHARE = 1 / 4  # of the memory, for freed buffers that MLX keeps for the next use; its own default is all of it


_LEAST_GB = 0.25


def machine_memory() -> int:
    """Bytes that the device can use: the GPU's, which on Apple Silicon are the machine's, or the machine's."""
    size = mx.device_info(mx.default_device()).get("memory_size", 0) if hasattr(mx, "device_info") else 0
    return int(size) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit_memory(gigabytes: float | None = None) -> int:
    """Cap what MLX keeps of freed memory in proportion to the machine's, or to `gigabytes`, which then also caps what
    it takes: beyond that it finishes work before it allocates more. Returns the bytes that may be used.

    Raises:
        UsageError: the limit is too small to be meant.
    """
    if gigabytes is not None and not gigabytes >= _LEAST_GB:
        raise UsageError(f"{called('memory_limit')} should be at least {_LEAST_GB} GB, got {gigabytes:g}")
    budget = machine_memory() if gigabytes is None else min(int(gigabytes * 1e9), machine_memory())
    if gigabytes is not None:
        mx.set_memory_limit(budget)
    if on_gpu() or gigabytes is not None:  # on the CPU the allocator below MLX keeps memory: see host.py
        mx.set_cache_limit(int(budget * CACHE_SHARE))
    return budget
