"""LoRAs that a prompt names, and what other programs read in a prompt."""

import re
import unicodedata
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.bundled.emoji_data import concepts
from mlx_deepcache import StableDiffusion
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.errors import UsageError
from mlx_deepcache.generation.prompts import PromptWarning
from mlx_deepcache.generation.tags import take_loras

SMALL = {"steps": 2, "height": 64, "width": 64}


@pytest.fixture
def folder(checkpoint, tmp_path):
    """Two LoRAs of one layer, one of them in a folder of its own."""
    torch.manual_seed(0)
    (tmp_path / "loras/styles").mkdir(parents=True)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    for name in ("ink", "styles/chalk"):
        sides = {"down": torch.randn(2, 32), "up": torch.randn(32, 2)}
        tensors = {f"{layer}.lora_{side}.weight": tensor for side, tensor in sides.items()}
        save_file(tensors, tmp_path / f"loras/{name}.safetensors")
    return tmp_path / "loras"


def test_a_prompt_names_its_loras(checkpoint, folder):
    """The same as when they are given by file; a prompt without one, or with another, gets its own."""
    model = str(checkpoint("sd15"))
    ink, chalk = folder / "ink.safetensors", folder / "styles/chalk.safetensors"
    pipe = StableDiffusion.from_pretrained(model, lora_dir=folder)
    drawn = {
        prompt: np.array(pipe(prompt, **SMALL).latents)
        for prompt in ("a cat", "a <lora:ink:0.8>cat", "a cat<lora:ink><lora:chalk:-0.5:-0.5>", "a cat ")
    }
    given = [[], [(ink, 0.8)], [ink, (chalk, -0.5)], []]
    for latents, loras in zip(drawn.values(), given, strict=True):
        expected = StableDiffusion.from_pretrained(model, loras=loras)("a cat", **SMALL).latents
        assert np.array_equal(latents, expected)
    assert not np.array_equal(drawn["a cat"], drawn["a <lora:ink:0.8>cat"])


def test_generations_begun_side_by_side_keep_their_loras(checkpoint, folder):
    pipe = StableDiffusion.from_pretrained(str(checkpoint("sd15")), lora_dir=folder)
    prompts = ("a cat <lora:ink:1>", "a cat")
    alone = [np.array(pipe(prompt, **SMALL).latents) for prompt in prompts]
    both = [pipe.denoise(pipe.settings(prompt, **SMALL)) for prompt in prompts]
    for _ in zip(*both, strict=True):
        pass
    assert all(np.array_equal(run.latents, latents) for run, latents in zip(both, alone, strict=True))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<lora:inc:1>", "no LoRA 'inc' in .*loras; did you mean ink"),
        ("<lora:../ink:1>", r"no LoRA '../ink'"),
        ("<lora:ink:much>", "<lora:ink:much> should be <lora:name> or <lora:name:scale>"),
        ("<lora:ink:nan>", "with a finite number"),
        ("<lora:ink:0.8:0.6>", "here a LoRA has one, for both"),
    ],
)
def test_names_that_cannot_be(checkpoint, folder, prompt, message, capsys):
    with pytest.raises(UsageError, match=message):
        StableDiffusion.from_pretrained(str(checkpoint("sd15")), lora_dir=folder).settings(prompt, **SMALL)
    flags = ["--model", str(checkpoint("sd15")), "--prompt", prompt, "--lora-dir", str(folder), "--quiet"]
    assert main_generate(flags) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_folder(checkpoint, tmp_path, capsys):
    with pytest.raises(UsageError, match="^lora_dir should be a folder, got 'none'"):
        StableDiffusion.from_pretrained(str(checkpoint("sd15")), lora_dir="none")
    assert main_generate(["--model", str(checkpoint("sd15")), "--prompt", "a", "--lora-dir", "none"]) == 2
    assert "error: --lora-dir should be a folder" in capsys.readouterr().err


def test_pictures_drawn_together_have_the_same_loras(folder):
    assert take_loras(["a<lora:ink:1>", "<lora:ink>b"], folder)[0] == ("a", "b")
    with pytest.raises(UsageError, match="should name the same LoRAs"):
        take_loras(["a <lora:ink:1>", "b"], folder)


@pytest.mark.parametrize(
    ("prompt", "options", "note"),
    [
        ("a cat BREAK a dog", {}, "read as plain text here: BREAK"),
        ("a [cat:dog:0.5]", {}, r"read as plain text here: \[cat:dog:0.5\]"),
        ("a [cat:.5] [x::10]", {}, r"\[cat:.5\], \[x::10\]"),
        ("a [cat|dog]", {}, r"\[cat\|dog\]"),
        ("a cat AND a dog", {}, "AND"),
        ("a <lora:ink:0.8> cat", {}, "<lora:ink:0.8>; lora_dir names the folder"),
        ("a cat", {"negative_prompt": "[a|b]"}, r"\[a\|b\]"),
        (r"a \[cat|dog\] [less] (more:1.2) and break [a: b]", {}, None),
        ("a [cat|dog]", {"plain_prompt": True}, None),
    ],
)
def test_what_is_only_text_here(pipeline, prompt, options, note):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline("sd15").denoise(pipeline("sd15").settings(prompt, **options))
    said = [str(w.message) for w in caught if w.category is PromptWarning]
    assert len(said) == (note is not None)
    if note is not None:
        with pytest.warns(PromptWarning, match=note):
            pipeline("sd15").denoise(pipeline("sd15").settings(prompt, **options))


def test_what_the_bundled_model_draws(capsys):
    """Its list is that of its training; a prompt without any of it gets a note, and others none."""
    assert main_generate(["--model", "emoji", "--list-prompts"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [re.split(r" \(also: |, ", line.rstrip(")")) for line in listed] == [list(c.names) for c in concepts()]
    assert main_generate(["--list-prompts"]) == 0
    assert capsys.readouterr().out.splitlines() == listed
    pipe = StableDiffusion.from_pretrained("emoji")
    for prompt in ("a red apple", "(two foxes:1.3), nice", "", "i want to see a KITTEN today"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.denoise(pipe.settings(prompt))
    with pytest.warns(PromptWarning, match="'a fops' is not one of the 129 things this model draws; nearest: fox,"):
        pipe.denoise(pipe.settings("a fops"))


def test_a_model_without_a_list(checkpoint, capsys):
    for model in (str(checkpoint("sd15")), "sd15"):
        assert main_generate(["--model", model, "--list-prompts"]) == 2
        assert "has no list of what it draws" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_with_its_accents_apart(folder, form):
    """So macOS writes the names of files that its own programs make; a prompt may be typed or copied from there."""
    written = folder / f"{unicodedata.normalize('NFD', 'Café ü')}.safetensors"
    (folder / "ink.safetensors").rename(written)
    prompt = unicodedata.normalize(form, "a cat <lora:Café ü:0.5>")
    assert take_loras([prompt], str(folder))[1] == ((written, 0.5),)
