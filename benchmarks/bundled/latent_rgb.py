"""Fit the linear map from a model's latents to colours that `--preview` uses without a VAE.

python benchmarks/bundled/latent_rgb.py --model DIR "a red apple" "a rocket" ...

Draws the prompts, decodes them, and fits each latent to the mean colour of its pixels by least squares. Prints what
belongs into the model's model_index.json, under "latent_rgb", and how much of the colours' variance the map explains.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks  # noqa: F401  (before MLX)

PROMPTS = [
    "a red apple",
    "a rocket",
    "a panda",
    "a sunflower",
    "a castle",
    "a whale",
    "a banana",
    "a rainbow",
    "a tree",
]


def main() -> None:
    import numpy as np

    from mlx_deepcache import StableDiffusion

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="*", default=PROMPTS, metavar="PROMPT")
    parser.add_argument("--model", help="default: the bundled one")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    pipe = StableDiffusion.from_pretrained(args.model)
    factor, rows, colours = pipe.checkpoint.vae_config.factor, [], []
    for prompt in args.prompts:
        result = pipe(prompt, steps=args.steps, cache_interval=1, seeds=[0, 1])
        for latents, image in zip(np.array(result.latents), result.images, strict=True):
            h, w, channels = latents.shape
            pixels = np.asarray(image, np.float64).reshape(h, factor, w, factor, 3).mean(axis=(1, 3))
            rows.append(latents.reshape(-1, channels))
            colours.append(pixels.reshape(-1, 3) / 127.5 - 1)
    rows, colours = np.concatenate(rows), np.concatenate(colours)
    design = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    fit = np.linalg.lstsq(design, colours, rcond=None)[0].round(4)
    explained = 1 - ((design @ fit - colours) ** 2).sum() / ((colours - colours.mean(axis=0)) ** 2).sum()
    print(json.dumps({"latent_rgb": {"factors": fit[:-1].tolist(), "bias": fit[-1].tolist()}}))
    print(f"explains {explained:.1%} of the variance of {len(rows):,} latents' colours", file=sys.stderr)


if __name__ == "__main__":
    main()
