"""The paper's comparison in miniature: the small DDPM that comes with the package, 100 steps of DDIM, caches beside
fewer steps, by a distance to its training data.

    python benchmarks/quality/miniature.py --minutes 25 --json FILE --plot FILE.png

Every case draws from the same noise, a batch of each in turn, so a run that is stopped by --minutes or by hand has as
many samples of each; started again, it goes on. The distance is of features of a small classifier that is trained on
the drawings of the repository (see `features.Classifier`), so it compares these rows and is no FID. What finitely many
samples cost any model is told by a row of as many drawings picked at random from the data.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks.quality import fid
from benchmarks.quality.features import Statistics, distance, emoji_drawings
from benchmarks.timing import header, machine, write_json
from mlx_deepcache import __version__
from mlx_deepcache.apps.calibrate import WORK
from mlx_deepcache.apps.command import run
from mlx_deepcache.cache.deepcache import DeepCache
from mlx_deepcache.cache.text import write
from mlx_deepcache.errors import Failure, UsageError
from mlx_deepcache.fields import positive

INTERVALS, BRANCHES = (2, 3, 5, 10), (0, 2)  # the paper's first and third skip branch
CENTRE, POWER = 0.3, 1.4  # of the steps, and as the paper has it for Stable Diffusion
FEWER = (0.5, 0.4, 0.25, 0.2, 0.1)  # shares of the steps; uniform timesteps want numbers that divide 1000
OPTIONS = {"scheduler": "ddim", "timesteps": "uniform"}
DATA = "drawn from the data"
STYLES = {"uniform": "-", "quad-centre": "--"}
COLOURS = {0: "tab:blue", 2: "tab:green"}


@dataclass(frozen=True)
class Case:
    """One way of drawing; schedule: how full steps are spread."""

    name: str
    steps: int
    caching: DeepCache | None = None
    schedule: str | None = None

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)

    @property
    def options(self) -> dict:
        cache = "deepcache:interval=1" if self.caching is None else write(self.caching)
        return OPTIONS | {"steps": self.steps, "cache": [cache]}


def cases(steps: int) -> list[Case]:
    """The uncached run first."""
    found = [Case(f"{steps} steps", steps)]
    for branch in BRANCHES:
        for interval in INTERVALS:
            even = DeepCache(interval=interval, branch=branch)
            found.append(Case(f"N = {interval}, branch {branch}, uniform", steps, even, "uniform"))
            try:
                packed = DeepCache(interval=interval, branch=branch, center=round(CENTRE * steps), power=POWER)
                packed.full_steps(steps)
            except UsageError as error:
                print(f"left out N = {interval}, branch {branch}, quad-centre: {error}")
                continue
            found.append(Case(f"N = {interval}, branch {branch}, quad-centre", steps, packed, "quad-centre"))
    return found + [Case(f"{n} steps", n) for n in sorted({max(2, round(s * steps)) for s in FEWER}, reverse=True)]


def draw(pipe, every: list[Case], args: argparse.Namespace) -> tuple[int, dict[str, dict]]:
    """Draw a batch of each case in turn, until there are --count of each or --minutes have passed.

    Returns: how many samples all cases have, and each one's settings and costs.

    Raises:
        Failure: the time was too short for one batch of each.
    """
    started, done, about = time.monotonic(), 0, {}
    for count in [*range(args.batch, args.count, args.batch), args.count]:
        for case in every:
            lacks = not (args.work / case.folder / f"{count - 1:06}.png").exists()
            if lacks and args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
                if not done:
                    raise Failure(f"{args.minutes:g} minutes are not enough for {args.batch} samples of each case")
                return done, about
            about[case.name] = fid.draw(
                pipe, args.work / case.folder, count, case.options, seed=args.seed, batch=args.batch
            )
        done = count
    return done, about


def measure(every: list[Case], count: int, about: dict[str, dict], features, folder: Path) -> list[dict]:
    """A row for each case, and one for as many drawings at random."""
    data = emoji_drawings()
    truth = Statistics.of(features(data)[0], features.name)
    picked = data[np.random.default_rng(0).integers(0, len(data), count)]
    apart = distance(Statistics.of(features(picked)[0], features.name), truth)
    rows, whole, uncached = [{"name": DATA, "kind": "data", "distance": round(apart, 4)}], None, None
    for case in every:
        images = np.stack(list(fid.pictures_of(folder / case.folder, count)))
        drawn, costs = Statistics.of(features(images)[0], features.name), about[case.name]
        if whole is None:
            whole, uncached, macs = drawn, images.astype(np.float64), costs["macs"]
        errors = np.square(images - uncached).mean((1, 2, 3))
        caching = case.caching
        row = {"name": case.name, "kind": "fewer steps" if caching is None else "cache", "steps": case.steps}
        if caching is not None:
            row |= {"interval": caching.interval, "branch": caching.branch, "schedule": case.schedule}
            row["full"] = sum(caching.full_steps(case.steps))
        row |= {"macs": round(costs["macs"] / macs, 4), "seconds": round(costs["seconds"], 4)}
        row |= {"distance": round(distance(drawn, truth), 4), "to_uncached": round(abs(distance(drawn, whole)), 4)}
        with np.errstate(divide="ignore"):
            decibels = np.minimum(100.0, 10 * np.log10(255**2 / errors))
        rows.append(row | {"psnr": round(float(decibels.mean()), 2)})
    return rows


def table(rows: list[dict]) -> list[str]:
    """In Markdown, by multiply-adds."""
    out = [
        "| drawn with | multiply-adds | distance to the data | to the uncached samples | mean PSNR to these |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row.get("macs", 2)):
        known = {"macs": "{:.3f}", "distance": "{:.2f}", "to_uncached": "{:.2f}", "psnr": "{:.1f} dB"}
        cells = [form.format(row[name]) if name in row else "" for name, form in known.items()]
        out.append(f"| {row['name']} | {' | '.join(cells)} |")
    return out


def plot(report: dict, file: Path) -> None:
    """The distance against multiply-adds: a line for each branch and schedule, one for fewer steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["rows"]
    figure, axes = pyplot.subplots(figsize=(8.5, 5), dpi=100)
    whole = [row for row in rows if row.get("macs") == 1]
    for branch in BRANCHES:
        for schedule, style in STYLES.items():
            some = [row for row in rows if (row.get("branch"), row.get("schedule")) == (branch, schedule)]
            some = sorted(some + whole, key=lambda row: row["macs"])
            x, y = [row["macs"] for row in some], [row["distance"] for row in some]
            axes.plot(x, y, style, marker="o", color=COLOURS[branch], label=f"DeepCache, branch {branch}, {schedule}")
            for row in some:
                if "interval" in row and schedule == "uniform":
                    at = {"xytext": (4, 5), "textcoords": "offset points", "fontsize": 7}
                    axes.annotate(f"N = {row['interval']}", (row["macs"], row["distance"]), **at)
    fewer = sorted((row for row in rows if row["kind"] == "fewer steps"), key=lambda row: row["macs"])
    axes.plot(
        [r["macs"] for r in fewer], [r["distance"] for r in fewer], ":x", color="black", label="fewer steps of DDIM"
    )
    (floor,) = (row["distance"] for row in rows if row["kind"] == "data")
    axes.axhline(floor, color="gray", lw=1, label=f"{report['pictures']:,} drawings at random from the data")
    axes.set_yscale("log")
    axes.set_xlabel(f"multiply-adds, as a share of {report['steps']} whole steps")
    axes.set_ylabel("Frechet distance to the data, small classifier")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(f"{report['model']}, {report['pictures']:,} samples each, {report['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def flags(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="emoji-ddpm", help="an unconditional model of 32 x 32 drawings (emoji-ddpm)")
    add("--steps", type=positive, default=100)
    add("--count", type=positive, default=2000, help="samples of each case (2000)")
    add("--minutes", type=float, help="stop drawing after so many, with fewer samples")
    add("--batch", type=positive, default=50, help="samples at once (50)")
    add("--seed", type=int, default=0)
    add("--work", type=Path, default=WORK / "miniature", help="where samples are kept")
    add("--json", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from mlx_deepcache import StableDiffusion

    pipe = StableDiffusion.from_pretrained(args.model)
    every = cases(args.steps)
    count, about = draw(pipe, every, args)
    features = fid.load_features(None, work=args.work)
    rows = measure(every, count, about, features, args.work)
    said = machine(str(pipe.dtype).removeprefix("mlx.core."), ("mlx", "torch"))
    report = said | {
        "mlx_deepcache": __version__,
        "model": args.model,
        "steps": args.steps,
        "pictures": count,
        "measure": features.says,
        "features": features.made_by,
        "accuracy": round(features.accuracy(), 3),
        "rows": rows,
    }
    print(f"{count:,} samples each, {header(said)}", f"distance: {features.says}", *table(rows), sep="\n")
    write_json(args.json, report)
    if args.plot is not None:
        plot(report, args.plot)


if __name__ == "__main__":
    sys.exit(run(main, flags, None, "cancelled; what is drawn is kept", "use a smaller --batch"))
