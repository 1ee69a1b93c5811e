"""ControlNet (Zhang et al. 2023, https://arxiv.org/abs/2302.05543): a copy of the U-Net's encoder that reads a picture.

What it says is added to the U-Net's skips: residual b to skip b, the last one to the middle's output. So a cached step
of branch b needs the first b + 1 of them only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..backend.ops import silu
from ..errors import CheckpointError
from ..unet import UNet2DConditionModel
from .unet_parts import Conditioning, Layer, Prepared, UNetConfig, run_down

Residuals = list[mx.array]


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """ControlNetModel's config.json: a U-Net's without the decoder, and the picture's encoder."""

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"

    @classmethod
    def from_dict(cls, data: dict) -> ControlNetConfig:
        """Raises CheckpointError for a value that this ControlNet cannot honour."""
        kind = data.get("_class_name", "ControlNetModel")
        if kind != "ControlNetModel":
            raise CheckpointError(f"this is a {kind}, which is not supported, only a ControlNetModel")
        if data.get("global_pool_conditions"):
            raise CheckpointError("global_pool_conditions = True is not supported in a ControlNet, only False")
        types = data.get("down_block_types") or ()
        ups = [str(kind).replace("Down", "Up") for kind in reversed(types)]
        config = super().from_dict({**data, "up_block_types": ups})
        if config.controlnet_conditioning_channel_order not in ("rgb", "bgr"):
            raise CheckpointError(
                "controlnet_conditioning_channel_order should be 'rgb' or 'bgr', got "
                f"{config.controlnet_conditioning_channel_order!r}"
            )
        return config

    @property
    def picture_factor(self) -> int:
        """Pixels of the picture along one side of a latent."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


class ControlNetConditioningEmbedding(nn.Module):
    """(B, H, W, 3) in [0, 1] -> (B, H/f, W/f, dims), f = 2 for each change of channels."""

    def __init__(self, dims: int, channels_in: int, channels: tuple[int, ...]):
        super().__init__()
        self.conv_in = nn.Conv2d(channels_in, channels[0], 3, padding=1)
        self.blocks = []
        for here, after in zip(channels, channels[1:], strict=False):
            self.blocks += [nn.Conv2d(here, here, 3, padding=1), nn.Conv2d(here, after, 3, stride=2, padding=1)]
        self.conv_out = nn.Conv2d(channels[-1], dims, 3, padding=1)

    def __call__(self, picture: mx.array) -> mx.array:
        h = silu(self.conv_in(picture))
        for block in self.blocks:
            h = silu(block(h))
        return self.conv_out(h)


class ControlNetModel(UNet2DConditionModel):
    """The U-Net's encoder and middle, with a 1x1 convolution behind every skip and the middle."""

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        for name in ("up_blocks", "conv_norm_out", "conv_out"):
            del self[name]
        channels, last = config.block_out_channels, config.levels - 1
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            channels[0], config.conditioning_channels, config.conditioning_embedding_out_channels
        )
        widths = [channels[0]]
        for level, width in enumerate(channels):
            widths += [width] * (config.layers_per_block + (level < last))
        self.controlnet_down_blocks = [nn.Linear(width, width) for width in widths]
        self.controlnet_mid_block = nn.Linear(channels[-1], channels[-1])

    def up_layers(self) -> list[Layer]:
        """None: what it finds goes to the U-Net's."""
        return []

    def embed_picture(self, picture: mx.array) -> mx.array:
        """picture: (1, H, W, 3) in [0, 1] -> (1, H/f, W/f, C), the same at every step."""
        if self.config.controlnet_conditioning_channel_order == "bgr":
            picture = picture[..., ::-1]
        return self.controlnet_cond_embedding(picture.astype(self.conv_in.weight.dtype))

    def __call__(
        self, x: mx.array, temb: mx.array, prompt: Prepared, picture: mx.array, *, skip: int | None = None
    ) -> Residuals:
        """x: (B, h, w, 4); temb, prompt: this net's own; picture: from `embed_picture`; skip: the last skip that is
        wanted, None for all of them and the middle -> residuals, outermost first."""
        down = self.down_layers() if skip is None else self.down_layers()[: skip + 1]
        x = down[0].conv(x) + picture
        skips = [x, *run_down(down[1:], x, temb, prompt.down[1 : len(down)])]
        residuals = [conv(h) for conv, h in zip(self.controlnet_down_blocks, skips, strict=False)]
        if skip is None:
            h = skips[-1]
            for layer, keys_values in zip(self.mid_layers(), prompt.mid, strict=True):
                h = layer(h, temb, keys_values)
            residuals.append(self.controlnet_mid_block(h))
        return residuals


@dataclass(frozen=True)
class Controlled:
    """A ControlNet and what it is to do: its picture (1, H, W, 3) in [0, 1], the factor on its residuals, and the
    share of the steps, from `start` to `end`, that it takes part in."""

    net: ControlNetModel
    picture: mx.array
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


class Controls:
    """ControlNets at work on one batch: their residuals, added up.

    The prompt's and the timesteps' share of the work, and the pictures', is done here, once. every_step: run the nets
    on cached steps too, as far as their residuals are read there; else a cached step uses the last full one's.
    """

    def __init__(
        self, controlled: Sequence[Controlled], cond: Conditioning, times: list[float], every_step: bool = False
    ):
        self.controlled, self.every_step, self.batch = controlled, every_step, len(cond.context)
        self.prompts = [c.net.prepare(cond) for c in controlled]
        self.pictures = [c.net.embed_picture(c.picture) for c in controlled]
        self.temb = [
            dict(zip(times, c.net.time_embed(mx.array(times), prompt), strict=True))
            for c, prompt in zip(controlled, self.prompts, strict=True)
        ]

    def __call__(self, x: mx.array, t: float, step: int, steps: int, skip: int | None) -> Residuals:
        """x: (B, h, w, 4) as the U-Net reads it; t: timestep; step of steps: for `start` and `end`; skip: see
        `ControlNetModel` -> residuals, none if no net takes part."""
        total: Residuals = []
        for c, prompt, picture, temb in zip(self.controlled, self.prompts, self.pictures, self.temb, strict=True):
            if step / steps < c.start or (step + 1) / steps > c.end:
                continue
            row = temb[t]
            if len(x) < self.batch:  # the conditional half alone
                prompt, row = prompt.rows(slice(-len(x), None)), row[-len(x) :]
            residuals = [c.scale * r for r in c.net(x, row, prompt, picture, skip=skip)]
            total = [a + b for a, b in zip(total, residuals, strict=True)] if total else residuals
        return total
