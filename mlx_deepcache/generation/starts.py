"""What a generation starts from: noise, given latents, or a picture."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from ..checkpoints.weights import read_tensors
from ..errors import CheckpointError


def read_latents(file: Path) -> mx.array:
    """`latents` from a safetensors file: (N, C, h, w), channels first as in PyTorch -> (N, h, w, C) float32.

    Raises:
        CheckpointError: no such tensor, or it has another number of dimensions, or values that are not finite.
    """
    tensors, _ = read_tensors(file)
    if "latents" not in tensors:
        raise CheckpointError(f"{file} should hold one tensor `latents`, got {', '.join(tensors) or 'none'}")
    latents = tensors["latents"]
    if latents.ndim != 4 or 0 in latents.shape:
        raise CheckpointError(f"{file}: latents should have shape (N, C, height, width), got {latents.shape}")
    latents = latents.astype(mx.float32).transpose(0, 2, 3, 1)
    if not mx.isfinite(latents).all():
        raise CheckpointError(f"{file}: latents hold NaN or infinite values")
    return latents
