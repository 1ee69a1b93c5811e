"""Tiny random checkpoints that read no prompt, in the diffusers layout and as lively as those of tiny.py: DDPM, latent
diffusion with a codebook, and the same of classes. Widths and groups are such that original files can hold them."""

import re
from pathlib import Path

import diffusers
import originals
import torch
from diffusers import UNet2DConditionModel, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file
from tiny import enliven, fit_last, write_json

DDPM = {
    "sample_size": 32,
    "block_out_channels": (32, 64, 64, 96),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
}
UNETS = {
    "ddpm": DDPM,
    "ddpm-6": DDPM  # as of LSUN: six levels
    | {
        "sample_size": 64,
        "block_out_channels": (32, 32, 64, 64, 96, 96),
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    },
    "ldm": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 96, 128),
        "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
        "attention_head_dim": 32,
    },
    "class": {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64, 96, 160),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        "attention_head_dim": 1,
        "cross_attention_dim": 24,
    },
}
LDM_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
SCHEDULERS = {
    "ddpm": {"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "clip_sample": True},
    "ddpm-6": {"_class_name": "DDIMScheduler", "clip_sample": False},
    "ldm": LDM_SCHEDULER,
    "class": LDM_SCHEDULER,
}
PIPELINES = {"ddpm": "DDPMPipeline", "ddpm-6": "DDIMPipeline", "ldm": "LDMPipeline", "class": "LDMPipeline"}
CLASSES = 1001


def build(kind: str, folder: Path) -> Path:
    """Write the tiny checkpoint `kind` (one of UNETS) to `folder`, in float32, and return the folder."""
    index = {"_class_name": PIPELINES[kind], "scheduler": ["diffusers", SCHEDULERS[kind]["_class_name"]]}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3000 + list(UNETS).index(kind))
        net = UNet2DConditionModel if kind == "class" else UNet2DModel
        unet = enliven(net(layers_per_block=2, **UNETS[kind]))
        fit_noise(unet, kind)
        unet.save_pretrained(folder / "unet")
        index["unet"] = ["diffusers", net.__name__]
        if "ddpm" not in kind:
            vae = VQModel(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(32, 32, 64),
                layers_per_block=2,
                num_vq_embeddings=64,
                sample_size=64,
                scaling_factor=1.0,
            )
            enliven(vae).save_pretrained(folder / "vqvae")
            index["vqvae"] = ["diffusers", "VQModel"]
        if kind == "class":
            labels = {"embedding.weight": torch.randn(CLASSES, UNETS[kind]["cross_attention_dim"])}
            config = {"num_embeddings": CLASSES, "embedding_dim": UNETS[kind]["cross_attention_dim"]}
            write_json(folder / "class_embedding" / "config.json", config)
            save_file(labels, folder / "class_embedding" / "diffusion_pytorch_model.safetensors")
            index["class_embedding"] = ["mlx_deepcache", "LabelEmbedding"]
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULERS[kind])
    write_json(folder / "model_index.json", index)
    return folder


def fit_noise(unet, kind, images=24, wild=0.35):
    """As tiny.fit_noise does, for nets of three channels and any schedule."""
    scheduler = getattr(diffusers, SCHEDULERS[kind]["_class_name"]).from_config(SCHEDULERS[kind])
    side, seen, t = UNETS[kind]["sample_size"] // (2 if kind == "ddpm-6" else 1), [], torch.randint(0, 1000, (images,))
    noise, alpha = torch.randn(images, 3, side, side), scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x = alpha.sqrt() * 0.5 * torch.randn_like(noise) + (1 - alpha).sqrt() * noise
    hook = unet.conv_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    unet(x, t, *([torch.randn(images, 1, UNETS[kind]["cross_attention_dim"])] if kind == "class" else []))
    hook.remove()
    fit_last(unet.conv_out, seen[0], noise, wild)


def flatten(source: Path, folder: Path, index: bool) -> Path:
    """A DDPM as its repositories have it: all in one folder, the attention's names of old; index: model_index.json."""
    folder.mkdir()
    for name in ("unet/config.json", "scheduler/scheduler_config.json", *["model_index.json"] * index):
        (folder / Path(name).name).write_text((source / name).read_text())
    tensors = load_file(source / "unet" / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"\.(to_q|to_k|to_v|to_out\.0)\.")
    tensors = {pattern.sub(lambda match: f".{old[match[1]]}.", name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


# ------------------------------------------------------------------------- original names, from diffusers' and not ours

_RESNET = {"time_emb_proj": "temb_proj", "conv_shortcut": "nin_shortcut"}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def renamed(name, table):
    """A name whose last part but one (two of to_out.0) is in the table by another name."""
    for ours, theirs in table.items():
        name = re.sub(rf"\.{re.escape(ours)}\.(weight|bias)$", rf".{theirs}.\1", name)
    return name


def write_ddpm_file(folder: Path, file: Path) -> Path:
    """The U-Net in one file, as DDIM's PyTorch code names its tensors: 1x1 convolutions where diffusers has linear."""
    levels, out = len(UNETS["ddpm"]["block_out_channels"]), {}
    for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        name = name.replace("time_embedding.linear_1", "temb.dense.0").replace(
            "time_embedding.linear_2", "temb.dense.1"
        )
        name = name.replace("conv_norm_out", "norm_out")
        name = re.sub(r"^down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"^up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"^mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        name = re.sub(r"^down_blocks\.(\d+)\.", r"down.\1.", name)
        name = re.sub(r"^up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
        name = name.replace(".resnets.", ".block.").replace(".attentions.", ".attn.")
        attends = "attn" in name
        name = renamed(name, _ATTENTION if attends else _RESNET)
        convolves = attends and tensor.ndim == 2
        out[name] = tensor[..., None, None].contiguous() if convolves else tensor
    save_file(out, file)
    return file


def write_ldm_file(kind: str, folder: Path, file: Path) -> Path:
    """The whole checkpoint in one file, as latent-diffusion names its tensors."""
    out = {}
    for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        out[f"model.diffusion_model.{openai_name(name)}"] = tensor
    if kind == "ldm":
        out = side_by_side(out, UNETS[kind]["attention_head_dim"])
    for name, tensor in load_file(folder / "vqvae" / "diffusion_pytorch_model.safetensors").items():
        name = re.sub(r"(up|down)_blocks\.(\d)", lambda m: f"{m[1]}.{2 - int(m[2]) if m[1] == 'up' else m[2]}", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace(".resnets.", ".block.")
        name = re.sub(r"\.(up|down)samplers\.0", r".\1sample", name).replace("conv_norm_out", "norm_out")
        attends = "attn" in name
        name = renamed(name, _ATTENTION if attends else _RESNET)
        out[f"first_stage_model.{name}"] = (
            tensor[..., None, None].contiguous() if attends and tensor.ndim == 2 else tensor
        )
    out |= {"first_stage_model.loss.logvar": torch.zeros(()), "betas": torch.zeros(1000)}
    if kind == "class":
        labels = load_file(folder / "class_embedding" / "diffusion_pytorch_model.safetensors")
        out["cond_stage_model.embedding.weight"] = labels["embedding.weight"]
    save_file(out, file)
    return file


def openai_name(name):
    """A U-Net's tensor, as openaimodel numbers the blocks of one with four levels of two layers."""
    for ours, theirs in {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in.": "input_blocks.0.0.",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }.items():
        name = re.sub(rf"^{re.escape(ours)}", theirs, name)
    sub = {"resnets": 0, "attentions": 1}
    name = re.sub(
        r"^down_blocks\.(\d)\.(resnets|attentions)\.(\d)",
        lambda m: f"input_blocks.{1 + 3 * int(m[1]) + int(m[3])}.{sub[m[2]]}",
        name,
    )
    name = re.sub(
        r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 + 3 * int(m[1])}.0.op", name
    )
    name = re.sub(
        r"^up_blocks\.(\d)\.(resnets|attentions)\.(\d)",
        lambda m: f"output_blocks.{3 * int(m[1]) + int(m[3])}.{sub[m[2]]}",
        name,
    )
    name = re.sub(r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{2 + 3 * int(m[1])}.2", name)
    return renamed(name, originals.RESNET) if re.search(r"_blocks?\.", name) and "transformer" not in name else name


def side_by_side(tensors, head_size):
    """q, k and v of each head one after the other, in convolutions over a line."""
    out, parts = {}, {}
    for name, tensor in tensors.items():
        match = re.search(r"^(.*)\.(to_q|to_k|to_v|to_out\.0|group_norm)\.(weight|bias)$", name)
        if match is None:
            out[name] = tensor
            continue
        place, part, kind = match.groups()
        if part == "group_norm":
            out[f"{place}.norm.{kind}"] = tensor
        elif part == "to_out.0":
            out[f"{place}.proj_out.{kind}"] = tensor[..., None].contiguous() if kind == "weight" else tensor
        else:
            parts.setdefault((place, kind), {})[part] = tensor
    for (place, kind), three in parts.items():
        heads = [three[part].reshape(-1, head_size, *three[part].shape[1:]) for part in ("to_q", "to_k", "to_v")]
        both = torch.stack(heads, 1).reshape(-1, *three["to_q"].shape[1:])
        out[f"{place}.qkv.{kind}"] = both[..., None].contiguous() if kind == "weight" else both.contiguous()
    return out
