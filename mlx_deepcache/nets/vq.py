"""VQModel: an autoencoder whose latents are drawn to the nearest of some thousand codewords before they are decoded
(Esser et al. 2021; the first stage of Rombach et al. 2022's unconditional and class-conditional models)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..backend.ops import linear
from ..errors import CheckpointError
from .autoencoder import AutoencoderKL, VAEConfig
from .layers import Linear

TOGETHER = 2048  # positions that are compared with all codewords at once: 64 MiB of distances to 8192


@dataclass(frozen=True)
class VQConfig(VAEConfig):
    """VQModel's config.json."""

    block_out_channels: tuple[int, ...] = (64,)
    latent_channels: int = 3
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None
    sample_size: int = 32
    force_upcast: bool = False
    spreads: ClassVar[bool] = False

    @classmethod
    def from_dict(cls, data: dict) -> VQConfig:
        """Raises CheckpointError for a value that this VAE cannot honour."""
        for key, only in (("norm_type", "group"), ("lookup_from_codebook", False)):
            if data.get(key, only) != only:
                raise CheckpointError(f"{key} = {data[key]!r} is not supported in a VQModel, only {only!r}")
        config = super().from_dict(data)
        if config.vq_embed_dim not in (None, config.latent_channels):
            raise CheckpointError(
                f"vq_embed_dim = {config.vq_embed_dim} is not supported in a VQModel, only its latent_channels, "
                f"{config.latent_channels}"
            )
        return config


class VectorQuantizer(nn.Module):
    """A codebook: each position's nearest codeword, by Euclidean distance."""

    def __init__(self, codewords: int, dims: int):
        super().__init__()
        self.embedding = nn.Embedding(codewords, dims)

    def __call__(self, z: mx.array) -> mx.array:
        """(..., dims) -> the same shape, codewords alone."""
        words = self.embedding.weight.astype(mx.float32)
        rows, halved = z.astype(mx.float32).reshape(-1, z.shape[-1]), -0.5 * words.square().sum(axis=1)
        # |z - e|^2 is least where z e - |e|^2 / 2 is greatest
        nearest = [
            mx.argmax(linear(rows[start : start + TOGETHER], words, halved), axis=1)
            for start in range(0, len(rows), TOGETHER)
        ]
        return self.embedding.weight[mx.concatenate(nearest)].reshape(z.shape)


class VQModel(AutoencoderKL):
    """Latents here are the sampler's, scaled as the config says."""

    def __init__(self, config: VQConfig):
        super().__init__(config)
        self.quant_conv = Linear(config.latent_channels, config.latent_channels)
        self.quantize = VectorQuantizer(config.num_vq_embeddings, config.latent_channels)

    def encode(self, image: mx.array, noise: mx.array | None = None) -> mx.array:
        """image: (B, H, W, 3) in [-1, 1] -> latents (B, H/f, W/f, latent_channels), not yet codewords, as a sampler
        starts from them; they have no spread for `noise`."""
        return self.quant_conv(self.encoder(image)) * self.config.scaling_factor

    def decode(self, latents: mx.array) -> mx.array:
        """latents: (B, h, w, latent_channels) -> (B, f*h, f*w, 3), about [-1, 1]."""
        z = self.quantize(latents / self.config.scaling_factor)
        return self.decoder(self.post_quant_conv(z.astype(latents.dtype)))
