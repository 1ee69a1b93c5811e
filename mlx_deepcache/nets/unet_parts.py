"""What U-Nets are made of: config, kinds of blocks, layers, conditioning, and the encoder that ControlNets share.

Modules are nested and named as in a diffusers checkpoint. To run, they are seen as a flat list of encoder layers and
one of decoder layers: the output of encoder layer b is skip b, and the decoder layer b-th from the end reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..backend.ops import silu
from ..errors import CheckpointError
from .attend import PLAIN, Attend
from .blocks import (
    AttentionBlock,
    Downsample2D,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    timestep_embedding,
)
from .config import build_config, check_split, per_level
from .layers import Conv2d, by_frame
from .spatiotemporal import SpatioTemporalResBlock, TransformerSpatioTemporalModel


@dataclass(frozen=True)
class UNetConfig:
    """UNet2DConditionModel's config.json, UNet2DModel's, or UNetSpatioTemporalConditionModel's; cross_attention_dim:
    None where it reads nothing but noisy latents; addition_embed_type: of videos "time": it reads numbers and no pooled
    text; num_frames: of a video that it was trained for."""

    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    cross_attention_dim: int | None
    in_channels: int = 4
    out_channels: int = 4
    sample_size: int | tuple[int, int] = 64
    layers_per_block: int = 2
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    attention_head_dim: int | tuple[int, ...] | None = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    downsample_padding: int = 1
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None
    num_frames: int | None = None

    @classmethod
    def from_dict(cls, data: dict) -> UNetConfig:
        """Raises CheckpointError for a value that this U-Net cannot honour."""
        if data.get("_class_name") == "UNetSpatioTemporalConditionModel":
            data = _VIDEO_DEFAULTS | {k: v for k, v in data.items() if v is not None} | _VIDEO_ALWAYS
        if alone := data.get("_class_name") == "UNet2DModel":
            data = _ALONE_DEFAULTS | data | _ALONE_ALWAYS
        config = build_config(cls, data, _UNET_SUPPORTED)
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for kind in set(getattr(config, name)) - set(known):
                raise CheckpointError(f"{name} holds {kind!r}, which is not supported, only {sorted(known)}")
            per_level(getattr(config, name), config.levels, name)
        added = "time" if config.video else "text_time"
        for name, known in (("mid_block_type", MID_BLOCKS), ("addition_embed_type", [added])):
            if (value := getattr(config, name)) not in (*known, None):
                only = " or ".join(map(repr, known))
                raise CheckpointError(f"{name} = {value!r} is not supported, only {only} or null")
        for name in ("layers_per_block", *([] if alone else ["cross_attention_dim"])):
            if not isinstance(value := getattr(config, name), int):
                raise CheckpointError(f"{name} = {value!r} is not supported, only one number")
        for kind in config.kinds:
            if kind not in _EVERYWHERE and (kind in _ALONE) != alone:
                name = "mid_block_type" if kind == config.mid_block_type else "down_block_types or up_block_types"
                net = data.get("_class_name", "UNet2DConditionModel")
                raise CheckpointError(f"{name}: {kind} is not supported in a {net}")
        if alone:
            config._check_heads()
        elif None in config.heads:
            raise CheckpointError("attention_head_dim = None is not supported, only one number, or one a level")
        for name, per in (
            ("norm_num_groups", (config.norm_num_groups,) * config.levels),
            ("attention_head_dim", config.heads),
        ):
            check_split(config.block_out_channels, per, name)
        if len({_VIDEO in kind for kind in config.kinds}) > 1:
            raise CheckpointError(f"blocks of pictures and of videos in one net are not supported, got {config.kinds}")
        return config

    def _check_heads(self) -> None:
        """Raises CheckpointError where a UNet2DModel's levels cannot be split into heads of its size."""
        size = self.attention_head_dim
        if isinstance(size, tuple):
            raise CheckpointError(f"attention_head_dim = {list(size)} is not supported, only one number or null")
        for level, width in enumerate(self.block_out_channels):
            kinds = self.down_block_types[level], self.up_block_types[-1 - level]
            attends = any(kind in _ALONE for kind in kinds) or (self.mid_block_type and level == self.levels - 1)
            if attends and size is not None and width % size:
                raise CheckpointError(f"a width of {width} cannot be split into heads of attention_head_dim = {size}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of all blocks."""
        middle = () if self.mid_block_type is None else (self.mid_block_type,)
        return (*self.down_block_types, *middle, *self.up_block_types)

    @property
    def video(self) -> bool:
        """Whether it draws videos: its arrays have an axis of frames, the second."""
        return _VIDEO in self.kinds[0]

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.block_out_channels)

    @property
    def branches(self) -> int:
        """Number of cache branches, 0 to branches - 1: three a level, as the pip package DeepCache counts them."""
        return 3 * self.levels

    @property
    def skip_channels(self) -> list[int]:
        """Channels of each skip, outermost first; every level but the last ends in a downsampler."""
        channels, last = self.block_out_channels, self.levels - 1
        made = [[c] * (self.layers_per_block + (level < last)) for level, c in enumerate(channels)]
        return [channels[0], *sum(made, [])]

    @property
    def temb_dim(self) -> int:
        """Size of the time embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level. diffusers calls this number `attention_head_dim`, for history's sake; in a
        UNet2DModel that is what its name says, the size of each, or null for one head."""
        if self.cross_attention_dim is None:
            size = self.attention_head_dim
            return tuple(1 if size is None or width % size else width // size for width in self.block_out_channels)
        heads = self.attention_head_dim if self.num_attention_heads is None else self.num_attention_heads
        return per_level(heads, self.levels, "attention_head_dim")

    @property
    def transformer_layers(self) -> tuple[int, ...]:
        """Transformer blocks of each level's attention layers."""
        return per_level(self.transformer_layers_per_block, self.levels, "transformer_layers_per_block")


_UNET_SUPPORTED = {
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "addition_embed_type_num_heads": (64, None),
    "attention_type": ("default",),
    "attn_norm_num_groups": (None,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv",),
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
    "upsample_type": ("conv",),
}
_VIDEO = "SpatioTemporal"  # in the names of blocks that have an axis of frames
# What UNetSpatioTemporalConditionModel takes for what its config does not say, and what it has no word for
_VIDEO_DEFAULTS = {
    "in_channels": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 3,
    "cross_attention_dim": 1024,
    "num_attention_heads": [5, 10, 20, 20],
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
    "num_frames": 25,
}
_VIDEO_ALWAYS = {
    "mid_block_type": "UNetMidBlockSpatioTemporal",
    "use_linear_projection": True,
    "addition_embed_type": "time",
}
# The same for UNet2DModel
_ALONE_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
}
_ALONE_ALWAYS = {"cross_attention_dim": None, "num_attention_heads": None, "addition_embed_type": None}
_ALONE = ("AttnDownBlock2D", "UNetMidBlock2D", "AttnUpBlock2D")  # blocks that attend to nothing but what they are given
_EVERYWHERE = ("DownBlock2D", "UpBlock2D")


def _resnet(c: UNetConfig, c_in: int, c_out: int) -> ResnetBlock2D:
    return ResnetBlock2D(c_in, c_out, c.temb_dim, c.norm_num_groups, c.norm_eps)


def _transformer(c: UNetConfig, level: int, make: type = Transformer2DModel) -> nn.Module:
    dims, heads, depth = c.block_out_channels[level], c.heads[level], c.transformer_layers[level]
    return make(dims, heads, c.cross_attention_dim, depth, c.norm_num_groups)


def _self_attention(c: UNetConfig, level: int) -> AttentionBlock:
    return AttentionBlock(c.block_out_channels[level], c.heads[level], c.norm_num_groups, c.norm_eps)


def _video_resnet(c: UNetConfig, c_in: int, c_out: int, *, eps: float) -> SpatioTemporalResBlock:
    return SpatioTemporalResBlock(c_in, c_out, c.temb_dim, c.norm_num_groups, eps)  # each kind has its own in diffusers


_video_transformer = partial(_transformer, make=TransformerSpatioTemporalModel)


# The kinds of blocks: what makes a layer's resnet, and what its transformer, if there is one
DOWN_BLOCKS = {
    "CrossAttnDownBlock2D": (_resnet, _transformer),
    "AttnDownBlock2D": (_resnet, _self_attention),
    "DownBlock2D": (_resnet, None),
    "CrossAttnDownBlockSpatioTemporal": (partial(_video_resnet, eps=1e-6), _video_transformer),
    "DownBlockSpatioTemporal": (partial(_video_resnet, eps=1e-5), None),
}
MID_BLOCKS = {
    "UNetMidBlock2DCrossAttn": (_resnet, _transformer),
    "UNetMidBlock2D": (_resnet, _self_attention),
    "UNetMidBlockSpatioTemporal": (partial(_video_resnet, eps=1e-5), _video_transformer),
}
UP_BLOCKS = {
    "CrossAttnUpBlock2D": (_resnet, _transformer),
    "AttnUpBlock2D": (_resnet, _self_attention),
    "UpBlock2D": (_resnet, None),
    "CrossAttnUpBlockSpatioTemporal": (partial(_video_resnet, eps=1e-6), _video_transformer),
    "UpBlockSpatioTemporal": (partial(_video_resnet, eps=1e-6), None),
}


def _block(kind: tuple, config: UNetConfig, level: int, widths: Sequence[int], transformers: int) -> nn.Module:
    """A block of a level: a resnet for each of the `widths` that come in, and so many transformers, if its kind has
    them."""
    resnet, transformer = kind
    block = nn.Module()
    block.resnets = [resnet(config, width, config.block_out_channels[level]) for width in widths]
    if transformer is not None:
        block.attentions = [transformer(config, level) for _ in range(transformers)]
    return block


def down_blocks(config: UNetConfig) -> list[nn.Module]:
    """The encoder, a block a level; all but the last end in a downsampler."""
    blocks, c_in, n = [], config.block_out_channels[0], config.layers_per_block
    for level, (kind, c_out) in enumerate(zip(config.down_block_types, config.block_out_channels, strict=True)):
        blocks.append(_block(DOWN_BLOCKS[kind], config, level, [c_in, *[c_out] * (n - 1)], n))
        if level < config.levels - 1:
            blocks[-1].downsamplers = [Downsample2D(c_out, pad_all_round=config.downsample_padding == 1)]
        c_in = c_out
    return blocks


def mid_block(config: UNetConfig) -> nn.Module:
    """A transformer between two resnets."""
    return _block(MID_BLOCKS[config.mid_block_type], config, config.levels - 1, config.block_out_channels[-1:] * 2, 1)


def up_blocks(config: UNetConfig) -> list[nn.Module]:
    """The decoder, a block a level, each of whose layers reads a skip; all but the last end in an upsampler."""
    blocks, c_in, n, skips = [], config.block_out_channels[-1], config.layers_per_block + 1, config.skip_channels
    for level, kind in zip(reversed(range(config.levels)), config.up_block_types, strict=True):
        c_out = config.block_out_channels[level]
        widths = [width + skips.pop() for width in [c_in, *[c_out] * (n - 1)]]
        blocks.append(_block(UP_BLOCKS[kind], config, level, widths, n))
        if level > 0:
            blocks[-1].upsamplers = [Upsample2D(c_out)]
        c_in = c_out
    return blocks


@dataclass(frozen=True)
class Conditioning:
    """What a picture is drawn from.

    context: (B, S, C) the encoded prompt, picture or class, no tokens (S = 0) where there is nothing to read; pooled:
    (B, P) and time_ids: (B, 6) for SDXL (original height and width, crop top and left, target height and width, in
    pixels), for videos time_ids: (B, 3) alone (frames a second less one, motion, noise added to the picture), else
    None; guidance: (B,) the scale that LCM's U-Net is told.
    """

    context: mx.array
    pooled: mx.array | None = None
    time_ids: mx.array | None = None
    guidance: mx.array | None = None


class Prepared(NamedTuple):
    """The part of the U-Net's work that the conditioning alone decides: done once, used at every step.

    down, mid, up: what each layer made of it, see `Layer.prepare`; added: (B, temb_dim) joins the time embedding;
    guidance: (B, time_cond_proj_dim).
    """

    down: list
    mid: list
    up: list
    added: mx.array | None
    guidance: mx.array | None

    def rows(self, rows: slice) -> Prepared:
        """The same for some of the pictures of the batch."""
        return Prepared(*(None if part is None else tree_map(lambda array: array[rows], part) for part in self))


@dataclass(frozen=True)
class Layer:
    """One encoder or decoder layer: a resnet, perhaps a transformer, perhaps a change of size."""

    conv: nn.Module | None = None
    resnet: ResnetBlock2D | None = None
    attention: Transformer2DModel | AttentionBlock | None = None
    upsample: Upsample2D | None = None

    def prepare(self, cond: Conditioning) -> list:
        """This layer's own share of the conditioning: the prompt's keys and values in each transformer block."""
        return [] if self.attention is None else self.attention.prepare(cond.context)

    def __call__(
        self, x: mx.array, temb: mx.array, own: list, attend: Attend = PLAIN, size: tuple[int, int] | None = None
    ) -> mx.array:
        """x: (B, H, W, C), or a video's (B, F, H, W, C); own: from `prepare`; size: what an upsampler should reach."""
        if self.conv is not None:
            x = by_frame(self.conv, x)
        if self.resnet is not None:
            x = self.resnet(x, temb)
        return self.after_resnet(x, own, attend, size)

    def after_resnet(self, x: mx.array, own: list, attend: Attend, size: tuple[int, int] | None) -> mx.array:
        """The rest of the layer."""
        if self.attention is not None:
            x = self.attention(x, own, attend)
        return x if self.upsample is None else by_frame(self.upsample, x, size)


def layers_of(block: nn.Module) -> list[Layer]:
    """A block's resnets, each with its transformer where it has one; a downsampler is a layer of its own, and an
    upsampler belongs to the last one."""
    resnets, attentions = block.resnets, block.get("attentions", [])
    attentions = [*attentions, *[None] * (len(resnets) - len(attentions))]
    layers = [Layer(resnet=r, attention=a) for r, a in zip(resnets, attentions, strict=True)]
    for sampler in block.get("upsamplers", []):
        layers[-1] = replace(layers[-1], upsample=sampler)
    return [*layers, *(Layer(conv=sampler) for sampler in block.get("downsamplers", []))]


def run(layers: Sequence[Layer], x: mx.array, temb: mx.array, own: list, attend: Attend = PLAIN) -> list[mx.array]:
    """x, and what each of these encoder or middle layers makes of it, one after the other."""
    outputs = [x]
    for layer, share in zip(layers, own, strict=True):
        outputs.append(layer(outputs[-1], temb, share, attend))
    return outputs


def run_up(
    layers: Sequence[Layer], x: mx.array, skips: list[mx.array], temb: mx.array, own: list, attend: Attend = PLAIN
) -> mx.array:
    """Decoder layers, each reading the last of the skips, which it takes away; upsamplers aim at the size of the next
    one."""
    for layer, share in zip(layers, own, strict=True):
        size = next_size(skips)
        x = mx.concatenate([x, skips.pop()], axis=-1)  # nothing holds these maps longer than they are needed
        x = layer.resnet(x, temb)
        x = layer.after_resnet(x, share, attend, size)
    return x


def next_size(skips: list[mx.array]) -> tuple[int, int] | None:
    """(height, width) of the skip that is read after the last one; None after the outermost."""
    return skips[-2].shape[-3:-1] if len(skips) > 1 else None


def added(skips: list[mx.array], residuals: Sequence[mx.array]) -> list[mx.array]:
    """Each skip with its residual, where there are residuals."""
    return [skip + r for skip, r in zip(skips, residuals, strict=False)] if residuals else skips


class Encoder(nn.Module):
    """What a U-Net and a ControlNet share: the time embedding, the encoder and the middle."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, temb_dim = config.block_out_channels, config.temb_dim
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], temb_dim, config.time_cond_proj_dim)
        if config.addition_embed_type is not None:
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, temb_dim)
        self.down_blocks = down_blocks(config)
        if config.mid_block_type is not None:
            self.mid_block = mid_block(config)

    def down_layers(self) -> list[Layer]:
        """Encoder layers, outermost first; layer b makes skip b."""
        return [Layer(conv=self.conv_in), *(layer for block in self.down_blocks for layer in layers_of(block))]

    def mid_layers(self) -> list[Layer]:
        """The middle, which makes no skips; empty in the smaller BK-SDM nets."""
        return layers_of(self.mid_block) if "mid_block" in self else []

    def up_layers(self) -> list[Layer]:
        """Decoder layers, innermost first: none here."""
        return []

    def prepare(self, cond: Conditioning) -> Prepared:
        """All that the conditioning alone decides, in the type of `cond.context`."""
        c, dtype, added, guidance = self.config, cond.context.dtype, None, None
        if c.addition_embed_type is not None:
            ids = self._sinusoid(cond.time_ids.reshape(-1), c.addition_time_embed_dim).reshape(len(cond.time_ids), -1)
            ids = ids.astype(dtype)
            added = self.add_embedding(ids if cond.pooled is None else mx.concatenate([cond.pooled, ids], axis=-1))
        if c.time_cond_proj_dim is not None:
            guidance = timestep_embedding(
                1000 * (cond.guidance - 1), c.time_cond_proj_dim, flip_sin_to_cos=False, freq_shift=1
            ).astype(dtype)
        rows = (self.down_layers(), self.mid_layers(), self.up_layers())
        return Prepared(*([layer.prepare(cond) for layer in layers] for layers in rows), added, guidance)

    def time_embed(self, t: mx.array, cond: Prepared) -> mx.array:
        """t: (T,) timesteps -> (T, B or 1, temb_dim), after the activation that every resnet starts with."""
        sinusoid = self._sinusoid(t, self.config.block_out_channels[0]).astype(self.conv_in.weight.dtype)
        temb = self.time_embedding(sinusoid[:, None], cond.guidance)
        return silu(temb if cond.added is None else temb + cond.added)

    def _sinusoid(self, t: mx.array, dim: int) -> mx.array:
        c = self.config
        return timestep_embedding(t, dim, flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift)
