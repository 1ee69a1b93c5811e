"""What the benchmarks share: medians of interleaved runs, and a line about the machine."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

INTERVALS = (2, 3, 5, 10)


def add_common(parser: argparse.ArgumentParser, repeats: int | None = None) -> None:
    """The flags that all of them have; repeats: the default of what is repeated, for the median."""
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, metavar="R", help=f"median of R ({repeats})")
    parser.add_argument("--dtype", choices=["auto", "float16", "bfloat16", "float32"], default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures here")


def medians(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each run; one of each to warm up, then all in turn `repeats` times, so that what slows the
    machine for a while slows all of them. A run evaluates what it computes."""
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def machine(dtype: str, packages: tuple[str, ...] = ("mlx",)) -> dict:
    """Device, type, versions and date."""
    from mlx_deepcache.generation.report import device_name

    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"device": device_name(), "dtype": dtype, "versions": versions, "date": today}


def header(about: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return f"{about['device']}, {about['dtype']}, {versions}, {about['date']}"


def write_json(file: Path | None, data: dict) -> None:
    if file is not None:
        file.write_text(json.dumps(data, indent=2) + "\n")
