"""Single files: every tensor against the diffusers folder that they were made of, and against diffusers' reading."""

import importlib.util
import json
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import originals
import pytest
import torch
from diffusers import UNet2DConditionModel as UNet2DCondition
from diffusers.loaders import single_file_utils as theirs
from helpers import token_rows
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from mlx_deepcache import StableDiffusion
from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.checkpoints import tokenizer as vocabulary
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.checkpoints.folder import Folder
from mlx_deepcache.checkpoints.original.singlefile import ModelWarning, SingleFile
from mlx_deepcache.checkpoints.tokenizer import load_tokenizer
from mlx_deepcache.errors import CheckpointError
from mlx_deepcache.nets.autoencoder import AutoencoderKL, VAEConfig
from mlx_deepcache.nets.clip import CLIPConfig, CLIPTextModel
from mlx_deepcache.nets.unet_parts import UNetConfig
from mlx_deepcache.unet import UNet2DConditionModel

KINDS = tuple(originals.UNETS)
V = {"modelspec.prediction_type": "v"}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """made(kind): the diffusers folder and the single file of a tiny checkpoint."""
    built = {}

    def paths(kind):
        if kind not in built:
            root = tmp_path_factory.mktemp(kind)
            folder = originals.build(kind, root / "folder")
            built[kind] = (
                folder,
                originals.write(kind, folder, root / "any-name.safetensors", V if kind == "sd2" else None),
            )
        return built[kind]

    return paths


def components(folder):
    return [name for name in ("text_encoder", "text_encoder_2", "unet", "vae") if (folder / name).is_dir()]


def module(source, name, dtype=None):
    """A component of ours, filled from a source, as {name: array}."""
    part = source.part(name)
    config = part.config
    if name == "unet":
        net = UNet2DConditionModel(UNetConfig.from_dict(config))
    elif name == "vae":
        net = AutoencoderKL(VAEConfig.from_dict(config))
    else:
        net = CLIPTextModel(CLIPConfig.from_dict(config))
    return dict(tree_flatten(part.load(net, dtype).parameters()))


def described(source, name):
    """A component's config as we read it."""
    reader = {"unet": UNetConfig, "vae": VAEConfig}.get(name, CLIPConfig)
    return reader.from_dict(source.part(name).config)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_and_setting_is_that_of_the_folder(made, kind):
    folder, file = made(kind)
    single, whole = SingleFile(file), Folder(folder)
    assert single.index["_class_name"] == whole.index["_class_name"]
    assert single.index.get("force_zeros_for_empty_prompt") == whole.index.get("force_zeros_for_empty_prompt")
    for name in components(folder):
        ours, reference = module(single, name), module(whole, name)
        assert ours.keys() == reference.keys()
        for tensor in ours:
            assert mx.array_equal(ours[tensor], reference[tensor]), tensor
        if name == "unet":
            assert described(single, name).heads == described(whole, name).heads
            assert described(single, name).transformer_layers == described(whole, name).transformer_layers
            same = (
                "down_block_types",
                "up_block_types",
                "mid_block_type",
                "sample_size",
                "in_channels",
                "norm_num_groups",
            )
            for field in (*same, "addition_time_embed_dim", "addition_embed_type", "layers_per_block"):
                assert getattr(described(single, name), field) == getattr(described(whole, name), field), field
        else:
            assert described(single, name) == described(whole, name)
    ours, reference = single.scheduler(), whole.scheduler()
    assert ours["_class_name"] == reference["_class_name"]
    assert {k: v for k, v in ours.items() if k in reference} == {k: reference[k] for k in ours if k in reference}


@pytest.mark.parametrize("kind", ["sd1", "sd1-inpaint", "sd2", "xl", "refiner"])
def test_diffusers_reads_the_same(made, kind):
    """diffusers' single-file conversion, function by function, gives the tensors that ours gives."""
    folder, file = made(kind)
    raw, single = load_file(file), SingleFile(file)
    config = json.loads((folder / "unet" / "config.json").read_text())
    expected = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(raw), config),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(raw), json.loads((folder / "vae" / "config.json").read_text())),
    }
    if kind in ("sd1", "sd1-inpaint", "xl"):
        expected["text_encoder"] = theirs.convert_ldm_clip_checkpoint(dict(raw))
    for name, prefix in {
        "sd2": {"text_encoder": "cond_stage_model.model."},
        "xl": {"text_encoder_2": "conditioner.embedders.1.model."},
        "refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
    }.get(kind, {}).items():
        # the width by which diffusers cuts in_proj comes from text_projection or from this model
        keep = {n: t for n, t in raw.items() if not n.endswith("text_projection")}
        net = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=128, num_attention_heads=2, num_hidden_layers=1))
        expected[name] = theirs.convert_open_clip_checkpoint(net, keep, prefix)
        if kind != "sd2":
            expected[name]["text_projection.weight"] = raw[f"{prefix}text_projection"].T
    for name, reference in expected.items():
        bare = {n.removeprefix("text_model."): t for n, t in reference.items() if not n.endswith("position_ids")}
        ours, _ = single.part(name).tensors()
        ours = {n.removeprefix("text_model."): t for n, t in ours.items() if not n.endswith("position_ids")}
        assert ours.keys() == bare.keys()
        for tensor, value in bare.items():
            assert np.array_equal(np.array(ours[tensor]).reshape(value.shape), value.numpy()), tensor


@pytest.mark.parametrize("kind", ["sd1", "sd2", "xl"])
def test_the_picture_is_the_folders(made, kind):
    options = {"height": 64, "width": 64, "steps": 3, "seeds": [5], "cache_interval": 2, "negative_prompt": "rain!"}
    latents = []
    for path in made(kind):
        pipe = StableDiffusion.from_pretrained(str(path), "float32", keep=False)
        latents.append(np.array(pipe("a cat, naïve 猫!", **options).latents))
    assert np.isfinite(latents[0]).all()
    assert np.array_equal(*latents)


def test_convert_writes_a_folder(made, tmp_path, capfd):
    folder, file = made("xl")
    assert main_convert(["--model", str(file), "--output", str(tmp_path / "out"), "--dtype", "float16"]) == 0
    converted = Folder(tmp_path / "out")
    for name in components(folder):
        ours, reference = module(converted, name), module(Folder(folder), name)
        for tensor in reference:
            assert mx.array_equal(ours[tensor], reference[tensor].astype(mx.float16)), tensor
    options = {"height": 64, "width": 64, "steps": 2, "seeds": [1]}
    pictures = [
        np.array(StableDiffusion.from_pretrained(str(path), "float16", keep=False)("a cat", **options).latents)
        for path in (file, tmp_path / "out")
    ]
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(made, tmp_path, dtype):
    folder, _ = made("sd1")
    file = originals.write("sd1", folder, tmp_path / "half.safetensors", dtype=dtype)
    ours = module(SingleFile(file), "unet", mx.float32)
    expected = module(Folder(folder), "unet")
    kind = mx.float16 if dtype == torch.float16 else mx.bfloat16
    assert all(mx.array_equal(ours[n], expected[n].astype(kind).astype(mx.float32)) for n in expected)


FULL_SIZE = {
    "sd1": (859_520_964, {}, "StableDiffusionPipeline"),
    "sd1-inpaint": (859_535_364, {"in_channels": 9}, "StableDiffusionInpaintPipeline"),
    "sd2": (865_910_724, {}, "StableDiffusionPipeline"),
    "xl": (2_567_463_684, {}, "StableDiffusionXLPipeline"),
    "refiner": (2_259_526_660, {}, "StableDiffusionXLImg2ImgPipeline"),
}
SD = {"block_out_channels": (320, 640, 1280, 1280), "down_block_types": (*[originals.CROSS] * 3, originals.DOWN)}
PUBLISHED = {
    "sd1": SD | {"attention_head_dim": 8, "cross_attention_dim": 768},
    "sd2": SD | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
    "xl": originals.XL
    | {
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "refiner": originals.REFINER
    | {
        "block_out_channels": (384, 768, 1536, 1536),
        "attention_head_dim": (6, 12, 24, 24),
        "transformer_layers_per_block": (4, 4, 4, 4),
        "cross_attention_dim": 1280,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    },
}


@pytest.mark.parametrize("kind", FULL_SIZE)
def test_published_architectures(tmp_path, kind):
    """Files of the true sizes, holes but for their headers: every name, shape and number of heads of the U-Net."""
    parameters, more, pipeline = FULL_SIZE[kind]
    options = PUBLISHED[kind.removesuffix("-inpaint")] | more
    ups = tuple(originals.UP[block] for block in reversed(options["down_block_types"]))
    with torch.device("meta"):
        net = UNet2DCondition(up_block_types=ups, **options)
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    attends = [i for i, block in enumerate(reversed(options["down_block_types"])) if block == originals.CROSS]
    header = {f"model.diffusion_model.{originals.unet_name(n, 2, attends)}": s for n, s in shapes.items()}
    if kind in ("xl", "refiner"):
        prefix = f"conditioner.embedders.{int(kind == 'xl')}.model."
        text = {"token_embedding.weight": (49408, 1280), "positional_embedding": (77, 1280)}
        text |= {"transformer.resblocks.31.ln_1.weight": (1280,), "text_projection": (1280, 1280)}
        text["transformer.resblocks.0.mlp.c_fc.weight"] = (5120, 1280)
        header |= {prefix + name: shape for name, shape in text.items()}
    offset = 0
    for name, shape in header.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (offset, offset := offset + size)}
    text = json.dumps(header).encode()
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    single = SingleFile(tmp_path / "x.safetensors", "epsilon")
    assert single.index["_class_name"] == pipeline
    ours, _ = single.part("unet").tensors()
    assert {name: tuple(t.shape) for name, t in ours.items()} == shapes
    config = UNetConfig.from_dict(single.part("unet").config)
    assert config.heads == tuple(np.broadcast_to(options["attention_head_dim"], config.levels))
    ours = UNet2DConditionModel(config).parameters()
    assert sum(p.size for _, p in tree_flatten(ours)) == sum(p.numel() for p in net.parameters()) == parameters
    if kind in ("xl", "refiner"):
        assert single.part("text_encoder_2").config["num_attention_heads"] == 20
        assert config.addition_time_embed_dim == 256


# -------------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    ("kind", "metadata", "markers", "given", "expected"),
    [
        ("sd1", {}, (), None, ("epsilon", 64, "PNDMScheduler")),
        ("sd2", {"modelspec.prediction_type": "epsilon"}, (), None, ("epsilon", 64, "PNDMScheduler")),
        (
            "sd2",
            {"modelspec.architecture": "stable-diffusion-v2-768-v"},
            (),
            None,
            ("v_prediction", 96, "DDIMScheduler"),
        ),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}, (), None, ("epsilon", 64, "PNDMScheduler")),
        ("sd2", {"ss_v_parameterization": "True"}, (), None, ("v_prediction", 96, "DDIMScheduler")),
        ("sd2", V, (), "epsilon", ("epsilon", 64, "PNDMScheduler")),
        ("xl", {}, (), "v_prediction", ("v_prediction", 128, "EulerDiscreteScheduler")),
        ("xl", {}, ("v_pred",), None, ("v_prediction", 128, "EulerDiscreteScheduler")),
        ("xl", {}, ("v_pred", "ztsnr"), None, ("v_prediction", 128, "EulerDiscreteScheduler")),
    ],
)
def test_prediction_type(made, tmp_path, kind, metadata, markers, given, expected):
    tensors = load_file(made(kind)[1]) | {name: torch.zeros(0) for name in markers}
    tensors = {n: t for n, t in tensors.items() if not n.startswith(("first_stage", "cond_stage"))}
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single = SingleFile(tmp_path / "model.safetensors", given)
    config = single.scheduler()
    assert (config["prediction_type"], single.part("unet").config["sample_size"], config["_class_name"]) == expected
    assert config.get("rescale_betas_zero_snr", False) == ("ztsnr" in markers)
    assert config["timestep_spacing"] == ("trailing" if "ztsnr" in markers else "leading")


def test_sd2_that_says_nothing_is_taken_for_v_and_says_so(made, tmp_path):
    save_file(load_file(made("sd2")[1]), tmp_path / "model.safetensors")
    with pytest.warns(ModelWarning, match="prediction_type='epsilon'"):
        checkpoint = Checkpoint.open(str(tmp_path / "model.safetensors"))
    assert checkpoint.schedule(None).config["prediction_type"] == "v_prediction"
    assert checkpoint.native_size == (768, 768)


def test_prediction_type_of_a_folder(checkpoint, tmp_path, capfd):
    assert Checkpoint.open(str(checkpoint("sd21"))).schedule(None).config["prediction_type"] == "v_prediction"
    flags = ["--model", str(checkpoint("sd21")), "--prediction-type", "epsilon", "--output", str(tmp_path / "out")]
    assert main_convert(flags) == 0
    assert Checkpoint.open(str(tmp_path / "out")).schedule("ddim").config["prediction_type"] == "epsilon"


# --------------------------------------------------------------------------------------------------------- vocabulary


def test_vocabulary_is_clips(tmp_path):
    """A line whose ids are well known; and the folder that is written gives the same, with either padding."""
    prompts = ["a photo of a cat", "hello, world!! (test:1.2)", ""]
    assert len(vocabulary.vocabulary()) == vocabulary.SIZE
    for pad, padding in (("!", 0), (vocabulary.END, 49407)):
        (tmp_path / str(padding)).mkdir()
        vocabulary.write(tmp_path / str(padding), pad)
        ids = np.array(token_rows(vocabulary.tokenizer(pad), prompts))
        assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, padding]
        assert np.array_equal(token_rows(load_tokenizer(tmp_path / str(padding)), prompts), ids)


def test_vocabulary_against_openais():
    """Every token of the tokenizer that CLIP was published with, and what it makes of some prompts."""
    file = Path(importlib.util.find_spec("clip").origin).with_name("simple_tokenizer.py")  # the package imports models
    spec = importlib.util.spec_from_file_location("simple_tokenizer", file)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    reference = theirs.SimpleTokenizer()
    assert vocabulary.vocabulary() == reference.encoder
    prompts = ["Ein Märchenwald, 8k; it's 猫!", "hello, world... (test:1.2)", "", "🙂 émigré_42 don't", "zymurgy"]
    ours = np.array(token_rows(vocabulary.tokenizer(vocabulary.END), prompts))
    for row, prompt in zip(ours, prompts, strict=True):
        expected = [49406, *reference.encode(prompt), 49407]
        assert row.tolist() == expected + [49407] * (77 - len(expected))


# -------------------------------------------------------------------------------------------------------------- errors


def without(prefix):
    return lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(prefix)}


def lora(tensors):
    return {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 8)}


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("sd1", without("first_stage_model."), ("lacks the vae", "first_stage_model.")),
        ("sd1", without("cond_stage_model."), ("lacks the text_encoder", "cond_stage_model.transformer.")),
        ("xl", without(("conditioner.", "first_stage_model.")), ("SDXL", "lacks the vae")),
        ("xl", without("conditioner.embedders.1."), ("lacks the text_encoder_2",)),
        ("sd1", without("model.diffusion_model.out.2.bias"), ("lacks conv_out.bias",)),
        ("sd1", lambda t: t | {"model.diffusion_model.extra.weight": torch.zeros(1)}, ("holds extra.weight",)),
        ("sd1", without("model.diffusion_model."), ("no Stable Diffusion checkpoint",)),
        ("sd1", lora, ("is a LoRA", "--lora")),
        ("sd1", lambda t: {"control_model.input_hint_block.0.weight": torch.zeros(1)}, ("is a ControlNet",)),
        ("xl", lambda t: t | {"edm_mean": torch.zeros(4)}, ("EDM", "not supported")),
    ],
)
def test_what_lacks_is_said_in_one_line(made, tmp_path, monkeypatch, capfd, kind, change, words):
    monkeypatch.chdir(tmp_path)
    file = originals.write(kind, made(kind)[0], tmp_path / "x.safetensors", change=change)
    size = ["--height", "64", "--width", "64", "--steps", "1"]
    assert main_generate(["--model", str(file), "--prompt", "a cat", *size]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize("name", ["model.ckpt", "renamed.safetensors"])
def test_pickles_are_refused(tmp_path, name):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / name)
    with pytest.raises(CheckpointError, match="pickle.*could run code"):
        Checkpoint.open(str(tmp_path / name))


def test_a_file_that_is_not_there_is_not_asked_of_the_hub():
    with pytest.raises(CheckpointError, match="there is no file models/mine.safetensors"):
        Checkpoint.open("models/mine.safetensors")
