"""Stable Video Diffusion's single files in the original layout."""

import mlx.core as mx
import pytest
import tiny_video
import video_originals
from helpers import PICTURE
from mlx.utils import tree_flatten

from mlx_deepcache import StableDiffusion
from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.errors import CheckpointError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With heads as wide as in the real one, which a file does not say."""
    return tiny_video.build(tmp_path_factory.mktemp("svd"), (64, 64, 128, 128), (1, 1, 2, 2), (80, 1))


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    return video_originals.write(folder, tmp_path_factory.mktemp("file") / "svd.safetensors")


@pytest.mark.parametrize("name", ["unet", "vae", "image_encoder"])
def test_parts_are_those_of_the_folder(folder, file, name):
    ours, theirs = (Checkpoint.open(str(model)).load(name, None) for model in (file, folder))
    expected = dict(tree_flatten(theirs.parameters()))
    found = dict(tree_flatten(ours.parameters()))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[key], expected[key]) for key in expected)


def test_it_draws_what_the_folder_draws(folder, file):
    options = {"image": PICTURE, "height": 64, "width": 64, "frames": 3, "steps": 3, "cache_interval": 2}
    drawn = [StableDiffusion.from_pretrained(str(model), "float32")(**options).latents for model in (file, folder)]
    assert mx.array_equal(*drawn)


def test_schedule_and_frames(file, folder, tmp_path):
    found = Checkpoint.open(str(file))
    assert found.schedule(None).config == Checkpoint.open(str(folder)).schedule(None).config
    assert found.frames == 14
    xt = tmp_path / "svd_xt.safetensors"
    xt.symlink_to(file)
    assert Checkpoint.open(str(xt)).frames == 25


def test_convert(file, tmp_path, capfd):
    assert main_convert(["--model", str(file), "--output", str(tmp_path / "new")]) == 0
    new, old = Checkpoint.open(str(tmp_path / "new")), Checkpoint.open(str(file))
    assert (new.unet_config, new.vae_config, new.family) == (old.unet_config, old.vae_config, old.family)
    net = new.load("unet", None)
    assert mx.array_equal(net.mid_block.attentions[0].time_mixer.mix_factor, _mix(old))


def _mix(checkpoint):
    return checkpoint.load("unet", None).mid_block.attentions[0].time_mixer.mix_factor


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("conditioner.embedders.0.", "lacks the image_encoder"),
        ("first_stage_model.", "lacks the vae"),
        ("conditioner.embedders.3.", "lacks conditioner.embedders.3.encoder.encoder.conv_in.weight"),
    ],
)
def test_a_file_without_a_part(folder, tmp_path, prefix, words):
    def without(tensors):
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}

    lacking = video_originals.write(folder, tmp_path / "a.safetensors", without)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(str(lacking))
