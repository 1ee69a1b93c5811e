"""What MLX finds in its process. On Linux without a GPU it is as fast as the BLAS and the allocator there: give it good
ones."""

from __future__ import annotations

import ctypes
import glob
import os
import sys
from collections.abc import Iterator

SLOW = "matrix products will be about 30 times slower than need be: "
TOO_LATE = SLOW + "mlx.core was imported before mlx_deepcache, which brings it a fast BLAS; import mlx_deepcache first"
NO_BLAS = SLOW + "no fast BLAS was found; `pip install cmeel-openblas` or `apt install libopenblas0-pthread`"

# After each product a BLAS's threads go on turning for 25 ms (OpenBLAS) or 200 ms (MKL), in case there is another one:
# on the cores that the next operation needs. Let them sleep after 2^20 turns, about 0.3 ms, and after 1 ms.
NAP = {"OPENBLAS_THREAD_TIMEOUT": "20", "KMP_BLOCKTIME": "1"}

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


# What mlx.launch, Open MPI and MPICH tell each process of its number among those that were started together; and MPI of
# how many these are
_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def told_rank() -> int | None:
    """This process's number among those that were started together; None if it was started alone."""
    hosts = os.environ.get("MLX_HOSTFILE", "")
    if os.path.isfile(hosts) and os.path.getsize(hosts) <= 1:  # of `mlx.launch -n 1`, which MLX itself cannot read
        return None
    return _first_told(_RANKS)


def told_size() -> int | None:
    """How many processes MPI has started together; None if it was not MPI."""
    return _first_told(_SIZES)


def _first_told(names: tuple[str, ...]) -> int | None:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), None)


def follows() -> bool:
    """Whether another process leads, which speaks for all and writes the files."""
    return told_rank() not in (None, 0)


def prepare() -> str | None:
    """Before MLX is first imported: make its CPU backend fast, on Linux without a GPU; and keep GPUs from rounding
    float32 to TF32 for their matrix units (Apple's from M5 on, and NVIDIA's), unless the environment says otherwise.
    MLX looks for that once, at its first product.

    Returns what to tell the user if matrix products will be slow, as far as can be told.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    if not sys.platform.startswith("linux") or glob.glob("/dev/nvidia[0-9]*"):
        return None
    _keep_memory()
    return _load_blas()


def _load_blas() -> str | None:
    """MLX's Linux wheel links the reference BLAS (7 GFLOP/s a core); one loaded globally before it takes precedence."""
    if hasattr(ctypes.CDLL(None), "cblas_sgemm"):  # somebody did that
        return None
    if "mlx.core" in sys.modules:
        with open("/proc/self/maps") as maps:
            return TOO_LATE if "mlx_cpu.libs/libblas" in maps.read() else None
    for name, value in NAP.items():
        os.environ.setdefault(name, value)
    for library in _libraries():
        try:
            if "cmeel" in library:
                _load_gfortran()
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return None
    return NO_BLAS


def _libraries() -> Iterator[str]:
    """Where a fast BLAS may be, first what somebody chose to install: MKL, OpenBLAS, and the system's own."""
    yield from sorted(glob.glob(os.path.join(sys.prefix, "lib", "libmkl_rt.so.*")))
    yield from _beside_mlx("cmeel.prefix/lib/libopenblas.so.0")
    yield from ("libopenblas.so.0", "libmkl_rt.so.2", "libmkl_rt.so.3")


def _beside_mlx(pattern: str) -> list[str]:
    """Files of installed packages."""
    return [file for folder in sys.path if folder for file in sorted(glob.glob(os.path.join(folder, pattern)))]


def _load_gfortran() -> None:
    """PyPI's OpenBLAS needs the system's libgfortran.so.5, which a bare machine lacks. MLX's wheel has one, by a name
    with a hash in it; the loader goes by the name that a library gives itself, so load a copy with the usual one."""
    usual = b"libgfortran.so.5"
    try:
        ctypes.CDLL(usual.decode())
    except OSError:
        for file in _beside_mlx("mlx_cpu.libs/libgfortran-*.so.5*")[:1]:
            own = os.path.basename(file).encode()
            ctypes.CDLL(file)  # which loads what it needs from beside it
            with open(file, "rb") as opened:
                copy = opened.read().replace(own + b"\0", usual.ljust(len(own) + 1, b"\0"))
            memory = os.memfd_create(usual.decode())
            with open(memory, "wb") as opened:
                opened.write(copy)
                opened.flush()
                ctypes.CDLL(f"/proc/self/fd/{memory}")


def hold_standard_streams() -> None:
    """Where standard input, output or errors are closed, the next files that are opened get their numbers: what is
    printed would go into them, and MLX takes number 0 for a failure."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _keep_memory() -> None:
    """Every MLX operation allocates its output. glibc gives large blocks back to the system at once and gets them
    anew, page by page, which takes several times as long as a simple operation itself; let it keep them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
