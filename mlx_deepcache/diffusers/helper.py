"""The pip package DeepCache's helper, and the cache arguments of its older pipelines, as policies of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import POLICIES
from ..cache.deepcache import DeepCache
from ..errors import UsageError
from ..fields import valued

if TYPE_CHECKING:
    from .base import DiffusionPipeline


class DeepCacheSDHelper:
    """Says when a pipeline, and every other over the same model, caches: set_params, enable, disable."""

    def __init__(self, pipe: DiffusionPipeline | None = None):
        self.pipe = pipe
        self.set_params()

    def set_params(self, cache_interval: int = 1, cache_branch_id: int = 0, skip_mode: str = "uniform") -> None:
        """cache_interval: the whole U-Net runs on every so manieth step; cache_branch_id: how much a cached step runs.

        Raises:
            NotImplementedError: another skip_mode than "uniform", of which the helper has none; names what there is.
            UsageError: a value that cannot be.
        """
        if skip_mode != "uniform":
            raise NotImplementedError(
                f"skip_mode should be 'uniform', got {valued(skip_mode)}; other ways to choose steps are the caches of "
                f"mlx_deepcache.StableDiffusion: {', '.join(POLICIES)}"
            )
        self.cache = DeepCache(cache_interval, cache_branch_id)

    def enable(self, pipe: DiffusionPipeline | None = None) -> None:
        """Cache from now on. pipe: the pipeline, if it was not given before."""
        self.pipe = self.pipe if pipe is None else pipe
        if self.pipe is None:
            raise UsageError("which pipeline? give DeepCacheSDHelper or its enable a pipe")
        self.pipe.model.helper = self

    def disable(self) -> None:
        """Cache no more."""
        if self.pipe is not None and self.pipe.model.helper is self:
            self.pipe.model.helper = None

    def over(self, timesteps: Sequence[float], run: Sequence[float]) -> DeepCache:
        """The cache for a run of these of a scheduler's timesteps. The helper looks up where a timestep first stands:
        where some stand twice, as PNDM's second, that is not a count of steps."""
        if len(set(timesteps)) == len(timesteps):
            return self.cache
        first = {t: i for i, t in reversed(list(enumerate(timesteps)))}
        begun, interval = first[run[0]], self.cache.interval
        full = tuple(i for i, t in enumerate(run) if (first[t] - begun) % interval == 0)
        return DeepCache(branch=self.cache.branch, steps=full)


def older(asked: dict[str, Any]) -> DeepCache | None:
    """What the arguments of DeepCache's own pipelines come to, if a call has them: these cut after a block's layer,
    that of videos after the branch beyond the first, and their other schedule is centred."""
    interval = asked["cache_interval"]
    if interval is None:
        return None
    if "cache_branch" in asked:
        return DeepCache(interval, 0 if asked["cache_branch"] is None else asked["cache_branch"] + 1)
    layer, block = asked["cache_layer_id"] or 0, asked["cache_block_id"] or 0
    branch = 3 * layer + block + 1
    if asked["uniform"] or interval == 1:
        return DeepCache(interval, branch)
    if asked["center"] is None or asked["pow"] is None:
        raise UsageError("uniform=False needs pow and center, such as pow=1.4, center=15")
    return DeepCache(interval, branch, center=asked["center"], power=asked["pow"])
