"""CLIP's picture encoder (Radford et al. 2021), named as transformers' CLIPVisionModelWithProjection without its
`vision_model.` prefix, and what it is shown of a picture."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .clip import CLIPVisionConfig, EncoderLayer
from .layers import Conv2d, LayerNorm, Linear

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pixels


class CLIPVisionModelWithProjection(nn.Module):
    """Encodes a picture into one vector."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config = config
        dims, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = mx.zeros((dims,))
        self.embeddings.patch_embedding = Conv2d(
            config.num_channels, dims, config.patch_size, stride=config.patch_size, bias=False
        )
        self.embeddings.position_embedding = nn.Embedding(1 + patches, dims)
        self.pre_layrnorm = LayerNorm(dims, eps=config.layer_norm_eps)  # spelt as in the files
        self.encoder = nn.Module()
        self.encoder.layers = [EncoderLayer(config, causal=False) for _ in range(config.num_hidden_layers)]
        self.post_layernorm = LayerNorm(dims, eps=config.layer_norm_eps)
        self.visual_projection = Linear(dims, config.projection_dim, bias=False)

    def __call__(self, pixels: mx.array) -> mx.array:
        """pixels: (B, side, side, 3), see `clip_pixels` -> (B, projection_dim)."""
        own = self.embeddings
        patches = own.patch_embedding(pixels)
        patches = patches.reshape(len(pixels), -1, patches.shape[-1])
        whole = mx.broadcast_to(own.class_embedding, (len(pixels), 1, patches.shape[-1]))
        x = self.pre_layrnorm(mx.concatenate([whole, patches], axis=1) + own.position_embedding.weight)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.visual_projection(self.post_layernorm(x[:, 0]))


def clip_pixels(picture: np.ndarray, side: int) -> mx.array:
    """(H, W, 3) in 0-255 -> (1, side, side, 3) float32, stretched to a square and normalised as CLIP was trained.

    As `_resize_with_antialiasing` of diffusers' StableVideoDiffusionPipeline does it: a Gaussian blur, then bicubic
    interpolation from corner to corner. Both work on one axis at a time, so that each axis is one matrix.
    """
    values = picture.astype(np.float32) / 255 * 2 - 1
    rows, columns = (_smaller(n, side) for n in values.shape[:2])
    small = np.einsum("ih,hwc->iwc", rows, values, optimize=True)
    small = np.einsum("jw,iwc->ijc", columns, small, optimize=True)
    normalised = ((small + 1) / 2 - np.array(MEAN)) / np.array(DEVIATION)
    return mx.array(normalised[None].astype(np.float32))


_CUBIC = -0.75  # the parameter of PyTorch's bicubic kernel (Keys 1981)


def _smaller(n: int, side: int) -> np.ndarray:
    """The matrix (side, n) that blurs and resizes an axis."""
    deviation = max((n / side - 1) / 2, 0.001)
    width = int(max(4 * deviation, 3)) // 2 * 2 + 1
    offsets = np.arange(width) - width // 2
    blur = np.exp(-(offsets**2) / (2 * deviation**2))
    blur /= blur.sum()
    at = np.arange(side) * ((n - 1) / (side - 1))
    first = np.floor(at)
    taps = first[:, None] + np.arange(-1, 3)
    distance = np.abs(at[:, None] - taps)
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
    weights = np.where(distance <= 1, near, far)
    seen = np.clip(taps, 0, n - 1).astype(int)[..., None] + offsets  # of blurred pixels, which the border repeats
    turn = max(2 * (n - 1), 1)
    seen = np.abs((seen + n - 1) % turn - (n - 1))  # of pixels, which it mirrors
    matrix = np.zeros((side, n))
    np.add.at(matrix, (np.arange(side)[:, None, None], seen), weights[..., None] * blur)
    return matrix.astype(np.float32)
