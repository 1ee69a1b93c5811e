"""What each caching policy costs in picture, and whether fewer steps would have done better.

    python benchmarks/quality/quality.py --json FILE --plot FILE --sheet FILE
    python benchmarks/quality/quality.py --model sd15 --prompts prompts.txt --batch 1

Every composition in the list of policies draws the same prompts from the same noise; its pictures are compared with the
uncached ones. The rivals that need no cache are drawn too: the model's own solver, DPM++ 2M and UniPC with fewer steps,
each also compared with its own picture of all the steps. What is drawn is kept in --work, so a run may be cut and
started again; several may run at once, each with its own --rounds, and a last one without puts them together; --report
looks at what is there so far. Seconds are shares of the uncached run's in the same round.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks  # noqa: F401  (before MLX)
from benchmarks.quality.quality_figures import plot, sheet
from benchmarks.timing import header, machine, write_json
from mlx_deepcache import __version__
from mlx_deepcache.apps.calibrate import POLICIES, PROMPTS, WORK, Case, cache_cases, compare, draw, read_lines
from mlx_deepcache.apps.command import run
from mlx_deepcache.cache.text import parse
from mlx_deepcache.errors import Failure

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
    p.add_argument("--prompts", type=Path, default=PROMPTS, help="one a line")
    p.add_argument("--policies", type=Path, default=POLICIES, help="one composition a line")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has the next one")
    p.add_argument("--batch", type=int, default=6, help="pictures drawn at once; a round")
    p.add_argument("--rounds", type=int, nargs="+", metavar="R", help="these only, from 0")
    p.add_argument("--report", action="store_true", help="draw nothing more; report the cases that are complete")
    p.add_argument("--work", type=Path, default=WORK, help="where what is drawn is kept")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--plot", type=Path, metavar="FILE.png")
    p.add_argument("--sheet", type=Path, metavar="FILE.png")
    return p


def used(prompts: list[str], batch: int, rounds: list[int] | None) -> list[str]:
    """The prompts of these rounds."""
    return [p for i, p in enumerate(prompts) if rounds is None or i // batch in rounds]


def judge(rows: list[dict]) -> None:
    """Write into each row whether it is on the front (`front`), and into each cache's who beats it: `loses_to`, a rival
    that is as near to the common picture at no more multiply-adds; `loses_to_own`, one that is as near to its own
    picture of all the steps; `dominated_by`, another cache."""
    caches = [row for row in rows if row["kind"] == "cache"]
    rivals = [row for row in rows if row["kind"] == "fewer steps"]
    for row in caches + rivals:
        row["front"] = not any(_beats(other, row) for other in caches + rivals)
    for row in caches:
        cheap = [rival for rival in rivals if rival["macs"] <= row["macs"]]
        row["loses_to"] = _best([r for r in cheap if r["psnr"] >= row["psnr"]], "psnr")
        row["loses_to_own"] = _best([r for r in cheap if r["psnr_own"] >= row["psnr"]], "psnr_own")
        row["dominated_by"] = _best([other for other in caches if _beats(other, row)], "psnr")


def _beats(one: dict, other: dict) -> bool:
    """Whether it is as cheap and as near, and one of the two is better."""
    a, b = (one["macs"], -one["psnr"]), (other["macs"], -other["psnr"])
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def _best(rows: list[dict], key: str) -> str | None:
    return max(rows, key=lambda row: row[key])["name"] if rows else None


def table(rows: list[dict]) -> list[str]:
    """All of it, in Markdown, by multiply-adds."""
    lines = [
        "| drawn with | multiply-adds | seconds (rough) | PSNR | worst | SSIM | to its own picture | loses to |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["macs"]):
        name = f"**`{row['name']}`**" if row.get("front") else f"`{row['name']}`"
        own = f"{row['psnr_own']:.1f} dB" if "psnr_own" in row else ""
        loses = list(dict.fromkeys(row[k] for k in ("loses_to", "loses_to_own", "dominated_by") if row.get(k)))
        lines.append(
            f"| {name} | {row['macs']:.3f} | {row['seconds_share']:.2f} | {row['psnr']:.1f} dB | "
            f"{row['psnr_worst']:.1f} | {row['ssim']:.4f} | {own} | {'; '.join(loses)} |"
        )
    return lines


def same_psnr_table(rows: list[dict]) -> list[str]:
    """Plain DeepCache against the cheapest composition, and the cheapest solver, that is as near; in Markdown."""
    lines = [
        "| DeepCache alone | multiply-adds | PSNR | cheapest cache as near | multiply-adds | PSNR | of DeepCache's | "
        "fewest steps as near |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["kind"] != "cache" or not re.fullmatch(r"deepcache:interval=\d+(,branch=\d+)?", row["name"]):
            continue
        near = [other for other in rows if other["kind"] != "reference" and other["psnr"] >= row["psnr"]]
        best = min((o for o in near if o["kind"] == "cache"), key=lambda other: (other["macs"], -other["psnr"]))
        rival = min((o for o in near if o["kind"] == "fewer steps"), key=lambda o: o["macs"], default=None)
        plain = parse(row["name"])
        lines.append(
            f"| N = {plain.interval}, branch {plain.branch} | {row['macs']:.3f} | {row['psnr']:.1f} dB | "
            f"`{best['name']}` | {best['macs']:.3f} | {best['psnr']:.1f} dB | {best['macs'] / row['macs']:.0%} | "
            f"{'none' if rival is None else rival['name']} |"
        )
    return lines


def main(args: argparse.Namespace) -> None:
    from mlx_deepcache import StableDiffusion

    pipe = StableDiffusion.from_pretrained(args.model)
    prompts = read_lines(args.prompts)
    settings = pipe.settings("")
    own = settings.scheduler
    uncached = Case("uncached", args.steps)
    policies = cache_cases(pipe, read_lines(args.policies), args.steps)
    many, few = rival_cases(args.steps, own)
    if not args.report:
        pipe(prompts[0], steps=1)  # reads the weights
    drawn = draw(
        pipe,
        [uncached, *policies, *many, *few],
        prompts,
        args.seed,
        batch=args.batch,
        folder=args.work,
        rounds=args.rounds,
        known_only=args.report,
    )
    if "uncached" not in drawn:
        raise Failure(f"{args.work} does not have all uncached pictures yet; leave out --report")
    policies, many, few = ([case for case in cases if case.name in drawn] for cases in (policies, many, few))
    references = {case.scheduler: case.name for case in many} | {None: "uncached"}
    few = [case for case in few if case.scheduler in references]
    rows = []
    for case in [*policies, *many, *few]:
        kind = "cache" if case.caches else "reference" if case in many else "fewer steps"
        row = {"name": case.name, "kind": kind, "cache": list(case.caches), "steps": case.steps}
        row |= {"scheduler": case.scheduler or own} | compare(drawn[case.name], drawn["uncached"])
        if kind == "fewer steps":
            mine = compare(drawn[case.name], drawn[references[case.scheduler]])
            row |= {"psnr_own": mine["psnr"], "psnr_own_worst": mine["psnr_worst"], "ssim_own": mine["ssim"]}
        rows.append(row)
    judge(rows)
    about = machine(str(pipe.dtype).removeprefix("mlx.core."), ("mlx", "scikit-image"))
    report = about | {
        "mlx_deepcache": __version__,
        "model": args.model or "bundled",
        "steps": args.steps,
        "scheduler": own,
        "guidance_scale": settings.guidance_scale,
        "height": settings.height,
        "width": settings.width,
        "pictures": len(drawn["uncached"].images),
        "batch": args.batch,
        "seed": args.seed,
        "prompts": used(prompts, args.batch, args.rounds),
        "seconds_note": "as shares of the uncached run in the same round; rough where the machine does other work",
        "uncached_seconds": round(sum(drawn["uncached"].seconds) / len(drawn["uncached"].images), 3),
        "rows": rows,
    }
    print(f"{report['pictures']} pictures, {header(about)}", *table(rows), "", *same_psnr_table(rows), sep="\n")
    write_json(args.json, report)
    if args.plot is not None:
        plot(report, args.plot)
    if args.sheet is not None:
        sheet(report, {name: result.images for name, result in drawn.items()}, args.sheet)


if __name__ == "__main__":
    sys.exit(run(main, parser().parse_args, None, "cancelled; what is drawn is kept", "use a smaller --batch"))
