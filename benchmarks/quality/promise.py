"""Whether `--cache auto --min-psnr` keeps its promise on prompts that were not calibrated.

    python benchmarks/quality/promise.py
    python benchmarks/quality/promise.py --model my-model --prompts unseen.txt

Draws each prompt without a cache and with what is picked for each promise, and counts the pictures that keep it. What
is drawn is kept in --work, so a run may be cut and started again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks  # noqa: F401  (before MLX)
from benchmarks.timing import header, machine, write_json
from mlx_deepcache.apps.calibrate import PROMPTS, WORK, Case, draw, psnr, read_lines
from mlx_deepcache.apps.command import run
from mlx_deepcache.errors import UsageError

CONCEPTS = Path(__file__).parents[1] / "bundled" / "emoji_concepts.txt"
SEARCHED = CONCEPTS.with_name("search_prompts.txt")
PROMISES = (30, 35, 40, 45, 50)


def unseen(count: int) -> list[str]:
    """Names of the bundled model's concepts, evenly over the list, of which no prompt speaks that was calibrated or
    searched with."""
    known = " ".join([*read_lines(PROMPTS), *read_lines(SEARCHED)])
    names = [line.split(" ", 1)[1].split(",")[0].split("|")[0].strip(" *") for line in read_lines(CONCEPTS)]
    fresh = [name for name in names if name not in known]
    return [fresh[i * len(fresh) // count] for i in range(min(count, len(fresh)))]


def flags(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the bundled one")
    parser.add_argument("--prompts", type=Path, help="one a line; default: 40 that the bundled model knows")
    parser.add_argument("--min-psnr", type=float, nargs="+", default=PROMISES, metavar="DB")
    parser.add_argument("--seed", type=int, default=1000, help="of the first prompt; the next has the next one")
    parser.add_argument("--work", type=Path, default=WORK, help="where what is drawn is kept")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> None:
    from mlx_deepcache import StableDiffusion
    from mlx_deepcache.cache.text import write

    pipe = StableDiffusion.from_pretrained(args.model)
    prompts = unseen(40) if args.prompts is None else read_lines(args.prompts)
    picked = {}
    for promise in args.min_psnr:
        try:
            settings = pipe.settings("", cache="auto", min_psnr=promise)
        except UsageError as error:
            print(f"{promise:g} dB: {error}")
            continue
        picked[promise] = tuple(write(policy) for policy in settings.cache.policies)
    steps = pipe.settings("").steps
    cases = {caches: Case(" ".join(caches) or "uncached", steps, caches) for caches in [(), *picked.values()]}
    drawn = draw(pipe, list(cases.values()), prompts, args.seed, batch=1, folder=args.work)
    rows, about = [], machine(str(pipe.dtype).removeprefix("mlx.core."))
    print(f"{len(prompts)} prompts that were not calibrated; {header(about)}")
    for promise, caches in picked.items():
        db = psnr(drawn[cases[caches].name].images, drawn["uncached"].images)
        rows.append({"min_psnr": promise, "cache": caches, "kept": int((db >= promise).sum()), "of": len(db)})
        rows[-1] |= {"psnr": round(float(db.mean()), 2), "psnr_worst": round(float(db.min()), 2)}
        print("{min_psnr:g} dB: {kept} of {of}, mean {psnr}, worst {psnr_worst}".format(**rows[-1]), *caches)
    write_json(args.json, about | {"prompts": prompts, "seed": args.seed, "rows": rows})


if __name__ == "__main__":
    raise SystemExit(run(measure, flags, None, "cancelled; what is drawn is kept", "draw smaller pictures"))
