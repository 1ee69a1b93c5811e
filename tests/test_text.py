"""Tokenizers and text encoders against transformers, and what diffusers makes of them."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import KINDS
from helpers import error
from oracle import text, text_encoder, token_ids
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from mlx_deepcache.clip import CLIPTextModel
from mlx_deepcache.config import CLIPConfig
from mlx_deepcache.prompts import PromptWarning, encode, load_tokenizer, tokenize

PROMPTS = ["a small red cat", "", "a cat! in the rain!!", "An OLD tree, at night: naïve 猫"]


def tokenizers(folder):
    return [name for name in ("tokenizer", "tokenizer_2") if (folder / name).is_dir()]


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_token_ids(checkpoint, kind):
    folder = checkpoint(kind)
    for name in tokenizers(folder):
        ours = tokenize(load_tokenizer(folder / name), PROMPTS)
        assert np.array_equal(ours, token_ids(folder, PROMPTS, name.removeprefix("tokenizer")))


def test_a_long_prompt_is_cut_and_says_what_is_lost(checkpoint):
    prompt = "a cat " * 60 + "blue flower"
    with pytest.warns(PromptWarning, match="not used: .*blue flower"):
        ours = tokenize(load_tokenizer(checkpoint("sd15") / "tokenizer"), [prompt])
    assert np.array_equal(ours, token_ids(checkpoint("sd15"), [prompt]))


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_are_those_of_transformers(checkpoint, pipeline, kind):
    folder = checkpoint(kind)
    for name in tokenizers(folder):
        suffix = name.removeprefix("tokenizer")
        ids = token_ids(folder, PROMPTS, suffix)
        expected = text_encoder(folder, ids, suffix)
        encoder = pipeline(kind)._part(f"text_encoder{suffix}")
        last, pooled = encoder(mx.array(ids))
        penultimate, _ = encoder(mx.array(ids), penultimate=True)
        assert error(last, expected["last"]) < 1e-5
        assert error(penultimate, expected["penultimate"]) < 1e-5
        assert error(pooled, expected["pooled"]) < 1e-5


@pytest.mark.parametrize("kind", ["sd15", "sd21-base", "sdxl"])
def test_context_is_what_diffusers_gives_the_unet(checkpoint, pipeline, kind):
    pipe = pipeline(kind)
    names = pipe.checkpoint.text_encoders
    cond = encode(
        [pipe._tokenizer(n.replace("text_encoder", "tokenizer")) for n in names],
        [pipe._part(n) for n in names],
        PROMPTS,
        None,
        size=(72, 104),
        zeros_for_none=True,
    )
    context, pooled = text(checkpoint(kind), PROMPTS)
    assert error(cond.context, context) < 1e-5
    if kind == "sdxl":
        assert error(cond.pooled, pooled) < 1e-5
        assert np.array_equal(cond.time_ids, [[72, 104, 0, 0, 72, 104]] * len(PROMPTS))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [2, 98])
def test_encoder_of_another_size(act, eos):
    """Both activations and both rules for the end of the text, on a model no checkpoint has."""
    torch.manual_seed(0)
    config = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": 100,
        "hidden_act": act,
        "eos_token_id": eos,
        "projection_dim": 12,
        "max_position_embeddings": 20,
    }
    reference = CLIPTextModelWithProjection(CLIPTextConfig(**config)).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours = CLIPTextModel(CLIPConfig.from_dict({**config, "architectures": ["CLIPTextModelWithProjection"]}))
    weights = {k.removeprefix("text_model."): mx.array(v.numpy()) for k, v in reference.state_dict().items()}
    ours.load_weights(list(weights.items()))
    ids = np.random.default_rng(0).integers(3, 97, (3, 20))
    ids[:, 12:] = 98
    with torch.no_grad():
        expected = reference(torch.tensor(ids), output_hidden_states=True)
    last, pooled = ours(mx.array(ids))
    assert error(last, expected.last_hidden_state) < 1e-5
    assert error(pooled, expected.text_embeds) < 1e-5
