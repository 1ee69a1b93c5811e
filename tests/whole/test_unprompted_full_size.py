"""The published nets that read no prompt, with random weights, against diffusers: parameters, multiply-adds, a call."""

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import at, error, to_mlx, to_torch_layout
from mlx.utils import tree_flatten

from mlx_deepcache.cache import macs
from mlx_deepcache.cache.macs import unet_macs
from mlx_deepcache.checkpoints.weights import rename, to_channels_last
from mlx_deepcache.nets.unet_parts import Conditioning, UNetConfig
from mlx_deepcache.nets.vq import VQConfig, VQModel
from mlx_deepcache.unet import UNet2DConditionModel

DDPM = {
    "_class_name": "UNet2DModel",
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
}
CIFAR = DDPM | {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
LSUN = DDPM | {
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
CELEBAHQ = {  # CompVis/ldm-celebahq-256
    "_class_name": "UNet2DModel",
    "sample_size": 64,
    "block_out_channels": [224, 448, 672, 896],
    "attention_head_dim": 32,
}
CIN256 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [192, 384, 576, 960],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "attention_head_dim": 1,
    "cross_attention_dim": 512,
}
VQ_F4 = {
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "num_vq_embeddings": 8192,
    "scaling_factor": 1.0,
}
NETS = {"cifar": CIFAR, "lsun": LSUN, "celebahq": CELEBAHQ, "cin256": CIN256}


def reference(config, device):
    with torch.device(device):
        kind = getattr(diffusers, config.get("_class_name", "VQModel"))
        return kind(**{key: value for key, value in config.items() if key[0] != "_"}).eval()


def parameters(module):
    return sum(parameter.size for _, parameter in tree_flatten(module.parameters()))


@pytest.mark.parametrize(
    ("config", "thousands"),
    [(CIFAR, 35_746), (LSUN, 113_673), (CELEBAHQ, None), (CIN256, 400_920), (VQ_F4, 55_320)],
    ids=["cifar", "lsun", "celebahq", "cin256", "vq-f4"],
)
def test_parameter_counts(config, thousands):
    """As diffusers counts them, and as they were published."""
    own = VQModel(VQConfig.from_dict(config)) if config is VQ_F4 else UNet2DConditionModel(UNetConfig.from_dict(config))
    theirs = reference(config, "meta")
    assert parameters(own) == sum(parameter.numel() for parameter in theirs.parameters())
    if thousands is not None:
        assert parameters(own) / 1000 == pytest.approx(thousands, abs=10)


@pytest.mark.parametrize(
    ("name", "full", "cached"),
    [  # giga multiply-adds of convolutions and linear layers; the branches are the pip package's, the paper's plus one
        ("cifar", 6.054, {1: 1.283, 2: 2.239, 3: 3.351, 4: 4.207, 6: 5.440}),
        ("lsun", 248.17, {1: 82.06, 2: 132.52, 3: 152.39, 4: 165.01, 6: 197.02}),
        ("cin256", 99.77, {0: 4.422}),
    ],
)
def test_multiply_adds(monkeypatch, name, full, cached):
    unet = UNet2DConditionModel(UNetConfig.from_dict(NETS[name]))
    size, tokens = (NETS[name]["sample_size"],) * 2, 1 if name == "cin256" else 0
    if name == "cin256":
        assert unet_macs(unet, size, 0, tokens)[0] / 1e9 == pytest.approx(104.23, rel=1e-3)
    monkeypatch.setattr(macs, "Attention", type(None))  # whose two products the published counts leave out
    for branch, expected in cached.items():
        ours = unet_macs(unet, size, branch, tokens)
        assert ours[0] / 1e9 == pytest.approx(full, rel=1e-3)
        assert ours[1] / 1e9 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("name", "side"), [("cifar", 32), ("cin256", 16)])
def test_a_call_is_that_of_diffusers(name, side):
    """At full width and depth; that of LSUN takes 8 s, and was done by hand."""
    torch.manual_seed(0)
    theirs = reference(NETS[name], "cpu")
    unet = UNet2DConditionModel(UNetConfig.from_dict(NETS[name]))
    shapes = {key: parameter.shape for key, parameter in tree_flatten(unet.parameters())}
    weights = rename({key: mx.array(value.detach().numpy()) for key, value in theirs.state_dict().items()})
    unet.load_weights(list(to_channels_last(weights, shapes).items()))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 3, side, side), dtype=np.float32)
    context = rng.standard_normal((1, 1, 512) if name == "cin256" else (1, 0, 0), dtype=np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(x), 500, *([torch.tensor(context)] if context.size else [])).sample.numpy()
    cond = unet.prepare(Conditioning(mx.array(context)))
    out, _ = unet(to_mlx(x), at(unet, cond, 500), cond)
    assert error(to_torch_layout(out), expected) < 1e-4
