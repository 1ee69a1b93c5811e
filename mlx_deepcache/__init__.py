"""Stable Diffusion 1.x, 2.x and XL in MLX, with DeepCache in the sampling loop."""

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

FAST_BLAS = host.prepare()  # before anything imports mlx


def __getattr__(name: str):
    if name == "StableDiffusion":
        from .generation.pipeline import StableDiffusion

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
