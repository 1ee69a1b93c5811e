"""Latents as files."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx

from ..errors import Failure


def write_latents(file: Path, latents: mx.array) -> None:
    """latents: (N, h, w, C) -> a file with `latents` (N, C, h, w) float32, written whole or not at all."""
    temporary = file.with_name(f".{os.getpid()}.part.safetensors")
    try:
        mx.save_safetensors(
            str(temporary), {"latents": mx.contiguous(latents.astype(mx.float32).transpose(0, 3, 1, 2))}
        )
        temporary.replace(file)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise Failure(f"cannot write {file}: {error}") from None
