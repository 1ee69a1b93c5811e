"""What it costs in picture that a ControlNet runs on full steps only: `python benchmarks/quality/controlnet.py`.

No ControlNet was trained for the bundled model, so one is made of it: the encoder is the U-Net's own, as at the start
of every ControlNet's training, and the convolutions behind it and behind the picture, which start at zero, are random.
Its residuals then depend on the latents and the timestep as a trained one's do, and are `--scale` times as large as the
skips that they are added to. What it draws is no longer what was asked for; only the distances between pictures count.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mlx_deepcache import Control, StableDiffusion  # noqa: I001  (it loads a fast BLAS, so it comes before MLX)
import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_deepcache.nets.controlnet import ControlNetConfig, ControlNetModel
from mlx_deepcache.checkpoints.weights import save

PROMPTS = ("a red apple", "a cat face")


def make(pipe: StableDiffusion, folder: Path, scale: float) -> Path:
    """Write the ControlNet."""
    data = pipe.checkpoint.part("unet").config | {
        "_class_name": "ControlNetModel",
        "conditioning_embedding_out_channels": [16, 32, 96],
    }
    net, unet = ControlNetModel(ControlNetConfig.from_dict(data)), pipe.checkpoint.load("unet", mx.float32)
    mine = dict(tree_flatten(net.parameters()))
    net.load_weights([(k, v) for k, v in tree_flatten(unet.parameters()) if k in mine], strict=False)
    mx.random.seed(0)
    for conv in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
        conv.weight = mx.random.normal(conv.weight.shape) * scale * conv.weight.shape[1] ** -0.5
        conv.bias = mx.zeros_like(conv.bias)
    save(net, folder)
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of 8-bit pictures."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--scale", type=float, nargs="+", default=[0.2])
    args = parser.parse_args()
    pipe = StableDiffusion.from_pretrained(None, "float32")
    height, width = pipe.checkpoint.native_size
    shape = Image.new("RGB", (width, height))
    ImageDraw.Draw(shape).ellipse((8, 16, width - 8, height - 16), outline="white", width=2)

    def draw(net, interval: int, branch: int, every: bool) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        results = [
            pipe(
                prompt,
                steps=args.steps,
                controls=[] if net is None else [Control(str(net), shape)],
                control_every_step=every,
                cache_interval=interval,
                cache_branch=branch,
            )
            for prompt in PROMPTS
        ]
        pictures = np.stack([np.asarray(result.images[0]) for result in results])
        return pictures, (time.perf_counter() - start) / len(PROMPTS)

    print("| residuals | interval | branch | full steps only, to every step | to uncached | every step, to uncached |")
    for scale in args.scale:
        with tempfile.TemporaryDirectory() as folder:
            net = make(pipe, Path(folder), scale)
            plain, _ = draw(None, 1, 0, False)
            uncached, base = draw(net, 1, 0, False)
            print(f"it changes the picture to {psnr(uncached, plain):.1f} dB; uncached {base:.2f} s", flush=True)
            for interval, branch in ((2, 0), (3, 0), (5, 0)):
                reused, fast = draw(net, interval, branch, False)
                every, slow = draw(net, interval, branch, True)
                print(
                    f"| {scale} | {interval} | {branch} | {psnr(reused, every):.1f} dB "
                    f"| {psnr(reused, uncached):.1f} dB, {fast:.2f} s | {psnr(every, uncached):.1f} dB, {slow:.2f} s |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
