"""The U-Net of SD 1.x, SD 2.x and SDXL, cut as DeepCache cuts it (Ma et al. 2023, section 3.2).

    x -> shallow -- skips ------------------------> finish -> prediction      every step
                      |                               |
                      +--> deep ------ features ------+                       full steps only

What the deep part gives changes little from step to step. So a full step runs all three parts and keeps `features`; a
cached step is given those and leaves `deep` out, which is most of the work.

Kept are not the arrays that leave the deep part, but what the next resnet makes of them: its first convolution over
their channels, and its shortcut. These are as constant as they are, and a cached step need not do that work again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import mlx.core as mx

from .backend.ops import compiled
from .errors import UsageError
from .nets.attend import PLAIN, Attend
from .nets.blocks import Features
from .nets.layers import Conv2d, GroupNorm, by_frame
from .nets.unet_parts import Encoder, Layer, Prepared, UNetConfig, added, layers_of, next_size, run, run_up, up_blocks

Residuals = Sequence[mx.array]


class UNet2DConditionModel(Encoder):
    """Predicts noise (or v, or the clean latents) from noisy latents, a timestep and a prompt.

    x: (B, H, W, in_channels) noisy latents, or a video's, (B, F, H, W, in_channels), for which all that goes in and
    comes out has that axis of frames; temb: (B or 1, temb_dim), one row of `time_embed`'s; cond: from `prepare`;
    cut: the last skip that every step computes, see `cut`; residuals: what ControlNets add to skips, outermost first,
    and to the middle; attend: runs the attention layers.
    """

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        self.up_blocks = up_blocks(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, config.block_out_channels[0], config.norm_eps)
        self.conv_out = Conv2d(config.block_out_channels[0], config.out_channels, 3, padding=1)

    def __call__(
        self,
        x: mx.array,
        temb: mx.array,
        cond: Prepared,
        *,
        branch: int = 0,
        reused: Features | None = None,
        residuals: Residuals = (),
    ) -> tuple[mx.array, Features]:
        """One prediction, (B, H, W, out_channels), and its features; reused: an earlier call's, for a cached step.

        Raises:
            UsageError: there is no such branch.
        """
        cut = self.cut(branch)
        skips = self.shallow(x, temb, cond, cut)
        features = self.deep(skips[-1], temb, cond, cut, residuals[cut + 1 :]) if reused is None else reused
        return self.finish(skips, features, temb, cond, cut, residuals[: cut + 1]), features

    def shallow(self, x: mx.array, temb: mx.array, cond: Prepared, cut: int, attend: Attend = PLAIN) -> list[mx.array]:
        """The encoder down to the cut: skips 0 to `cut`."""
        return run(self.down_layers()[: cut + 1], x, temb, cond.down[: cut + 1], attend)[1:]

    def deep(
        self,
        skip: mx.array,
        temb: mx.array,
        cond: Prepared,
        cut: int,
        residuals: Residuals = (),
        attend: Attend = PLAIN,
    ) -> Features:
        """From skip `cut` all that lies below it; residuals: those of the skips below, and the middle's."""
        skips = run(self.down_layers()[cut + 1 :], skip, temb, cond.down[cut + 1 :], attend)
        h = run(self.mid_layers(), skips[-1], temb, cond.mid, attend)[-1]
        if residuals:
            h = h + residuals[-1]
        *inner, joint = self.up_layers()[: len(skips)]
        skips = [skip, *added(skips[1:], residuals)]
        h = run_up(inner, h, skips, temb, cond.up[: len(inner)], attend)
        return joint.resnet.fixed_part(h)

    def finish(
        self,
        skips: list[mx.array],
        features: Features,
        temb: mx.array,
        cond: Prepared,
        cut: int,
        residuals: Residuals = (),
        attend: Attend = PLAIN,
    ) -> mx.array:
        """The decoder from the layer on that reads skip `cut`; residuals: those of `skips`."""
        (joint, *outer), (own, *others) = self.up_layers()[-1 - cut :], cond.up[-1 - cut :]
        skips = added(skips, residuals)
        x = joint.resnet.join(features, skips[-1], temb)
        x = joint.after_resnet(x, own, attend, next_size(skips))
        x = run_up(outer, x, skips[:-1], temb, others, attend)
        return by_frame(self.conv_out, by_frame(self.conv_norm_out, x, then_silu=True))

    def up_layers(self) -> list[Layer]:
        """Decoder layers, innermost first."""
        return [layer for block in self.up_blocks for layer in layers_of(block)]

    def cut(self, branch: int) -> int:
        """The skip that a cache branch names. The pip package counts three branches a level, one for each of two layers
        and one for the downsampler, so it is the same number; where a level has fewer (BK-SDM), at most its last.

        Raises:
            UsageError: there is no such branch.
        """
        branches = self.config.branches
        if not 0 <= branch < branches:
            raise UsageError(f"cache branch must be in [0, {branches}) for this U-Net, got {branch}")
        level, layer = divmod(branch, 3)
        return level * (self.config.layers_per_block + 1) + min(layer, self.config.layers_per_block)

    def compiled(self) -> UNet2DConditionModel:
        """This U-Net with each of the three parts compiled by itself, with the weights that it has now.

        A graph is built for each shape and cut, and for what the attention layers do. What is made of weights alone is
        computed before it, the folds of upsampling and the split at the cut: left to the graph, that would be done anew
        in every step.
        """
        layers = self.up_layers()
        mx.eval([layer.upsample.fold() for layer in layers if layer.upsample is not None])

        def split(cut: int, skip: mx.array) -> None:
            mx.eval(layers[-1 - cut].resnet.made_for(skip.shape[-1]))

        unet = copy.copy(self)
        unet.shallow = _compiled(self.shallow)
        unet.deep = _compiled(self.deep, lambda skip, temb, cond, cut, *_: split(cut, skip))
        unet.finish = _compiled(self.finish, lambda skips, features, temb, cond, cut, *_: split(cut, skips[-1]))
        return unet


def _compiled(part: Callable, prepare: Callable[..., None] = lambda *inputs: None) -> Callable:
    """One of the U-Net's parts through `mx.compile`: a function for each way of running attention, which is given what
    that reuses and returns what it keeps; prepare: called with the inputs, outside of the graph."""
    functions: dict[tuple, Callable] = {}

    def call(*inputs, attend: Attend = PLAIN):
        prepare(*inputs)
        key = attend.do, attend.inner
        if key not in functions:

            def function(given, *inputs):
                inside = Attend(key[0], given, key[1])
                return part(*inputs, attend=inside), inside.kept

            functions[key] = compiled(function)
        output, kept = functions[key](attend.given, *inputs)
        for mine, outputs in zip(attend.kept, kept, strict=True):
            mine += outputs  # as an uncompiled call would have: inside of a traced one nothing can be kept
        return output

    return call
