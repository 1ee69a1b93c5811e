"""What the shapes of a single file's tensors say of its nets, as diffusers' and transformers' configs.

What leaves no trace in a shape, heads above all, is passed in: it is the family's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError

VISION_HEAD = 80  # numbers of a head in OpenCLIP's ViT-H
CODEBOOK = "quantize.embedding.weight"
_CROSS, _PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


@dataclass(frozen=True)
class Shapes:
    """The shapes of a file's tensors whose names start with a prefix; names here are without it."""

    file: Path
    prefix: str
    all: Mapping[str, tuple[int, ...]]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.all

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """Of a matrix, or a convolution; raises CheckpointError if there is no such tensor."""
        if name not in self:
            raise CheckpointError(f"{self.file} lacks {self.prefix}{name}, so its architecture cannot be told")
        if len(shape := self.all[self.prefix + name]) < 2:
            raise CheckpointError(f"{self.file}: {self.prefix}{name} should have two axes or more, got shape {shape}")
        return shape

    def count(self, pattern: str) -> int:
        """How many blocks there are, from the highest number that the pattern's group takes at a name's start."""
        found = map(re.compile(re.escape(self.prefix) + pattern).match, self.all)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def first(self, ending: str) -> tuple[int, ...] | None:
        """The shape of some tensor whose name ends so."""
        found = (n for n in self.all if n.startswith(self.prefix) and n.endswith(ending))
        return next((self[name.removeprefix(self.prefix)] for name in found), None)


def unet(shapes: Shapes, *, head_size: int | None, linear: bool, heads: int = 8) -> dict:
    """A U-Net's config; head_size: of attention, or None for so many heads everywhere; linear: whether its transformers
    are entered by a linear layer, and not by a convolution.

    Raises:
        CheckpointError: its blocks are laid out as no config can say.
    """
    blocks = shapes.count(r"input_blocks\.(\d+)\.")
    downs = [i for i in range(blocks) if f"input_blocks.{i}.0.op.weight" in shapes]
    layers = (downs[0] if downs else blocks) - 1
    levels = len(downs) + 1
    if downs != [(layers + 1) * (level + 1) for level in range(levels - 1)] or blocks != levels * (layers + 1):
        raise CheckpointError(f"{shapes.file}: the U-Net's levels have different numbers of layers: not supported")
    channels, down, up, depths = [], [], [], []
    for level in range(levels):
        first, mirrored = 1 + level * (layers + 1), (levels - 1 - level) * (layers + 1)
        channels.append(shapes[f"input_blocks.{first}.0.out_layers.3.weight"][0])
        down.append((_CROSS if f"input_blocks.{first}.1.norm.weight" in shapes else _PLAIN)[0])
        up.insert(0, (_CROSS if f"output_blocks.{mirrored}.1.norm.weight" in shapes else _PLAIN)[1])
        of_level = [f"input_blocks.{first + i}.1" for i in range(layers)]
        of_level += [f"output_blocks.{mirrored + i}.1" for i in range(layers + 1)]
        of_level += ["middle_block.1"] * (level == levels - 1)
        counts = {shapes.count(rf"{re.escape(at)}\.transformer_blocks\.(\d+)\.") for at in of_level} - {0}
        if len(counts) > 1:
            raise CheckpointError(
                f"{shapes.file}: attention layers of one level of the U-Net have {sorted(counts)} transformer blocks; "
                "only equal numbers are supported"
            )
        depths.append(counts.pop() if counts else 1)
    context = shapes.first("attn2.to_k.weight")
    config = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers,
    }
    if context is None and shapes.first(".qkv.weight") is not None:
        return config | {
            "_class_name": "UNet2DModel",
            "down_block_types": [kind.removeprefix("Cross") for kind in down],
            "up_block_types": [kind.removeprefix("Cross") for kind in up],
            "attention_head_dim": head_size,
        }
    if context is None:
        raise CheckpointError(f"{shapes.file}: the U-Net has no cross-attention, so no prompt can be given to it")
    return config | {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": down,
        "up_block_types": up,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if shapes.count(r"middle_block\.(\d+)\.") else None,
        "transformer_layers_per_block": depths,
        "cross_attention_dim": context[1],
        "use_linear_projection": linear,
        "attention_head_dim": heads if head_size is None else [max(1, width // head_size) for width in channels],
    }


def video_unet(shapes: Shapes, *, head_size: int, numbers: int) -> dict:
    """The config of a U-Net of videos, which is told so many numbers; raises as `unet`."""
    config = unet(shapes, head_size=head_size, linear=True)
    kept = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
    told = shapes["label_emb.0.0.weight"][1]
    return {name: config[name] for name in (*kept, "transformer_layers_per_block")} | {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "num_attention_heads": config["attention_head_dim"],
        "projection_class_embeddings_input_dim": told,
        "addition_time_embed_dim": told // numbers,
        **{
            key: [kind.replace("2D", "SpatioTemporal") for kind in config[key]]
            for key in ("down_block_types", "up_block_types")
        },
    }


def vae(shapes: Shapes) -> dict:
    """A VAE's config, from its original names or diffusers'."""
    ours = "decoder.up_blocks.0.resnets.0.conv1.weight" in shapes
    levels = shapes.count(r"decoder\.up(?:_blocks)?\.(\d+)\.")
    ups = [f"up_blocks.{levels - 1 - i}.resnets" if ours else f"up.{i}.block" for i in range(levels)]
    query = ("mid_block.attentions.0.to_q", "mid_block.attentions.0.query", "mid.attn_1.q")
    words = {"num_vq_embeddings": shapes[CODEBOOK][0]} if CODEBOOK in shapes else {}
    return words | {
        "_class_name": "VQModel" if words else "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"decoder.{up}.0.conv1.weight"][0] for up in ups],
        "layers_per_block": shapes.count(r"encoder\.down(?:_blocks)?\.0\.(?:block|resnets)\.(\d+)\."),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(f"decoder.{name}.weight" in shapes for name in query),
    }


def video_vae(decoder: Shapes, encoder: Shapes) -> dict:
    """The config of Stable Video Diffusion's VAE, whose halves are in two places."""
    levels = decoder.count(r"decoder\.up\.(\d+)\.")
    return {
        "_class_name": "AutoencoderKLTemporalDecoder",
        "in_channels": encoder["encoder.conv_in.weight"][1],
        "out_channels": decoder["decoder.conv_out.weight"][0],
        "latent_channels": decoder["decoder.conv_in.weight"][1],
        "block_out_channels": [decoder[f"decoder.up.{level}.block.0.conv1.weight"][0] for level in range(levels)],
        "layers_per_block": encoder.count(r"encoder\.down\.0\.block\.(\d+)\."),
    }


def clip_vision(shapes: Shapes) -> dict:
    """The config of OpenCLIP's encoder of pictures."""
    (seen, width), (_, _, patch, _) = shapes["positional_embedding"], shapes["conv1.weight"]
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "hidden_size": width,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": shapes.count(r"transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": max(1, width // VISION_HEAD),
        "image_size": math.isqrt(seen - 1) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "projection_dim": shapes["proj"][1],
    }


def taesd(shapes: Shapes) -> dict:
    """An AutoencoderTiny's config, from diffusers' names: blocks stand behind the convolution that they belong to."""
    config = {"_class_name": "AutoencoderTiny", "scaling_factor": 1.0}
    for side in ("encoder", "decoder"):
        counts = []
        for i in range(shapes.count(rf"{side}\.layers\.(\d+)\.")):
            if f"{side}.layers.{i}.weight" in shapes:
                counts.append(0)
            elif f"{side}.layers.{i}.conv.0.weight" in shapes and counts:
                counts[-1] += 1
        config[f"num_{side}_blocks"] = counts[:-1]
        config[f"{side}_block_out_channels"] = [shapes[f"{side}.layers.0.weight"][0]] * len(counts[:-1])
    return config | {"latent_channels": shapes["decoder.layers.0.weight"][1]}


def clip(shapes: Shapes) -> dict:
    """The config of a text encoder with transformers' names, perhaps with an outer `text_model.`."""
    inner = "text_model." if "text_model.final_layer_norm.weight" in shapes else ""
    tokens, positions = (shapes[f"{inner}embeddings.{kind}_embedding.weight"] for kind in ("token", "position"))
    mlp = shapes[f"{inner}encoder.layers.0.mlp.fc1.weight"]
    return _text(tokens, positions, mlp, shapes.count(rf"{re.escape(inner)}encoder\.layers\.(\d+)\."))


def open_clip(shapes: Shapes) -> dict:
    """The config of a text encoder with OpenCLIP's names; all of them have GELU."""
    tokens, positions = shapes["token_embedding.weight"], shapes["positional_embedding"]
    mlp = shapes["transformer.resblocks.0.mlp.c_fc.weight"]
    return _text(tokens, positions, mlp, shapes.count(r"transformer\.resblocks\.(\d+)\.")) | {"hidden_act": "gelu"}


def _text(tokens: tuple[int, ...], positions: tuple[int, ...], mlp: tuple[int, ...], layers: int) -> dict:
    return {
        "architectures": ["CLIPTextModel"],
        "hidden_size": tokens[1],
        "intermediate_size": mlp[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, tokens[1] // 64),  # in all of CLIP's and OpenCLIP's
        "vocab_size": tokens[0],
        "max_position_embeddings": positions[0],
    }
