"""Models that read no prompt: their layouts, original files, and what is refused."""

import json
import shutil

import mlx.core as mx
import pytest
import tiny_unprompted
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file
from tiny import Hub

from mlx_deepcache import StableDiffusion
from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.checkpoints import hub
from mlx_deepcache.checkpoints.checkpoint import BUNDLED, Checkpoint
from mlx_deepcache.checkpoints.families import DDIM, DDPM, LDM, LDM_CLASS
from mlx_deepcache.checkpoints.names import BUNDLED_NAMES
from mlx_deepcache.errors import CheckpointError, UsageError

FAMILIES = {"ddpm": DDPM, "ddpm-6": DDIM, "ldm": LDM, "class": LDM_CLASS}
OPTIONS = {"ddpm": {}, "ldm": {}, "class": {"class_label": 7, "guidance_scale": 2.0}}


def same_weights(one, other, names):
    for name in names:
        ours, theirs = (dict(tree_flatten(c.load(name, None).parameters())) for c in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(ours[key], theirs[key]) for key in theirs)


def drawn(model, kind, **options):
    pipe = StableDiffusion.from_pretrained(str(model), "float32")
    return pipe(steps=3, scheduler="ddim", cache_interval=2, **OPTIONS[kind], **options).latents


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_are_told_by_the_configs(unprompted, kind):
    found = Checkpoint.open(str(unprompted(kind)[0]))
    assert found.family == FAMILIES[kind]
    assert "vae" in found.components or not found.family.decodes
    assert (found.labels is not None) == (kind == "class")


@pytest.mark.parametrize("index", [True, False])
def test_a_flat_repository_with_old_names(unprompted, tmp_path, index):
    """As google/ddpm-cifar10-32 has it; model_index.json or none."""
    folder = unprompted("ddpm")[0]
    flat = tiny_unprompted.flatten(folder, tmp_path / "flat", index)
    found, own = Checkpoint.open(str(flat)), Checkpoint.open(str(folder))
    assert (found.family, found.unet_config, found.source.scheduler()) == (
        DDPM,
        own.unet_config,
        own.source.scheduler(),
    )
    same_weights(found, own, ["unet"])
    assert mx.array_equal(drawn(flat, "ddpm"), drawn(folder, "ddpm"))
    (flat / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match="scheduler_config.json is missing"):
        Checkpoint.open(str(flat)).schedule(None)


@pytest.mark.parametrize("flat", [True, False])
def test_from_the_hub(unprompted, tmp_path, monkeypatch, flat):
    source = unprompted("ddpm")[0]
    folder = tiny_unprompted.flatten(source, tmp_path / "flat", False) if flat else source
    server = Hub(monkeypatch, tmp_path / "cache")
    server.repositories["google/ddpm-cifar10-32"] = folder
    with hub.silence(True):
        found = Checkpoint.open("ddpm-cifar10")
        same_weights(found, Checkpoint.open(str(source)), ["unet"])
        before = len(server.got)
        Checkpoint.open("ddpm-cifar10")
    assert len(server.got) == before  # it was there


def test_ldm_from_the_hub(unprompted, tmp_path, monkeypatch):
    server = Hub(monkeypatch, tmp_path / "cache")
    server.repositories["CompVis/ldm-celebahq-256"] = unprompted("ldm")[0]
    with hub.silence(True):
        found = Checkpoint.open("ldm-celebahq")
    same_weights(found, Checkpoint.open(str(unprompted("ldm")[0])), ["unet", "vae"])


def original(kind, folder, file):
    if kind == "ddpm":
        return tiny_unprompted.write_ddpm_file(folder, file)
    return tiny_unprompted.write_ldm_file(kind, folder, file)


@pytest.mark.parametrize("kind", OPTIONS)
def test_original_files(unprompted, tmp_path, kind):
    folder = unprompted(kind)[0]
    file = original(kind, folder, tmp_path / "model.safetensors")
    found, own = Checkpoint.open(str(file)), Checkpoint.open(str(folder))
    assert found.family == own.family
    same_weights(found, own, own.components)
    if kind == "ddpm":  # the file's scheduler is that of DDPM's own repositories
        assert (found.unet_config, found.native_size) == (own.unet_config, (32, 32))
        config = found.source.scheduler()
        assert (config["variance_type"], config["clip_sample"]) == ("fixed_large", True)
        assert found.schedule(None).alphas_cumprod.tolist() == own.schedule(None).alphas_cumprod.tolist()
    else:
        assert found.schedule(None).config == own.schedule(None).config
        assert found.native_size == (256, 256)  # of the real ones
    assert mx.array_equal(drawn(file, kind, height=64, width=64), drawn(folder, kind, height=64, width=64))


def test_the_size_of_the_larger_original_nets(unprompted, tmp_path):
    """Attention at 16 x 16 on the fifth of six levels makes 256 pixels."""
    tensors = load_file(tiny_unprompted.write_ddpm_file(unprompted("ddpm")[0], tmp_path / "a.safetensors"))
    moved = {
        name.replace("down.1.attn", "down.3.attn").replace("up.1.attn", "up.3.attn"): t for name, t in tensors.items()
    }
    save_file(moved, tmp_path / "b.safetensors")
    found = Checkpoint.open(str(tmp_path / "b.safetensors"))
    assert found.native_size == (128, 128)
    assert found.unet_config.down_block_types == ("DownBlock2D",) * 3 + ("AttnDownBlock2D",)
    assert found.source.scheduler()["variance_type"] == "fixed_small"


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("single", [False, True])
def test_convert(unprompted, tmp_path, capfd, kind, single):
    """What was converted draws the same, and is converted again."""
    source = unprompted(kind)[0]
    source = original(kind, source, tmp_path / "model.safetensors") if single else source
    for model, output in ((source, "new"), (tmp_path / "new", "newer")):
        assert main_convert(["--model", str(model), "--output", str(tmp_path / output)]) == 0
        new, old = Checkpoint.open(str(tmp_path / output)), Checkpoint.open(str(source))
        assert (new.unet_config, new.vae_config, new.family) == (old.unet_config, old.vae_config, old.family)
        same_weights(new, old, old.components)
    parts = {path.name for path in (tmp_path / "new").iterdir() if path.is_dir()}
    assert parts == {"scheduler", *old.components}
    size = {"height": 64, "width": 64}
    assert mx.array_equal(drawn(tmp_path / "new", kind, **size), drawn(source, kind, **size))
    flags = ["--model", str(source), "--output", str(tmp_path / "new"), "--dtype", "float16", "--quantize", "8"]
    assert main_convert([*flags, "--force"]) == 0
    assert "8 bits" in capfd.readouterr().out
    assert mx.isfinite(drawn(tmp_path / "new", kind, **size)).all()


def test_a_bundled_name_is_a_folder_of_the_package(monkeypatch, unprompted, tmp_path):
    assert BUNDLED_NAMES == ("emoji", "emoji-ddpm")
    shutil.copytree(unprompted("ddpm")[0], tmp_path / "emoji-ddpm")
    monkeypatch.setattr("mlx_deepcache.checkpoints.checkpoint.BUNDLED", tmp_path / "emoji")
    assert Checkpoint.open("emoji-ddpm").family == DDPM
    with pytest.raises(CheckpointError, match="the bundled model emoji is not installed"):
        Checkpoint.open(None)
    assert BUNDLED.name == "emoji" and BUNDLED.is_dir()


def changed(unprompted, tmp_path, kind, file, values):
    folder = shutil.copytree(unprompted(kind)[0], tmp_path / "model")
    config = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))
    return folder


UNET = "unet/config.json"


@pytest.mark.parametrize(
    ("kind", "file", "values", "words"),
    [
        ("ddpm", UNET, {"in_channels": 1, "out_channels": 1}, "only nets of red, green and blue"),
        ("ddpm", UNET, {"out_channels": 6}, "without learned variances"),
        (
            "ddpm",
            UNET,
            {"attention_head_dim": 24},
            "a width of 64 cannot be split into heads of attention_head_dim = 24",
        ),
        ("ddpm", UNET, {"attention_head_dim": [8, 8, 8, 8]}, "only one number or null"),
        ("ddpm", UNET, {"down_block_types": ["DownBlock2D"] * 3 + ["CrossAttnDownBlock2D"]}, "in a UNet2DModel"),
        ("ddpm", UNET, {"down_block_types": ["SkipDownBlock2D"] * 4}, "'SkipDownBlock2D', which is not supported"),
        (
            "class",
            "model_index.json",
            {"_class_name": "DDPMPipeline", "vqvae": [None, None]},
            "should be a UNet2DModel",
        ),
        ("ddpm", UNET, {"downsample_padding": 2}, "downsample_padding = 2 is not supported"),
        ("ddpm", UNET, {"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier' is not supported"),
        ("ddpm", UNET, {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ("ddpm", UNET, {"num_class_embeds": 10}, "num_class_embeds = 10 is not supported"),
        ("ddpm", UNET, {"add_attention": False}, "add_attention = False is not supported"),
        ("ddpm", UNET, {"block_out_channels": "wide"}, "block_out_channels = 'wide'"),
        ("ddpm", UNET, {"sample_size": None}, "sample_size = None"),
        (
            "ddpm",
            UNET,
            {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 8},
            "is not supported in a UNet2DCond",
        ),
        ("ldm", UNET, {"out_channels": 6}, "gives 6 channels where the VAE's latents have 3"),
        ("ldm", UNET, {"in_channels": 7}, "reads 7 channels where the VAE's latents have 3"),
        ("class", UNET, {"cross_attention_dim": None}, "cross_attention_dim = None is not supported"),
        ("class", UNET, {"attention_head_dim": None}, "attention_head_dim = None is not supported"),
        ("class", "class_embedding/config.json", {"embedding_dim": 32}, "width of 32, and the U-Net reads 24"),
        ("class", "class_embedding/config.json", {"num_embeddings": "gone"}, "it lacks num_embeddings"),
        ("ldm", "vqvae/config.json", {"_class_name": "VQVAE"}, "a VAE of kind VQVAE is not supported"),
    ],
)
def test_what_is_refused(unprompted, tmp_path, kind, file, values, words):
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(str(changed(unprompted, tmp_path, kind, file, values)))


@pytest.mark.parametrize(("kind", "folder"), [("ldm", "vqvae"), ("class", "class_embedding"), ("ddpm", "unet")])
def test_what_lacks(unprompted, tmp_path, kind, folder):
    model = shutil.copytree(unprompted(kind)[0], tmp_path / "model")
    shutil.rmtree(model / folder)
    with pytest.raises(CheckpointError, match="is no whole checkpoint: it lacks the folder"):
        Checkpoint.open(str(model))


def test_original_files_that_lack_a_part(unprompted, tmp_path):
    tensors = load_file(tiny_unprompted.write_ldm_file("class", unprompted("class")[0], tmp_path / "a.safetensors"))
    for prefix, words in (("first_stage_model.", "lacks the vae"), ("model.diff", "is no Stable Diffusion checkpoint")):
        save_file({n: t for n, t in tensors.items() if not n.startswith(prefix)}, tmp_path / "b.safetensors")
        with pytest.raises(CheckpointError, match=words):
            Checkpoint.open(str(tmp_path / "b.safetensors"))
    ddpm = load_file(tiny_unprompted.write_ddpm_file(unprompted("ddpm")[0], tmp_path / "a.safetensors"))
    del ddpm["conv_in.weight"]
    save_file(ddpm, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="lacks conv_in.weight, so its architecture cannot be told"):
        Checkpoint.open(str(tmp_path / "b.safetensors"))


def test_another_vae(unprompted, checkpoint, tmp_path):
    """One with a codebook for another; none for pixels."""
    ldm = unprompted("ldm")[0]
    found = Checkpoint.open(str(ldm), vae=str(unprompted("class")[0]))
    same_weights(found, Checkpoint.open(str(unprompted("class")[0])), ["vae"])
    with pytest.raises(CheckpointError, match="its latent channels should be 3, got 4"):
        Checkpoint.open(str(ldm), vae=str(checkpoint("sd15")))
    with pytest.raises(UsageError, match="DDPM draws pixels, which need no vae; leave it out"):
        Checkpoint.open(str(unprompted("ddpm")[0]), vae=str(ldm))
