"""Peak memory of one picture by phase, for each way to save some: what fits into which machine.

python benchmarks/speed/memory.py --config sd15

Random weights at real size. A phase's peak is MLX's own count, weights and all, and in brackets what was estimated
beforehand. "kept" is the pipeline as Python users have it, with every component kept loaded; "freed" is what
generate.py does.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.speed import images, models
from benchmarks.timing import add_common, header, machine, write_json

WAYS = {
    "kept": {},
    "freed": {"keep": False},
    "low memory": {"low_memory": True},
    "low memory, 8 bits": {"low_memory": True, "quantize": 8},
    "low memory, 4 bits": {"low_memory": True, "quantize": 4},
}
PHASES = ("load", "encode", "denoise", "decode")


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=list(models.UNETS), default="sd15")
    parser.add_argument("--size", type=int, default=512, metavar="PX")
    parser.add_argument("--way", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all")
    add_common(parser)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    import mlx.core as mx

    rows = []
    for way in args.way:
        pipe = images.ours(args.config, args.dtype, **WAYS[way])
        result = pipe(
            "a picture",
            steps=2,
            height=args.size,
            width=args.size,
            scheduler="ddim",
            cache_interval=2,
            guidance_scale=5,
        )
        dtype, peak = str(pipe.dtype).removeprefix("mlx.core."), result.stats["peak_memory_bytes_by_phase"]
        estimated = result.stats["estimated_memory_bytes_by_phase"]
        rows.append({"way": way, "peak_bytes": peak, "estimated_bytes": estimated})
        if len(rows) == 1:
            about = machine(dtype)
            print(f"{args.config}, {args.size} px; {header(about)}\nGB{'':19}" + "".join(f"{p:>15}" for p in PHASES))
        print(f"{way:20} " + "".join(f"{peak[p] / 1e9:7.2f} ({estimated[p] / 1e9:5.2f})" for p in PHASES), flush=True)
        del pipe, result
        gc.collect()
        mx.clear_cache()
    write_json(args.json, about | {"config": args.config, "size": args.size, "rows": rows})


if __name__ == "__main__":
    main()
