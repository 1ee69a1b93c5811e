"""What caching cost a picture: the same again without it, beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..cache.composition import Caches
from ..cache.deepcache import DeepCache
from ..cache.text import write
from ..errors import UsageError, called
from ..generation.settings import Settings
from ..media.sheets import captioned, psnr, side_by_side, stacked

if TYPE_CHECKING:
    from ..generation.pipeline import StableDiffusion


Uncached = tuple[Sequence[np.ndarray], float]
"""A batch drawn without a cache: the pictures, (H, W, 3) in 0-255, and the seconds of denoising."""


def check_comparable(settings: Settings) -> None:
    """Raises UsageError if nothing is cached, so that there is nothing to compare."""
    if settings.cache.policies == no_cache().policies:
        raise UsageError(
            f"{called('compare')} shows what the cache changes, but it is off; give {called('cache_interval')} or "
            f"{called('cache')}"
        )


def without_cache(pipe: StableDiffusion, settings: Settings) -> Uncached:
    """Draw without a cache what was drawn with one."""
    drawn = pipe.denoise(replace(settings, cache=no_cache()))
    for _ in drawn:
        pass
    return list(drawn.decode()), drawn.clock.seconds["denoise"]


def comparison(
    cache: Caches,
    images: Sequence[np.ndarray],
    seconds: float,
    uncached: Sequence[Uncached],
) -> np.ndarray:
    """Each picture drawn with a cache beside the one without, over their PSNR; last what was cached, and both times.

    uncached: batches, from `without_cache`; together they have as many pictures as `images`.
    """
    pairs = zip(images, [image for batch, _ in uncached for image in batch], strict=True)
    shown = [captioned(side_by_side(pair), [f"PSNR {psnr(*pair):.1f} dB"]) for pair in pairs]
    lines = [
        f"left: {', '.join(write(policy) for policy in cache.policies)}, {seconds:.2f} s",
        f"right: no cache, {sum(time for _, time in uncached):.2f} s",
    ]
    return captioned(stacked(shown), lines)


def comparisons(
    cache: Caches,
    videos: Sequence[np.ndarray],
    seconds: float,
    uncached: Sequence[Uncached],
) -> list[np.ndarray]:
    """The same of videos, (F, H, W, 3) each, frame by frame."""
    return [
        comparison(
            cache,
            [video[i] for video in videos],
            seconds,
            [([video[i] for video in batch], time) for batch, time in uncached],
        )
        for i in range(len(videos[0]))
    ]


def no_cache() -> Caches:
    """No cache at all."""
    return Caches.of([DeepCache(1)])
