"""Pictures as PNG files, with the settings that drew them inside."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .errors import Failure

JSON_KEY = "mlx_deepcache"
# What other programs call the samplers
A1111_SAMPLERS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler-a": "Euler a",
    "heun": "Heun",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-karras": "DPM++ 2M Karras",
    "dpm++2m-sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
    "ddpm": "DDPM",
}
A1111_RNGS = {"torch": "CPU", "torch-cuda": "NV", "mlx": "MLX"}


def to_uint8(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) in [-1, 1] -> the same in 0-255, rounded as diffusers does."""
    return (np.clip(images / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)


def parameters_text(settings: dict) -> str:
    """Settings as the `parameters` text of AUTOMATIC1111's web UI, which most programs read."""
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    pairs = {
        "Steps": settings["steps"],
        "Sampler": A1111_SAMPLERS[settings["scheduler"]],
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        **({} if settings.get("strength") is None else {"Denoising strength": settings["strength"]}),
        "Model": settings["model"],
        "RNG": A1111_RNGS[settings["rng"]],
        "DeepCache interval": settings["cache_interval"],
        "DeepCache branch": settings["cache_branch"],
        "Caches": " + ".join(settings.get("cache") or []) or None,
        "Version": settings["version"],
    }
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def _quoted(value) -> str:
    """A1111 quotes a value that its own separators occur in."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:"\n') else text


def save_png(file: Path, image: np.ndarray, settings: dict | None) -> None:
    """Write (H, W, 3) uint8, whole or not at all; `settings` go in as `parameters` text and as JSON.

    Raises:
        Failure: the file cannot be written.
    """
    info = None
    if settings is not None:
        info = PngInfo()
        info.add_itxt("parameters", parameters_text(settings))
        info.add_itxt(JSON_KEY, json.dumps(settings, ensure_ascii=False))
    write_image(file, image, pnginfo=info)


def write_image(file: Path, image: np.ndarray, **options) -> None:
    """Write (H, W, 3) uint8 as PNG, whole or not at all; options: Pillow's.

    Raises:
        Failure: the file cannot be written.
    """
    temporary = file.with_name(f".{os.getpid()}.part")  # a short name, however long the file's own is
    try:
        Image.fromarray(image).save(temporary, format="PNG", **options)
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Failure(f"cannot write {file}: {error.strerror or error}") from None


def side_by_side(images: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Pictures (H, W, 3) of one size as one picture, row by row; columns: all, unless given; a last row's rest is
    white."""
    columns = columns or len(images)
    rows = -(-len(images) // columns)
    height, width, _ = images[0].shape
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * height, i % columns * width
        sheet[y : y + height, x : x + width] = image
    return sheet


def grid(images: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures as one picture, about as many columns as rows."""
    return side_by_side(images, math.ceil(math.sqrt(len(images))))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures in 0-255, in dB; infinite for equal ones."""
    mse = np.mean((one.astype(np.float64) - other) ** 2)
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def captioned(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """A picture with lines of text under it, in Pillow's own font, of a size that its width allows if it can."""
    height, width, _ = image.shape
    for size in range(20, 8, -1):
        font = ImageFont.load_default(size)
        room = 8 + math.ceil(max(font.getlength(line) for line in lines))
        if room <= width:
            break
    step = round(size * 1.4)
    sheet = Image.new("RGB", (max(width, room), height + step * len(lines) + 6), "white")
    sheet.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((4, height + 3 + i * step), line, fill="black", font=font)
    return np.asarray(sheet)
