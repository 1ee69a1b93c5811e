"""Multiply-adds of a U-Net call, counted from its layers: what DeepCache saves before any clock is read."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import mlx.nn as nn

from ..nets.attend import Do, Kind
from ..nets.blocks import Attention, AttentionBlock, Transformer2DModel
from ..nets.controlnet import ControlNetModel
from ..nets.unet_parts import Encoder, Layer
from ..unet import UNet2DConditionModel
from .policy import DEEP, Work


class Macs(NamedTuple):
    """For one picture: all of them, and those of each kind of attention among them."""

    total: int = 0
    spatial: int = 0
    cross: int = 0
    temporal: int = 0


def unet_macs(
    unet: UNet2DConditionModel, size: tuple[int, ...], branch: int, tokens: int, products: bool = True
) -> tuple[int, int]:
    """Multiply-adds of a full and of a cached call for one latent of `size` (h, w), or (F, h, w) of a video, and a
    prompt of `tokens`.

    Convolutions, linear layers and attention's two products; a cached call is DeepCache's own, with nothing saved
    beyond it. The prompt's keys and values and the time embedding count in both. products: False leaves attention's
    two out, which the paper's counts do.
    """
    shallow, deep, finish = parts_macs(unet, size, branch, tokens, products)
    return shallow.total + deep.total + finish.total, shallow.total + finish.total


def work_macs(unet: UNet2DConditionModel, size: tuple[int, ...], branch: int, work: Iterable[Work]) -> int:
    """Multiply-adds of these calls, for latents of `size` (h, w) or (F, h, w), less the attention layers that they left
    out."""
    total, counted = 0, {}
    for call in work:
        if call.tokens not in counted:
            counted[call.tokens] = parts_macs(unet, size, branch, call.tokens)
        for part, (macs, done) in enumerate(zip(counted[call.tokens], call.attention, strict=True)):
            if part != DEEP or call.full:
                left_out = sum(n for n, do in zip(macs[1:], done, strict=True) if do is Do.REUSE)
                total += call.pictures * (macs.total - left_out)
    return total


def parts_macs(
    unet: UNet2DConditionModel, size: tuple[int, ...], branch: int, tokens: int, products: bool = True
) -> list[Macs]:
    """Of the shallow part, with the time embedding, of the deep one, and of the one that finishes; see `unet_macs`."""
    sizes, down, mid, times = _encoder_macs(unet, size, tokens, products)
    places = zip(unet.up_layers(), sizes[::-1], [*sizes[-2::-1], sizes[0]], strict=True)
    up = [_layer_macs(layer, here, after, tokens, products) for layer, here, after in places]
    out = Macs(_leaf_macs(unet.conv_out, prod(sizes[0])))
    n = unet.cut(branch) + 1  # layers that always run, of the encoder and of the decoder
    parts = [*times, *down[:n]], [*down[n:], *mid, *up[:-n]], [*up[-n:], out]
    return [Macs(*map(sum, zip(*part, strict=True))) for part in parts]


def control_macs(net: ControlNetModel, size: tuple[int, ...], cut: int | None, tokens: int) -> int:
    """Multiply-adds of a ControlNet's call for one latent of `size` (h, w), or (F, h, w) of a video: up to skip `cut`,
    or all of it. Its picture's are not among them, as it is embedded once."""
    sizes, down, mid, times = _encoder_macs(net, size, tokens)
    last = len(down) - 1 if cut is None else cut
    joints = zip(net.controlnet_down_blocks, sizes[: last + 1], strict=False)
    total = sum(_leaf_macs(conv, prod(place)) for conv, place in joints)
    parts = [*times, *down[: last + 1]]
    if cut is None:
        parts += mid
        total += _leaf_macs(net.controlnet_mid_block, prod(sizes[-1]))
    return total + sum(part.total for part in parts)


def _encoder_macs(
    net: Encoder, size: tuple[int, ...], tokens: int, products: bool = True
) -> tuple[list[tuple[int, ...]], list[Macs], list[Macs], list[Macs]]:
    """The size of each skip, and what encoder layers, the middle's and the time embedding take."""
    sizes, down = [], []
    for layer in net.down_layers():
        if hasattr(layer.conv, "pad_all_round"):  # a stride-2 convolution, padded by one on two sides or on all four
            size = (*size[:-2], *((side + layer.conv.pad_all_round) // 2 for side in size[-2:]))
        sizes.append(size)
        down.append(_layer_macs(layer, size, size, tokens, products))
    mid = [_layer_macs(layer, size, size, tokens, products) for layer in net.mid_layers()]
    times = [Macs(_leaf_macs(net[name], 1)) for name in ("time_embedding", "add_embedding") if name in net]
    return sizes, down, mid, times


def _layer_macs(layer: Layer, here: tuple[int, ...], after: tuple[int, ...], tokens: int, products: bool) -> Macs:
    positions, frames = prod(here), prod(here[:-2])
    total, attention = 0, [0] * len(Kind)
    for module in (layer.conv, layer.resnet):
        total += 0 if module is None else _leaf_macs(module, positions)
    for name, module in [] if layer.attention is None else layer.attention.named_modules():
        cross, over_frames = "attn2" in name, "temporal" in name
        keys = tokens if cross else frames if over_frames else positions // frames  # that each position sees
        rows = frames if "time_pos_embed" in name else positions
        if name.endswith(("to_k", "to_v")) and (cross or isinstance(layer.attention, Transformer2DModel)):
            rows = keys  # a net of pictures attends to a video's first frame
        own = _own_macs(module, rows)
        if products and isinstance(module, Attention):  # queries with keys, and weights with values
            own += 2 * positions * keys * module.to_out[0].weight.shape[0]
        total += own
        if "attn" in name or isinstance(layer.attention, AttentionBlock):
            attention[Kind.CROSS if cross else Kind.TEMPORAL if over_frames else Kind.SPATIAL] += own
    if layer.upsample is not None:
        total += _leaf_macs(layer.upsample, prod(after))
    return Macs(total, *attention)


def _leaf_macs(module: nn.Module, positions: int) -> int:
    return sum(_own_macs(m, 1 if name.endswith("time_emb_proj") else positions) for name, m in module.named_modules())


def _own_macs(module: nn.Module, positions: int) -> int:
    if isinstance(module, nn.QuantizedLinear):
        out, packed = module.weight.shape
        return positions * out * packed * 32 // module.bits
    return positions * module.weight.size if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)) else 0
