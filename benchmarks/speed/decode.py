"""A VAE's decoder and encoder: seconds, and peak memory beside the weights; and PyTorch's.

python benchmarks/speed/decode.py --config sd15 --against torch

Random weights at real size, one picture. PyTorch has no count of its memory on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks.speed.models import VAES, mlx_vae, torch_vae
from benchmarks.timing import add_common, header, machine, medians, write_json


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=list(VAES), default="sd15")
    parser.add_argument("--size", type=int, default=512, metavar="PX", help="side of the picture (512)")
    parser.add_argument("--against", choices=["torch"], help="compare with diffusers")
    add_common(parser, 3)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    import mlx.core as mx

    from mlx_deepcache.backend import memory
    from mlx_deepcache.backend.ops import dtype_of

    dtype = dtype_of(args.dtype)
    name = str(dtype).removeprefix("mlx.core.")
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, args.size // 8, args.size // 8, 4), dtype=np.float32)
    picture = rng.uniform(-1, 1, (1, args.size, args.size, 3)).astype(np.float32)
    vae = mlx_vae(VAES[args.config], dtype)
    z, x = (mx.array(array).astype(dtype) for array in (latents, picture))
    mx.eval(z, x)
    runs = {"ours, decode": lambda: mx.eval(vae.decode(z)), "ours, encode": lambda: mx.eval(vae.encode(x))}
    about = machine(name, ("mlx", "torch", "diffusers") if args.against else ("mlx",))
    if args.against:
        import torch

        torch.set_grad_enabled(False)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        theirs = torch_vae(VAES[args.config]).to(device, getattr(torch, name))
        z_t, x_t = (
            torch.from_numpy(a).permute(0, 3, 1, 2).contiguous().to(device, getattr(torch, name))
            for a in (latents, picture)
        )

        def done(_) -> None:
            if device == "cuda":
                torch.cuda.synchronize()

        runs |= {
            "PyTorch, decode": lambda: done(theirs.decode(z_t).sample),
            "PyTorch, encode": lambda: done(theirs.encode(x_t).latent_dist.mean),
        }
        about["torch_device"] = device
    seconds = medians(runs, args.repeats)
    print(f"{args.config}'s VAE, {args.size} px; {header(about)}")
    rows = []
    for kind in ("decode", "encode"):
        before = mx.get_active_memory()
        memory.reset_peak()
        runs[f"ours, {kind}"]()
        row = {"call": kind, "ours_s": seconds[f"ours, {kind}"], "peak_bytes": memory.peak() - before}
        text = f"{kind}: {row['ours_s']:.3f} s, {row['peak_bytes'] / 1e9:.2f} GB beside the weights"
        if args.against:
            row["torch_s"] = seconds[f"PyTorch, {kind}"]
            row["ours_over_theirs"] = row["ours_s"] / row["torch_s"]
            text += f"; PyTorch {row['torch_s']:.3f} s, ours/theirs {row['ours_over_theirs']:.2f}"
        print(text)
        rows.append(row)
    write_json(args.json, about | {"size": args.size, "rows": rows})


if __name__ == "__main__":
    main()
