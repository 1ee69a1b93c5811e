"""The original names of Stable Diffusion's tensors (latent-diffusion, OpenCLIP), and those of the diffusers layout.

Single files have the original ones, and so have the LoRAs that kohya's scripts train on SDXL. A "place" is a module's
name without that of its parameter: `input_blocks.4.1` is the place `down_blocks.1.attentions.0`.
"""

from __future__ import annotations

from ...nets.autoencoder import VAEConfig
from ...nets.temporal_vae import TemporalVAEConfig
from ...nets.unet_parts import UNetConfig

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}

_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

_OPEN_CLIP = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}

_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
    "attn": "self_attn",  # what is left of it: in_proj_weight and in_proj_bias
}

_OPEN_CLIP_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
    "proj": "visual_projection.weight",
}


def unet_places(config: UNetConfig) -> dict[str, str]:
    """Original place -> diffusers' place, for all of a U-Net's layers.

    The original counts encoder layers and downsamplers through all levels, and so decoder layers, whose upsampler comes
    last in a level's last one.
    """
    places = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }

    def resnet(old: str, new: str) -> None:
        if config.video:
            places.update(_over_frames(old, new, "temporal_res_block", _RESNET))
            places[f"{old}.time_mixer"] = f"{new}.time_mixer"
            new = f"{new}.spatial_res_block"
        places.update({f"{old}.{part}": f"{new}.{name}" for part, name in _RESNET.items()})

    def attention(old: str, new: str) -> None:
        places[old] = new
        if config.cross_attention_dim is None:
            places.update({f"{old}.norm": f"{new}.group_norm", f"{old}.proj_out": f"{new}.to_out.0"})
        if config.video:
            places[f"{old}.time_stack"] = f"{new}.temporal_transformer_blocks"
            for old_layer, layer in ((0, 1), (2, 2)):
                places[f"{old}.time_pos_embed.{old_layer}"] = f"{new}.time_pos_embed.linear_{layer}"

    attention("middle_block.1", "mid_block.attentions.0")
    resnet("middle_block.0", "mid_block.resnets.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    last, i = config.levels - 1, 1
    for level, kind in enumerate(config.down_block_types):
        for layer in range(config.layers_per_block):
            resnet(f"input_blocks.{i}.0", f"down_blocks.{level}.resnets.{layer}")
            if "Attn" in kind:
                attention(f"input_blocks.{i}.1", f"down_blocks.{level}.attentions.{layer}")
            i += 1
        if level < last:
            places[f"input_blocks.{i}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            i += 1
    i = 0
    for level, kind in enumerate(config.up_block_types):
        attends = "Attn" in kind
        for layer in range(config.layers_per_block + 1):
            resnet(f"output_blocks.{i}.0", f"up_blocks.{level}.resnets.{layer}")
            if attends:
                attention(f"output_blocks.{i}.1", f"up_blocks.{level}.attentions.{layer}")
            i += 1
        if level < last:
            places[f"output_blocks.{i - 1}.{1 + attends}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return places


def _over_frames(old: str, new: str, block: str, parts: dict[str, str]) -> dict[str, str]:
    """Places of a resnet over frames, which the original has inside the one of a frame."""
    return {f"{old}.time_stack.{part}": f"{new}.{block}.{name}" for part, name in parts.items()}


def controlnet_places(config: UNetConfig, last: int) -> dict[str, str]:
    """Original place -> diffusers' place, for all of a ControlNet's layers; config: of the U-Net that it steers; last:
    the number of the last layer that reads its picture."""
    places, hints = unet_places(config), "controlnet_cond_embedding"
    places |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(len(config.skip_channels))}
    places |= {"input_hint_block.0": f"{hints}.conv_in", f"input_hint_block.{last}": f"{hints}.conv_out"}
    places |= {f"input_hint_block.{i}": f"{hints}.blocks.{i // 2 - 1}" for i in range(2, last, 2)}  # with SiLU between
    return places | {"middle_block_out.0": "controlnet_mid_block"}


def vae_places(config: VAEConfig) -> dict[str, str]:
    """Original place -> diffusers' place, for all of a VAE's layers. The original counts decoder levels outwards in."""
    temporal = isinstance(config, TemporalVAEConfig)
    places = {name: name for name in ("quant_conv", "post_quant_conv")}
    last = len(config.block_out_channels) - 1
    for side, old, new, sampler in (("encoder", "down", "down_blocks", "down"), ("decoder", "up", "up_blocks", "up")):
        places |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        places[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        for name, attention in _VAE_ATTENTION.items():
            places[f"{side}.mid.attn_1.{name}"] = f"{side}.mid_block.attentions.0.{attention}"
        resnets = {f"mid.block_{i + 1}": f"mid_block.resnets.{i}" for i in range(2)}
        for level in range(last + 1):
            block = f"{new}.{level if side == 'encoder' else last - level}"
            for layer in range(config.layers_per_block + (side == "decoder")):
                resnets[f"{old}.{level}.block.{layer}"] = f"{block}.resnets.{layer}"
            places[f"{side}.{old}.{level}.{sampler}sample.conv"] = f"{side}.{block}.{sampler}samplers.0.conv"
        for resnet, name in resnets.items():
            old, new = f"{side}.{resnet}", f"{side}.{name}"
            if temporal and side == "decoder":
                places |= _over_frames(old, new, "temporal_res_block", _RESNET)
                places[f"{old}.mix_factor"] = f"{new}.time_mixer.mix_factor"
                new = f"{new}.spatial_res_block"
            places |= {old: new, f"{old}.nin_shortcut": f"{new}.conv_shortcut"}
    if temporal:
        places["decoder.conv_out.time_mix_conv"] = "decoder.time_conv_out"
    return places


def rename(name: str, places: dict[str, str]) -> str:
    """A tensor's name with its longest known place replaced; as it is, if it has none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (place := places.get(".".join(parts[:end]))) is not None:
            return ".".join([place, *parts[end:]])
    return name


def rename_open_clip(name: str) -> str:
    """A tensor of one of OpenCLIP's encoders, named as transformers does; its `in_proj` remains to be split."""
    if name in _OPEN_CLIP | _OPEN_CLIP_VISION:
        return (_OPEN_CLIP | _OPEN_CLIP_VISION)[name]
    prefix = "transformer.resblocks."
    if not name.startswith(prefix):
        return name
    number, rest = name.removeprefix(prefix).split(".", 1)
    for old, new in _OPEN_CLIP_LAYER.items():
        if rest.startswith(f"{old}."):
            return f"encoder.layers.{number}.{new}.{rest.removeprefix(f'{old}.')}"
    return name
