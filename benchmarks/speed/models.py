"""Full-size nets with shared random weights: the real architectures, for shapes, parity, memory and speed.

The weights are drawn tensor by tensor from their names, so that PyTorch and MLX can each hold the same net without
both being in memory at once. They are lively: every layer keeps about unit variance, norms and biases are not trivial.
"""

from __future__ import annotations

import zlib

import numpy as np

_CROSS, _DOWN, _UP, _UP_CROSS = "CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"

# What the published config.json files say, where it differs from diffusers' defaults
SD15 = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [_CROSS, _CROSS, _CROSS, _DOWN],
    "up_block_types": [_UP, _UP_CROSS, _UP_CROSS, _UP_CROSS],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SD21 = SD15 | {
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [_DOWN, _CROSS, _CROSS],
    "up_block_types": [_UP_CROSS, _UP_CROSS, _UP],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
    "vocab_size": 49408,
}
CLIP_H = CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
CLIP_G = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
TEXT_ENCODERS = {
    "sd15": {"text_encoder": CLIP_L},
    "sd21": {"text_encoder": CLIP_H},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
}
VAES = {"sd15": VAE, "sd21": VAE, "sdxl": VAE | {"scaling_factor": 0.13025, "force_upcast": True}}

# SD's own, but predicting v: with it a net of random weights keeps the latents at unit variance
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "prediction_type": "v_prediction",
}


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights called `name`, in PyTorch's layout, float32."""
    values = np.random.default_rng(zlib.crc32(name.encode())).random(shape, dtype=np.float32)
    values *= 2
    values -= 1  # uniform in [-1, 1], deviation 1 / sqrt(3)
    if len(shape) == 1:
        values *= 0.3
        return values + 1 if "norm" in name and name.endswith("weight") else values
    fan_in = int(np.prod(shape[1:])) if "embedding." not in name else 3
    values *= np.float32((3 / fan_in) ** 0.5)
    return values


def torch_unet(config: dict):
    """diffusers' U-Net with these weights, float32, on the CPU."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    return fill_torch(unet)


def torch_vae(config: dict):
    """diffusers' VAE, likewise."""
    import torch
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    return fill_torch(vae)


def torch_text_encoder(config: dict):
    """transformers' CLIP text encoder, likewise."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    projection = config.get("architectures") == ["CLIPTextModelWithProjection"]
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    with torch.device("meta"):
        encoder = kind(CLIPTextConfig(**config))
    return fill_torch(encoder)


def fill_torch(module):
    """A PyTorch module made on the meta device, filled. transformers' prefix is no part of a name here."""
    import torch

    module.load_state_dict(
        {
            name: torch.from_numpy(tensor(name.removeprefix("text_model."), tuple(p.shape)))
            for name, p in module.state_dict().items()
        },
        assign=True,
    )
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):  # CLIP's position ids, which no file holds
            if buffer.is_meta:
                setattr(child, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module.eval().requires_grad_(False)


def mlx_unet(config: dict, dtype=None):
    """Our U-Net with these weights."""
    from mlx_deepcache.nets.unet_parts import UNetConfig
    from mlx_deepcache.unet import UNet2DConditionModel

    return fill_mlx(UNet2DConditionModel(UNetConfig.from_dict(config)), dtype)


def mlx_vae(config: dict, dtype=None):
    """Our VAE, likewise."""
    from mlx_deepcache.nets.autoencoder import AutoencoderKL, VAEConfig

    return fill_mlx(AutoencoderKL(VAEConfig.from_dict(config)), dtype)


def mlx_text_encoder(config: dict, dtype=None):
    """Our CLIP text encoder, likewise."""
    from mlx_deepcache.nets.clip import CLIPConfig, CLIPTextModel

    return fill_mlx(CLIPTextModel(CLIPConfig.from_dict(config)), dtype)


def fill_mlx(module, dtype=None):
    """One of our modules, filled; a matrix that is a 1x1 convolution in PyTorch holds the same numbers there."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    for name, parameter in tree_flatten(module.parameters()):
        shape = parameter.shape
        if len(shape) == 4:
            values = np.ascontiguousarray(tensor(name, (shape[0], shape[3], *shape[1:3])).transpose(0, 2, 3, 1))
        else:
            values = tensor(name, shape)
        array = mx.array(values) if dtype is None else mx.array(values).astype(dtype)
        mx.eval(array)
        module.load_weights([(name, array)], strict=False)
    module.eval()
    return module
