"""Tiny random checkpoints in the diffusers layout, one a family, for tests that hold our code against diffusers.

`build(kind, folder)` writes one; `Hub` stands in for the place where people get theirs. The weights are random but
lively: every layer keeps about unit variance, so that a skip, the prompt or the timestep left out shows in the output,
and an epsilon model's last convolution is fitted to predict the noise, so that fifty steps end at latents of ordinary
size. Nothing here comes from outside this file.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging

logging.disable_progress_bar()

CROSS, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
UP = {CROSS: "CrossAttnUpBlock2D", DOWN: "UpBlock2D"}
WORDS = (
    "a photo of the cat dog red house with small bird in rain an old tree blue flower painting and at night"
).split()
PNDM = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
EULER = PNDM | {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
SD1 = {
    "down_block_types": (CROSS, CROSS, CROSS, DOWN),
    "block_out_channels": (32, 40, 48, 48),
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "sample_size": 16,
}
SD2 = SD1 | {"attention_head_dim": (2, 4, 4, 6), "cross_attention_dim": 48, "use_linear_projection": True}
UNETS = {
    "sd15": SD1,
    "sd21-base": SD2 | {"upcast_attention": False},
    "sd21": SD2 | {"sample_size": 8},
    "sdxl": {
        "down_block_types": (DOWN, CROSS, CROSS),
        "block_out_channels": (32, 40, 48),
        "norm_num_groups": 8,
        "attention_head_dim": (2, 4, 6),
        "transformer_layers_per_block": (1, 2, 3),
        "cross_attention_dim": 32 + 48,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 40 + 6 * 8,
        "sample_size": 16,
    },
    "bk-base": SD1 | {"layers_per_block": 1},
    "bk-small": SD1 | {"layers_per_block": 1, "mid_block_type": None},
    "bk-tiny": SD1
    | {
        "layers_per_block": 1,
        "mid_block_type": None,
        "down_block_types": (CROSS, CROSS, CROSS),
        "block_out_channels": (32, 40, 48),
    },
}
SCHEDULERS = {
    "inpaint-xl": EULER,
    "lcm": PNDM | {"_class_name": "LCMScheduler"},
    "refiner": EULER,
    "sd21-base": PNDM | {"prediction_type": "epsilon"},
    "sd21": PNDM | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "sdxl": EULER,
}
KINDS = tuple(UNETS)  # that draw from text alone
UNETS |= {
    "inpaint": SD1 | {"in_channels": 9},
    "inpaint-xl": UNETS["sdxl"] | {"in_channels": 9},
    "refiner": UNETS["sdxl"]
    | {
        "down_block_types": (DOWN, CROSS, CROSS, DOWN),
        "block_out_channels": (32, 40, 48, 48),
        "attention_head_dim": (2, 4, 6, 6),
        "transformer_layers_per_block": 2,
        "cross_attention_dim": 48,
        "projection_class_embeddings_input_dim": 40 + 5 * 8,
    },
    "lcm": SD1 | {"time_cond_proj_dim": 24},
}
PIPELINES = {
    "lcm": "LatentConsistencyModelPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "inpaint": "StableDiffusionInpaintPipeline",
    "inpaint-xl": "StableDiffusionXLInpaintPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
}


def build(kind: str, folder: Path) -> Path:
    """Write the tiny checkpoint `kind` (one of UNETS) to `folder`, in float32, and return the folder."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1000 + list(UNETS).index(kind))
        write_unet(kind, folder / "unet")
        write_vae(kind, folder / "vae")
        write_text(kind, folder)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULERS.get(kind, PNDM))
    write_json(folder / "model_index.json", model_index(kind))
    return folder


def is_xl(kind):
    return "addition_embed_type" in UNETS[kind]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def model_index(kind):
    """model_index.json's content: pipeline class and the class of each component."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", SCHEDULERS.get(kind, PNDM)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index["_class_name"] = PIPELINES.get(kind, index["_class_name"])
    if is_xl(kind):
        if kind == "refiner":
            index |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
        return index | {
            "force_zeros_for_empty_prompt": kind != "refiner",
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    absent = {"feature_extractor": [None, None], "safety_checker": [None, None]}
    return index | absent | {"requires_safety_checker": False}


# ---------------------------------------------------------------------------------------------------------- weights


def gain(name):
    """Factor on 1/sqrt(fan_in): attention sharper than unit logits make it, what SiLU and averages lost made good, and
    x carried to the output well enough for `fit_noise`."""
    if name.endswith(("to_q", "to_k", "q_proj", "k_proj")):
        return 1.6
    if name.endswith(("to_out.0", "conv_in", "conv1", "conv2", "time_emb_proj", "linear_2", "net.2")):
        return 1.5
    return 0.5 if name.endswith("proj_out") else 1.0


def enliven(model):
    """Variance-preserving normal weights, norms with weights 1 + 0.3 n and biases 0.3 n; draws from torch's seed."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(std=0.3 if "position" in name else 1.0)
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.normal_(1.0, 0.3)
            module.bias.normal_(std=0.3)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.normal_(std=gain(name) * module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.normal_(std=0.2)
    return model.eval()


def write_unet(kind, folder):
    """A lively U-Net; epsilon models predict the noise to some degree (see `fit_noise`)."""
    config = {"layers_per_block": 2} | UNETS[kind]
    ups = tuple(UP[block] for block in reversed(config["down_block_types"]))
    unet = enliven(UNet2DConditionModel(up_block_types=ups, **config))
    if kind != "sd21":
        fit_noise(unet)
    unet.save_pretrained(folder)


def write_controlnet(kind, folder, seed=0, **config):
    """A lively ControlNet for the U-Net of `kind`, whose residuals are smaller than the skips."""
    skipped = ("sample_size", "in_channels")
    shared = {"layers_per_block": 2} | {key: v for key, v in UNETS[kind].items() if key not in skipped}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        net = enliven(ControlNetModel(conditioning_embedding_out_channels=(8, 8, 12, 16), **shared, **config))
        for conv in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
            conv.weight.mul_(0.3)
        net.save_pretrained(folder)
    return folder


def write_lora(file):
    """A LoRA, called ink, of one layer of SD 1.x."""
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sides = {"down": torch.randn(2, 32), "up": torch.randn(32, 2)}
    save_file({f"{layer}.lora_{side}.weight": tensor for side, tensor in sides.items()}, file, {"ss_title": "ink"})
    return file


def write_upscaler(file):
    """A compact net that makes pictures twice as large."""
    sizes = {"0": (8, 3), "2": (12, 8)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tensors = {f"body.{i}.weight": torch.randn(*size, 3, 3) * 0.2 for i, size in sizes.items()}
        tensors |= {f"body.{i}.bias": torch.randn(size[0]) * 0.1 for i, size in sizes.items()}
        save_file(tensors | {"body.1.weight": torch.rand(8)}, file)
    return file


def fit_noise(unet, images=32, side=16, wild=0.35):
    """conv_out := the least-squares fit of the noise in x from what enters conv_out, plus `wild` times itself."""
    config, seen = unet.config, []
    t = torch.randint(0, 1000, (images,))
    alpha = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().neg().add(1).cumprod(0)[t].view(-1, 1, 1, 1)
    noise = torch.randn(images, 4, side, side)
    x = alpha.sqrt() * 0.7 * torch.randn_like(noise) + (1 - alpha).sqrt() * noise
    x = torch.cat([x, torch.randn(images, config.in_channels - 4, side, side)], 1)
    added = None
    if config.addition_embed_type is not None:
        numbers = (config.projection_class_embeddings_input_dim - 40) // config.addition_time_embed_dim
        ids = [128.0, 128, 0, 0, 128, 128][:numbers]
        pooled = torch.randn(images, 40)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([ids]).repeat(images, 1)}
    hook = unet.conv_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    unet(x, t, torch.randn(images, 77, config.cross_attention_dim), added_cond_kwargs=added)
    hook.remove()
    fit_last(unet.conv_out, seen[0], noise, wild)


def fit_last(conv, x, wanted, wild):
    """conv := `wild` times itself, plus the 3 x 3 convolution that comes nearest to `wanted`, (N, C, H, W), given x."""
    patches = nn.functional.unfold(x, 3, padding=1).mT.flatten(0, 1).double()
    patches = torch.cat([patches, torch.ones(len(patches), 1)], 1)
    fit = torch.linalg.lstsq(patches, wanted.flatten(2).mT.flatten(0, 1).double()).solution.mT.float()
    conv.weight.mul_(wild).add_(fit[:, :-1].reshape(conv.weight.shape))
    conv.bias.mul_(wild).add_(fit[:, -1])


def write_vae(kind, folder):
    """A lively autoencoder of factor 8. That of "sd15" has the old attention names, as the published file has."""
    scale = 0.13025 if is_xl(kind) else 0.18215
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 24, 32),
        layers_per_block=2 if kind == "sd15" else 1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=8 * UNETS[kind]["sample_size"],
        scaling_factor=scale,
        force_upcast=is_xl(kind),
    )
    enliven(vae).post_quant_conv.weight.mul_(scale)  # so that sampler latents have about unit variance
    vae.quant_conv.weight.div_(scale)
    vae.save_pretrained(folder)
    if kind == "sd15":
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        rename(folder / "diffusion_pytorch_model.safetensors", old)


def write_taesd(folder):
    """A lively AutoencoderTiny that fits Stable Diffusion's latents."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(16,) * 4,
            decoder_block_out_channels=(24,) * 4,
            num_encoder_blocks=(1, 2, 1, 2),
            num_decoder_blocks=(2, 1, 2, 1),
            scaling_factor=1.3,
        )
        enliven(vae).save_pretrained(folder)
    return folder


def rename(file, table):
    """Replace parts of the tensor names in one safetensors file."""
    tensors = load_file(file)
    for old, new in table.items():
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------------- text


def write_text(kind, folder):
    """Tokenizers and text encoders. config's eos_token_id is the legacy 2 in sd15, bk-* and both of sdxl's encoders."""
    if is_xl(kind):
        if kind != "refiner":
            write_encoder(folder, "", CLIPTextModel, 32, 3, "quick_gelu", 2)
        write_encoder(folder, "_2", CLIPTextModelWithProjection, 48, 4, "gelu", 2, projection_dim=40)
    elif kind in ("sd21-base", "sd21"):
        write_encoder(folder, "", CLIPTextModel, 48, 3, "gelu", None)
    else:
        write_encoder(folder, "", CLIPTextModel, 32, 2, "quick_gelu", 2)
    if kind == "sd15":  # names as in the published file, which also has this buffer
        file = folder / "text_encoder" / "model.safetensors"
        tensors = {"text_model." + name.removeprefix("text_model."): v for name, v in load_file(file).items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(tensors, file, metadata={"format": "pt"})


def write_encoder(folder, suffix, cls, width, layers, act, eos, projection_dim=512):
    """One text encoder and its tokenizer: 4 heads, 77 positions; eos None stands for the tokenizer's own id."""
    last = write_tokenizer(folder / f"tokenizer{suffix}", "<|endoftext|>" if act == "quick_gelu" else "!")
    config = CLIPTextConfig(
        vocab_size=last + 1,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=act,
        projection_dim=projection_dim,
        bos_token_id=0 if eos == 2 else last - 1,
        eos_token_id=eos or last,
        pad_token_id=1,
    )
    enliven(cls(config)).save_pretrained(folder / f"text_encoder{suffix}")


def byte_alphabet():
    """CLIP's 256 characters, one a byte, printable ones first: "!" has id 0."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def word_merges(words):
    """The merges, in order, that build each word from its letters, left to right."""
    merges = {}
    for word in words:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            merges[left, right] = True
            left += right
    return list(merges)


def write_tokenizer(folder, pad):
    """vocab.json, merges.txt and the two small configs. Returns the id of the end token, the largest."""
    alphabet, merges = byte_alphabet(), word_merges(WORDS)
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad
    write_json(folder / "special_tokens_map.json", special)
    options = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    write_json(folder / "tokenizer_config.json", special | options | {"tokenizer_class": "CLIPTokenizer"})
    return len(tokens) - 1


# -------------------------------------------------------------------------------------------------------------- hub


def files(folder):
    """Names of all files in a folder and below."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


class Hub:
    """A stand-in for the hub: repositories are folders, and what is downloaded lies in a cache like the hub's own."""

    SHA = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, monkeypatch, cache):
        self.repositories, self.calls, self.got, self.cache = {}, [], [], cache
        for name in ("model_info", "hf_hub_download", "get_hf_file_metadata"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def folder(self, repository):
        if repository not in self.repositories:
            raise RuntimeError(f"404 Client Error\nRepository Not Found for url {repository}\nand so on")
        return self.repositories[repository]

    def snapshot(self, repository):
        return self.cache / f"models--{repository.replace('/', '--')}" / "snapshots" / self.SHA

    def model_info(self, repo_id, *, revision=None, **_):
        self.calls.append(("list", repo_id, revision))
        folder = self.folder(repo_id)
        sizes = {name: (folder / name).stat().st_size for name in sorted(files(folder))}
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
        return SimpleNamespace(siblings=siblings, sha=self.SHA)

    def get_hf_file_metadata(self, url, **_):
        self.calls.append(("look", url))

    def hf_hub_download(self, repo_id, filename, *, revision=None):
        self.got.append(filename)
        target = self.snapshot(repo_id)
        ref = target.parents[1] / "refs" / (revision or "main")
        for file in (target / filename, ref):
            file.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(self.SHA)
        shutil.copyfile(self.folder(repo_id) / filename, target / filename)
        return str(target / filename)
