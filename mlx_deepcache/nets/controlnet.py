"""ControlNet (Zhang et al. 2023, https://arxiv.org/abs/2302.05543): a copy of the U-Net's encoder that reads a picture.

What it says is added to the U-Net's skips: residual b to skip b, the last one to the middle's output. So a cached step
of branch b needs the first b + 1 of them only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..backend.ops import silu
from ..errors import CheckpointError
from .attend import PLAIN, Attend, compute
from .layers import Conv2d, Linear, by_frame
from .unet_parts import Conditioning, Encoder, Prepared, UNetConfig, run

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
        self.conv_in = Conv2d(channels_in, channels[0], 3, padding=1)
        self.blocks = []
        for here, after in zip(channels, channels[1:], strict=False):
            self.blocks += [Conv2d(here, here, 3, padding=1), Conv2d(here, after, 3, stride=2, padding=1)]
        self.conv_out = Conv2d(channels[-1], dims, 3, padding=1)

    def __call__(self, picture: mx.array) -> mx.array:
        h = silu(self.conv_in(picture))
        for block in self.blocks:
            h = silu(block(h))
        return self.conv_out(h)


class ControlNetModel(Encoder):
    """The U-Net's encoder and middle, with a 1x1 convolution behind every skip and the middle."""

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        channels = config.block_out_channels
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            channels[0], config.conditioning_channels, config.conditioning_embedding_out_channels
        )
        self.controlnet_down_blocks = [Linear(width, width) for width in config.skip_channels]
        self.controlnet_mid_block = Linear(channels[-1], channels[-1])

    def embed_picture(self, picture: mx.array) -> mx.array:
        """picture: (1, H, W, 3) in [0, 1], or one a frame -> (1, H/f, W/f, C), the same at every step."""
        if self.config.controlnet_conditioning_channel_order == "bgr":
            picture = picture[..., ::-1]
        return self.controlnet_cond_embedding(picture.astype(self.conv_in.weight.dtype))

    def __call__(
        self,
        x: mx.array,
        temb: mx.array,
        cond: Prepared,
        picture: mx.array,
        *,
        cut: int | None = None,
        attend: Attend = PLAIN,
    ) -> Residuals:
        """x: (B, h, w, 4), or a video's, (B, F, h, w, 4); temb, cond: this net's own; picture: from `embed_picture`;
        cut: the last skip that is wanted, None for all of them and the middle; attend: runs the attention layers ->
        residuals, outermost first."""
        last = len(self.controlnet_down_blocks) - 1 if cut is None else cut
        layers = self.down_layers()[1 : last + 1]
        skips = run(layers, by_frame(self.conv_in, x) + picture, temb, cond.down[1 : last + 1], attend)
        residuals = [conv(h) for conv, h in zip(self.controlnet_down_blocks, skips, strict=False)]
        if cut is None:
            residuals.append(self.controlnet_mid_block(run(self.mid_layers(), skips[-1], temb, cond.mid, attend)[-1]))
        return residuals


@dataclass(frozen=True)
class Controlled:
    """A ControlNet and what it is to do: its picture (1, H, W, 3) in [0, 1], or one a frame, the factor on its
    residuals, and the share of the steps, from `start` to `end`, that it takes part in."""

    net: ControlNetModel
    picture: mx.array
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


class Controls:
    """ControlNets at work on one batch: their residuals, added up.

    The prompt's and the timesteps' share of the work, and the pictures', is done here, once. times: the timestep of
    each step. every_step: run the nets on cached steps too, as far as their residuals are read there. inner: how
    attention layers are run, see `Attend`. ran: each call of a net: which, for how many latents, and up to which skip.
    """

    def __init__(
        self,
        controlled: Sequence[Controlled],
        cond: Conditioning,
        times: Sequence[float],
        every_step: bool = False,
        inner: Callable[..., mx.array] = compute,
    ):
        self.controlled, self.every_step = controlled, every_step
        self.attend = Attend(inner=inner)
        self.ran: list[tuple[ControlNetModel, int, int | None]] = []
        self.steps, times = len(times), list(dict.fromkeys(times))
        self.conds = [c.net.prepare(cond) for c in controlled]
        self.pictures = [c.net.embed_picture(c.picture) for c in controlled]
        self.temb = [
            dict(zip(times, c.net.time_embed(mx.array(times), own), strict=True))
            for c, own in zip(controlled, self.conds, strict=True)
        ]

    def __call__(self, x: mx.array, t: float, step: int, cut: int | None, half: int | None) -> Residuals | None:
        """x: (B, h, w, 4), perhaps with frames, as the U-Net reads it; t: timestep; step: its number, for `start` and
        `end`; cut: on a cached step, see `ControlNetModel`; half: which of guidance's x is, None for all of the batch
        -> residuals, [] if no net takes part; None: the last full step's serve."""
        if cut is not None and not self.every_step:
            return None
        total: Residuals = []
        for c, cond, picture, temb in zip(self.controlled, self.conds, self.pictures, self.temb, strict=True):
            if step / self.steps < c.start or (step + 1) / self.steps > c.end:
                continue
            row = temb[t]
            if half is not None:
                rows = slice(half * len(x), (half + 1) * len(x))
                cond, row = cond.rows(rows), row[rows] if len(row) > 1 else row
            residuals = [c.scale * r for r in c.net(x, row, cond, picture, cut=cut, attend=self.attend)]
            self.ran.append((c.net, len(x), cut))
            total = [a + b for a, b in zip(total, residuals, strict=True)] if total else residuals
        return total
