"""Random numbers: MLX's own, and PyTorch's, so that a seed gives the picture that it gives in diffusers.

A generator is an object with `normal(shape) -> float32 array`; each call goes on where the last one stopped. PyTorch's
two generators are written from its sources, ATen/native/cpu/DistributionTemplates.h (normal_fill) and
ATen/native/cuda/DistributionTemplates.h, and from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import UsageError


class TorchCPU:
    """torch.randn with a CPU generator: Mersenne Twister words, Box-Muller in blocks of 16 values."""

    def __init__(self, seed: int):
        self.words = np.random.RandomState(seed % 2**32)

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal values of this shape, float32.

        Raises:
            UsageError: fewer than 16 values are asked for (PyTorch takes another path for those).
        """
        n = math.prod(shape)
        if n < 16:
            raise UsageError(f"the picture is too small: its latents should have 16 values or more, got {n}")
        values = self._uniform(n)
        whole = n - n % 16
        values[:whole] = self._box_muller(values[:whole])
        if n % 16:  # PyTorch draws the last 16 values anew, over the end of the last whole block
            values[-16:] = self._box_muller(self._uniform(16))
        return values.reshape(shape)

    def _uniform(self, n: int) -> np.ndarray:
        words = np.frombuffer(self.words.bytes(4 * n), dtype="<u4")
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    @staticmethod
    def _box_muller(uniform: np.ndarray) -> np.ndarray:
        u1, u2 = np.moveaxis(uniform.reshape(-1, 2, 8), 1, 0)
        radius = np.sqrt(-2 * np.log(1 - u1))
        angle = np.float32(2 * math.pi) * u2
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1).astype(np.float32)


class TorchCUDA:
    """torch.randn with a CUDA generator: Philox 4x32-10, one subsequence a value.

    Exact as long as a draw has at most as many values as the card runs threads at once (over 100,000 on desktop cards,
    270,336 on an H200; a 1024 x 1024 picture has 65,536). Written from PyTorch's source and not yet compared with one
    on a device.
    """

    def __init__(self, seed: int):
        self.seed = seed % 2**64
        self.draws = 0

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal values of this shape, float32."""
        n = math.prod(shape)
        index = np.arange(n, dtype=np.uint64)
        counter = [np.full(n, self.draws, np.uint64), np.zeros(n, np.uint64), index & _LOW, index >> np.uint64(32)]
        self.draws += 1  # each draw moves the offset by 4, and a counter stands for 4 words
        x, y, _, _ = philox(counter, self.seed)
        u = x.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
        v = (y.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)) * np.float32(2 * math.pi)
        return (np.sqrt(-2 * np.log(u)) * np.sin(v)).astype(np.float32).reshape(shape)


_LOW = np.uint64(0xFFFFFFFF)


def philox(counter: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Philox 4x32 with ten rounds: four arrays of 32-bit words (held in uint64) from four arrays of counter words."""
    key = [seed & 0xFFFFFFFF, seed >> 32]
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(key[0]),
            b & _LOW,
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(key[1]),
            a & _LOW,
        )
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return [c0, c1, c2, c3]


class MLX:
    """mlx.core.random's own generator, on whatever device MLX uses."""

    def __init__(self, seed: int):
        import mlx.core as mx

        self.key = mx.random.key(seed % 2**64)

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal values of this shape, float32."""
        import mlx.core as mx

        self.key, use = mx.random.split(self.key)
        return np.array(mx.random.normal(shape, key=use))


GENERATORS = {"torch": TorchCPU, "torch-cuda": TorchCUDA, "mlx": MLX}


class BatchNoise:
    """One generator a picture, so that a picture does not depend on which others are drawn beside it."""

    def __init__(self, rng: str, seeds: list[int]):
        self.generators = [GENERATORS[rng](seed) for seed in seeds]

    def normal(self, shape: tuple[int, int, int]) -> np.ndarray:
        """(N, C, h, w) float32 for N seeds and a picture's latent shape (C, h, w)."""
        return np.concatenate([g.normal((1, *shape)) for g in self.generators])

    def spread(self, shape: tuple[int, int, int]) -> np.ndarray:
        """The same for what a VAE's encoder leaves to chance in the picture that all start from."""
        return self.normal(shape)
