"""What DeepCache costs a video: how near each frame stays, and how much more frames flicker.

    python benchmarks/quality/video.py --json FILE --sheet FILE
    python benchmarks/quality/video.py --model svd --image a.png b.png --frames 14

The same videos are drawn from the same noise without a cache and with each interval and branch, one after the other for
each video, so that seconds are of the same minutes. Of a prompt they are Text2Video-Zero's, and SVD's of a picture.
PSNR is a frame's to the same frame of the uncached video. Change is the mean difference of neighbouring frames in grey
levels, to be held against the uncached video's own: more of it is flicker, less is what no longer moves.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

import benchmarks  # noqa: F401  (before MLX)
from benchmarks.timing import header, machine, write_json
from mlx_deepcache import __version__
from mlx_deepcache.apps.calibrate import IDENTICAL, PROMPTS, read_lines
from mlx_deepcache.media.sheets import captioned, psnr, side_by_side, stacked

INTERVALS, BRANCHES = (2, 3, 5), (0, 1, 3)
LARGER = 2  # times, on the sheet


def parse(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="default: the bundled one")
    p.add_argument("--image", type=Path, nargs="+", metavar="FILE", help="a video of each, for SVD")
    p.add_argument("--prompts", type=Path, default=PROMPTS, help="one a line, for other models")
    p.add_argument("--videos", type=int, default=6, help="of how many prompts")
    p.add_argument("--frames", type=int, default=8)
    for name in ("steps", "height", "width"):
        p.add_argument(f"--{name}", type=int, help="default: the model's")
    p.add_argument("--intervals", type=int, nargs="+", default=INTERVALS)
    p.add_argument("--branches", type=int, nargs="+", default=BRANCHES)
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--sheet", type=Path, metavar="FILE.png", help="frames of the first video, a row a case of branch 0")
    return p.parse_args(argv)


def change(video: np.ndarray) -> float:
    """Mean difference of neighbouring frames: (F, H, W, 3) uint8 -> grey levels."""
    return float(np.abs(np.diff(video.astype(np.float32), axis=0)).mean())


def row_of(videos: list[np.ndarray], uncached: list[np.ndarray]) -> dict:
    """PSNR of each frame, averaged over the videos, and what changes from frame to frame."""
    near = np.array(
        [
            [min(psnr(mine, true), IDENTICAL) for mine, true in zip(video, reference, strict=True)]
            for video, reference in zip(videos, uncached, strict=True)
        ]
    )
    return {
        "psnr": round(float(near.mean()), 2),
        "psnr_worst": round(float(near.min()), 2),
        "psnr_by_frame": [round(float(value), 2) for value in near.mean(axis=0)],
        "change": round(float(np.mean([change(video) for video in videos])), 3),
        "change_of_uncached": round(float(np.mean([change(video) for video in uncached])), 3),
    }


def main(argv=None) -> None:
    args = parse(argv)
    from mlx_deepcache import StableDiffusion

    pipe = StableDiffusion.from_pretrained(args.model)
    given = read_lines(args.prompts)[: args.videos] if args.image is None else args.image
    cases = {"uncached": {"cache_interval": 1}}
    for branch in args.branches:
        for n in args.intervals:
            cases[f"N = {n}, branch {branch}"] = {"cache_interval": n, "cache_branch": branch}
    videos, stats, seconds = ({name: [] for name in cases} for _ in range(3))
    for seed, what in enumerate(given):
        of = {"prompt": what} if args.image is None else {"image": what}
        options = of | {"frames": args.frames, "steps": args.steps, "seeds": [seed]}
        options |= {"height": args.height, "width": args.width}
        if seed == 0:
            pipe(**options | {"steps": 4}, cache_interval=2)  # reads the weights
        for name, case in cases.items():
            start = time.perf_counter()
            result = pipe(**options, **case)
            seconds[name].append(time.perf_counter() - start)
            videos[name].append(np.stack([np.asarray(frame) for frame in result.videos[0]]))
            stats[name].append(result.stats)
        print(f"{what}: {seconds['uncached'][-1]:.1f} s without a cache", flush=True)
    rows = []
    for name, case in cases.items():
        full = stats[name][0]
        rows.append(
            {"name": name, **case, "macs": round(full["unet_macs"] / full["unet_macs_uncached"], 4)}
            | {"seconds_share": round(sum(seconds[name]) / sum(seconds["uncached"]), 3)}
            | row_of(videos[name], videos["uncached"])
        )
    about = machine(str(pipe.dtype).removeprefix("mlx.core."))
    settings = pipe.settings(**options)
    report = about | {
        "mlx_deepcache": __version__,
        "model": args.model or "bundled",
        **{name: getattr(settings, name) for name in ("frames", "steps", "height", "width", "guidance_scale")},
        "videos": [str(what) if args.image is None else what.name for what in given],
        "unet_macs_uncached": stats["uncached"][0]["unet_macs_uncached"],
        "uncached_seconds": round(sum(seconds["uncached"]) / len(given), 2),
        "rows": rows,
    }
    print(f"{len(given)} videos, {header(about)}", *table(rows), sep="\n")
    write_json(args.json, report)
    if args.sheet is not None:
        shown = ["uncached", *(f"N = {n}, branch {args.branches[0]}" for n in args.intervals)]
        Image.fromarray(sheet({name: videos[name][0] for name in shown})).save(args.sheet, optimize=True)


def table(rows: list[dict]) -> list[str]:
    """In Markdown."""
    lines = [
        "| | multiply-adds | seconds | PSNR | first frame | last frame | worst | change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        by_frame = row["psnr_by_frame"]
        near = [f"{value:.1f} dB" for value in (row["psnr"], by_frame[0], by_frame[-1], row["psnr_worst"])]
        near = near if row["name"] != "uncached" else [""] * 4
        lines.append(
            f"| {row['name']} | {row['macs']:.3f} | {row['seconds_share']:.2f} | {' | '.join(near)} | "
            f"{row['change']:.2f} |"
        )
    return lines


def sheet(videos: dict[str, np.ndarray]) -> np.ndarray:
    """Videos (F, H, W, 3), a row each."""
    large = {name: video.repeat(LARGER, axis=1).repeat(LARGER, axis=2) for name, video in videos.items()}
    return stacked([captioned(side_by_side(list(video)), [name]) for name, video in large.items()])


if __name__ == "__main__":
    main()
