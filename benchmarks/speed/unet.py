"""Full against cached U-Net calls: seconds, multiply-adds, what of the promised speed-up arrives, and PyTorch's.

python benchmarks/speed/unet.py --config sd15 --against torch

Random weights at real size, one picture with guidance. A share is a cached call's of the full one's. "Ideal" is what
DeepCache's own multiply-adds promise at an interval; "efficiency" is the measured speed-up over that. `--against torch`
has diffusers with the pip package DeepCache make the same calls in turn with ours, on CUDA if PyTorch has it, else on
the CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks.speed.models import SCHEDULER, UNETS, mlx_unet, torch_unet
from benchmarks.timing import INTERVALS, add_common, header, machine, medians, write_json

TORCH_PACKAGES = ("mlx", "torch", "diffusers", "DeepCache")


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=[*UNETS, "emoji"], default="sd15")
    parser.add_argument("--size", type=int, metavar="PX", help="side of the picture; default: 512, or emoji's own")
    parser.add_argument("--batch", type=int, default=1, help="pictures; guidance doubles it (1)")
    parser.add_argument("--branches", default="0,1,3", help="comma-separated (0,1,3)")
    parser.add_argument("--against", choices=["torch"], help="compare with diffusers and DeepCache")
    add_common(parser, 5)
    args = parser.parse_args(argv)
    args.branches = [int(branch) for branch in args.branches.split(",")]
    if args.against and args.config == "emoji":
        parser.error("--against torch needs one of the real architectures")
    return args


def inputs(config, batch: int, side: int) -> dict[str, np.ndarray]:
    """Latents (B, h, w, 4) and what a prompt would have given, for a U-Net's config."""
    rng = np.random.default_rng(0)
    given = {
        "x": rng.standard_normal((batch, side, side, 4), dtype=np.float32),
        "context": rng.standard_normal((batch, 77, config.cross_attention_dim), dtype=np.float32),
    }
    if config.addition_embed_type is not None:
        given["pooled"] = rng.standard_normal((batch, 1280), dtype=np.float32)
        given["time_ids"] = np.full((batch, 6), 8.0 * side, np.float32)
    return given


def calls(unet, given: dict[str, np.ndarray], branches: list[int], dtype) -> dict[str, Callable[[], None]]:
    """A full call, and a cached one of each branch."""
    import mlx.core as mx

    from mlx_deepcache.nets.unet_parts import Conditioning

    arrays = {name: mx.array(array) for name, array in given.items()}
    x, context = (arrays[name].astype(dtype) for name in ("x", "context"))
    pooled = arrays["pooled"].astype(dtype) if "pooled" in arrays else None
    prompt = unet.prepare(Conditioning(context, pooled, arrays.get("time_ids")))
    temb = unet.time_embed(mx.array([500]), prompt)[0]
    mx.eval(x, temb, prompt.down, prompt.mid, prompt.up)

    def call(branch: int, features=None) -> Callable[[], None]:
        return lambda: mx.eval(unet(x, temb, prompt, branch=branch, reused=features)[0])

    runs = {"full": call(branches[0])}
    for branch in branches:
        _, features = unet(x, temb, prompt, branch=branch)
        mx.eval(features)
        runs[f"cached {branch}"] = call(branch, features)
    return runs


def their_calls(config: str, given: dict[str, np.ndarray], branches: list[int], dtype: str):
    """The same, through diffusers and the pip package DeepCache; and the device."""
    import torch
    from DeepCache import DeepCacheSDHelper
    from diffusers import DDIMScheduler
    from diffusers.utils import logging

    logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = torch_unet(UNETS[config]).to(device, getattr(torch, dtype))
    tensors = {name: torch.from_numpy(array).to(device, getattr(torch, dtype)) for name, array in given.items()}
    x = tensors["x"].permute(0, 3, 1, 2).contiguous()
    added = {"text_embeds": tensors.get("pooled"), "time_ids": tensors.get("time_ids")}
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(50)
    helper = DeepCacheSDHelper(SimpleNamespace(unet=unet, scheduler=scheduler))

    def predict(step: int) -> None:
        unet(x, scheduler.timesteps[step], encoder_hidden_states=tensors["context"], added_cond_kwargs=added)
        if device == "cuda":
            torch.cuda.synchronize()

    def cached(branch: int) -> Callable[[], None]:
        kept = {}

        def run() -> None:
            helper.set_params(cache_interval=1000, cache_branch_id=branch)
            helper.enable()
            if not kept:  # the first time, to warm up: a full call, whose features all others are given
                predict(0)
                kept.update(helper.cached_output)
            helper.cached_output, helper.start_timestep = dict(kept), 0
            predict(1)
            helper.disable()

        return run

    return {"full": lambda: predict(0)} | {f"cached {branch}": cached(branch) for branch in branches}, device


def main(argv=None) -> None:
    args = parse(argv)

    from mlx_deepcache.backend.ops import dtype_of
    from mlx_deepcache.cache.macs import unet_macs

    dtype = dtype_of(args.dtype)
    name = str(dtype).removeprefix("mlx.core.")
    if args.config == "emoji":
        from mlx_deepcache.checkpoints.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(None)
        unet, factor = checkpoint.load("unet", dtype), checkpoint.vae_config.factor
        side = args.size // factor if args.size else unet.config.sample_size
    else:
        unet, factor = mlx_unet(UNETS[args.config], dtype), 8
        side = (args.size or 512) // factor
    batch = 2 * args.batch
    given = inputs(unet.config, batch, side)
    runs = {f"ours, {kind}": run for kind, run in calls(unet, given, args.branches, dtype).items()}
    about = machine(name, TORCH_PACKAGES if args.against else ("mlx",))
    if args.against:
        theirs, about["torch_device"] = their_calls(args.config, given, args.branches, name)
        runs |= {f"PyTorch, {kind}": run for kind, run in theirs.items()}
    seconds = medians(runs, args.repeats)

    macs = {"full": batch * unet_macs(unet, (side, side), 0, 77)[0]}
    macs |= {f"cached {b}": batch * unet_macs(unet, (side, side), b, 77)[1] for b in args.branches}
    rows, speedup = [], []
    for kind, count in macs.items():
        row = {"call": kind, "macs": count, "macs_share": count / macs["full"]}
        for side_name in ("ours", "PyTorch")[: 2 if args.against else 1]:
            s = seconds[f"{side_name}, {kind}"]
            row[side_name] = {"s": s, "share": s / seconds[f"{side_name}, full"]}
        if args.against:
            row["ours_over_theirs"] = row["ours"]["s"] / row["PyTorch"]["s"]
        rows.append(row)
        for interval in INTERVALS if kind != "full" else ():
            ideal, measured = (
                interval / (1 + (interval - 1) * share) for share in (row["macs_share"], row["ours"]["share"])
            )
            speedup.append({"interval": interval, "branch": int(kind.split()[1]), "measured": measured, "ideal": ideal})

    print(f"{args.config}, {side * factor} px, batch {args.batch} (x 2 for guidance); {header(about)}")
    print(f"{'':10} {'GMAC':>8} {'share':>6} {'seconds':>8} {'share':>6} {'over MACs':>9}", end="")
    print(f" {'PyTorch':>8} {'share':>6} {'ours/theirs':>11}" if args.against else "")
    for row in rows:
        mine = row["ours"]
        over = mine["share"] / row["macs_share"]
        print(
            f"{row['call']:10} {row['macs'] / 1e9:8.1f} {row['macs_share']:6.3f} {mine['s']:8.3f} {mine['share']:6.3f} "
            f"{over:9.2f}",
            end="",
        )
        if args.against:
            print(f" {row['PyTorch']['s']:8.3f} {row['PyTorch']['share']:6.3f} {row['ours_over_theirs']:11.2f}", end="")
        print()
    print(f"{'interval':>8} {'branch':>6} {'measured':>9} {'ideal':>6} {'efficiency':>10}")
    for row in speedup:
        print(
            f"{row['interval']:8} {row['branch']:6} {row['measured']:8.2f}x {row['ideal']:5.2f}x "
            f"{row['measured'] / row['ideal']:10.2f}"
        )
    write_json(args.json, about | {"size": side * factor, "calls": rows, "speedup": speedup})


if __name__ == "__main__":
    main()
