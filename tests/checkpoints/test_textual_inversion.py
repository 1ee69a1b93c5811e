"""Textual inversions against diffusers' load_textual_inversion."""

import json
import shutil

import numpy as np
import oracle
import pytest
import torch
from helpers import error, loaded
from PIL import Image
from safetensors.torch import save_file

from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.checkpoints.adapters.applied import Addons
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.fields import file_and_word
from mlx_deepcache.generation.conditioning import encode

WIDTHS = {"sd15": (32,), "sd21": (48,), "sdxl": (32, 48)}


def vectors(kind, n, seed=0):
    """Random ones, about as long as the vocabulary's own."""
    torch.manual_seed(seed)
    return [torch.randn(n, width) if n else torch.randn(width) for width in WIDTHS[kind]]


def context(addons, prompt):
    """What our U-Net reads, without guidance."""
    family = addons.checkpoint.family
    return encode(
        [addons.tokenizer(name) for name in family.encoders.values()],
        [loaded(addons, name) for name in family.encoders],
        [prompt],
        None,
        family=family,
        size=(64, 64),
        zeros_for_none=True,
    )


def theirs(pipe, prompt):
    with torch.no_grad():
        out = pipe.encode_prompt(
            prompt, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return out[0].numpy(), out[2].numpy() if len(out) == 4 else None


def ours(folder, *embeddings):
    return Addons(Checkpoint.open(str(folder)), embeddings=embeddings)


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_one_encoder(checkpoint, tmp_path, kind, n):
    """diffusers' format with the word in the file, and A1111's with the file's name; both at once."""
    first, second = vectors(kind, n, 1)[0], vectors(kind, n or 2, 2)[0]
    save_file({"<cat-toy>": first}, tmp_path / "learned_embeds.safetensors")
    save_file({"emb_params": second}, tmp_path / "wild-style.safetensors")
    prompt = "a photo of <cat-toy>, in wild-style with the <cat-toy>"
    plain = context(ours(checkpoint(kind)), prompt).context
    pipe = oracle.pipeline(checkpoint(kind))
    pipe.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"))
    pipe.load_textual_inversion(str(tmp_path / "wild-style.safetensors"), token="wild-style")
    files = [tmp_path / "learned_embeds.safetensors", str(tmp_path / "wild-style.safetensors")]
    expected, _ = theirs(pipe, prompt)
    assert (
        error(context(ours(checkpoint(kind), *files), prompt).context, expected) < 1e-5 < 0.01 < error(plain, expected)
    )


@pytest.mark.parametrize(("n", "names"), [(1, ("clip_l", "clip_g")), (2, ("text_encoders_0", "text_encoders_1"))])
def test_two_encoders(checkpoint, tmp_path, n, names):
    """SDXL. diffusers looks for the text's end at the highest id, which an added word has, if the config is an old one;
    so its config is told the true id here, and ours is not."""
    folder = shutil.copytree(checkpoint("sdxl"), tmp_path / "sdxl")
    config = json.loads((folder / "text_encoder_2" / "config.json").read_text())
    assert config["eos_token_id"] == 2
    config["eos_token_id"] = config["vocab_size"] - 1
    (folder / "text_encoder_2" / "config.json").write_text(json.dumps(config))
    clip_l, clip_g = vectors("sdxl", n)
    save_file({names[1]: clip_g, names[0]: clip_l}, tmp_path / "style.safetensors")
    pipe = oracle.pipeline(folder)
    for tensor, suffix in ((clip_l, ""), (clip_g, "_2")):
        encoder, tokenizer = getattr(pipe, f"text_encoder{suffix}"), getattr(pipe, f"tokenizer{suffix}")
        pipe.load_textual_inversion({"x": tensor}, token="odd", text_encoder=encoder, tokenizer=tokenizer)
    expected, pooled = theirs(pipe, "a red house in odd, at night")
    cond = context(ours(checkpoint("sdxl"), (tmp_path / "style.safetensors", "odd")), "a red house in odd, at night")
    assert error(cond.context, expected) < 1e-5
    assert error(cond.pooled, pooled) < 1e-5


def test_only_the_whole_word(checkpoint, tmp_path):
    """As a word of its own, in any case; and not inside another."""
    save_file({"emb_params": torch.randn(2, 32)}, tmp_path / "zyx.safetensors")
    addons = ours(checkpoint("sd15"), tmp_path / "zyx.safetensors")
    tokenizer = addons.tokenizer("tokenizer")
    ids = [np.array(tokenizer.encode(text)) for text in ("a zyx, cat", "a ZYX, cat", "zyxt azyx")]
    last = len(loaded(addons, "text_encoder").embeddings.token_embedding.weight) - 1
    assert np.array_equal(ids[0], ids[1])
    assert [last - 1, last] == sorted(set(ids[0]))[-2:]
    assert max(ids[2]) < last - 1


@pytest.mark.parametrize(
    ("tensors", "flag", "code", "words"),
    [
        ({"emb_params": (2, 768)}, "", 1, ("width 768", "32 wide", "Stable Diffusion 1.x")),
        ({"clip_l": (1, 768), "clip_g": (1, 1280)}, "", 1, ("768 and 1280", "SDXL")),
        ({"emb_params": (2, 2, 32)}, "", 1, ("shape (n, width)",)),
        ({"a": (1, 32), "b": (1, 32)}, "", 1, ("no textual inversion", "clip_l", "got ")),
        ({"emb_params": (1, 32)}, ":two words", 2, ("no spaces", "FILE:WORD")),
        ({"emb_params": (1, 32)}, ":ca", 2, ("is a word already",)),
    ],
)
def test_an_embedding_that_does_not_fit(checkpoint, tmp_path, monkeypatch, capfd, tensors, flag, code, words):
    monkeypatch.chdir(tmp_path)
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, "a.safetensors")
    flags = ["--model", str(checkpoint("sd15")), "--prompt", "a cat", "--steps", "1", "--height", "64", "--width", "64"]
    assert main_generate([*flags, "--embedding", f"a.safetensors{flag}"]) == code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


def test_the_flag(checkpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for text, (file, word) in {
        "a.safetensors": ("a.safetensors", None),
        "a.safetensors:<x>": ("a.safetensors", "<x>"),
        "C:\\files\\a.safetensors": ("C:\\files\\a.safetensors", None),
        "C:\\a.safetensors:x": ("C:\\a.safetensors", "x"),
    }.items():
        assert tuple(map(str, file_and_word(text))) == (file, str(word))
    save_file({"emb_params": torch.randn(3, 32)}, "style.safetensors")
    flags = ["--model", str(checkpoint("sd15")), "--prompt", "a cat in style", "--steps", "2"]
    flags += ["--height", "64", "--width", "64"]
    for i, extra in enumerate(([], ["--embedding", "style.safetensors"], ["--embedding", "style.safetensors:other"])):
        assert main_generate([*flags, "--output", f"{i}.png", *extra]) == 0
    pictures = [np.asarray(Image.open(f"{i}.png")) for i in range(3)]
    assert np.array_equal(pictures[0], pictures[2])  # nobody says "other"
    assert not np.array_equal(pictures[0], pictures[1])
    twice = ["--embedding", "style.safetensors", "--embedding", "style.safetensors"]
    assert main_generate([*flags, *twice]) == 2
    assert "two embeddings" in capfd.readouterr().err
