"""What a GPU makes of our nets, whether it is right and how fast: run it once on your Mac, paste it into an issue.

python benchmarks/first_run.py
python benchmarks/first_run.py --quick  # small sizes, half a minute: for CI, and what a machine without a GPU gets

First correctness: each operation on the GPU and on the CPU of this machine against NumPy in float64, and whole nets on
the GPU against the CPU; without a GPU, ours on the CPU and MLX's own operations there. Then full and cached steps of
SD 1.5's architecture with random weights, each choice of ours for GPUs against what there would be otherwise, and peak
memory by phase. Text goes to standard output, progress to standard error, and all figures into a JSON file.

Exit status 1 if an error is above its limit, with a line for each, or if something could not be run.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # or float32 on some GPUs would not be float32
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from benchmarks.timing import header, machine, medians, write_json

JSON = ROOT / "runs" / "first_run.json"  # which git ignores
BRANCHES = [0, 1]
REPEATS = 5
NOISE = 1.03  # a choice of ours loses where it takes more of the other's time than this
UNET_UPSAMPLINGS = ((2, 8, 1280), (2, 16, 1280), (2, 32, 640))  # pictures, side, channels of SD 1.5 at 512 px
VAE_UPSAMPLINGS = ((1, 64, 512), (1, 128, 512), (1, 256, 256))
QUICK_UPSAMPLINGS = ((2, 8, 64), (1, 16, 32))
HEADS = ((40, 4096, 4096), (40, 4096, 77), (80, 1024, 1024), (80, 1024, 77))  # size, positions, keys


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; without a GPU always")
    parser.add_argument(
        "--sizes",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[512, 1024],
        metavar="PX,..",
        help="sides of the pictures whose steps are timed (512,1024)",
    )
    parser.add_argument("--json", type=Path, default=JSON, metavar="FILE", help="default: runs/first_run.json")
    return parser.parse_args(argv)


class Report:
    """Lines above a progress bar, the figures behind them, and what failed."""

    def __init__(self, file: Path, total: int):
        self.file, self.data, self.failures = file, {}, []
        self.bar = tqdm(total=total, file=sys.stderr, leave=False, disable=None)

    def line(self, text: str = "") -> None:
        with tqdm.external_write_mode():
            print(text, flush=True)

    def add(self, key: str, rows: list) -> None:
        """Written at once: a GPU that gives up may take the process with it."""
        self.data.setdefault(key, []).extend(rows)
        write_json(self.file, self.data)

    def part(self, name: str, run: Callable[[], None]) -> None:
        """One step of the progress bar. What goes wrong in it is told at the end, and the others go on."""
        from mlx_deepcache.errors import UsageError

        self.bar.set_description(name)
        try:
            run()
        except UsageError as reason:  # it does not fit into this machine
            self.line(f"{name}: not run, {reason}")
        except Exception as failure:
            self.failures.append(f"{name}: {type(failure).__name__}: {failure}")
        self.bar.update()


# The machine


def about(dtype: str) -> dict:
    """Device, memory, system, versions and load."""
    import mlx.core as mx

    from mlx_deepcache import __version__
    from mlx_deepcache.backend.memory import machine_memory

    mac = platform.mac_ver()[0]
    return machine(dtype, ("mlx", "numpy")) | {
        "gpu": mx.device_info(mx.default_device()) if mx.default_device() == mx.gpu else None,
        "memory_bytes": machine_memory(),
        "system": f"macOS {mac}, Darwin {platform.release()}" if mac else platform.platform(),
        "python": platform.python_version(),
        "mlx_deepcache": f"{__version__}, {commit()}",
        "load": os.getloadavg()[0],
    }


def commit() -> str:
    """This clone's commit, with a plus sign if files were changed."""
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
        return "commit " + subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no git clone"


def show_machine(report: Report, facts: dict) -> None:
    report.line(header(facts))
    report.line(
        f"{facts['system']}, {facts['memory_bytes'] / 1e9:.1f} GB, Python {facts['python']}, "
        f"mlx_deepcache {facts['mlx_deepcache']}, load {facts['load']:.1f}"
    )
    if facts["gpu"] is None:
        report.line("No GPU was found: small sizes, and MLX's own operations on the CPU (plain) in a GPU's place.")
    else:
        report.line(", ".join(f"{name} {value}" for name, value in facts["gpu"].items()))
    report.data |= facts


# Correctness


def show_correctness(report: Report, ways: list[str]) -> None:
    report.line("\nCorrectness: error relative to NumPy's float64, of nets and runs to this machine's CPU in float32")
    report.line(f"{'':58} {'':8} {ways[0]:>8} {ways[1]:>8} {'limit':>8}")


def check(report: Report, rows: Iterator[dict], ways: list[str]) -> None:
    for row in rows:
        report.add("correctness", [row])
        columns = " ".join(f"{row['error'][way]:8.1e}" if way in row["error"] else f"{'':8}" for way in ways)
        told = f"{row['piece']:58} {row['dtype']:8} {columns} {row['limit']:8.1e}"
        report.line(f"{told}  {'FAIL' if row['failed'] else 'pass'}")
        for way in row["failed"]:
            report.failures.append(
                f"{row['piece']}, {row['dtype']}, {way}: error {row['error'][way]:.1e}, at worst "
                f"{row['worst'][way]:.1e}, limit {row['limit']:.1e}"
            )


# Speed and memory


def upsampling_rows(shapes, dtype) -> list[dict]:
    """Folded against plain upsampling."""
    import mlx.core as mx

    from mlx_deepcache.nets.blocks import Upsample2D

    rows = []
    for pictures, side, channels in shapes:
        up = Upsample2D(channels)
        up.set_dtype(dtype)
        x = mx.random.normal((pictures, side, side, channels)).astype(dtype)
        mx.eval(x, up.parameters(), up.fold())
        runs = {
            "ours": lambda up=up, x=x: mx.eval(up(x)),
            "other": lambda up=up, x=x: mx.eval(up.conv(mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2))),
        }
        where = f"{side}x{side} of {channels}"
        rows.append(choice("folded upsampling", "plain upsampling", where, medians(runs, REPEATS)))
    return rows


def heads_rows(shapes, dtype) -> list[dict]:
    """Padded against plain heads, where this machine pads them."""
    import mlx.core as mx

    from mlx_deepcache.backend.ops import attention, pad_heads

    rows = []
    for dim, positions, keys in shapes:
        q, k = (mx.random.normal((2, 8, n, dim)).astype(dtype) for n in (positions, keys))
        padded = pad_heads(k)
        if padded.shape == k.shape:
            continue
        mx.eval(q, k, padded)

        def ours(q=q, k=k, padded=padded):
            """A prompt's keys are padded once a picture, those of self-attention at every call."""
            given = padded if k.shape[2] == 77 else pad_heads(k)
            mx.eval(attention(q, given, given))

        def other(q=q, k=k):
            mx.eval(mx.fast.scaled_dot_product_attention(q, k, k, scale=q.shape[-1] ** -0.5))

        where = f"heads of {dim}, {positions} to {keys} positions"
        rows.append(choice("padded heads", "plain heads", where, medians({"ours": ours, "other": other}, REPEATS)))
    return rows


def choice(ours: str, other: str, where: str, seconds: dict[str, float]) -> dict:
    return {"ours": ours, "other": other, "where": where, "ours_s": seconds["ours"], "other_s": seconds["other"]}


def step_rows(unet, size: int, factor: int, dtype, compiled: bool) -> list[dict]:
    """A full step and a cached one for each branch, plain and, perhaps, compiled, in turn."""
    from benchmarks.speed.unet import calls, inputs
    from mlx_deepcache.cache.macs import unet_macs

    side = size // factor
    nets = {"plain": unet, **({"compiled": unet.compiled()} if compiled else {})}
    runs = {
        (kind, step): run
        for kind, net in nets.items()
        for step, run in calls(net, inputs(net.config, 2, side), BRANCHES, dtype).items()
    }
    seconds = medians(runs, REPEATS if size <= 512 else 3)
    macs = {f"cached {branch}": unet_macs(unet, (side, side), branch, 77) for branch in BRANCHES}
    rows = []
    for step in ("full", *macs):
        full, cached = macs.get(step, (1, 1))
        timed = {kind: seconds[kind, step] for kind in nets}
        share = {kind: timed[kind] / seconds[kind, "full"] for kind in nets}
        rows.append({"size": size, "step": step, "seconds": timed, "of_full": share, "macs_of_full": cached / full})
    return rows


def compiling(rows: list[dict]) -> list[dict]:
    """Compiled steps against plain ones, where both were timed."""
    return [
        choice(
            "compiled steps",
            "steps that are not compiled",
            f"{row['size']} px, {row['step']}",
            {"ours": row["seconds"]["compiled"], "other": row["seconds"]["plain"]},
        )
        for row in rows
        if "compiled" in row["seconds"]
    ]


def show_steps(report: Report, rows: list[dict]) -> None:
    report.line(f"\n{'px':>5} {'step':9} {'':9} {'seconds':>8} {'of the full one':>16} {'of its multiply-adds':>21}")
    for row in rows:
        for kind, s in row["seconds"].items():
            report.line(
                f"{row['size']:5} {row['step']:9} {kind:9} {s:8.4f} {row['of_full'][kind]:16.3f} "
                f"{row['macs_of_full']:21.3f}"
            )


def memory_rows(pipe, size: int) -> list[dict]:
    """Peak memory by phase of a picture of two steps, with all weights loaded, and what was estimated beforehand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bundled model does not know this prompt
        seconds, peak = pipe.picture(size, 1, 2, 2, 0)
        settings = pipe.settings("a picture", steps=2, height=size, width=size, scheduler="ddim", cache_interval=2)
    estimated = pipe.estimate(settings)
    return [
        {"size": size, "phase": p, "peak_bytes": peak[p], "estimated_bytes": estimated[p], "seconds": seconds[p]}
        for p in seconds
    ]


def show_memory(report: Report, rows: list[dict]) -> None:
    report.line(f"\n{'px':>5} {'phase':9} {'peak GB':>8} {'estimated':>10} {'seconds':>8}   a picture of two steps")
    for row in rows:
        report.line(
            f"{row['size']:5} {row['phase']:9} {row['peak_bytes'] / 1e9:8.2f} {row['estimated_bytes'] / 1e9:10.2f} "
            f"{row['seconds']:8.2f}"
        )


def show_choices(report: Report, rows: list[dict]) -> None:
    report.line(f"\n{'choice':20} {'where':39} {'ms':>9} {'otherwise':>10} {'ratio':>6}")
    for row in rows:
        ours, other = row["ours_s"], row["other_s"]
        report.line(f"{row['ours']:20} {row['where']:39} {ours * 1e3:9.3f} {other * 1e3:10.3f} {ours / other:6.2f}")


def otherwise(rows: list[dict]) -> str:
    """What this machine would have, had it been asked."""
    losing = [
        f"{row['other']} for {row['where']} ({row['other_s'] / row['ours_s']:.2f} of the time)"
        for row in rows
        if row["ours_s"] > NOISE * row["other_s"]
    ]
    return "What this machine would have otherwise: " + ("; ".join(losing) or "nothing of what was tried")


# All of it


def main(argv=None) -> int:
    args = parse(argv)
    import mlx.core as mx

    from benchmarks import checks
    from benchmarks.speed import images
    from mlx_deepcache.backend.ops import dtype_of, on_gpu

    gpu = on_gpu()
    quick = args.quick or not gpu
    config, sizes, factor = ("emoji", [64], 4) if quick else ("sd15", args.sizes, 8)
    dtype, ways = dtype_of("auto"), checks.ways()
    pieces, nets = checks.pieces(quick), checks.nets(quick)
    work = [*((piece, checks.check_piece) for piece in pieces), *((net, checks.check_net) for net in nets)]

    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = Report(args.json, len(work) + 2 * len(sizes) + 2)
    show_machine(report, about(str(dtype).removeprefix("mlx.core.")))
    show_correctness(report, list(ways))
    for item, checked in work:
        report.part(item.name, partial(check, report, checked(item, ways), list(ways)))
    mx.clear_cache()

    shapes = QUICK_UPSAMPLINGS if quick else UNET_UPSAMPLINGS + VAE_UPSAMPLINGS
    report.part("upsampling", lambda: report.add("choices", upsampling_rows(shapes, dtype)))
    report.part("heads", lambda: report.add("choices", heads_rows(HEADS[2:] if quick else HEADS, dtype)))
    what = "The bundled model" if quick else "SD 1.5 with random weights"
    report.line(f"\n{what}, one picture with guidance, {report.data['dtype']}")
    pipe, memory, steps = images.ours(config, "auto"), [], []
    for size in sizes:
        report.part(f"a picture, {size} px", lambda size=size: memory.extend(memory_rows(pipe, size)))
    report.add("memory", memory)
    unet = pipe.component("unet")
    pipe = None
    for size in {row["size"]: None for row in memory}:  # those that fit
        report.part(
            f"steps, {size} px",
            lambda size=size: steps.extend(step_rows(unet, size, factor, dtype, compiled=gpu)),
        )
    report.add("steps", steps)
    report.add("choices", compiling(steps))
    report.bar.close()

    show_steps(report, steps)
    show_memory(report, memory)
    show_choices(report, report.data["choices"])
    report.line(f"\n{otherwise(report.data['choices'])}")
    report.line(f"{len(report.failures)} failed; all figures are in {args.json}")
    for failure in report.failures:
        report.line(f"FAIL  {failure}")
    report.add("failures", report.failures)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
