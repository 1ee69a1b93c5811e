"""A script's generators as the source of noise, drawn from in the order in which diffusers does."""

from __future__ import annotations

import operator
import secrets
import sys
from typing import Any

import numpy as np

from ..diffusion.noise import TorchCPU
from ..errors import UsageError
from ..fields import valued


class TorchNoise:
    """A torch.Generator, or PyTorch's global one for None; it goes on where the script left it."""

    def __init__(self, generator: Any, dtype: str):
        """dtype: in which diffusers would draw; others' values differ."""
        self.torch, self.generator = sys.modules["torch"], generator
        self.dtype = getattr(self.torch, dtype)

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal values of this shape, float32."""
        device = "cpu" if self.generator is None else self.generator.device
        drawn = self.torch.randn(shape, generator=self.generator, device=device, dtype=self.dtype)
        return drawn.float().cpu().numpy()


class Noise:
    """What `diffusion.noise.BatchNoise` is to seeds: for so many pictures from one generator, which draws for all of
    them at once, or one each. alone: the picture that all start from is encoded once, with the first one's noise."""

    def __init__(self, given: Any, pictures: int, dtype: str, *, alone: bool):
        """given: a torch.Generator, a seed, None, or a list of these.

        Raises:
            UsageError: it is none of these, or there are more or fewer than pictures.
        """
        self.several = isinstance(given, (list, tuple))
        if self.several and len(given) != pictures:
            raise UsageError(f"generator should be one, or a list of {pictures}, one a picture; got {len(given)}")
        self.generators = [_source(one, dtype) for one in (given if self.several else [given])]
        self.several = self.several and pictures > 1
        self.pictures, self.alone = pictures, alone

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """(N, *shape) float32."""
        if not self.several:
            return self.generators[0].normal((self.pictures, *shape))
        return np.concatenate([generator.normal((1, *shape)) for generator in self.generators])

    def spread(self, shape: tuple[int, ...]) -> np.ndarray:
        """The same for a VAE's encoder."""
        if self.several and not self.alone:
            return self.normal(shape)
        return np.repeat(self.generators[0].normal((1, *shape)), self.pictures, axis=0)


def _source(given: Any, dtype: str) -> Any:
    if hasattr(given, "initial_seed") or (given is None and "torch" in sys.modules):
        return TorchNoise(given, dtype)
    if given is None:
        return TorchCPU(secrets.randbelow(2**32))
    try:
        return TorchCPU(operator.index(given))
    except TypeError:
        raise UsageError(f"generator should be a torch.Generator or a seed, got {valued(given)}") from None
