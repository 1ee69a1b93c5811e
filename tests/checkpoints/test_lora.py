"""LoRAs fused into our weights, against diffusers' and PEFT's, and against PyTorch's own layers."""

import json
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import originals
import peft
import pytest
import torch
from helpers import at, conditioning, error, loaded, to_mlx, to_torch_layout, unet_inputs
from PIL import Image
from safetensors.torch import save_file
from tiny import CROSS

from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.checkpoints.adapters import lora
from mlx_deepcache.checkpoints.adapters.applied import Addons
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.errors import CheckpointError
from mlx_deepcache.fields import file_and_scale

RANK = 3
ATTENTION = r"(to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)$"
CONVOLUTIONS = r"(resnets\.\d\.conv[12]|conv_shortcut|time_emb_proj|samplers\.0\.conv)$"
ENDS = r"^(conv_in|conv_out|time_embedding\.linear_[12]|add_embedding\.linear_[12])$"
TEXT = r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"


def layers(net, pattern):
    """Names and weights of a torch net's layers whose names match."""
    return [(name, m.weight) for name, m in net.named_modules() if re.search(pattern, name) and hasattr(m, "weight")]


def factors(weight, generator, rank=RANK):
    """Random down and up of one layer, that change it visibly."""
    inner = weight.shape[1:]
    down = torch.randn(rank, *inner, generator=generator) / weight[0].numel() ** 0.5
    up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator) * 0.3
    return down, up


def encoders(pipe):
    found = {"text_encoder": pipe.text_encoder, "text_encoder_2": getattr(pipe, "text_encoder_2", None)}
    return {name: net for name, net in found.items() if net is not None}


def peft_file(pipe, unet_pattern):
    """diffusers' present format."""
    g, out = torch.Generator().manual_seed(1), {}
    for name, weight in layers(pipe.unet, unet_pattern):
        down, up = factors(weight, g)
        out |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    for encoder, net in encoders(pipe).items():
        for name, weight in layers(net, TEXT):
            down, up = factors(weight, g)
            out |= {f"{encoder}.{name}.lora_A.weight": down, f"{encoder}.{name}.lora_B.weight": up}
    return out


def old_file(pipe, unet_pattern):
    """diffusers' first format, of attention processors."""
    g, out = torch.Generator().manual_seed(2), {}
    for name, weight in layers(pipe.unet, r"(to_[qkv]|to_out\.0)$"):
        down, up = factors(weight, g)
        layer, kind = re.fullmatch(r"(.+)\.(to_\w+)(?:\.0)?", name).groups()
        out |= {f"unet.{layer}.processor.{kind}_lora.{part}.weight": w for part, w in (("down", down), ("up", up))}
    return out


def kohya_file(pipe, unet_pattern, *, original=False):
    """kohya's format, with an alpha that matters; original: the original U-Net's names, as it has for SDXL."""
    g, out = torch.Generator().manual_seed(3), {}
    config = pipe.unet.config
    attends = [i for i, kind in enumerate(reversed(config.down_block_types)) if kind == CROSS]
    for name, weight in layers(pipe.unet, unet_pattern):
        if original:
            name = originals.unet_name(f"{name}.weight", config.layers_per_block, attends).removesuffix(".weight")
        out |= kohya_layer(f"lora_unet_{name.replace('.', '_')}", weight, g)
    names = {
        "text_encoder": "lora_te1" if "text_encoder_2" in encoders(pipe) else "lora_te",
        "text_encoder_2": "lora_te2",
    }
    for encoder, net in encoders(pipe).items():
        for name, weight in layers(net, TEXT):
            full = "text_model." + name.removeprefix("text_model.")
            out |= kohya_layer(f"{names[encoder]}_{full.replace('.', '_')}", weight, g)
    return out


def kohya_layer(name, weight, generator):
    down, up = factors(weight, generator)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.5)}


def ours(folder, *files):
    return Addons(Checkpoint.open(str(folder)), loras=files)


def unet_error(addons, net, seed=0):
    """Of our U-Net call against a torch one."""
    x, context, added = unet_inputs(addons.checkpoint.unet_config, seed=seed)
    args, kwargs = oracle.unet_arguments(x, 421, context, added)
    with torch.no_grad():
        expected = net(*args, **kwargs).sample.numpy()
    unet = loaded(addons, "unet")
    prompt = unet.prepare(conditioning(context, added))
    out, _ = unet(to_mlx(x), at(unet, prompt, 421), prompt)
    return error(to_torch_layout(out), expected)


def text_error(addons, name, net):
    ids = np.array([[1, 5, 9, 200, 7] + [net.config.vocab_size - 1] * 72])
    with torch.no_grad():
        expected = net(torch.tensor(ids), output_hidden_states=True)
    last, _ = loaded(addons, name)(mx.array(ids))
    return error(last, expected.last_hidden_state)


@pytest.mark.parametrize(
    ("kind", "make", "pattern"),
    [
        ("sd15", peft_file, f"{ATTENTION}|{CONVOLUTIONS}"),
        ("sdxl", peft_file, ATTENTION),
        ("sd21", old_file, ATTENTION),
        ("sd15", kohya_file, f"{ATTENTION}|{CONVOLUTIONS}|{ENDS}"),
        ("sd21", kohya_file, ATTENTION),
        ("sdxl", lambda *a: kohya_file(*a, original=True), f"{ATTENTION}|{CONVOLUTIONS}|{ENDS}"),
    ],
    ids=["peft", "peft-xl", "processors", "kohya", "kohya-sd2", "kohya-xl"],
)
def test_against_diffusers(checkpoint, tmp_path, kind, make, pattern):
    folder = checkpoint(kind)
    theirs = oracle.pipeline(folder)
    file = tmp_path / "lora.safetensors"
    save_file({n: t.contiguous() for n, t in make(theirs, pattern).items()}, file, {"format": "pt"})
    plain = ours(folder)
    before = unet_error(plain, theirs.unet)
    theirs.load_lora_weights(str(file))
    theirs.fuse_lora(lora_scale=0.7)
    changed = ours(folder, (file, 0.7))
    assert before < 1e-5 < 0.01 < unet_error(plain, theirs.unet)  # it changes much
    assert unet_error(changed, theirs.unet) < 1e-5
    for name, net in encoders(theirs).items():
        assert text_error(changed, name, net) < 1e-5
        if make is not old_file:
            assert text_error(plain, name, net) > 0.01


PEFT = {
    "dora": peft.LoraConfig(r=RANK, lora_alpha=1.5, use_dora=True),
    "loha": peft.LoHaConfig(r=RANK, alpha=1.5),
    "loha-tucker": peft.LoHaConfig(r=RANK, alpha=1.5, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=RANK, alpha=1.5),
    "lokr-both": peft.LoKrConfig(r=2, alpha=1.5, decompose_both=True, decompose_factor=8),
    "lokr-tucker": peft.LoKrConfig(r=RANK, alpha=1.5, use_effective_conv2d=True),
}


@pytest.mark.parametrize("kind", PEFT)
def test_against_peft(checkpoint, tmp_path, kind):
    """LyCORIS's kinds and DoRA, as PEFT's layers compute them, in the files' own names."""
    config = PEFT[kind]
    net = oracle.pipeline(checkpoint("sd15")).unet
    config.target_modules = f".*({ATTENTION.removesuffix('$')}|{CONVOLUTIONS.removesuffix('$')})"
    peft.inject_adapter_in_model(config, net)
    torch.manual_seed(5)
    out = {}
    for name, layer in net.named_modules():
        if not hasattr(layer, "adapter_layer_names") or not hasattr(layer, "base_layer"):
            continue
        name, alpha = "lora_unet_" + name.replace(".", "_"), kind != "dora"
        for part in layer.adapter_layer_names:
            if "default" not in (store := getattr(layer, part)):
                continue
            value = getattr(store["default"], "weight", store["default"])
            scale = 1.0 if part == "lora_magnitude_vector" else 0.3
            with torch.no_grad():
                value.copy_(scale * (torch.rand_like(value) + 0.5 if scale == 1.0 else torch.randn_like(value)))
            part = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}.get(part, part)
            out[f"{name}.{part}"] = value.detach().clone()
        alpha = layer.scaling["default"] * layer.r["default"]
        whole = {f"{name}.lokr_w1", f"{name}.lokr_w2"} <= out.keys()
        out[f"{name}.alpha"] = torch.tensor(77.0 if whole else alpha)  # without a rank, alpha says nothing
        if whole:
            layer.scaling["default"] = 1.0
    assert len(out) > 100
    save_file(out, tmp_path / "lora.safetensors")
    plain, changed = ours(checkpoint("sd15")), ours(checkpoint("sd15"), tmp_path / "lora.safetensors")
    assert unet_error(plain, net) > 0.01
    assert unet_error(changed, net) < 1e-5


@pytest.mark.parametrize("stabilised", [False, True])
def test_peft_metadata_has_the_alpha(checkpoint, tmp_path, stabilised):
    """diffusers writes PEFT's alpha and rank-stabilised scaling into the metadata."""
    theirs = oracle.pipeline(checkpoint("sd15"))
    config = {"r": RANK, "init_lora_weights": "gaussian", "target_modules": ["to_q", "to_v"], "use_rslora": stabilised}
    theirs.unet.add_adapter(peft.LoraConfig(lora_alpha=7, alpha_pattern={"attn2.to_v": 2}, **config))
    torch.manual_seed(0)
    for name, parameter in theirs.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    state = peft.get_peft_model_state_dict(theirs.unet)
    theirs.save_lora_weights(tmp_path, state, unet_lora_adapter_metadata=theirs.unet.peft_config["default"].to_dict())
    (file,) = tmp_path.glob("*.safetensors")
    assert unet_error(ours(checkpoint("sd15"), file), theirs.unet) < 1e-5
    assert unet_error(ours(checkpoint("sd15")), theirs.unet) > 0.01


WRAPPED = {
    "lora": peft.LoraConfig(r=RANK, lora_alpha=7, target_modules=["to_q", "to_v", "conv1"]),
    "patterns": peft.LoraConfig(
        r=RANK,
        lora_alpha=7,
        rank_pattern={"attn2.to_v": 2},
        alpha_pattern={"attn2.to_v": 5, "to_v": 1},
        target_modules=["to_q", "to_v"],
    ),
    "rslora": peft.LoraConfig(r=RANK, lora_alpha=7, use_rslora=True, target_modules=["to_q"]),
    "bias": peft.LoraConfig(r=RANK, lora_alpha=7, lora_bias=True, target_modules=["to_q", "to_out.0", "conv1"]),
    "dora": peft.LoraConfig(r=RANK, lora_alpha=7, use_dora=True, target_modules=["to_q", "conv1"]),
    "loha": peft.LoHaConfig(r=RANK, alpha=7, alpha_pattern={"attn1.to_q": 2}, target_modules=["to_q", "conv1"]),
    "lokr": peft.LoKrConfig(r=RANK, alpha=7, target_modules=["to_q", "conv1"]),
    "lokr-whole": peft.LoKrConfig(r=32, alpha=7, rank_pattern={"attn2.to_v": 16}, target_modules=["to_q", "to_v"]),
}


def wrapped(net, config, folder):
    """A torch net with a lively adapter of PEFT's in it, written to a folder by PEFT."""
    model = peft.get_peft_model(net, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"lora_B|hada_|lokr_", name):
                parameter.normal_(std=0.3)
            elif "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore:`lora_bias=True`", "ignore:Adapter 'default'.* invalid shape")
@pytest.mark.parametrize("kind", WRAPPED)
def test_pefts_own_folders(checkpoint, tmp_path, kind):
    """The rank and alpha stand in adapter_config.json."""
    net = wrapped(oracle.pipeline(checkpoint("sd15")).unet, WRAPPED[kind], tmp_path)
    assert unet_error(ours(checkpoint("sd15")), net) > 0.01
    assert unet_error(ours(checkpoint("sd15"), tmp_path), net) < 1e-5
    assert unet_error(ours(checkpoint("sd15"), tmp_path / "adapter_model.safetensors"), net) < 1e-5


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_pefts_folders_of_text_encoders(checkpoint, tmp_path, name):
    """Both have the same names for their layers; which is meant is told by the class that PEFT wrapped."""
    config = peft.LoraConfig(r=RANK, lora_alpha=7, target_modules=["q_proj", "fc1"])
    net = wrapped(getattr(oracle.pipeline(checkpoint("sdxl")), name), config, tmp_path)
    assert text_error(ours(checkpoint("sdxl")), name, net) > 0.01
    assert text_error(ours(checkpoint("sdxl"), tmp_path), name, net) < 1e-5


@pytest.mark.filterwarnings("ignore:`lora_bias=True`", "ignore:Adapter 'default'.* invalid shape")
def test_diffusers_folder(checkpoint, tmp_path):
    """Of both kinds of net, with biases; settings of each stand in the metadata."""
    pipe, layers, settings = oracle.pipeline(checkpoint("sd15")), {}, {}
    for name, targets, alpha in (("unet", ["to_out.0"], 5), ("text_encoder", ["q_proj"], 2)):
        net = getattr(pipe, name)
        net.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=alpha, lora_bias=True, target_modules=targets))
        with torch.no_grad():
            for parameter in (p for n, p in net.named_parameters() if "lora_B" in n):
                parameter.normal_(std=0.3)
        layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(net)
        settings[f"{name}_lora_adapter_metadata"] = net.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, **layers, **settings)
    changed, plain = ours(checkpoint("sd15"), tmp_path), ours(checkpoint("sd15"))
    assert unet_error(changed, pipe.unet) < 1e-5 < unet_error(plain, pipe.unet)
    assert text_error(changed, "text_encoder", pipe.text_encoder) < 1e-5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (None, "how strong it is stands in adapter_config.json; put that beside it"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"lora_alpha": "much"}, "should give a rank and an alpha"),
        ({"alpha_pattern": {"(": 2}}, "should give a rank and an alpha"),
        ({"alpha_pattern": [2]}, "should give a rank and an alpha"),
        ([], "should hold a JSON object"),
    ],
)
def test_settings_that_cannot_be_honoured(checkpoint, tmp_path, settings, words):
    name = "base_model.model.mid_block.attentions.0.proj_in"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 48, 1, 1), f"{name}.lora_B.weight": torch.ones(48, 2, 1, 1)}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    if settings is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=re.escape(words)):
        ours(checkpoint("sd15"), tmp_path)


def test_folders_that_hold_no_one_lora(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="should hold one LoRA, such as .*, got none"):
        ours(checkpoint("sd15"), tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"got adapter_model\.bin"):
        ours(checkpoint("sd15"), tmp_path)
    for name in "ab":
        changed(tmp_path / f"{name}.safetensors", mid_block_attentions_0_proj_in=torch.ones(48))
    with pytest.raises(CheckpointError, match=r"got a\.safetensors, b\.safetensors"):
        ours(checkpoint("sd15"), tmp_path)
    (tmp_path / "b.safetensors").unlink()
    changed(tmp_path / "a.safetensors", **{"mid_block_attentions_0_proj_in.diff_b": torch.ones(48)})
    assert ours(checkpoint("sd15"), tmp_path).loras[0].file == tmp_path / "a.safetensors"


def test_convolution_in_three_factors():
    """LoCon's down, middle and up, against three convolutions in a row; and LoRA's two."""
    torch.manual_seed(1)
    x = torch.randn(1, 4, 9, 9)
    for mid in (None, torch.randn(2, 2, 3, 3)):
        down, up = torch.randn(2, 4, *(3, 3) if mid is None else (1, 1)), torch.randn(6, 2, 1, 1)
        shape, between = (6, 4, 3, 3), torch.conv2d(x, down)
        expected = torch.conv2d(between if mid is None else torch.conv2d(between, mid), up) * (3 / 2)
        parts = {"down": down, "up": up, "mid": mid, "alpha": torch.tensor(3.0)}
        parts = {name: mx.array(part.numpy()) for name, part in parts.items() if part is not None}
        delta = np.array(lora.changed(mx.zeros(shape), parts, 1.0))
        assert error(torch.conv2d(x, torch.tensor(delta)), expected) < 1e-5


BLOCK = "mid_block_attentions_0_transformer_blocks_0"


def middle(folder, *files):
    """The middle's transformer, with these LoRAs in it."""
    return loaded(ours(folder, *files), "unet").mid_block.attentions[0]


def changed(file, **tensors):
    save_file({f"lora_unet_{name}": tensor for name, tensor in tensors.items()}, file)
    return file


@pytest.mark.parametrize(("shape", "axis"), [((1, 192), 0), ((48, 1), 1)])
def test_the_axis_of_doras_magnitude(checkpoint, tmp_path, shape, axis):
    """Of each output, as PEFT has it, or, in LyCORIS's first files, of each input: it is what the norms of the changed
    weights come to."""
    layer, torch_rng = f"{BLOCK}_ff_net_2", torch.Generator().manual_seed(0)
    down, up = (torch.randn(s, generator=torch_rng) for s in ((2, 192), (48, 2)))
    magnitude = torch.rand(shape, generator=torch_rng) + 0.5
    tensors = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.dora_scale": magnitude}
    file = changed(tmp_path / "a.safetensors", **tensors)
    weight = np.array(middle(checkpoint("sd15"), file).transformer_blocks[0].ff.net[2].weight)
    assert error(np.linalg.norm(weight, axis=axis), magnitude.numpy().ravel()) < 1e-5


@pytest.mark.parametrize("scale", [0, 0.5, 1, -1])
def test_dora_at_other_scales(checkpoint, tmp_path, scale):
    """ComfyUI's and Forge's rule: so much of the way from the model to the model with the whole change in it."""
    config = peft.LoraConfig(r=RANK, lora_alpha=7, use_dora=True, target_modules=["to_q"])
    wrapped(oracle.pipeline(checkpoint("sd15")).unet, config, tmp_path)
    plain, whole, some = (
        middle(checkpoint("sd15"), *files).transformer_blocks[0].attn1.to_q.weight
        for files in ((), (tmp_path,), ((tmp_path, scale),))
    )
    assert error(whole, plain) > 0.1
    assert error(some, plain + scale * (whole - plain)) < 1e-6
    assert bool(mx.array_equal(some, plain)) == (scale == 0)


def test_biases_and_norms_are_changed(checkpoint, tmp_path):
    folder, plain = checkpoint("sd15"), middle(checkpoint("sd15"))
    rows = torch.arange(48.0)
    tensors = {"mid_block_attentions_0_proj_in.diff_b": rows}
    tensors |= {f"{BLOCK}_norm1.w_norm": rows + 1, f"{BLOCK}_norm1.b_norm": rows + 2}
    now = middle(folder, (changed(tmp_path / "a.safetensors", **tensors), 0.5))
    assert error(now.proj_in.bias - plain.proj_in.bias, 0.5 * rows) < 1e-5
    assert mx.array_equal(now.proj_in.weight, plain.proj_in.weight)
    before, after = plain.transformer_blocks[0].norm1, now.transformer_blocks[0].norm1
    assert error(after.weight - before.weight, 0.5 * (rows + 1)) < 1e-5
    assert error(after.bias - before.bias, 0.5 * (rows + 2)) < 1e-5


def test_a_bias_that_is_not_there(checkpoint, tmp_path):
    """It is made, as in LyCORIS; but an embedding has none."""
    file = changed(tmp_path / "a.safetensors", **{f"{BLOCK}_attn1_to_q.diff_b": torch.ones(48)})
    layer = middle(checkpoint("sd15"), (file, 0.5)).transformer_blocks[0].attn1.to_q
    assert mx.array_equal(layer(mx.zeros((1, 48))), 0.5 * mx.ones((1, 48)))
    save_file({"lora_te_text_model_embeddings_position_embedding.diff_b": torch.ones(77)}, file)
    with pytest.raises(CheckpointError, match="the bias of text_encoder.*position_embedding, which can have none"):
        loaded(ours(checkpoint("sd15"), file), "text_encoder")


def test_several_add_up_and_full_differences(checkpoint, tmp_path):
    folder = checkpoint("sd15")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    plain = loaded(ours(folder), "unet").mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    down, up, diff = torch.randn(2, 48), torch.randn(48, 2), torch.randn(48, 48)
    low_rank, whole = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, low_rank)
    save_file({f"{name}.diff": diff}, whole)
    addons = ours(folder, (low_rank, 0.5), whole, (low_rank, -2))
    changed = loaded(addons, "unet").mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert error(changed - plain, -1.5 * up @ down + diff) < 1e-5


def test_quantized_layers(checkpoint, tmp_path):
    """A quantized layer becomes what quantizing its changed weights gives, with the same bits."""
    assert main_convert(["--model", str(checkpoint("sd15")), "--output", str(tmp_path / "q"), "--quantize", "8"]) == 0
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    down, up = torch.randn(2, 128), torch.randn(32, 2)
    name = "lora_unet_" + layer.replace(".", "_")
    file = tmp_path / "a.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, file)
    before, after = (
        dict(loaded(ours(tmp_path / "q", *files), "unet").named_modules())[layer] for files in ((), (file,))
    )
    assert isinstance(after, nn.QuantizedLinear)
    assert after.bits == 8
    whole, changed = (mx.dequantize(q.weight, q.scales, q.biases, q.group_size, q.bits) for q in (before, after))
    expected = np.array(whole) + (up @ down).numpy()
    assert error(changed, expected) < 0.01 < error(whole, expected)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"lora_unet_down_blocks_9_attn2_to_k.lora_down.weight": (4, 2048)},
            ("1 of its 1 layers match nothing", "SDXL"),
        ),
        (
            {
                "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 768),
                "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight": (48, 4),
            },
            ("does not fit", "made for Stable Diffusion 1.x", "context of width 32"),
        ),
        ({"unet.conv_in.lora_A.weight": (4, 4, 3, 3)}, ("not whole", "lacks its up")),
        ({"model.diffusion_model.out.2.bias": (4,)}, ("is no LoRA",)),
        ({"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": (4, 12, 12)}, ("is of kind OFT", "LoHa")),
        ({"lora_unet_conv_in.weight": (4,), "lora_unet_conv_in.on_input": ()}, ("is of kind (IA)^3",)),
        ({"lora_unet_mid_block_attentions_0_proj_in.diff_b": (47,)}, ("does not fit", "shape (48, 48)")),
        (
            {"lora_unet_conv_in.lora_A.weight": (0, 4, 3, 3), "lora_unet_conv_in.lora_B.weight": (32, 0)},
            ("should not have shape",),
        ),
        ({"lora_unet_conv_in.lokr_w1_a": (), "lora_unet_conv_in.alpha": ()}, ("lokr_w1_a should not have shape ()",)),
        (
            {"lora_unet_conv_in.diff": (32, 4, 3, 3), "lora_unet_conv_in.alpha": (2,)},
            ("alpha should not have shape (2,)",),
        ),
        (
            {f"lora_unet_conv_in.{part}": (32, 4, 3, 3) for part in ("diff", "lokr_w1", "lora_up.weight")},
            ("in several ways at once (diff, lokr, lora)",),
        ),
        ({}, ("is empty",)),
    ],
)
def test_a_lora_that_does_not_fit(checkpoint, tmp_path, monkeypatch, capfd, tensors, words):
    monkeypatch.chdir(tmp_path)
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, "a.safetensors")
    assert main_generate(["--model", str(checkpoint("sd15")), "--prompt", "a cat", "--lora", "a.safetensors:0.5"]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "out.png").exists()


def test_the_flag(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, expected in {
        "a.safetensors": ("a.safetensors", 1.0),
        "C:\\my files\\a.safetensors": ("C:\\my files\\a.safetensors", 1.0),
        "C:\\a.safetensors:-.5": ("C:\\a.safetensors", -0.5),
        "sub:2/a.safetensors:1e-1": ("sub:2/a.safetensors", 0.1),
        "sub:2/a.safetensors": ("sub:2/a.safetensors", 1.0),
    }.items():
        file, scale = file_and_scale(text)
        assert (str(file), scale) == expected
    name = "lora_unet_mid_block_attentions_0_proj_in"
    save_file(
        {f"{name}.lora_down.weight": torch.randn(2, 48, 1, 1), f"{name}.lora_up.weight": torch.randn(48, 2, 1, 1)},
        "a.safetensors",
    )
    flags = ["--model", str(checkpoint("sd15")), "--prompt", "a cat", "--steps", "2", "--height", "64", "--width", "64"]
    for file, extra in {"0": [], "1": ["--lora", "a.safetensors"], "2": ["--lora", "a.safetensors:0"]}.items():
        assert main_generate([*flags, "--output", f"{file}.png", *extra]) == 0
    pictures = [np.asarray(Image.open(f"{i}.png")) for i in range(3)]
    assert np.array_equal(pictures[0], pictures[2])
    assert not np.array_equal(pictures[0], pictures[1])
    assert main_generate([*flags, "--lora", "nothing.safetensors:1"]) == 1
