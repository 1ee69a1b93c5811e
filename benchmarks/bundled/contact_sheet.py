"""The README's picture: twelve prompts, uncached above, every third and every fifth step full below.

python benchmarks/bundled/contact_sheet.py --output docs/contact_sheet.png
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks  # noqa: F401  (before MLX)

PROMPTS = [
    "a red apple",
    "a drawing of a cat",
    "a rocket",
    "a slice of pizza",
    "a panda",
    "a sunflower",
    "a picture of a castle",
    "a snowman",
    "a penguin",
    "a birthday cake",
    "a guitar",
    "a rainbow",
]
INTERVALS = (1, 3, 5)
SIDE, GAP, LABEL = 96, 4, 150


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/contact_sheet.png"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    import numpy as np
    from PIL import Image, ImageDraw

    from benchmarks.timing import header, machine
    from mlx_deepcache import StableDiffusion

    pipe = StableDiffusion.from_pretrained()
    pipe(PROMPTS[0], steps=1)  # reads the weights
    sheet = Image.new("RGB", (LABEL + len(PROMPTS) * (SIDE + GAP), len(INTERVALS) * (SIDE + GAP) + 20), "white")
    draw, plain, rows = ImageDraw.Draw(sheet), None, []
    for row, interval in enumerate(INTERVALS):
        images, seconds = [], 0.0
        for prompt in PROMPTS:
            start = time.perf_counter()
            images += pipe(prompt, seeds=[args.seed], cache_interval=interval).images
            seconds += time.perf_counter() - start
        pixels = np.stack([np.asarray(image, dtype=np.float64) for image in images])
        plain = pixels if plain is None else plain
        errors = np.square(pixels - plain).mean((1, 2, 3))
        psnr = math.inf if interval == 1 else float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-9))))
        rows.append((interval, seconds / len(PROMPTS), psnr))
        top = row * (SIDE + GAP)
        for column, image in enumerate(images):
            sheet.paste(image.resize((SIDE, SIDE), Image.LANCZOS), (LABEL + column * (SIDE + GAP), top))
        text = "uncached" if interval == 1 else f"--cache-interval {interval}\n{psnr:.1f} dB"
        draw.multiline_text((4, top + SIDE // 3), f"{text}\n{seconds / len(PROMPTS):.2f} s", fill="black")
    about = machine(str(pipe.dtype).removeprefix("mlx.core."))
    draw.text((4, len(INTERVALS) * (SIDE + GAP) + 2), f"50 steps, seed {args.seed}, {header(about)}", fill="black")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output, optimize=True)
    print(header(about))
    for interval, seconds, psnr in rows:
        print(f"interval {interval}: {seconds:.2f} s a picture, {rows[0][1] / seconds:.2f}x, PSNR {psnr:.1f} dB")


if __name__ == "__main__":
    main()
