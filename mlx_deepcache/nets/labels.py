"""Classes as a U-Net reads them: ClassEmbedder of latent-diffusion, one token each."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .config import build_config


@dataclass(frozen=True)
class LabelConfig:
    """The embedding's config.json. num_embeddings: of classes, of which the last stands for none of them."""

    num_embeddings: int
    embedding_dim: int

    @classmethod
    def from_dict(cls, data: dict) -> LabelConfig:
        """Raises CheckpointError for a value that cannot be."""
        return build_config(cls, data, {})

    @property
    def without(self) -> int:
        """The class that stands for none: what a picture should not be, in guidance."""
        return self.num_embeddings - 1


class LabelEmbedding(nn.Module):
    """(B,) numbers of classes -> (B, 1, embedding_dim)."""

    def __init__(self, config: LabelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_embeddings, config.embedding_dim)

    def __call__(self, labels: mx.array) -> mx.array:
        return self.embedding(labels)[:, None]
