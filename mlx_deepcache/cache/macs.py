"""Multiply-adds of a U-Net call, counted from its layers: what DeepCache saves before any clock is read."""

from __future__ import annotations

import mlx.nn as nn

from ..nets.blocks import Attention
from ..nets.unet_parts import Layer
from ..unet import UNet2DConditionModel


def unet_macs(unet: UNet2DConditionModel, size: tuple[int, int], branch: int, tokens: int = 77) -> tuple[int, int]:
    """Multiply-adds of a full and of a cached call for one latent of `size` (h, w) and a prompt of `tokens`.

    Convolutions, linear layers and attention's two products; a cached call is DeepCache's own, with nothing saved
    beyond it. The prompt's keys and values and the time embedding count in both.
    """
    down, mid, up = unet.down_layers(), unet.mid_layers(), unet.up_layers()
    sizes, counts = [], []
    for layer in down:
        if hasattr(layer.conv, "pad_all_round"):  # a stride-2 convolution, padded by one
            size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        sizes.append(size)
        counts.append(_layer_macs(layer, size, size, tokens))
    middle = sum(_layer_macs(layer, size, size, tokens) for layer in mid)
    ups = []
    for layer, here, after in zip(up, sizes[::-1], [*sizes[-2::-1], sizes[0]], strict=True):
        ups.append(_layer_macs(layer, here, after, tokens))
    always = _leaf_macs(unet.time_embedding, 1) + _leaf_macs(unet.conv_out, sizes[0][0] * sizes[0][1])
    if "add_embedding" in unet:
        always += _leaf_macs(unet.add_embedding, 1)
    skip = unet.skip_of(branch)
    shallow = always + sum(counts[: skip + 1]) + sum(ups[len(ups) - 1 - skip :])
    return always + sum(counts) + middle + sum(ups), shallow


def attention_macs(attention: Attention, positions: int, keys: int) -> int:
    """Multiply-adds of one attention layer for one picture, whose positions attend to so many keys."""
    named = attention.named_modules()
    linear = sum(_own_macs(m, keys if name in ("to_k", "to_v") else positions) for name, m in named)
    return linear + _products(attention, positions, keys)


def _products(attention: Attention, positions: int, keys: int) -> int:
    """Of the queries with the keys, and of the weights with the values."""
    return 2 * positions * keys * attention.to_out[0].weight.shape[0]


def _layer_macs(layer: Layer, here: tuple[int, int], after: tuple[int, int], tokens: int) -> int:
    positions = here[0] * here[1]
    total = 0 if layer.conv is None else _leaf_macs(layer.conv, positions)
    if layer.resnet is not None:
        total += _leaf_macs(layer.resnet, positions)
    if layer.attention is not None:
        for name, module in layer.attention.named_modules():
            reads_prompt = name.endswith(("attn2.to_k", "attn2.to_v"))
            total += _own_macs(module, tokens if reads_prompt else positions)
            if isinstance(module, Attention):
                total += _products(module, positions, tokens if name.endswith("attn2") else positions)
    if layer.upsample is not None:
        total += _leaf_macs(layer.upsample, after[0] * after[1])
    return total


def _leaf_macs(module: nn.Module, positions: int) -> int:
    return sum(_own_macs(m, 1 if name.endswith("time_emb_proj") else positions) for name, m in module.named_modules())


def _own_macs(module: nn.Module, positions: int) -> int:
    if isinstance(module, nn.QuantizedLinear):
        out, packed = module.weight.shape
        return positions * out * packed * 32 // module.bits
    return positions * module.weight.size if isinstance(module, (nn.Conv2d, nn.Linear)) else 0
