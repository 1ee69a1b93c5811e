"""Latents as files."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from .files import whole


def write_latents(file: Path, latents: mx.array) -> None:
    """latents: (N, h, w, C) -> a file with `latents` (N, C, h, w) float32, whole or not at all; a video's (N, F, h, w,
    C) -> (N, F, C, h, w).

    Raises:
        Failure: the file cannot be written.
    """
    channels_first = mx.contiguous(mx.moveaxis(latents.astype(mx.float32), -1, -3))
    with whole(file, ".safetensors") as part:
        mx.save_safetensors(str(part), {"latents": channels_first})
