"""Networks that enlarge pictures: ESRGAN's RRDBNet (Wang et al. 2018, 2021) and the compact SRVGGNet of Real-ESRGAN,
named as in Real-ESRGAN's files."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .layers import Conv2d

TILE = 160  # pixels a side of what is enlarged at once
MARGIN = 16  # pixels around it that the network sees too
SLOPE, SHARE = 0.2, 0.2  # of a leaky ReLU below 0, and of what a block adds


@dataclass(frozen=True)
class RRDBConfig:
    """features, growth: channels of the trunk, and that each dense layer adds; doublings: of the picture's sides, at
    the end; shuffle: by which they are divided at the start, pixels becoming channels."""

    features: int
    growth: int
    blocks: int
    doublings: int
    shuffle: int = 1

    @property
    def factor(self) -> int:
        """By which the sides grow."""
        return 2**self.doublings // self.shuffle


@dataclass(frozen=True)
class CompactConfig:
    """features: channels of each layer; layers: between the first and the last; factor: by which the sides grow."""

    features: int
    layers: int
    factor: int
    shuffle: int = 1


class DenseBlock(nn.Module):
    """Five convolutions, each reading all before it."""

    def __init__(self, features: int, growth: int):
        super().__init__()
        for i in range(1, 6):
            out = features if i == 5 else growth
            self[f"conv{i}"] = Conv2d(features + (i - 1) * growth, out, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        seen = x
        for i in range(1, 5):
            seen = mx.concatenate([seen, leaky(self[f"conv{i}"](seen))], axis=-1)
        return x + SHARE * self.conv5(seen)


class RRDB(nn.Module):
    """A residual of three dense blocks."""

    def __init__(self, features: int, growth: int):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(features, growth) for _ in range(3))

    def __call__(self, x: mx.array) -> mx.array:
        return x + SHARE * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    def __init__(self, config: RRDBConfig):
        super().__init__()
        self.config, features = config, config.features
        self.conv_first = Conv2d(3 * config.shuffle**2, features, 3, padding=1)
        self.body = [RRDB(features, config.growth) for _ in range(config.blocks)]
        self.conv_body = Conv2d(features, features, 3, padding=1)
        for i in range(1, config.doublings + 1):
            self[f"conv_up{i}"] = Conv2d(features, features, 3, padding=1)
        self.conv_hr = Conv2d(features, features, 3, padding=1)
        self.conv_last = Conv2d(features, 3, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, 3) in [0, 1], sides multiples of `shuffle` -> (B, factor H, factor W, 3), about the same."""
        x = self.conv_first(unshuffled(x, self.config.shuffle))
        y = x
        for block in self.body:
            y = block(y)
        x = x + self.conv_body(y)
        for i in range(1, self.config.doublings + 1):
            x = leaky(self[f"conv_up{i}"](repeated(x, 2)))
        return self.conv_last(leaky(self.conv_hr(x)))


class ChannelReLU(nn.Module):
    """Below 0 a slope for each channel (He et al. 2015)."""

    def __init__(self, dims: int):
        super().__init__()
        self.weight = mx.zeros((dims,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.maximum(x, 0) + self.weight * mx.minimum(x, 0)


class SRVGGNetCompact(nn.Module):
    def __init__(self, config: CompactConfig):
        super().__init__()
        self.config, features = config, config.features
        self.body = [Conv2d(3, features, 3, padding=1), ChannelReLU(features)]
        for _ in range(config.layers):
            self.body += [Conv2d(features, features, 3, padding=1), ChannelReLU(features)]
        self.body.append(Conv2d(features, 3 * config.factor**2, 3, padding=1))

    def __call__(self, x: mx.array) -> mx.array:
        """As `RRDBNet`."""
        y = x
        for layer in self.body:
            y = layer(y)
        return shuffled(y, self.config.factor) + repeated(x, self.config.factor)


def leaky(x: mx.array) -> mx.array:
    return mx.maximum(x, SLOPE * x)


def repeated(x: mx.array, factor: int) -> mx.array:
    """Each pixel as factor x factor: (B, H, W, C) -> (B, factor H, factor W, C)."""
    return mx.repeat(mx.repeat(x, factor, axis=1), factor, axis=2)


def shuffled(x: mx.array, factor: int) -> mx.array:
    """Channels become pixels: (B, H, W, C factor^2) -> (B, factor H, factor W, C)."""
    B, H, W, _ = x.shape
    x = x.reshape(B, H, W, -1, factor, factor).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(B, H * factor, W * factor, -1)


def unshuffled(x: mx.array, factor: int) -> mx.array:
    """Pixels become channels: (B, factor H, factor W, C) -> (B, H, W, C factor^2)."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // factor, factor, W // factor, factor, C).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(B, H // factor, W // factor, -1)


def seen(config: RRDBConfig | CompactConfig, height: int, width: int) -> tuple[int, int]:
    """The (height, width) that a net sees at most at once of a picture of this size."""
    sides = (min(side, TILE + 2 * MARGIN) for side in (height, width))
    return tuple(side + -side % config.shuffle for side in sides)


def upscaled(net: RRDBNet | SRVGGNetCompact, picture: np.ndarray, dtype: mx.Dtype, tile: int = TILE) -> np.ndarray:
    """(H, W, 3) uint8 -> (factor H, factor W, 3), a tile at a time, as Real-ESRGAN's own program does; tile: a multiple
    of the network's `shuffle`."""
    factor, (height, width, _) = net.config.factor, picture.shape
    over = [(0, -side % net.config.shuffle) for side in (height, width)]
    pixels = mx.array(np.pad(picture, [*over, (0, 0)], mode="reflect"))[None].astype(dtype) / 255
    large = np.empty((height * factor, width * factor, 3), np.uint8)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            y, x = max(top - MARGIN, 0), max(left - MARGIN, 0)
            part = net(pixels[:, y : top + tile + MARGIN, x : left + tile + MARGIN]).astype(mx.float32)
            part = np.array(part)[0, (top - y) * factor :, (left - x) * factor :]
            place = large[top * factor : (top + tile) * factor, left * factor : (left + tile) * factor]
            place[:] = (np.clip(part[: place.shape[0], : place.shape[1]], 0, 1) * 255).round()
    return large
