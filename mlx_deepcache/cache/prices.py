"""What caching policies cost a model in picture, as mlx-deepcache-calibrate measured it; and picking one by that."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from ..errors import CheckpointError, UsageError, called
from .composition import Caches
from .text import parse

AUTO = "auto"


COMMAND = "mlx-deepcache-calibrate"


_SAME = ("steps", "scheduler", "guidance_scale", "height", "width")


KEPT, SURE = 0.95, 0.95  # a promise holds for this share of pictures; how sure that is, by the calibration


def margin(pictures: int) -> float:
    """Standard deviations below the mean above which a share of `KEPT` of a normal distribution lies, `SURE`ly, if both
    were found from so many samples: the one-sided tolerance limit (Natrella 1963, section 2-2.2), of which no less than
    three make sense."""
    n, (kept, sure) = max(pictures, 3), (NormalDist().inv_cdf(share) for share in (KEPT, SURE))
    a, b = 1 - sure**2 / (2 * (n - 1)), kept**2 - sure**2 / n
    return (kept + math.sqrt(kept**2 - a * b)) / a


def spread_of(mean: float, least: float, pictures: int) -> float:
    """The standard deviation that samples of a normal distribution have, by their least (Blom 1958)."""
    return (mean - least) / NormalDist().inv_cdf((max(pictures, 2) - 0.375) / (max(pictures, 2) + 0.25))


@dataclass(frozen=True)
class Price:
    """What a composition of policies came to. cache: the policies as text; macs: multiply-adds in the U-Net as a share
    of the uncached run's; psnr, psnr_worst, psnr_spread: dB to the uncached pictures, the mean over all, the least of
    them and the standard deviation; ssim: the mean structural similarity."""

    cache: tuple[str, ...]
    macs: float
    psnr: float
    psnr_worst: float
    psnr_spread: float
    ssim: float

    def promise(self, pictures: int) -> float:
        """The dB that a share of `KEPT` of all pictures will have, as far as a calibration with so many can tell."""
        return self.psnr - margin(pictures) * self.psnr_spread

    def __str__(self) -> str:
        return " ".join(self.cache)


def confirmed(price: Price, prices: Iterable[Price]) -> bool:
    """Whether none that is as cheap is better, where mean and worst count alike."""
    return all(price.psnr + price.psnr_worst >= p.psnr + p.psnr_worst for p in prices if p.macs <= price.macs)


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
        self, min_psnr: float | None, max_macs: float | None, check: Callable[[Caches], None] = lambda caches: None
    ) -> tuple[Price, str]:
        """The cheapest policy with which a share of `KEPT` of pictures comes at least as near as min_psnr, in dB (see
        `Price.promise`); without it, the one that came nearest on average. Within max_macs, if that is given. And why,
        in a line.

        check: raises UsageError if what is to be drawn cannot have these caches; they are passed over.

        Raises:
            UsageError: no policy is that near or that cheap; says what the nearest or cheapest comes to.
        """
        known = [price for price in self.policies if _passes(check, caches_of(price))]
        if not known:
            raise UsageError(
                f"none of the calibrated caches can be had with these settings; choose one with {called('cache')}"
            )
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
            promises = {price: price.promise(self.pictures) for price in cheap}
            near = [price for price, promise in promises.items() if promise >= min_psnr]
            if not near:
                best = max(cheap, key=promises.get)
                within = "" if max_macs is None else f" within {max_macs:.3g} of the multiply-adds"
                raise UsageError(
                    f"no calibrated cache{within} keeps {KEPT:.0%} of pictures at {min_psnr:g} dB to the uncached one; "
                    f"the best, {best}, at {promises[best]:.1f} dB; {called('cache_interval', 1)} draws without"
                )
            price = min(near, key=lambda price: (price.macs, -price.psnr))
            why = f"cheapest of {len(near)} that keep {KEPT:.0%} of pictures at {min_psnr:g} dB or nearer"
        return price, (
            f"cache: {price}: {why}; {price.macs:.3f} of the multiply-adds, {price.psnr:.1f} dB on average and "
            f"{price.psnr_worst:.1f} dB at worst over {self.pictures} calibrated pictures"
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


def _passes(check: Callable[[Caches], None], caches: Caches) -> bool:
    try:
        check(caches)
    except UsageError:
        return False
    return True


def read(file: Path) -> Front:
    """
    Raises:
        CheckpointError: the file cannot be read, or is not what mlx-deepcache-calibrate writes; says what is wrong.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected an object")
        rows = content["policies"]
        for row in rows:  # files until 0.1 had no spread
            row.setdefault("psnr_spread", spread_of(row["psnr"], row["psnr_worst"], content["pictures"]))
        prices = tuple(Price(tuple(row["cache"]), *(_number_of(row, key) for key in _NUMBERS)) for row in rows)
        for price in prices:
            caches_of(price)
        whole = {key: content[key] for key in ("steps", "height", "width", "pictures")}
        if not all(type(value) is int and value > 0 for value in whole.values()):
            raise ValueError(f"{', '.join(whole)} should be whole numbers above 0")
        words = {key: str(content[key]) for key in ("model", "scheduler", "version", "date")}
        if not prices:
            raise ValueError("it has no policies")
        return Front(policies=prices, guidance_scale=_number_of(content, "guidance_scale"), **whole, **words)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    except KeyError as error:
        raise CheckpointError(f"{file} is damaged: it lacks {error}; make it anew with {COMMAND}") from None
    except (ValueError, TypeError, AttributeError, UsageError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}; make it anew with {COMMAND}") from None


_NUMBERS = ("macs", "psnr", "psnr_worst", "psnr_spread", "ssim")


def _number_of(row: dict, key: str) -> float:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} should be a number, got {value!r}")
    return float(value)


def wanted(cache: Any, interval: int | None, branch: int, min_psnr: float | None, max_macs: float | None) -> bool:
    """Whether a cache is to be picked by its price: `cache` is "auto", or a sequence of that alone.

    Raises:
        UsageError: "auto" beside other caches, without a promise or with one that cannot be; a promise without "auto".
    """
    given = [cache] if isinstance(cache, str) else cache if isinstance(cache, (list, tuple)) else []
    promises = {name: value for name, value in (("min_psnr", min_psnr), ("max_macs", max_macs)) if value is not None}
    if AUTO not in given:
        if promises:
            raise UsageError(f"{' and '.join(map(called, promises))} is for picking a cache: it needs cache auto")
        return False
    if len(given) > 1 or interval is not None or branch:
        raise UsageError("cache auto picks all caches by their price; it goes with no other cache, interval or branch")
    if not promises:
        raise UsageError(
            f"cache auto needs {called('min_psnr')}, the least dB to the uncached picture (30), or "
            f"{called('max_macs')} (0.4)"
        )
    if min_psnr is not None and not 0 < min_psnr < math.inf:
        raise UsageError(f"{called('min_psnr')} should be a number of dB above 0, such as 30, got {min_psnr}")
    if max_macs is not None and not 0 < max_macs <= 1:
        raise UsageError(
            f"{called('max_macs')} should be a share of the multiply-adds, above 0 and at most 1, got {max_macs}"
        )
    return True


def choose(
    model: Path,
    file: Path | None,
    min_psnr: float | None,
    max_macs: float | None,
    check: Callable[[Caches], None],
    **here,
) -> tuple[Price, str]:
    """`Front.pick` from the front in a model's `file`; warns where what is drawn (`here`, see
    `Front.differences`) differs much.

    Raises:
        UsageError: nothing was calibrated, or nothing keeps the promise.
        CheckpointError: see `read`.
    """
    if file is None:
        raise UsageError(
            f"cache auto: nothing was calibrated for this model; run {COMMAND} --model {model}, or choose a cache "
            "yourself"
        )
    front = read(file)
    choice = front.pick(min_psnr, max_macs, check)
    if differences := front.differences(**here):
        warnings.warn(f"the cache's price may be another here: {'; '.join(differences)}", stacklevel=2)
    return choice
