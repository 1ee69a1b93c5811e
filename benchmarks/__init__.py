"""Benchmarks. mlx_deepcache comes first: it loads a fast BLAS before anything imports MLX."""

import mlx_deepcache  # noqa: F401
