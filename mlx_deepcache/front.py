"""What caching policies cost a model in picture, measured beforehand by benchmarks/calibrate.py; and picking one by it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import CheckpointError, UsageError
from .policies import Caches
from .policy_text import parse

AUTO = "auto"
FILE = "cache_front.json"
COMMAND = "python benchmarks/calibrate.py"
_SAME = ("steps", "scheduler", "guidance_scale", "height", "width")


@dataclass(frozen=True)
class Price:
    """What a composition of policies came to. cache: the policies as text; macs: multiply-adds in the U-Net as a share
    of the uncached run's; psnr, psnr_worst: dB to the uncached pictures, the mean over all and the least of them; ssim:
    the mean structural similarity."""

    cache: tuple[str, ...]
    macs: float
    psnr: float
    psnr_worst: float
    ssim: float

    def __str__(self) -> str:
        return " ".join(self.cache)


@dataclass(frozen=True)
class Front:
    """The prices of policies on one model, and how they were measured; see `read` and `Front.pick`."""

    model: str
    steps: int
    scheduler: str
    guidance_scale: float
    height: int
    width: int
    pictures: int
    version: str
    date: str
    policies: tuple[Price, ...]

    def pick(
        self, min_psnr: float | None, max_macs: float | None, possible: Callable[[Caches], bool] = lambda caches: True
    ) -> tuple[Price, str]:
        """The cheapest policy of which each calibrated picture came at least as near as min_psnr, in dB; without it, the
        one that came nearest on average. Within max_macs, if that is given. And why, in a line.

        possible: whether what is to be drawn can have these caches; others are passed over.

        Raises:
            UsageError: no policy is that near or that cheap; says what the nearest or cheapest comes to.
        """
        known = [price for price in self.policies if possible(caches_of(price))]
        if not known:
            raise UsageError("none of the calibrated caches can be had with these settings; choose one with --cache")
        cheap = [price for price in known if max_macs is None or price.macs <= max_macs]
        if not cheap:
            least = min(known, key=lambda price: price.macs)
            raise UsageError(
                f"no calibrated cache is as cheap as {max_macs:.3g} of the multiply-adds; the cheapest, {least}, takes "
                f"{least.macs:.3f}"
            )
        if min_psnr is None:
            price = max(cheap, key=lambda price: (price.psnr, -price.macs))
            why = f"nearest of {len(cheap)} within {max_macs:.3g} of the multiply-adds"
        else:
            near = [price for price in cheap if price.psnr_worst >= min_psnr]
            if not near:
                best = max(cheap, key=lambda price: price.psnr_worst)
                within = "" if max_macs is None else f" within {max_macs:.3g} of the multiply-adds"
                raise UsageError(
                    f"no calibrated cache{within} keeps every picture within {min_psnr:g} dB of the uncached one; the best, "
                    f"{best}, came to {best.psnr_worst:.1f} dB; --cache-interval 1 draws without"
                )
            price = min(near, key=lambda price: (price.macs, -price.psnr))
            why = f"cheapest of {len(near)} with every picture at {min_psnr:g} dB or nearer"
        return price, (
            f"cache: {price}: {why}; {price.macs:.3f} of the multiply-adds, {price.psnr:.1f} dB on average and "
            f"{price.psnr_worst:.1f} dB at worst over {self.pictures} pictures"
        )

    def differences(self, **here) -> list[str]:
        """How what is drawn differs from what was calibrated, in words. here: steps, scheduler, guidance_scale, height,
        width."""
        pairs = [(name, getattr(self, name), here[name]) for name in _SAME]
        return [f"{name} {now} where {then} was calibrated" for name, then, now in pairs if now != then]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def caches_of(price: Price) -> Caches:
    """Raises UsageError if the text is none of policies, or they cannot be combined."""
    return Caches.of([parse(text) for text in price.cache])


def read(file: Path) -> Front:
    """
    Raises:
        CheckpointError: the file cannot be read, or is not what calibrate.py writes; says what is wrong.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = content["policies"]
        prices = tuple(Price(tuple(row["cache"]), *(_share(row, key) for key in _NUMBERS)) for row in rows)
        for price in prices:
            caches_of(price)
        whole = {key: content[key] for key in ("steps", "height", "width", "pictures")}
        if not all(type(value) is int and value > 0 for value in whole.values()):
            raise ValueError(f"{', '.join(whole)} should be whole numbers above 0")
        words = {key: str(content[key]) for key in ("model", "scheduler", "version", "date")}
        if not prices:
            raise ValueError("it has no policies")
        return Front(policies=prices, guidance_scale=_share(content, "guidance_scale"), **whole, **words)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    except KeyError as error:
        raise CheckpointError(f"{file} is damaged: it lacks {error}; make it anew with {COMMAND}") from None
    except (ValueError, TypeError, AttributeError, UsageError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}; make it anew with {COMMAND}") from None


_NUMBERS = ("macs", "psnr", "psnr_worst", "ssim")


def _share(row: dict, key: str) -> float:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} should be a number, got {value!r}")
    return float(value)


def place_for(model: Path) -> Path:
    """Where the front of a model lies: in its folder; for a hub's snapshot or a single file, which are not ours to add
    to, in the user's cache folder.

    model: where the model is on the disk, see `Source.path`.
    """
    snapshot = next((part for part in model.parts if part.startswith("models--")), None)
    if snapshot is None and not model.is_file():
        return model / FILE
    room = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_deepcache" / "fronts"
    if snapshot is not None:
        return room / f"{snapshot.removeprefix('models--')}.json"
    return room / f"{model.stem}-{hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:8]}.json"


def find(model: Path) -> Front:
    """The front of a model.

    Raises:
        UsageError: nothing was calibrated; says how.
        CheckpointError: see `read`.
    """
    file = place_for(model)
    if not file.is_file():
        raise UsageError(
            f"nothing was calibrated for this model, there is no {file}; run {COMMAND} --model {model}, or choose a "
            "cache yourself"
        )
    return read(file)
