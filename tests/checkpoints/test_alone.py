"""A VAE, a TAESD and a ControlNet in one file by itself, against the folders that they were made of; weights of 8 and
of 64 bits against PyTorch's."""

import json
import re
import shutil

import mlx.core as mx
import numpy as np
import originals
import pytest
import tiny
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from helpers import PICTURE
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file

from mlx_deepcache import StableDiffusion
from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.checkpoints.part import OtherVAE, load_controlnet
from mlx_deepcache.checkpoints.weights import read_tensors
from mlx_deepcache.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tensors(net):
    return dict(tree_flatten(net.parameters()))


def same(ours, reference):
    ours, reference = tensors(ours), tensors(reference)
    return ours.keys() == reference.keys() and all(mx.array_equal(ours[name], reference[name]) for name in ours)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    """The folder of a tiny SD 1.x."""
    return originals.build("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "diffusers"])
def test_vae(sd1, tmp_path, prefix):
    """With the original names, as its authors publish it or cut out of a checkpoint, and with diffusers'."""
    found = load_file(sd1 / "vae" / WEIGHTS)
    if prefix != "diffusers":
        found = {f"{prefix}{originals.vae_name(name, 4)}": tensor.contiguous() for name, tensor in found.items()}
    save_file(found, tmp_path / "vae.safetensors")
    own = Checkpoint.open(str(sd1)).vae_config
    ours = OtherVAE.open(str(tmp_path / "vae.safetensors"), own)
    assert ours.config == own
    assert same(ours.load(None), OtherVAE.open(str(sd1 / "vae"), own).load(None))
    assert same(OtherVAE.open(str(sd1 / "vae" / WEIGHTS), own).load(None), ours.load(None))  # its config is beside it


def taesd_names(found, encoder, decoder):
    """diffusers' layers -> the author's numbers behind these prefixes: his decoder starts with a clamp."""
    out = {}
    for name, tensor in found.items():
        side, number, rest = re.fullmatch(r"(\w+)\.layers\.(\d+)\.(.+)", name).groups()
        out[f"{encoder}{number}.{rest}" if side == "encoder" else f"{decoder}{int(number) + 1}.{rest}"] = tensor
    return out


@pytest.mark.parametrize("prefixes", [("encoder.", "decoder."), ("taesd_encoder.", "taesd_decoder."), None])
def test_taesd(taesd, tmp_path, prefixes):
    found, own = load_file(taesd / WEIGHTS), Checkpoint.open(None).vae_config
    found = found if prefixes is None else taesd_names(found, *prefixes)
    save_file(found, tmp_path / "taesd.safetensors")
    ours = OtherVAE.open(str(tmp_path / "taesd.safetensors"), None)
    reference = OtherVAE.open(str(taesd), None)
    assert own.latent_channels == ours.config.latent_channels
    assert same(ours.load(None), reference.load(None))
    assert ours.config.num_decoder_blocks == reference.config.num_decoder_blocks


def test_taesd_in_its_authors_two_files(taesd, tmp_path):
    """Either is named; alone it is not enough."""
    found = taesd_names(load_file(taesd / WEIGHTS), "encoder/", "decoder/")
    for side in ("decoder", "encoder"):
        half = {name.removeprefix(f"{side}/"): t for name, t in found.items() if name.startswith(side)}
        save_file(half, tmp_path / f"taesd_{side}.safetensors")
        if side == "decoder":
            with pytest.raises(CheckpointError, match="the decoder of a TAESD alone; put taesd_encoder.safetensors"):
                OtherVAE.open(str(tmp_path / "taesd_decoder.safetensors"), None)
    reference = OtherVAE.open(str(taesd), None).load(None)
    for side in ("decoder", "encoder"):
        assert same(OtherVAE.open(str(tmp_path / f"taesd_{side}.safetensors"), None).load(None), reference)


def controlnet_names(found, prefix):
    """diffusers' ControlNet -> the original one's names."""
    out = {}
    for name, tensor in found.items():
        place, _, parameter = name.rpartition(".")
        kind, *rest = place.split(".")
        if kind == "controlnet_cond_embedding":
            last = 2 + 2 * sum(n.startswith(f"{kind}.blocks") and n.endswith("weight") for n in found)
            number = {"conv_in": 0, "conv_out": last}.get(rest[0], 2 * int(rest[-1]) + 2 if rest[-1].isdigit() else 0)
            old = f"input_hint_block.{number}.{parameter}"
        elif kind == "controlnet_down_blocks":
            old = f"zero_convs.{rest[0]}.0.{parameter}"
        elif kind == "controlnet_mid_block":
            old = f"middle_block_out.0.{parameter}"
        else:
            old = originals.unet_name(name, 2)
        out[prefix + old] = tensor
    return out


@pytest.mark.parametrize(("kind", "prefix"), [("sd15", "control_model."), ("sd15", ""), ("sd15", None), ("sdxl", None)])
def test_controlnet(checkpoint, tmp_path, kind, prefix):
    folder = tiny.write_controlnet(kind, tmp_path / "net")
    found = load_file(folder / WEIGHTS)
    if prefix is not None:
        original = controlnet_names(found, prefix)
        config = json.loads((folder / "config.json").read_text())
        theirs = convert_controlnet_checkpoint(dict(original), config)  # diffusers makes of it what it was made of
        assert theirs.keys() == found.keys() and all(torch.equal(theirs[name], found[name]) for name in found)
    save_file(found if prefix is None else original, tmp_path / "net.safetensors")
    checked = Checkpoint.open(str(checkpoint(kind)))
    unet, factor = checked.unet_config, checked.vae_config.factor
    files = (tmp_path / "net.safetensors", folder)
    ours, reference = (load_controlnet(str(file), unet, factor, mx.float32) for file in files)
    assert same(ours, reference)
    for field in ("heads", "conditioning_embedding_out_channels", "in_channels", "norm_num_groups"):
        assert getattr(ours.config, field) == getattr(reference.config, field)


def test_a_checkpoint_without_a_vae(checkpoint, tmp_path, capfd):
    """A folder and a file, drawn with another; the picture is the same as with its own."""
    options = {"steps": 2, "height": 64, "width": 64}
    vae = str(checkpoint("sd15") / "vae")
    expected = StableDiffusion.from_pretrained(str(checkpoint("sd15")), "float32")("a cat", **options)
    folder = shutil.copytree(checkpoint("sd15"), tmp_path / "model")
    shutil.rmtree(folder / "vae")
    drawn = StableDiffusion.from_pretrained(str(folder), "float32", vae=vae)("a cat", **options)
    assert np.array_equal(drawn.images[0], expected.images[0])
    assert main_generate(["--model", str(folder), "--prompt", "a cat"]) == 1
    assert "lacks the folder vae" in capfd.readouterr().err


def test_a_single_file_without_a_vae(sd1, tmp_path):
    """Latents are as large as the family's, which a VAE's file does not say."""
    whole = originals.write("sd1", sd1, tmp_path / "whole.safetensors")
    found = load_file(whole)
    for name, of_vae in (("unet", False), ("vae", True)):
        part = {n: t for n, t in found.items() if n.startswith("first_stage_model.") == of_vae}
        save_file(part, tmp_path / f"{name}.safetensors")
    ours = Checkpoint.open(str(tmp_path / "unet.safetensors"), vae=str(tmp_path / "vae.safetensors"))
    reference = Checkpoint.open(str(whole))
    assert ours.vae_config == reference.vae_config
    assert same(ours.load("vae", None), reference.load("vae", None))
    assert Checkpoint.open(str(sd1), vae=str(whole)).vae_config == reference.vae_config
    with pytest.raises(CheckpointError, match="lacks the vae.*or name a VAE with --vae"):
        Checkpoint.open(str(tmp_path / "unet.safetensors"))
    parts = [
        f"--{flag}={tmp_path / name}" for flag, name in (("model", "unet.safetensors"), ("vae", "vae.safetensors"))
    ]
    assert main_convert([*parts, "--output", str(tmp_path / "whole")]) == 0
    assert same(Checkpoint.open(str(tmp_path / "whole")).load("vae", None), reference.load("vae", None))


@pytest.mark.parametrize(
    ("flag", "names", "words"),
    [
        ("--vae", ["a.weight"], "x.safetensors is no VAE"),
        ("--vae", [], "is no VAE: .* only none"),
        ("--vae", ["decoder.conv_in.weight"], "lacks .*so its architecture cannot be told"),
        ("--controlnet", ["a.weight"], "x.safetensors is no ControlNet"),
        ("--controlnet", ["lora_controlnet"], "is a Control-LoRA, which is not supported"),
        ("--controlnet", ["input_hint_block.0.weight"], "lacks .*so its architecture cannot be told"),
        ("--controlnet", ["model.diffusion_model.input_blocks.0.0.weight"], "is a whole model"),
        ("--model", ["input_hint_block.0.weight", "control_model.a"], "is a ControlNet; give it to --controlnet"),
        ("--model", ["taesd_decoder.1.weight"], "is a VAE alone; give it to --vae"),
    ],
)
def test_refused(checkpoint, tmp_path, monkeypatch, capfd, flag, names, words):
    monkeypatch.chdir(tmp_path)
    PICTURE.save("p.png")
    save_file({name: torch.zeros(4, 3, 3, 3) for name in names}, "x.safetensors")
    more = ["--control-image", "p.png"] if flag == "--controlnet" else []
    model = [] if flag == "--model" else ["--model", str(checkpoint("sd15"))]
    assert main_generate([*model, "--prompt", "a cat", flag, "x.safetensors", *more]) == 1
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert re.search(words, line), line


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight"])
def test_weights_of_too_few_axes(tmp_path, name):
    save_file({name: torch.zeros(4), "decoder.conv_in.weight": torch.zeros(4, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} should have two axes or more, got shape \(4,\)"):
        OtherVAE.open(str(tmp_path / "x.safetensors"), None)


# ------------------------------------------------------------------------------------------------------ 8 and 64 bits


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_every_number_is_pytorchs(tmp_path, dtype):
    """All there are in 8 bits; beside them tensors of all other types, as they were."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype) if dtype != torch.float64 else torch.randn(6, 4).double()
    others = (torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool)
    kept = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in others}
    save_file({"x": numbers, "one": torch.tensor(3.0), **kept}, tmp_path / "x.safetensors", {"a": "b"})
    ours, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"a": "b"}
    assert np.array_equal(np.array(ours["x"].astype(mx.float32)), numbers.float().numpy(), equal_nan=True)
    assert ours["one"].item() == 3 and ours["one"].shape == ()
    for name, tensor in kept.items():
        assert str(ours[name].dtype).removeprefix("mlx.core.").rstrip("_") == name.removeprefix("torch.")
        assert np.array_equal(np.array(ours[name].astype(mx.float32)), tensor.float().numpy())
    assert read_tensors(tmp_path / "x.safetensors", "on")[0].keys() == {"one"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_a_checkpoint_of_such_numbers(sd1, tmp_path, dtype):
    """Draws what the widened weights draw; the encoder's positions are whole numbers and stay unread."""
    files = []
    for name, change in (("narrow", lambda t: t), ("wide", lambda t: t.float())):
        made = originals.write("sd1", sd1, tmp_path / f"{name}.safetensors", dtype=dtype)
        save_file({n: change(t) if t.is_floating_point() else t for n, t in load_file(made).items()}, made)
        files.append(made)
    options = {"steps": 2, "height": 64, "width": 64}
    drawn = [StableDiffusion.from_pretrained(str(file), "float32")("a cat", **options).latents for file in files]
    assert mx.isfinite(drawn[0]).all() and mx.array_equal(*drawn)


@pytest.mark.parametrize(("names", "shape"), [(("scale_weight", "scale_input"), ()), (("weight_scale", "x"), (4, 1))])
def test_scales_beside_the_weights(tmp_path, names, shape):
    weight, scale = torch.randn(4, 6).to(torch.float8_e4m3fn), torch.rand(shape) + 0.5
    found = {"a.weight": weight, f"a.{names[0]}": scale, "b.weight": torch.ones(2)}
    found |= {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} if names[1] != "x" else {}
    save_file(found | ({"a.scale_input": torch.ones(())} if names[1] != "x" else {}), tmp_path / "x.safetensors")
    ours, _ = read_tensors(tmp_path / "x.safetensors")
    assert ours.keys() == {"a.weight", "b.weight"}
    assert np.array_equal(ours["a.weight"], weight.float() * scale)


def test_other_types_are_named(tmp_path):
    """Not called damaged."""
    save_file({"x": torch.zeros(4, dtype=torch.float8_e8m0fnu)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="numbers of type F8_E8M0 .x., which are not supported"):
        read_tensors(tmp_path / "x.safetensors")
