"""How much memory MLX may take and keep."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import mlx.core as mx

from ..errors import UsageError, called
from . import cpu, ops

CACHE_SHARE = 1 / 4  # of the memory, for freed buffers that MLX keeps for the next use; its own default is all of it
METAL_SHARE = 0.9  # of what Metal recommends to hold at once; MLX's own default is one and a half times that


_LEAST_GB = 0.25
_BESIDE = 300_000_000  # bytes that Python and the libraries take, measured on Linux


def machine_memory() -> int:
    """Bytes that the device can use: the GPU's, which on Apple Silicon are the machine's, or the machine's; less where
    a container or `ulimit` allows this process less."""
    info = mx.device_info(mx.default_device())
    size = info.get("memory_size", info.get("total_memory", 0))  # as Metal and CUDA call it
    return min([int(size) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_allowed()])


def _allowed() -> list[int]:
    """Limits of this process, in bytes: its control groups' on Linux, and what is left of its address space."""
    limits = []
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(file).read_text().strip() if os.access(file, os.R_OK) else "max"
        if text.isdigit():
            limits.append(int(text))
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses != resource.RLIM_INFINITY:
        taken = Path("/proc/self/statm")
        pages = int(taken.read_text().split()[0]) if taken.exists() else 0
        limits.append(max(addresses - pages * resource.getpagesize(), 0))
    return limits


def limit_memory(gigabytes: float | None = None) -> int:
    """Cap what MLX keeps of freed memory in proportion to the machine's, or to `gigabytes`, which then also caps what
    it takes: beyond that it finishes work before it allocates more, as it does on the CPU near the machine's end and on
    Metal near the end of what that recommends. Returns the bytes that its arrays may take.

    Raises:
        UsageError: the limit is too small to be meant.
    """
    if gigabytes is not None and not gigabytes >= _LEAST_GB:
        raise UsageError(f"{called('memory_limit')} should be at least {_LEAST_GB} GB, got {gigabytes:g}")
    budget = max(machine_memory() - _BESIDE, 0)
    recommended = mx.device_info(mx.default_device()).get("max_recommended_working_set_size")  # Metal has it
    if recommended is not None:
        budget = min(int(METAL_SHARE * recommended), budget)
    if gigabytes is not None:
        budget = min(int(gigabytes * 1e9), budget)
    if gigabytes is not None or recommended is not None or not ops.on_gpu():
        mx.set_memory_limit(budget)
    if ops.on_gpu() or gigabytes is not None:  # on the CPU the allocator below MLX keeps memory: see host.py
        mx.set_cache_limit(int(budget * CACHE_SHARE))
    return budget


def reset_peak() -> None:
    """Count the peak anew."""
    mx.reset_peak_memory()
    cpu.peak_memory = 0


def peak() -> int:
    """Most bytes since `reset_peak`: of MLX's arrays, and of what the CPU's kernels take beside them."""
    return max(mx.get_peak_memory(), cpu.peak_memory)
