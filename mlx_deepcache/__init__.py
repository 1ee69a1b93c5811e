"""Stable Diffusion 1.x, 2.x and XL in MLX, with DeepCache in the sampling loop."""

import warnings

from ._version import __version__
from .backend import host

POLICIES = (
    "DeepCache",
    "Adaptive",
    "TaylorSeer",
    "Spectrum",
    "PyramidAttentionBroadcast",
    "FasterCache",
    "TGate",
    "GuidanceInterval",
)
__all__ = [*POLICIES, "CacheSchedule", "Control", "StableDiffusion", "__version__"]  # noqa: PLE0604

SLOW = host.prepare()  # before anything imports mlx; says why products will be slow, if they will


def __getattr__(name: str):
    if name == "StableDiffusion":
        if SLOW is not None:
            warnings.warn(SLOW, stacklevel=2)
        from .generation.pipeline import StableDiffusion

        globals()[name] = StableDiffusion  # so that this is not asked again
        return StableDiffusion
    if name in POLICIES:
        from .cache import composition

        return getattr(composition, name)
    if name == "CacheSchedule":
        from .cache.deepcache import CacheSchedule

        return CacheSchedule
    if name == "Control":
        from .generation.options import Control

        return Control
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
