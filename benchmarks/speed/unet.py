"""Full against cached U-Net calls: seconds, multiply-adds, and what of the promised speed-up arrives.

python benchmarks/speed/unet.py --config sd15 --size 256

Random weights at real size. "Ideal" is what DeepCache's own multiply-adds promise at an interval; "efficiency" is the
measured speed-up over that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.speed.models import UNETS, mlx_unet
from benchmarks.timing import INTERVALS, header, machine, medians, write_json


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=[*UNETS, "emoji"], default="sd15")
    parser.add_argument("--size", type=int, metavar="PX", help="side of the picture; default: the model's own")
    parser.add_argument("--batch", type=int, default=1, help="pictures; guidance doubles it (1)")
    parser.add_argument("--branches", default="0,1,3", help="comma-separated (0,1,3)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["auto", "float16", "bfloat16", "float32"], default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def calls(unet, side: int, pictures: int, branches: list[int], dtype, factor: int = 8) -> dict[str, Callable[[], None]]:
    """What to time: a full step, and a cached one for each branch; side: of the latents, each `factor` pixels wide."""
    import mlx.core as mx
    import numpy as np

    from mlx_deepcache.nets.unet_parts import Conditioning

    config, rng = unet.config, np.random.default_rng(0)
    batch = 2 * pictures
    x = mx.array(rng.standard_normal((batch, side, side, 4))).astype(dtype)
    context = mx.array(rng.standard_normal((batch, 77, config.cross_attention_dim))).astype(dtype)
    pooled = time_ids = None
    if config.addition_embed_type is not None:
        pooled = mx.array(rng.standard_normal((batch, 1280))).astype(dtype)
        time_ids = mx.full((batch, 6), float(side * factor))
    prompt = unet.prepare(Conditioning(context, pooled, time_ids))
    temb = unet.time_embed(mx.array([500]), prompt)[0]
    mx.eval(x, temb)

    def call(branch, features=None):
        def run():
            mx.eval(unet(x, temb, prompt, branch=branch, reused=features))

        return run

    runs = {"full": call(branches[0])}
    for branch in branches:
        _, features = unet(x, temb, prompt, branch=branch)
        mx.eval(features)
        runs[f"cached {branch}"] = call(branch, features)
    return runs


def main(argv=None) -> None:
    args = parse(argv)
    from mlx_deepcache.backend.ops import dtype_of
    from mlx_deepcache.cache.macs import unet_macs

    dtype = dtype_of(args.dtype)
    if args.config == "emoji":
        from mlx_deepcache.checkpoints.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(None)
        unet, factor = checkpoint.load("unet", dtype), checkpoint.vae_config.factor
    else:
        unet, factor = mlx_unet(UNETS[args.config], dtype), 8
    config = unet.config
    side = args.size // factor if args.size else config.sample_size
    branches = [int(b) for b in args.branches.split(",")]

    batch = 2 * args.batch
    runs = calls(unet, side, args.batch, branches, dtype, factor)
    seconds = medians(runs, args.repeats)

    full_s = seconds["full"]
    full_macs = batch * unet_macs(unet, (side, side), 0, 77)[0]
    cached, speedup = [], []
    for branch in branches:
        macs = batch * unet_macs(unet, (side, side), branch, 77)[1]
        s = seconds[f"cached {branch}"]
        cached.append({"branch": branch, "s": s, "macs": macs})
        for interval in INTERVALS:
            measured = interval / (1 + (interval - 1) * s / full_s)
            ideal = interval / (1 + (interval - 1) * macs / full_macs)
            speedup.append({"interval": interval, "branch": branch, "measured": measured, "ideal": ideal})

    about = machine(str(dtype).removeprefix("mlx.core."))
    print(f"{args.config}, {side * factor} px, batch {args.batch} (x 2 for guidance); {header(about)}")
    print(f"full step {full_s:.4f} s, {full_macs / 1e9:,.1f} GMAC")
    for row in cached:
        print(
            f"cached step, branch {row['branch']}: {row['s']:.4f} s, {row['macs'] / 1e9:,.1f} GMAC; of the full step's "
            f"{row['s'] / full_s:.3f} of time, {row['macs'] / full_macs:.3f} of multiply-adds"
        )
    print(f"{'interval':>8} {'branch':>6} {'measured':>9} {'ideal':>6} {'efficiency':>10}")
    for row in speedup:
        print(
            f"{row['interval']:8} {row['branch']:6} {row['measured']:8.2f}x {row['ideal']:5.2f}x "
            f"{row['measured'] / row['ideal']:10.2f}"
        )
    write_json(args.json, about | {"full_s": full_s, "full_macs": full_macs, "cached": cached, "speedup": speedup})


if __name__ == "__main__":
    main()
