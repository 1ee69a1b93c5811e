"""What quality.py and calibrate.py share: which cases to draw, drawing them in interleaved rounds that can be cut and
resumed, and how near the pictures are to their references."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_deepcache.errors import Failure, UsageError

DATA = Path(__file__).parent
IDENTICAL = 100.0  # dB, in place of infinity, so that means can be taken; 8-bit pictures that differ stay below it


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
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise Failure(f"{file} has no lines but empty ones and comments")
    return lines


def cache_cases(
    pipe, lines: Iterable[str], steps: int, scheduler: str | None = None, common: dict | None = None
) -> list[Case]:
    """Each line's caches, in their shortest writing; those that the model or the number of steps cannot have are left
    out, with a line that says why.

    Raises:
        UsageError: a line is no composition of policies.
    """
    from mlx_deepcache.cache.composition import Caches
    from mlx_deepcache.cache.text import parse, write

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
    pipe,
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
    folder.mkdir(parents=True, exist_ok=True)
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
            part = file.with_suffix(f".{os.getpid()}.part")
            with part.open("wb") as out:
                np.savez_compressed(out, images=images, macs=macs, seconds=seconds)
            part.replace(file)
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


def fingerprint(pipe) -> str:
    """Tells models apart by the U-Net's last layer, which any training changes."""
    weight = pipe._part("unet").conv_out.weight.astype(mx.float32)
    return hashlib.sha256(np.array(weight).tobytes()).hexdigest()[:16]


def psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of each picture, in dB: (N, H, W, 3) uint8 twice -> (N,); `IDENTICAL` where nothing differs."""
    from skimage.metrics import peak_signal_noise_ratio

    same = (images == reference).all((1, 2, 3))
    return np.array(
        [
            IDENTICAL if equal else peak_signal_noise_ratio(true, test, data_range=255)
            for equal, test, true in zip(same, images, reference, strict=True)
        ]
    )


def ssim(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al. 2004) of each picture over windows of 7 x 7, in [-1, 1]."""
    from skimage.metrics import structural_similarity

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
        "ssim": round(float(similarity.mean()), 5),
        "ssim_worst": round(float(similarity.min()), 5),
        "macs": round(sum(drawn.macs) / sum(reference.macs), 5),
        "seconds": round(sum(drawn.seconds) / len(drawn.images), 4),
        "seconds_share": round(math.fsum(ratios) / len(ratios), 4),
    }


def run(main: Callable[[], None]) -> None:
    """A benchmark's main, with errors in one line, as the commands have them."""
    try:
        main()
    except (UsageError, Failure) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
