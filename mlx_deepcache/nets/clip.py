"""CLIP's text encoder (Radford et al. 2021), named as transformers' CLIPTextModel without its `text_model.` prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..backend.ops import attention, gelu, pad_heads, quick_gelu
from ..errors import CheckpointError
from .config import build_config, check_split
from .layers import LayerNorm, Linear


class SelfAttention(nn.Module):
    """causal: a token sees itself and those before, as in texts."""

    def __init__(self, dims: int, heads: int, *, causal: bool = True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = Linear(dims, dims)
        self.k_proj = Linear(dims, dims)
        self.v_proj = Linear(dims, dims)
        self.out_proj = Linear(dims, dims)

    def __call__(self, x: mx.array) -> mx.array:
        B, S, _ = x.shape
        q, k, v = (
            proj(x).reshape(B, S, self.heads, -1).swapaxes(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attention(q, pad_heads(k), pad_heads(v), causal=self.causal)
        return self.out_proj(out.swapaxes(1, 2).reshape(x.shape))


class MLP(nn.Module):
    def __init__(self, dims: int, inner: int, activation: str):
        super().__init__()
        self.fc1 = Linear(dims, inner)
        self.fc2 = Linear(inner, dims)
        self.activation = quick_gelu if activation == "quick_gelu" else gelu

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config: CLIPConfig | CLIPVisionConfig, *, causal: bool = True):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads, causal=causal)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextModel(nn.Module):
    """Encodes token ids into one vector a token, and one for the whole text."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embeddings.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.encoder = nn.Module()
        self.encoder.layers = [EncoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.with_projection:
            self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def __call__(
        self, ids: mx.array, *, penultimate: bool = False, skip: Sequence[int] | None = None
    ) -> tuple[mx.array, mx.array]:
        """ids: (B, S) -> hidden states (B, S, C) and the pooled text (B, C), or (B, projection_dim) with a projection.

        `penultimate` gives the hidden states before the last layer, unnormalised, as SDXL uses them; else they are the
        last layer's, normalised. skip: of each text, from how many layers before that they are instead. The pooled text
        is the last layer's at the end-of-text token either way.

        Raises:
            CheckpointError: an id is past the end of the vocabulary, where MLX would read anything.
        """
        vocabulary = len(self.embeddings.token_embedding.weight)
        if ids.max().item() >= vocabulary:
            raise CheckpointError(
                f"the tokenizer gives token {ids.max().item()} to a text encoder that knows {vocabulary}; "
                "they are not of one checkpoint"
            )
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding.weight[: ids.shape[1]]
        states = [x]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        normed = self.final_layer_norm(states[-1])
        pooled = normed[mx.arange(len(ids)), self._end_of_text(ids)]
        if "text_projection" in self:
            pooled = self.text_projection(pooled)
        if skip is None:
            return (states[-2] if penultimate else normed), pooled
        hidden = mx.stack([states[-1 - penultimate - layers][i] for i, layers in enumerate(skip)])
        return (hidden if penultimate else self.final_layer_norm(hidden)), pooled

    def _end_of_text(self, ids: mx.array) -> mx.array:
        """Position of each text's end token. Old configs say 2 where the token has the vocabulary's highest id, but for
        words that were added to it (textual inversion)."""
        end = self.config.eos_token_id
        original = mx.where(ids < self.config.vocab_size, ids, 0)
        return mx.argmax(original if end == 2 else (ids == end).astype(mx.int32), axis=-1)


@dataclass(frozen=True)
class CLIPConfig:
    """CLIPTextModel's (or CLIPTextModelWithProjection's) config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int = 512
    with_projection: bool = False

    @classmethod
    def from_dict(cls, data: dict) -> CLIPConfig:
        """Raises CheckpointError for a value that this text encoder cannot honour."""
        projection = data.get("architectures") == ["CLIPTextModelWithProjection"]
        config = build_config(cls, {**data, "with_projection": projection}, {})
        return _checked(config)


@dataclass(frozen=True)
class CLIPVisionConfig:
    """CLIPVisionModelWithProjection's config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    @classmethod
    def from_dict(cls, data: dict) -> CLIPVisionConfig:
        """Raises CheckpointError for a value that this encoder cannot honour."""
        config = _checked(build_config(cls, data, {"num_channels": (3,)}))
        check_split((config.image_size,), (config.patch_size,), "patch_size")
        return config


def _checked(config: CLIPConfig | CLIPVisionConfig):
    if config.hidden_act not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"hidden_act = {config.hidden_act!r} is not supported, only 'quick_gelu' or 'gelu'")
    check_split((config.hidden_size,), (config.num_attention_heads,), "num_attention_heads")
    return config
