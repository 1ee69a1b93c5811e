"""Measure what caching policies cost a model in picture, for `generate.py --cache auto`.

    python benchmarks/quality/calibrate.py --model my-model
    python generate.py --model my-model --prompt "a red apple" --cache auto --min-psnr 30

Every composition in the list of policies draws the same prompts from the same noise; its pictures are compared with the
uncached ones. The result is stored in the model's folder (cache_front.json), or, for a hub's model, a single file
and a folder that cannot be written, in ~/.cache/mlx_deepcache/fronts; both are where `--cache auto` looks. Calibrate
with the settings that you draw with. What is drawn is kept in --work, so a run may be cut and started again.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks  # noqa: F401  (before MLX)
from benchmarks.quality.drawn import DATA, Case, cache_cases, compare, draw, read_lines, run
from mlx_deepcache import __version__
from mlx_deepcache.cache.prices import Front, Price
from mlx_deepcache.checkpoints.folder import price_places
from mlx_deepcache.errors import Failure


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="default: the bundled one")
    p.add_argument("--prompts", type=Path, default=DATA / "quality_prompts.txt", help="one a line")
    p.add_argument("--policies", type=Path, default=DATA / "policies.txt", help="one composition a line")
    p.add_argument("--steps", type=int, help="default: the model's own, 50")
    p.add_argument("--scheduler", help="default: the model's own")
    p.add_argument("--guidance-scale", type=float, help="likewise")
    p.add_argument("--height", type=int, help="likewise")
    p.add_argument("--width", type=int, help="likewise")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has the next one")
    p.add_argument("--batch", type=int, default=1, help="pictures at once; adaptive caches decide for all of them")
    p.add_argument("--work", type=Path, default=Path("runs/quality"), help="where what is drawn is kept")
    p.add_argument("--output", type=Path, metavar="FILE.json", help="where to store the result, if not as said above")
    return p


def main(argv=None) -> None:
    args = parser().parse_args(argv)
    from mlx_deepcache import StableDiffusion

    pipe = StableDiffusion.from_pretrained(args.model, args.dtype)
    prompts = read_lines(args.prompts)
    common = {key: getattr(args, key) for key in ("guidance_scale", "height", "width")}
    common = {key: value for key, value in common.items() if value is not None}
    settings = pipe.settings("", steps=args.steps, scheduler=args.scheduler, **common)
    uncached = Case("uncached", settings.steps, scheduler=args.scheduler)
    cases = cache_cases(pipe, read_lines(args.policies), settings.steps, args.scheduler, common)
    file = args.output or next(
        (file for file in price_places(pipe.checkpoint.source.path) if _writable(file)),
        price_places(pipe.checkpoint.source.path)[-1],
    )
    drawn = draw(pipe, [uncached, *cases], prompts, args.seed, batch=args.batch, folder=args.work, common=common)
    rows = {case.name: compare(drawn[case.name], drawn["uncached"]) for case in cases}
    prices = [
        Price(case.caches, **{key: rows[case.name][key] for key in ("macs", "psnr", "psnr_worst", "ssim")})
        for case in cases
    ]
    front = Front(
        model=args.model or "bundled",
        steps=settings.steps,
        scheduler=settings.scheduler,
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        pictures=len(prompts),
        version=__version__,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        policies=tuple(sorted(prices, key=lambda price: price.macs)),
    )
    write(front, file)
    for price in front.policies:
        print(f"{price.macs:.3f}  {price.psnr:5.1f} dB, worst {price.psnr_worst:5.1f}  {price}")
    print(f"wrote {file}")


def write(front: Front, file: Path) -> None:
    """Whole or not at all."""
    part = file.with_name(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(front.to_json(), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise Failure(f"cannot write {file}: {error.strerror or error}; name another place with --output") from None


def _writable(file: Path) -> bool:
    return file.parent.is_dir() and os.access(file.parent, os.W_OK)


if __name__ == "__main__":
    run(main)
