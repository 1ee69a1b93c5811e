"""The U-Net of SD 1.x, SD 2.x and SDXL, with DeepCache's cut built into its forward pass.

Modules are nested and named as in a diffusers checkpoint. To run, the U-Net is seen as a flat list of encoder layers
and one of decoder layers: the output of encoder layer b is skip b, and the decoder layer b-th from the end reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from .backend.ops import silu
from .errors import UsageError
from .nets.blocks import (
    Attention,
    Downsample2D,
    Fixed,
    GroupNorm,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    timestep_embedding,
)
from .nets.unet_parts import (
    Attend,
    Conditioning,
    Layer,
    Prepared,
    UNetConfig,
    _pairs,
    added,
    next_size,
    run_down,
    run_up,
)


class UNet2DConditionModel(nn.Module):
    """Predicts noise (or v, or the clean latents) from noisy latents, a timestep and a prompt."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, heads, depth = config.block_out_channels, config.heads, config.transformer_layers
        temb_dim = 4 * channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], temb_dim, config.time_cond_proj_dim)
        if config.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, temb_dim)

        def resnet(c_in: int, c_out: int) -> ResnetBlock2D:
            return ResnetBlock2D(c_in, c_out, temb_dim, config.norm_num_groups, config.norm_eps)

        def attention(level: int) -> Transformer2DModel:
            return Transformer2DModel(
                channels[level], heads[level], config.cross_attention_dim, depth[level], config.norm_num_groups
            )

        last = config.levels - 1
        self.down_blocks, skips, c_in = [], [channels[0]], channels[0]
        for level, kind in enumerate(config.down_block_types):
            block = nn.Module()
            c_out = channels[level]
            block.resnets = [resnet(c_out if i else c_in, c_out) for i in range(config.layers_per_block)]
            if kind == "CrossAttnDownBlock2D":
                block.attentions = [attention(level) for _ in block.resnets]
            if level < last:
                block.downsamplers = [Downsample2D(c_out)]
            skips += [c_out] * (config.layers_per_block + (level < last))
            self.down_blocks.append(block)
            c_in = c_out

        if config.mid_block_type is not None:
            self.mid_block = nn.Module()
            self.mid_block.resnets = [resnet(c_in, c_in), resnet(c_in, c_in)]
            self.mid_block.attentions = [attention(last)]

        self.up_blocks = []
        for level, kind in zip(reversed(range(config.levels)), config.up_block_types, strict=True):
            block, block.resnets = nn.Module(), []
            for _ in range(config.layers_per_block + 1):
                block.resnets.append(resnet(c_in + skips.pop(), channels[level]))
                c_in = channels[level]
            if kind == "CrossAttnUpBlock2D":
                block.attentions = [attention(level) for _ in block.resnets]
            if level > 0:
                block.upsamplers = [Upsample2D(c_in)]
            self.up_blocks.append(block)

        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    # The flat view

    def down_layers(self) -> list[Layer]:
        """Encoder layers, outermost first; layer b makes skip b."""
        layers = [Layer(conv=self.conv_in)]
        for block in self.down_blocks:
            layers += _pairs(block)
            layers += [Layer(conv=sampler) for sampler in block.get("downsamplers", [])]
        return layers

    def mid_layers(self) -> list[Layer]:
        """The middle, which makes no skips; empty in the smaller BK-SDM nets."""
        if "mid_block" not in self:
            return []
        first, second = self.mid_block.resnets
        return [Layer(resnet=first, attention=self.mid_block.attentions[0]), Layer(resnet=second)]

    def up_layers(self) -> list[Layer]:
        """Decoder layers, innermost first; an upsampler belongs to the last layer of its block."""
        layers = []
        for block in self.up_blocks:
            *rest, last = _pairs(block)
            for sampler in block.get("upsamplers", []):
                last = Layer(resnet=last.resnet, attention=last.attention, upsample=sampler)
            layers += [*rest, last]
        return layers

    def skip_of(self, branch: int) -> int:
        """The skip that a cache branch names: the same number, where a level has two layers and a downsampler.

        Raises:
            UsageError: there is no such branch.
        """
        branches = self.config.branches
        if not 0 <= branch < branches:
            raise UsageError(f"cache branch must be in [0, {branches}) for this U-Net, got {branch}")
        level, layer = divmod(branch, 3)
        return level * (self.config.layers_per_block + 1) + min(layer, self.config.layers_per_block)

    # Running it

    def prepare(self, cond: Conditioning) -> Prepared:
        """All that the prompt alone decides, in the type of `cond.context`."""
        config, dtype, added, guidance = self.config, cond.context.dtype, None, None
        if config.addition_embed_type == "text_time":
            ids = timestep_embedding(
                cond.time_ids.reshape(-1),
                config.addition_time_embed_dim,
                flip_sin_to_cos=config.flip_sin_to_cos,
                freq_shift=config.freq_shift,
            ).reshape(cond.time_ids.shape[0], -1)
            added = self.add_embedding(mx.concatenate([cond.pooled, ids.astype(dtype)], axis=-1))
        if config.time_cond_proj_dim is not None:
            guidance = timestep_embedding(
                1000 * (cond.guidance - 1), config.time_cond_proj_dim, flip_sin_to_cos=False, freq_shift=1
            ).astype(dtype)
        down, mid, up = (
            [layer.keys_values(cond.context) for layer in layers]
            for layers in (self.down_layers(), self.mid_layers(), self.up_layers())
        )
        return Prepared(down, mid, up, added, guidance)

    def time_embed(self, t: mx.array, prompt: Prepared) -> mx.array:
        """t: (T,) timesteps -> (T, B or 1, temb_dim), after the activation that every resnet starts with."""
        config = self.config
        sinusoid = timestep_embedding(
            t, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        ).astype(self.conv_in.weight.dtype)
        temb = self.time_embedding(sinusoid[:, None], prompt.guidance)
        return silu(temb if prompt.added is None else temb + prompt.added)

    def __call__(
        self,
        x: mx.array,
        temb: mx.array,
        prompt: Prepared,
        *,
        branch: int = 0,
        features: Fixed | Callable[[mx.array], Fixed | None] | None = None,
        residuals: Sequence[mx.array] = (),
        attend: Attend = Attention.__call__,
    ) -> tuple[mx.array, Fixed]:
        """One prediction, and the features that a later call may reuse in place of the deep part.

        DeepCache (Ma et al. 2023, section 3.2): the features entering the decoder layer that reads the branch's skip
        change little from step to step, so a cached step is given the last full step's and runs the shallow part alone.
        What that layer's resnet makes of the features is as constant as they are, so that is what is kept of them.

        x: (B, H, W, in_channels) noisy latents; temb: (B or 1, temb_dim), one row of `time_embed`'s; features: None for
        a full step, or those that an earlier call with the same branch and sizes returned, or a function that is given
        the branch's skip and decides; residuals: what a ControlNet adds to the skips, outermost first, and to the
        middle, or nothing; a cached step reads the first `branch` + 1; attend: runs an attention layer, or remembers
        what it gave: (layer, x, keys and values of the prompt, if it reads it) -> x
        -> (B, H, W, out_channels), features.

        Raises:
            UsageError: there is no such branch.
        """
        down, mid, up = self.down_layers(), self.mid_layers(), self.up_layers()
        skip = self.skip_of(branch)
        cut = len(up) - 1 - skip  # the decoder layer that reads this skip

        skips = run_down(down[: skip + 1], x, temb, prompt.down[: skip + 1], attend)
        if callable(features):
            features = features(skips[-1])
        if features is None:  # a full step: run the deep part
            deep = run_down(down[skip + 1 :], skips[-1], temb, prompt.down[skip + 1 :], attend)
            h = (skips + deep)[-1]
            for layer, keys_values in zip(mid, prompt.mid, strict=True):
                h = layer(h, temb, keys_values, None, attend)
            if residuals:
                h = h + residuals[-1]
            h = run_up(up[:cut], h, added(skips + deep, residuals), temb, prompt.up[:cut], attend)
            features = up[cut].resnet.fixed_part(h)
        skips = added(skips, residuals)
        x = up[cut].resnet.join(features, skips[-1], temb)
        x = up[cut].after_resnet(x, prompt.up[cut], next_size(skips), attend)
        x = run_up(up[cut + 1 :], x, skips[:-1], temb, prompt.up[cut + 1 :], attend)
        return self.conv_out(silu(self.conv_norm_out(x))), features

    def compiled(self) -> Callable[..., tuple[mx.array, Fixed]]:
        """The same call with its graph built once for each kind of step, branch and shape, and simple operations fused.

        The weights of this moment are built in, so it is for a U-Net that is loaded and stays as it is. A call that is
        given a function for its features or its attention runs as it is: what those remember cannot be built in.
        """
        for module in self.modules():
            if isinstance(module, Upsample2D):
                module.fold()  # in the graph it would be folded at every step
        full = mx.compile(
            lambda x, temb, prompt, branch, residuals: self(x, temb, prompt, branch=branch, residuals=residuals)
        )
        cached = mx.compile(
            lambda x, temb, prompt, branch, residuals, features: self(
                x, temb, prompt, branch=branch, residuals=residuals, features=features
            )
        )

        def call(x, temb, prompt, *, branch=0, features=None, residuals=(), attend=Attention.__call__):
            if callable(features) or attend is not Attention.__call__:
                return self(x, temb, prompt, branch=branch, features=features, residuals=residuals, attend=attend)
            if features is None:
                return full(x, temb, prompt, branch, list(residuals))
            return cached(x, temb, prompt, branch, list(residuals), features)

        return call
