# PYTHON_ARGCOMPLETE_OK
"""Measure what caching policies cost a model in picture, for `--cache auto`: `mlx-deepcache-calibrate`.

Every composition in the list of policies draws the same prompts from the same noise; its pictures are compared with the
uncached ones. The result is stored in the model's folder (cache_front.json), or, for a hub's model, a single file and a
folder that cannot be written, in ~/.cache/mlx_deepcache/fronts; both are where `--cache auto` looks.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._version import __version__
from ..errors import Failure, UsageError
from ..fields import positive
from ..generation.declared import option_of
from ..generation.kinds import KINDS
from ..generation.options import ModelOptions, Options
from ..media.files import read_text, whole, write_text
from .command import run
from .flags import Named, Parser, add_option, complete, given, reader
from .outputs import check

if TYPE_CHECKING:
    from ..generation.pipeline import StableDiffusion

PROMPTS, POLICIES = (Path(__file__).with_name(f"calibrate_{what}.txt") for what in ("prompts", "policies"))
WORK = Path("runs/quality")
IDENTICAL = 100.0  # dB, in place of infinity, so that means can be taken; 8-bit pictures that differ stay below it
_COMMON = ("guidance_scale", "height", "width")


def main_calibrate(argv: list[str] | None = None) -> int:
    """mlx-deepcache-calibrate; returns its exit code."""
    cancelled = "cancelled; what is drawn is kept, and the same command goes on"
    return run(_calibrate, _flags, argv, cancelled, "try a smaller --batch, --height and --width")


def calibrate_parser() -> Parser:
    parser = Parser(
        "python -m mlx_deepcache.apps.calibrate",
        "mlx-deepcache-calibrate",
        description="Measure what caches cost a model in picture, for generate.py --cache auto. Calibrate with the "
        "settings that you draw with. A run may be cut and started again.",
    )
    for name in ("model", "dtype"):
        add_option(parser, option_of(ModelOptions, name))
    for name in ("steps", "scheduler", *_COMMON):
        add_option(parser, option_of(Options, name))
    add = parser.add_argument
    add(
        "--prompts", type=Named(), default=PROMPTS, metavar="FILE", help="one a line; default: 24 for the bundled model"
    )
    add(
        "--policies", type=Named(), default=POLICIES, metavar="FILE", help="one composition a line; default: 62 of them"
    )
    add("--seed", type=int, default=0, metavar="S", help="of the first prompt; the next has the next one")
    add(
        "--batch",
        type=reader(positive),
        default=1,
        metavar="N",
        help="pictures at once (1); adaptive caches decide for all of them",
    )
    add(
        "--search",
        action="store_true",
        help="also find schedules: on every other prompt, and only the rest is reported",
    )
    add(
        "--full-steps",
        type=reader(positive),
        nargs="+",
        metavar="N",
        help="of the schedules to be found; default: a fifth and a third of the steps",
    )
    add(
        "--work",
        type=Named(written=True),
        default=WORK,
        metavar="DIR",
        help=f"where what is drawn is kept; default {WORK}",
    )
    add(
        "--output",
        type=Named(written=True, suffix=".json"),
        metavar="FILE.json",
        help="where to store the result, if not with the model",
    )
    return parser


def _flags(argv: list[str]) -> argparse.Namespace:
    parser = calibrate_parser()
    complete(parser)
    args = parser.parse_args(argv)
    if args.full_steps is not None and not args.search:
        parser.error("--full-steps are those of --search, which is not there")
    if args.output is not None:
        _make_folder(args.output.parent)
    check(parser, args)
    return args


def _calibrate(args: argparse.Namespace) -> None:
    from ..cache.prices import Front, Price, confirmed
    from ..checkpoints.folder import price_places
    from ..generation.pipeline import StableDiffusion

    model = given(args, ModelOptions)
    pipe = StableDiffusion.from_pretrained(**model)
    prompts, options = read_lines(args.prompts), given(args, Options)
    common = {name: value for name, value in options.items() if name in _COMMON}
    scheduler = options.get("scheduler")
    settings = pipe.settings("", **options)
    uncached = Case("uncached", settings.steps, scheduler=scheduler)
    cases = cache_cases(pipe, read_lines(args.policies), settings.steps, scheduler, common)
    places = price_places(pipe.checkpoint.source.path)
    file = args.output or next((file for file in places if _writable(file)), places[-1])
    given_to = {"batch": args.batch, "folder": args.work, "common": common}
    searched, seed = [], args.seed
    if args.search:
        if len(prompts) < 2:
            raise UsageError(f"--search needs 2 prompts or more, half of them to report on, got {len(prompts)}")
        half, prompts = prompts[::2], prompts[1::2]
        listed = {case.name for case in cases}
        searched = [
            case for case in _found(pipe, uncached, half, seed, args.full_steps, **given_to) if case.name not in listed
        ]
        cases, seed = [*cases, *searched], seed + len(half)
    drawn = draw(pipe, [uncached, *cases], prompts, seed, **given_to)
    rows = {case.name: compare(drawn[case.name], drawn["uncached"]) for case in cases}
    prices = [
        Price(case.caches, **{field.name: rows[case.name][field.name] for field in fields(Price)[1:]}) for case in cases
    ]
    kept = [price for price in prices if str(price) not in {case.name for case in searched} or confirmed(price, prices)]
    front = Front(
        model=KINDS["Model"].record(model.get("model", "bundled")),
        steps=settings.steps,
        scheduler=settings.scheduler,
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        pictures=len(prompts),
        version=__version__,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        policies=tuple(sorted(kept, key=lambda price: price.macs)),
    )
    _make_folder(file.parent)
    write_text(file, front.to_json())
    for price in front.policies:
        print(f"{price.macs:.3f}  {price.psnr:5.1f} dB, worst {price.psnr_worst:5.1f}  {price}")
    for price in prices:
        if price not in kept:
            print(f"left out, as other prompts do not confirm it: {price}, {price.psnr:.1f} dB, {price.psnr_worst:.1f}")
    print(f"wrote {file}")


def _found(
    pipe: StableDiffusion,
    uncached: Case,
    prompts: Sequence[str],
    seed: int,
    budgets: Sequence[int] | None,
    **given_to,
) -> list[Case]:
    """The schedules that `search` finds for these prompts, a line about each step of the way."""
    from .search import found, gains, likeness, windows, without

    def case_of(policies: tuple[str, ...]) -> Case:
        return Case(" ".join(policies), uncached.steps, policies, uncached.scheduler)

    def nearness(policies: tuple[str, ...]) -> np.ndarray:
        """Of each picture to the uncached one, dB (P,)."""
        case = case_of(policies)
        both = draw(pipe, [uncached, case], prompts, seed, **given_to)
        return psnr(both[case.name].images, both["uncached"].images)

    def score(policies: tuple[str, ...]) -> float:
        """The mean and the worst count alike."""
        db = nearness(policies)
        return float(db.mean() + db.min()) / 2

    options = given_to["common"] | {"steps": uncached.steps, "scheduler": uncached.scheduler}
    n = len(pipe.settings("", **options).legs[0].plan.steps)
    budgets = budgets or sorted({-(-n // 5), -(-n // 3)})
    for full in budgets:
        if not 2 <= full < n:
            raise UsageError(f"--full-steps should be from 2 to {n - 1} of {n} steps, got {full}")
    likenesses = np.stack([likeness(pipe, prompt, seed + i, **options) for i, prompt in enumerate(prompts)])
    runs = windows(n, max(2, -(-n // max(budgets))))
    errors = np.stack([10 ** (-nearness(without(n, run)) / 10) for run in runs])
    gain = gains(likenesses, runs, errors)
    return [case_of(found(likenesses, gain, full, score, lambda text: print(text, flush=True))) for full in budgets]


def _writable(file: Path) -> bool:
    return file.parent.is_dir() and os.access(file.parent, os.W_OK)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"cannot make the folder {folder}: {error.strerror or error}; see --output and --work") from None


# What is drawn, and how near it comes


@dataclass(frozen=True)
class Case:
    """One way of drawing. caches: policies as text, none for the whole U-Net on every step; scheduler: None is the
    model's own."""

    name: str
    steps: int
    caches: tuple[str, ...] = ()
    scheduler: str | None = None

    @property
    def options(self) -> dict:
        """For `StableDiffusion.__call__`."""
        return {"steps": self.steps, "scheduler": self.scheduler, "cache": list(self.caches) or "deepcache:interval=1"}


@dataclass(frozen=True)
class Drawn:
    """What a case came to. images: (N, H, W, 3) uint8; macs: multiply-adds in the U-Net, per round; seconds: of
    denoising, per round."""

    images: np.ndarray
    macs: tuple[int, ...]
    seconds: tuple[float, ...]


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty or comments.

    Raises:
        Failure: it cannot be read, or there are none.
    """
    lines = [line.strip() for line in read_text(file).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise Failure(f"{file} has no lines but empty ones and comments")
    return lines


def cache_cases(
    pipe: StableDiffusion, lines: Iterable[str], steps: int, scheduler: str | None = None, common: dict | None = None
) -> list[Case]:
    """Each line's caches, in their shortest writing; those that the model or the number of steps cannot have are left
    out, with a line that says why.

    Raises:
        UsageError: a line is no composition of policies.
    """
    from ..cache.composition import Caches
    from ..cache.text import parse, write

    cases = {}
    for line in lines:
        policies = [parse(text) for text in line.split()]
        Caches.of(policies)
        texts = tuple(write(policy) for policy in policies)
        case = Case(" ".join(texts), steps, texts, scheduler)
        try:
            pipe.settings("", **(common or {}) | case.options)
        except UsageError as error:
            print(f"left out {case.name}: {error}", flush=True)
            continue
        cases[case.name] = case
    return list(cases.values())


def draw(
    pipe: StableDiffusion,
    cases: Sequence[Case],
    prompts: Sequence[str],
    seed: int,
    *,
    batch: int,
    folder: Path,
    rounds: Sequence[int] | None = None,
    common: dict | None = None,
    known_only: bool = False,
) -> dict[str, Drawn]:
    """Draw every case: prompt i with seed + i, `batch` at a time.

    All cases take turns over the first `batch` prompts, then over the next, so that what slows the machine for a while
    slows all of them, and a run that is cut has whole rounds. Each result goes into `folder` at once; what lies there
    is not drawn again. rounds: only these, where several processes share the work;
    common: options of every case; known_only: draw nothing, and leave out what is not there.

    Returns: what each case came to, over the rounds asked for.

    Raises:
        UsageError: there is no such round.
    """
    _make_folder(folder)
    starts = range(0, len(prompts), batch)
    wanted = range(len(starts)) if rounds is None else rounds
    if not set(wanted) <= set(range(len(starts))):
        raise UsageError(f"rounds should be from 0 to {len(starts) - 1} for {len(prompts)} prompts, got {rounds}")
    found: dict[str, list] = {case.name: [] for case in cases}
    model = fingerprint(pipe)
    for number in wanted:
        some = list(prompts[starts[number] : starts[number] + batch])
        seeds = [seed + i for i in range(starts[number], starts[number] + len(some))]
        for i, case in enumerate(cases):
            options = (common or {}) | case.options
            key = json.dumps([model, str(pipe.dtype), some, seeds, options])
            file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
            if file.exists():
                with np.load(file) as known:
                    found[case.name].append((known["images"], int(known["macs"]), float(known["seconds"])))
                continue
            if known_only:
                continue
            start = time.perf_counter()
            result = pipe(some, seeds=seeds, **options)
            images = np.stack([np.asarray(image) for image in result.images])
            macs, seconds = result.stats["unet_macs"], result.stats["seconds"]["denoise"]
            with whole(file) as part, part.open("wb") as out:
                np.savez_compressed(out, images=images, macs=macs, seconds=seconds)
            found[case.name].append((images, macs, seconds))
            print(
                f"round {number + 1} of {len(starts)}, {i + 1} of {len(cases)}: {case.name}, "
                f"{time.perf_counter() - start:.1f} s",
                flush=True,
            )
    return {
        name: Drawn(np.concatenate([images for images, *_ in parts]), *(tuple(p[i] for p in parts) for i in (1, 2)))
        for name, parts in found.items()
        if len(parts) == len(wanted)
    }


def fingerprint(pipe: StableDiffusion) -> str:
    """Tells models apart by the U-Net's last layer, which any training changes."""
    import mlx.core as mx

    weight = pipe.component("unet").conv_out.weight.astype(mx.float32)
    return hashlib.sha256(np.array(weight).tobytes()).hexdigest()[:16]


def psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of each picture, in dB: (N, H, W, 3) uint8 twice -> (N,); `IDENTICAL` where nothing differs."""
    peak_signal_noise_ratio = _metrics().peak_signal_noise_ratio

    same = (images == reference).all((1, 2, 3))
    return np.array(
        [
            IDENTICAL if equal else peak_signal_noise_ratio(true, test, data_range=255)
            for equal, test, true in zip(same, images, reference, strict=True)
        ]
    )


def ssim(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al. 2004) of each picture over windows of 7 x 7, in [-1, 1]."""
    structural_similarity = _metrics().structural_similarity

    return np.array(
        [
            structural_similarity(true, test, channel_axis=-1, data_range=255)
            for test, true in zip(images, reference, strict=True)
        ]
    )


def compare(drawn: Drawn, reference: Drawn) -> dict:
    """How near the pictures are, and what they cost as a share of the reference's."""
    db, similarity = psnr(drawn.images, reference.images), ssim(drawn.images, reference.images)
    ratios = sorted(a / b for a, b in zip(drawn.seconds, reference.seconds, strict=True))
    return {
        "psnr": round(float(db.mean()), 3),
        "psnr_worst": round(float(db.min()), 3),
        "psnr_spread": round(float(db.std(ddof=1)), 3) if len(db) > 1 else 0.0,
        "ssim": round(float(similarity.mean()), 5),
        "ssim_worst": round(float(similarity.min()), 5),
        "macs": round(sum(drawn.macs) / sum(reference.macs), 5),
        "seconds": round(sum(drawn.seconds) / len(drawn.images), 4),
        "seconds_share": round(math.fsum(ratios) / len(ratios), 4),
    }


def _metrics():
    """scikit-image's, which only this command needs."""
    try:
        import skimage.metrics
    except ImportError:
        raise Failure('comparing pictures needs scikit-image: pip install "mlx_deepcache[benchmark]"') from None
    return skimage.metrics


if __name__ == "__main__":
    raise SystemExit(main_calibrate())
