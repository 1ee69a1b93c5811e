"""Tiny checkpoints with real families' proportions, and the single files in the original layout that hold the same.

The names are made here from diffusers' ones, by the inverse of what a reader has to do and without its code.
"""

import re
from pathlib import Path

import tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny import CROSS, DOWN, EULER, PNDM, UP, enliven, fit_noise, write_json
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mlx_deepcache.checkpoints import tokenizer as vocabulary

XL = {
    "block_out_channels": (64, 128, 192),
    "down_block_types": (DOWN, CROSS, CROSS),
    "attention_head_dim": (1, 2, 3),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "cross_attention_dim": 64 + 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 40 + 6 * 8,
    "sample_size": 128,
}
SD1 = {
    "block_out_channels": (32, 64, 96, 96),
    "down_block_types": (CROSS, CROSS, CROSS, DOWN),
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
    "sample_size": 64,
}
SD2 = SD1 | {
    "block_out_channels": (64, 128, 192, 192),
    "attention_head_dim": (1, 2, 3, 3),
    "cross_attention_dim": 128,
    "use_linear_projection": True,
    "sample_size": 96,
}
REFINER = XL | {
    "block_out_channels": (64, 128, 192, 192),
    "down_block_types": (DOWN, CROSS, CROSS, DOWN),
    "attention_head_dim": (1, 2, 3, 3),
    "transformer_layers_per_block": (1, 2, 2, 2),
    "cross_attention_dim": 128,
    "projection_class_embeddings_input_dim": 40 + 5 * 8,
}
UNETS = {
    "sd1": SD1,
    "sd1-inpaint": SD1 | {"in_channels": 9},
    "sd1-bk": SD1 | {"layers_per_block": 1, "mid_block_type": None},
    "sd2": SD2,
    "xl": XL,
    "refiner": REFINER,
}
PIPELINES = {
    "sd1-inpaint": "StableDiffusionInpaintPipeline",
    "xl": "StableDiffusionXLPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
}


def build(kind, folder):
    """Write the checkpoint in the diffusers layout."""
    folder, xl = Path(folder), kind in ("xl", "refiner")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(len(kind))
        config = {"layers_per_block": 2} | UNETS[kind]
        ups = tuple(UP[block] for block in reversed(config["down_block_types"]))
        unet = enliven(UNet2DConditionModel(up_block_types=ups, **config))
        if kind in ("sd1", "xl"):
            fit_noise(unet, images=8)
        unet.save_pretrained(folder / "unet")
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 64, 96),
            layers_per_block=1 if xl else 2,
            latent_channels=4,
            scaling_factor=0.13025 if xl else 0.18215,
            sample_size=8 * config["sample_size"],
        )
        enliven(vae).save_pretrained(folder / "vae")
        if kind == "sd2":
            encoder(folder, "", CLIPTextModel, 128, 23, "gelu")
        elif kind != "refiner":
            encoder(folder, "", CLIPTextModel, 64, 2, "quick_gelu")
        if xl:
            encoder(folder, "_2", CLIPTextModelWithProjection, 128, 3, "gelu")
    scheduler = EULER if xl else PNDM | {"prediction_type": "epsilon"}
    if kind == "sd2":
        scheduler = tiny.SCHEDULERS["sd21"]
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = tiny.model_index("sdxl" if xl else "sd15")
    if kind == "refiner":
        index |= {"text_encoder": [None, None], "tokenizer": [None, None], "force_zeros_for_empty_prompt": False}
        index["requires_aesthetics_score"] = True
    write_json(folder / "model_index.json", index | {"_class_name": PIPELINES.get(kind, index["_class_name"])})
    return folder


def encoder(folder, suffix, cls, width, layers, act):
    config = CLIPTextConfig(
        vocab_size=vocabulary.SIZE,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=act,
        projection_dim=40 if suffix else 512,
        eos_token_id=vocabulary.SIZE - 1,
    )
    enliven(cls(config)).save_pretrained(folder / f"text_encoder{suffix}")
    (folder / f"tokenizer{suffix}").mkdir()
    vocabulary.write(folder / f"tokenizer{suffix}", "!" if act == "gelu" else vocabulary.END)


def read(folder, name):
    (file,) = (folder / name).glob("*.safetensors")
    return load_file(file)


def single_tensors(kind, folder):
    """The checkpoint's tensors as a single file has them."""
    layers = UNETS[kind].get("layers_per_block", 2)
    attends = [i for i, block in enumerate(reversed(UNETS[kind]["down_block_types"])) if block == CROSS]
    unet = read(folder, "unet").items()
    out = {f"model.diffusion_model.{unet_name(name, layers, attends)}": tensor for name, tensor in unet}
    for name, tensor in read(folder, "vae").items():
        old = vae_name(name, 4)
        is_attention = ".attn_1." in old and tensor.ndim == 2
        out[f"first_stage_model.{old}"] = tensor[:, :, None, None] if is_attention else tensor
    clip = "conditioner.embedders.0.transformer." if kind == "xl" else "cond_stage_model.transformer."
    if kind == "sd2":
        out |= open_clip(read(folder, "text_encoder"), "cond_stage_model.model.", spare_layer=True)
    elif kind != "refiner":
        texts = read(folder, "text_encoder").items()
        out |= {f"{clip}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in texts}
        out[f"{clip}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if kind in ("xl", "refiner"):
        number = 1 if kind == "xl" else 0
        out |= open_clip(read(folder, "text_encoder_2"), f"conditioner.embedders.{number}.model.")
    # what training leaves behind
    out |= {"alphas_cumprod": torch.rand(1000), "model_ema.decay": torch.tensor(0.9), "denoiser.sigmas": torch.rand(9)}
    return {name: tensor.contiguous() for name, tensor in out.items()}


def write(kind, folder, file, metadata=None, dtype=None, change=lambda tensors: tensors):
    """Write the single file; dtype: of its floating-point tensors."""
    tensors = change(single_tensors(kind, folder))
    if dtype is not None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    save_file(tensors, file, metadata=metadata)
    return file


RESNET = {  # diffusers' name -> the original one, of what a U-Net's resnet is made of
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def unet_name(name, layers, attends=()):
    """diffusers' name -> the original one; attends: decoder levels with attention, before their upsampler."""
    stride = layers + 1
    outer = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for new, old in outer.items():
        if name.startswith(new + "."):
            return name.replace(new, old, 1)
    side, level, kind, layer, rest = re.match(
        r"(down_blocks|up_blocks|mid_block)\.?(\d*)\.(\w+)\.(\d+)\.(.*)", name
    ).groups()
    level, layer = int(level or 0), int(layer)
    if kind == "resnets":
        part, parameter = rest.split(".")
        rest = f"{RESNET[part]}.{parameter}"
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{stride * (level + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{stride * level + layers}.{2 if level in attends else 1}.{rest}"
    i = stride * level + layer
    block = f"input_blocks.{1 + i}" if side == "down_blocks" else f"output_blocks.{i}"
    return f"{block}.{int(kind == 'attentions')}.{rest}"


def vae_name(name, levels):
    """diffusers' name -> the original one."""
    for new, old in (
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("resnets", "block"),
        ("down_blocks", "down"),
    ):
        name = name.replace(new, old)
    return re.sub(r"up_blocks\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}", name)


def open_clip(tensors, prefix, spare_layer=False):
    """transformers' text encoder as OpenCLIP names it; SD 2.x's has one layer more than is used."""
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    out = {
        "positional_embedding": tensors["embeddings.position_embedding.weight"],
        "token_embedding.weight": tensors["embeddings.token_embedding.weight"],
        "ln_final.weight": tensors["final_layer_norm.weight"],
        "ln_final.bias": tensors["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
        "text_projection": tensors.get("text_projection.weight", torch.rand(128, 128)).T,
    }
    count = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layers"))
    for layer in range(count + spare_layer):
        old, new = f"encoder.layers.{min(layer, count - 1)}", f"transformer.resblocks.{layer}"
        for parameter in ("weight", "bias"):
            qkv = [tensors[f"{old}.self_attn.{part}_proj.{parameter}"] for part in "qkv"]
            out[f"{new}.attn.in_proj_{parameter}"] = torch.cat(qkv)
            for theirs, ours in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                out[f"{new}.{ours}.{parameter}"] = tensors[f"{old}.{theirs}.{parameter}"].clone()
    return {prefix + name: tensor for name, tensor in out.items()}
