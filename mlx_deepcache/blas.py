"""On Linux without a GPU, MLX's matrix products run on whatever BLAS was loaded first: find a fast one."""

from __future__ import annotations

import ctypes
import glob
import os
import sys

HINT = (
    "no fast BLAS found, so matrix products will be about 100 times slower: "
    "`pip install mkl` (x86-64) or `apt install libopenblas0-pthread`"
)


def load_fast_blas() -> bool:
    """Load OpenBLAS or MKL so that MLX's CPU backend, not yet imported, finds its symbols there.

    MLX's Linux wheel links the reference BLAS (1.5 GFLOP/s); a library loaded globally before it takes precedence.
    Returns whether matrix products will be fast, as far as can be told; elsewhere than on Linux they are.
    """
    if not sys.platform.startswith("linux") or glob.glob("/dev/nvidia[0-9]*"):
        return True
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


_LOADED = "_MLX_DEEPCACHE_BLAS"
