"""What a generation cost."""

from __future__ import annotations

import platform

import mlx.core as mx


def device_name() -> str:
    """The device that MLX computes on, in words."""
    device = mx.default_device()
    info = mx.device_info(device) if hasattr(mx, "device_info") else {}
    return str(info.get("device_name", platform.processor() or platform.machine())) + f" ({device.type.name})"


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
