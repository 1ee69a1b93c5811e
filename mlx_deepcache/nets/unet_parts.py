"""What a U-Net is made of: its config, its conditioning, and its layers in a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..errors import CheckpointError
from .blocks import Attention, ResnetBlock2D, Transformer2DModel, Upsample2D
from .config import build_config, check_split, per_level


@dataclass(frozen=True)
class UNetConfig:
    """UNet2DConditionModel's config.json."""

    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    cross_attention_dim: int
    in_channels: int = 4
    out_channels: int = 4
    sample_size: int | tuple[int, int] = 64
    layers_per_block: int = 2
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None

    @classmethod
    def from_dict(cls, data: dict) -> UNetConfig:
        """Raises CheckpointError for a value that this U-Net cannot honour."""
        down = {"CrossAttnDownBlock2D", "DownBlock2D"}
        up = {"CrossAttnUpBlock2D", "UpBlock2D"}
        config = build_config(cls, data, _UNET_SUPPORTED)
        for name, types, known in (
            ("down_block_types", config.down_block_types, down),
            ("up_block_types", config.up_block_types, up),
        ):
            for kind in set(types) - known:
                raise CheckpointError(f"{name} holds {kind!r}, which is not supported, only {sorted(known)}")
            per_level(types, config.levels, name)
        if config.mid_block_type not in ("UNetMidBlock2DCrossAttn", None):
            raise CheckpointError(
                f"mid_block_type = {config.mid_block_type!r} is not supported, only 'UNetMidBlock2DCrossAttn' or null"
            )
        if config.addition_embed_type not in (None, "text_time"):
            raise CheckpointError(
                f"addition_embed_type = {config.addition_embed_type!r} is not supported, only null or 'text_time'"
            )
        if not isinstance(config.layers_per_block, int):
            raise CheckpointError(f"layers_per_block = {config.layers_per_block!r} is not supported, only one number")
        if not isinstance(config.cross_attention_dim, int):
            raise CheckpointError(
                f"cross_attention_dim = {config.cross_attention_dim!r} is not supported, only one number"
            )
        for name, per in (
            ("norm_num_groups", (config.norm_num_groups,) * config.levels),
            ("attention_head_dim", config.heads),
        ):
            check_split(config.block_out_channels, per, name)
        return config

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.block_out_channels)

    @property
    def branches(self) -> int:
        """Number of cache branches, 0 to branches - 1: three a level, as the pip package DeepCache counts them."""
        return 3 * self.levels

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level. diffusers calls this number `attention_head_dim`, for history's sake."""
        heads = self.attention_head_dim if self.num_attention_heads is None else self.num_attention_heads
        return per_level(heads, self.levels, "attention_head_dim")

    @property
    def transformer_layers(self) -> tuple[int, ...]:
        """Transformer blocks of each level's attention layers."""
        return per_level(self.transformer_layers_per_block, self.levels, "transformer_layers_per_block")


_UNET_SUPPORTED = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": (64, None),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1, 1.0),
    "num_class_embeds": (None,),
    "only_cross_attention": (False, [False] * 4, [False] * 3),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


Attend = Callable[..., mx.array]


@dataclass(frozen=True)
class Conditioning:
    """What a picture is drawn from.

    context: (B, S, C) the encoded prompt; pooled: (B, P) and time_ids: (B, 6) for SDXL (original height and width, crop
    top and left, target height and width, in pixels), else None; guidance: (B,) the scale that LCM's U-Net is told.
    """

    context: mx.array
    pooled: mx.array | None = None
    time_ids: mx.array | None = None
    guidance: mx.array | None = None


class Prepared(NamedTuple):
    """The part of the U-Net's work that depends on the prompt alone: done once, used at every step.

    down, mid, up: keys and values of each flat layer's transformer blocks; added: (B, temb_dim) joins the time
    embedding; guidance: (B, time_cond_proj_dim).
    """

    down: list
    mid: list
    up: list
    added: mx.array | None
    guidance: mx.array | None

    def rows(self, rows: slice) -> Prepared:
        """The same for some of the pictures of the batch."""
        parts = [self.down, self.mid, self.up, self.added, self.guidance]
        return Prepared(*(None if part is None else tree_map(lambda array: array[rows], part) for part in parts))


@dataclass(frozen=True)
class Layer:
    """One encoder or decoder layer: a resnet, perhaps a transformer, perhaps a change of size."""

    conv: nn.Module | None = None
    resnet: ResnetBlock2D | None = None
    attention: Transformer2DModel | None = None
    upsample: Upsample2D | None = None

    def keys_values(self, context: mx.array) -> list:
        return [] if self.attention is None else self.attention.keys_values(context)

    def __call__(
        self,
        x: mx.array,
        temb: mx.array,
        prompt: list,
        size: tuple[int, int] | None = None,
        attend: Attend = Attention.__call__,
    ) -> mx.array:
        """x: (B, H, W, C); size: what an upsampler should reach."""
        if self.conv is not None:
            x = self.conv(x)
        if self.resnet is not None:
            x = self.resnet(x, temb)
        return self.after_resnet(x, prompt, size, attend)

    def after_resnet(self, x: mx.array, prompt: list, size: tuple[int, int] | None, attend: Attend) -> mx.array:
        """The rest of the layer."""
        if self.attention is not None:
            x = self.attention(x, prompt, attend)
        return x if self.upsample is None else self.upsample(x, size)


def run_down(
    layers: list[Layer], x: mx.array, temb: mx.array, prompts: list, attend: Attend = Attention.__call__
) -> list[mx.array]:
    """The outputs of all these encoder layers: their skips."""
    skips = []
    for layer, prompt in zip(layers, prompts, strict=True):
        x = layer(x, temb, prompt, None, attend)
        skips.append(x)
    return skips


def run_up(
    layers: list[Layer],
    x: mx.array,
    skips: list[mx.array],
    temb: mx.array,
    prompts: list,
    attend: Attend = Attention.__call__,
) -> mx.array:
    """Decoder layers, each reading the last skip not yet read; upsamplers aim at the size of the next one."""
    for layer, prompt in zip(layers, prompts, strict=True):
        x = layer(mx.concatenate([x, skips[-1]], axis=-1), temb, prompt, next_size(skips), attend)
        skips = skips[:-1]
    return x


def added(skips: list[mx.array], residuals: Sequence[mx.array]) -> list[mx.array]:
    """Each skip with its residual, where there are residuals."""
    return [skip + r for skip, r in zip(skips, residuals, strict=False)] if residuals else skips


def next_size(skips: list[mx.array]) -> tuple[int, int] | None:
    """(height, width) of the skip that is read after the last one; None after the outermost."""
    return skips[-2].shape[1:3] if len(skips) > 1 else None


def _pairs(block: nn.Module) -> list[Layer]:
    """A block's resnets, each with its transformer where it has one."""
    attentions = block.get("attentions", [None] * len(block.resnets))
    return [Layer(resnet=r, attention=a) for r, a in zip(block.resnets, attentions, strict=True)]
