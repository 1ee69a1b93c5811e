"""The single file of a tiny Stable Video Diffusion checkpoint, named from diffusers' layout as the original is."""

import re

from originals import open_clip, read, unet_name, vae_name
from safetensors.torch import save_file

LEVELS, ATTENDS = 4, (1, 2, 3)


def write(folder, file, change=lambda tensors: tensors):
    """folder: the checkpoint in the diffusers layout; returns the file."""
    out = {}
    for name, tensor in read(folder, "unet").items():
        out[f"model.diffusion_model.{video_unet_name(name)}"] = tensor
    for name, tensor in read(folder, "vae").items():
        old = video_vae_name(name)
        prefix = "first_stage_model." if name.startswith("decoder.") else "conditioner.embedders.3.encoder."
        out[prefix + old] = tensor[:, :, None, None] if ".attn_1." in old and tensor.ndim == 2 else tensor
    out |= vision(read(folder, "image_encoder"))
    out = {name: tensor.contiguous().clone() for name, tensor in out.items()}
    save_file(change(out), file)
    return file


def video_unet_name(name):
    """A layer over frames has the original name of the one that it follows, and then its own."""
    if (
        found := re.match(r"(.*\.resnets\.\d+)\.(spatial_res_block|temporal_res_block|time_mixer)\.(.*)", name)
    ) is None:
        name = re.sub(r"temporal_transformer_blocks", "time_stack", name)
        name = name.replace("time_pos_embed.linear_1", "time_pos_embed.0").replace(
            "time_pos_embed.linear_2", "time_pos_embed.2"
        )
        return unet_name(name, 2, ATTENDS)
    layer, kind, rest = found.groups()
    if kind == "time_mixer":
        return unet_name(f"{layer}.norm1.weight", 2).replace("in_layers.0.weight", f"time_mixer.{rest}")
    old = unet_name(f"{layer}.{rest}", 2)
    block = unet_name(f"{layer}.norm1.weight", 2).removesuffix("in_layers.0.weight")
    return old if kind == "spatial_res_block" else old.replace(block, f"{block}time_stack.")


def video_vae_name(name):
    if name.startswith("decoder.time_conv_out."):
        return name.replace("time_conv_out", "conv_out.time_mix_conv")
    for new, old in (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0")):
        name = name.replace(f"temporal_res_block.{new}", f"time_stack.{old}")
    name = name.replace("temporal_res_block.conv2", "time_stack.out_layers.3")
    return vae_name(name.replace("spatial_res_block.", "").replace("time_mixer.", ""), LEVELS)


def vision(tensors):
    """OpenCLIP's encoder of pictures; its layers are named as those of texts."""
    prefix = "conditioner.embedders.0.open_clip.model.visual."
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    position = tensors["embeddings.position_embedding.weight"]
    layers = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.layers.")}
    stand_in = ("embeddings.position_embedding", "embeddings.token_embedding", "final_layer_norm")
    layers |= {f"{name}.weight": position for name in stand_in} | {"final_layer_norm.bias": position}
    out = {n: t for n, t in open_clip(layers, prefix).items() if ".resblocks." in n}
    out |= {
        f"{prefix}{old}": tensors[new]
        for old, new in {
            "class_embedding": "embeddings.class_embedding",
            "positional_embedding": "embeddings.position_embedding.weight",
            "conv1.weight": "embeddings.patch_embedding.weight",
            "ln_pre.weight": "pre_layrnorm.weight",
            "ln_pre.bias": "pre_layrnorm.bias",
            "ln_post.weight": "post_layernorm.weight",
            "ln_post.bias": "post_layernorm.bias",
        }.items()
    }
    return out | {f"{prefix}proj": tensors["visual_projection.weight"].T}
