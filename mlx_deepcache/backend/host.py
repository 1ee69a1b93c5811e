"""On Linux without a GPU, MLX's CPU backend is as fast as the BLAS and the allocator it finds: give it good ones."""

from __future__ import annotations

import ctypes
import glob
import os
import sys

HINT = (
    "no fast BLAS found, so matrix products will be about 100 times slower: "
    "`pip install mkl` (x86-64) or `apt install libopenblas0-pthread`"
)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def prepare() -> bool:
    """Make MLX's CPU backend fast, before it is first imported; does nothing elsewhere than on Linux without a GPU.

    Returns whether matrix products will be fast, as far as can be told.
    """
    if not sys.platform.startswith("linux") or glob.glob("/dev/nvidia[0-9]*"):
        return True
    _keep_memory()
    return _load_blas()


def _load_blas() -> bool:
    """MLX's Linux wheel links the reference BLAS (1.5 GFLOP/s); one loaded globally before it takes precedence."""
    if "mlx.core" in sys.modules:
        return _LOADED in os.environ
    in_environment = sorted(glob.glob(os.path.join(sys.prefix, "lib", "libmkl_rt.so.*")))
    for library in ("libopenblas.so.0", *in_environment, "libmkl_rt.so.2", "libmkl_rt.so.3"):
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        os.environ[_LOADED] = library
        return True
    return False


def _keep_memory() -> None:
    """Every MLX operation allocates its output. glibc gives large blocks back to the system at once and gets them
    anew, page by page, which takes several times as long as a simple operation itself; let it keep them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


_LOADED = "_MLX_DEEPCACHE_BLAS"
