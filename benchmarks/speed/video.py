"""Memory of Stable Video Diffusion by frames and size, and a small run of it at full width.

    python benchmarks/speed/video.py                                   # a table of estimates, in float16
    python benchmarks/speed/video.py --measure --frames 4 --size 128   # random weights, 6 GB: peaks and seconds

The table is arithmetic: what `generate.py` says beforehand, with one component in memory at a time. --measure holds the
same arithmetic against MLX's own count, and times a full and a cached step, by turns.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import benchmarks  # noqa: F401  (before MLX)
from benchmarks.speed import models
from benchmarks.timing import header, machine, medians, write_json

UNET = {"_class_name": "UNetSpatioTemporalConditionModel", "sample_size": 96, "num_frames": 14}
VAE = {key: value for key, value in models.VAE.items() if key != "up_block_types"}
VAE |= {"_class_name": "AutoencoderKLTemporalDecoder"}
CLIP_VISION_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
PARTS = {"unet": UNET, "vae": VAE, "image_encoder": CLIP_VISION_H}
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}
SIZES, FRAMES, CHUNKS = ((1024, 576), (768, 448), (512, 320)), (14, 25), (None, 8, 4, 1)


def pipeline(dtype: str, **options):
    """Ours, with the published architecture and random weights, which are made when they are needed."""
    from mlx_deepcache import StableDiffusion
    from mlx_deepcache.checkpoints.checkpoint import Checkpoint
    from mlx_deepcache.checkpoints.folder import Part
    from mlx_deepcache.nets.temporal_vae import TemporalVAEConfig
    from mlx_deepcache.nets.unet_parts import UNetConfig

    class Nowhere:
        """A checkpoint's source without files."""

        path, index = Path("svd"), {"_class_name": "StableVideoDiffusionPipeline"}

        def part(self, name):
            return Part(PARTS[name], "nowhere", lambda: ({}, {}))

        def scheduler(self):
            return dict(SCHEDULER)

    class RandomCheckpoint(Checkpoint):
        def load(self, name, dtype):
            return models.fill_mlx(self.module(name), dtype)

    configs = UNetConfig.from_dict(UNET), TemporalVAEConfig.from_dict(VAE)
    return StableDiffusion(RandomCheckpoint(Nowhere(), *configs), dtype, keep=False, **options)


def picture(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def estimates() -> list[dict]:
    """Bytes at the peak of each phase, for each size, number of frames, and frames decoded together."""
    rows = []
    for low in (False, True):
        pipe = pipeline("float16", low_memory=low)
        for width, height in SIZES:
            for frames in FRAMES:
                for chunk in CHUNKS:
                    settings = pipe.settings(
                        image=picture(width, height),
                        width=width,
                        height=height,
                        frames=frames,
                        decode_chunk=chunk or frames,
                        cache_interval=3,
                    )
                    row = {"width": width, "height": height, "frames": frames, "chunk": chunk or frames, "low": low}
                    rows.append(row | {"bytes": pipe.estimate(settings)})
    return rows


def table(rows: list[dict]) -> list[str]:
    """In Markdown, GB."""
    lines = [
        "| size | frames | denoising | with `--low-memory` | decoding all together | 8 | 4 | 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for width, height in SIZES:
        for frames in FRAMES:
            own = [row for row in rows if (row["width"], row["height"], row["frames"]) == (width, height, frames)]
            denoise = [next(row["bytes"]["denoise"] for row in own if row["low"] == low) for low in (False, True)]
            decode = [row["bytes"]["decode"] for row in own if not row["low"]]
            cells = " | ".join(f"{value / 1e9:.1f}" for value in (*denoise, *decode))
            lines.append(f"| {width} x {height} | {frames} | {cells} |")
    return lines


def measured(frames: int, side: int, repeats: int) -> dict:
    """Peaks beside their estimates, and the seconds of a full and of a cached step of both halves of guidance."""
    import mlx.core as mx

    from mlx_deepcache.nets.unet_parts import Conditioning

    pipe = pipeline("float32")
    options = {"image": picture(side, side), "width": side, "height": side, "frames": frames, "decode_chunk": frames}
    stats = pipe(**options, steps=2, cache_interval=2).stats
    unet = pipe.component("unet")
    rng, latents = np.random.default_rng(0), (2, frames, side // 8, side // 8, 8)
    x, context = mx.array(rng.standard_normal(latents, np.float32)), mx.zeros((2, 1, 1024))
    cond = unet.prepare(Conditioning(context, time_ids=mx.array([[6.0, 127.0, 0.02]] * 2)))
    temb = unet.time_embed(mx.array([0.5]), cond)[0]
    _, features = unet(x, temb, cond)
    mx.eval(features)
    runs = {
        "full": lambda: mx.eval(unet(x, temb, cond)[0]),
        "cached, branch 0": lambda: mx.eval(unet(x, temb, cond, reused=features)[0]),
    }
    seconds = medians(runs, repeats)
    return {
        "frames": frames,
        "side": side,
        "peak_bytes": stats["peak_memory_bytes_by_phase"],
        "estimated_bytes": stats["estimated_memory_bytes_by_phase"],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run it, with random weights")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--size", type=int, default=128, metavar="PX")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    about = machine("float32" if args.measure else "float16")
    if not args.measure:
        rows = estimates()
        print(*table(rows), sep="\n")
        write_json(args.json, about | {"rows": rows})
        return
    row = measured(args.frames, args.size, args.repeats)
    print(f"{args.frames} frames of {args.size} px; {header(about)}")
    for phase, peak in row["peak_bytes"].items():
        print(f"{phase}: {peak / 1e9:.2f} GB, estimated {row['estimated_bytes'][phase] / 1e9:.2f} GB")
    print(", ".join(f"{name} {value:.2f} s" for name, value in row["seconds"].items()))
    write_json(args.json, about | row)


if __name__ == "__main__":
    main()
