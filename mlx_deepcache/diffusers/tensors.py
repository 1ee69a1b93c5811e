"""Pictures and latents between a script and this package: what diffusers has as PyTorch's tensors, channels first."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import UsageError
from ..fields import valued
from ..media.pictures import read_picture


def tensor(array: np.ndarray) -> Any:
    """PyTorch's where it is installed, as scripts for diffusers expect it, else NumPy's."""
    return importlib.import_module("torch").from_numpy(array) if find_spec("torch") is not None else array


def array(value: Any) -> np.ndarray:
    """A tensor, on whatever device, or any library's array."""
    if hasattr(value, "detach"):
        value = value.detach().float().cpu()
    return np.asarray(value)


def latents_in(latents: Any) -> mx.array:
    """(N, C, h, w), or (N, F, C, h, w) -> (N, h, w, C), or (N, F, h, w, C)."""
    latents = array(latents)
    if latents.ndim not in (4, 5):
        raise UsageError(f"latents should be a tensor (N, channels, height, width), got {valued(latents)}")
    return mx.array(np.moveaxis(latents, -3, -1).astype(np.float32))


def latents_out(latents: mx.array) -> np.ndarray:
    """The other way."""
    return np.ascontiguousarray(np.moveaxis(np.array(latents), -1, -3))


def picture(name: str, value: Any) -> Any:
    """One picture, as this package takes them: Pillow's, a file, or an array (H, W, 3). Tensors are (3, H, W) in [0,
    1], alone or the only one of their batch.

    Raises:
        TypeError: several, or latents in place of one.
    """
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise TypeError(f"{name}: one picture can be honoured here, got {len(value)}; call once for each")
        value = value[0]
    if not hasattr(value, "shape"):
        return value
    pixels, first = array(value), hasattr(value, "detach")
    if pixels.ndim == 4:
        if len(pixels) != 1:
            raise TypeError(f"{name}: one picture can be honoured here, got {len(pixels)}; call once for each")
        pixels = pixels[0]
    if first and pixels.ndim == 3:
        if pixels.shape[0] not in (1, 3):
            raise TypeError(f"{name}: a picture should have 3 channels, got {pixels.shape}; latents cannot be taken")
        pixels = np.moveaxis(pixels, 0, -1)
    return pixels


def rounded_size(value: Any, multiple: int) -> tuple[int, int]:
    """(height, width) at which diffusers draws a picture by itself."""
    image = read_picture(value)
    return image.height - image.height % multiple, image.width - image.width % multiple


def pictures_out(images: np.ndarray, kind: str) -> Any:
    """images: (N, H, W, 3), or videos (N, F, H, W, 3), in 0-255 -> what output_type names; numbers are in [0, 1].

    Raises:
        UsageError: there is no such type.
    """
    if kind == "pil":
        if images.ndim == 5:
            return [[Image.fromarray(frame) for frame in video] for video in images]
        return [Image.fromarray(image) for image in images]
    shares = images.astype(np.float32) / 255
    if kind == "np":
        return shares
    return tensor(np.ascontiguousarray(np.moveaxis(shares, -1, -3)))


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
