"""Benchmarks. PyTorch comes first where it is installed: it would take its matrix products from the BLAS that
mlx_deepcache loads for MLX, which halves its speed. mlx_deepcache comes next, before anything imports MLX."""

from contextlib import suppress

with suppress(ImportError):
    import torch  # noqa: F401

import mlx_deepcache  # noqa: F401
