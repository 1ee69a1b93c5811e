"""What each caching policy costs in picture, and whether fewer steps would have done better.

    python benchmarks/quality.py --json FILE --plot FILE --sheet FILE
    python benchmarks/quality.py --model sd15 --prompts prompts.txt --batch 1

Every composition in the list of policies draws the same prompts from the same noise; its pictures are compared with the
uncached ones. The rivals that need no cache are drawn too: the model's own solver, DPM++ 2M and UniPC with fewer steps,
each also compared with its own picture of all the steps. What is drawn is kept in --work, so a run may be cut and
started again; several may run at once, each with its own --rounds, and a last one without puts them together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import benchmarks  # noqa: F401  (before MLX)
from benchmarks.drawn import DATA, Case, cache_cases, compare, draw, read_lines

BETTER_SOLVERS = ("dpm++2m", "unipc")
OWN_SHARES = (0.1, 0.16, 0.2, 0.26, 0.34, 0.5)
BETTER_SHARES = (0.1, 0.16, 0.2, 0.3, 0.4)


def rival_cases(steps: int, own: str) -> tuple[list[Case], list[Case]]:
    """Other solvers with all the steps; and all of them, the model's own first, with fewer."""
    better = [name for name in BETTER_SOLVERS if name != own]
    many = [Case(f"{name}, {steps} steps", steps, scheduler=name) for name in better]
    few = []
    for name, shares in ((None, OWN_SHARES), *((name, BETTER_SHARES) for name in better)):
        for n in sorted({max(2, round(share * steps)) for share in shares}, reverse=True):
            few.append(Case(f"{name or own}, {n} steps", n, scheduler=name))
    return many, few


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="default: the bundled one")
    p.add_argument("--prompts", type=Path, default=DATA / "quality_prompts.txt", help="one a line")
    p.add_argument("--policies", type=Path, default=DATA / "policies.txt", help="one composition a line")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has the next one")
    p.add_argument("--batch", type=int, default=6, help="pictures drawn at once; a round")
    p.add_argument("--rounds", type=int, nargs="+", metavar="R", help="draw only these, from 0, and stop")
    p.add_argument("--work", type=Path, default=Path("runs/quality"), help="where what is drawn is kept")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--plot", type=Path, metavar="FILE.png")
    p.add_argument("--sheet", type=Path, metavar="FILE.png")
    return p


def main(argv=None) -> None:
    args = parser().parse_args(argv)
    from mlx_deepcache import StableDiffusion

    pipe = StableDiffusion.from_pretrained(args.model)
    prompts = read_lines(args.prompts)
    own = pipe.settings("").scheduler
    uncached = Case("uncached", args.steps)
    policies = cache_cases(pipe, read_lines(args.policies), args.steps)
    many, few = rival_cases(args.steps, own)
    pipe(prompts[0], steps=1)  # reads the weights
    drawn = draw(
        pipe,
        [uncached, *policies, *many, *few],
        prompts,
        args.seed,
        batch=args.batch,
        folder=args.work,
        common={},
        rounds=args.rounds,
        say=lambda text: print(text, flush=True),
    )
    reference = drawn["uncached"]
    for case in [*policies, *many, *few]:
        print(case.name, compare(drawn[case.name], reference))


if __name__ == "__main__":
    main()
