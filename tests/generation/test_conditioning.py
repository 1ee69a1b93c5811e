"""Tokenizers and text encoders against transformers, and what diffusers makes of them."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import error, to_torch_layout, token_rows
from oracle import generate, shared, text, text_encoder, token_ids
from oracle import pipeline as oracle_pipeline
from tiny import KINDS
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from mlx_deepcache.checkpoints.tokenizer import load_tokenizer
from mlx_deepcache.errors import UsageError
from mlx_deepcache.generation.conditioning import encode
from mlx_deepcache.generation.prompts import PromptWarning, parse
from mlx_deepcache.nets.clip import CLIPConfig, CLIPTextModel

PROMPTS = ["a small red cat", "", "a cat! in the rain!!", "An OLD tree, at night: naïve 猫"]


def tokenizers(folder):
    return [name for name in ("tokenizer", "tokenizer_2") if (folder / name).is_dir()]


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_token_ids(checkpoint, kind):
    folder = checkpoint(kind)
    for name in tokenizers(folder):
        ours = token_rows(load_tokenizer(folder / name), PROMPTS)
        assert np.array_equal(ours, token_ids(folder, PROMPTS, name.removeprefix("tokenizer")))


def test_a_long_prompt_is_cut_and_says_what_is_lost(checkpoint):
    prompt = "a cat " * 60 + "blue flower"
    with pytest.warns(PromptWarning, match="not used: .*blue flower"):
        ours = token_rows(load_tokenizer(checkpoint("sd15") / "tokenizer"), [prompt])
    assert np.array_equal(ours, token_ids(checkpoint("sd15"), [prompt]))


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_are_those_of_transformers(checkpoint, pipeline, kind):
    folder = checkpoint(kind)
    for name in tokenizers(folder):
        suffix = name.removeprefix("tokenizer")
        tokens = token_ids(folder, PROMPTS, suffix)
        expected = text_encoder(folder, tokens, suffix)
        encoder = pipeline(kind).checkpoint.load(f"text_encoder{suffix}", None)
        last, pooled = encoder(mx.array(tokens))
        penultimate, _ = encoder(mx.array(tokens), penultimate=True)
        assert error(last, expected["last"]) < 1e-5
        assert error(penultimate, expected["penultimate"]) < 1e-5
        assert error(pooled, expected["pooled"]) < 1e-5


def encoded(checkpoint, prompts, negatives=None, **options):
    """What the U-Net of a checkpoint would read."""
    encoders = checkpoint.family.encoders
    tokenizers = [checkpoint.source.tokenizer(name) for name in encoders.values()]
    nets = [checkpoint.load(name, None) for name in encoders]
    given = {"size": (72, 104), "zeros_for_none": True, **options}
    return encode(tokenizers, nets, prompts, negatives, family=checkpoint.family, **given)


@pytest.mark.parametrize("kind", ["sd15", "sd21-base", "sdxl"])
def test_context_is_what_diffusers_gives_the_unet(checkpoint, pipeline, kind):
    cond = encoded(pipeline(kind).checkpoint, PROMPTS)
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
    tokens = np.random.default_rng(0).integers(3, 97, (3, 20))
    tokens[:, 12:] = 98
    with torch.no_grad():
        expected = reference(torch.tensor(tokens), output_hidden_states=True)
    last, pooled = ours(mx.array(tokens))
    assert error(last, expected.last_hidden_state) < 1e-5
    assert error(pooled, expected.text_embeds) < 1e-5


LONG = "a small red cat (at night:1.4) " * 12 + "[an old tree]"  # whose mean, divided by, is not near zero anywhere
SHORT = "(two) dogs"


def encoded_by_hand(folder, name, text, chunks, penultimate):
    """What A1111 makes of a weighted text of any length, with transformers' parts: (chunks * 77, C)."""
    suffix = name.removeprefix("text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / f"tokenizer{suffix}")
    tokens, weights = [], []
    for piece, weight in parse(text):  # held against A1111's own examples elsewhere
        piece_ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        tokens, weights = tokens + piece_ids, weights + [weight] * len(piece_ids)
    out = []
    for i in range(chunks):
        part, w = tokens[75 * i : 75 * (i + 1)], weights[75 * i : 75 * (i + 1)]
        padding = [tokenizer.pad_token_id] * (75 - len(part))
        row = np.array([[tokenizer.bos_token_id, *part, tokenizer.eos_token_id, *padding]])
        expected = text_encoder(folder, row, suffix)
        z = np.asarray(expected["penultimate" if penultimate else "last"], np.float64)
        multiplied = z * np.array([1, *w, 1, *[1] * len(padding)])[None, :, None]
        if not penultimate:
            multiplied *= z.mean() / multiplied.mean()
        out.append(multiplied[0])
    return np.concatenate(out)


@pytest.mark.parametrize("kind", ["sd15", "sd21-base", "sdxl"])
def test_weighted_and_long_prompts(checkpoint, pipeline, kind):
    ours, folder, xl = pipeline(kind).checkpoint, checkpoint(kind), kind == "sdxl"
    cond = encoded(ours, [LONG, SHORT], weighted=True, long=True)
    chunks = cond.context.shape[1] // 77
    assert chunks > 1
    for i, text_ in enumerate((LONG, SHORT)):
        expected = np.concatenate(
            [encoded_by_hand(folder, n, text_, chunks, xl) for n in ours.family.encoders], axis=-1
        )
        assert error(cond.context[i], expected) < 1e-5


def test_sdxl_reads_a_second_prompt(checkpoint, pipeline):
    texts = {"prompt_2": "oil on canvas", "negative_2": "a photo"}
    cond = encoded(pipeline("sdxl").checkpoint, ["a cat"], ["a dog"], **texts)
    with torch.no_grad():
        given, without, pooled, pooled_without = shared(str(checkpoint("sdxl"))).encode_prompt(
            "a cat", "oil on canvas", negative_prompt="a dog", negative_prompt_2="a photo"
        )
    assert error(cond.context, np.concatenate([without, given])) < 1e-5
    assert error(cond.pooled, np.concatenate([pooled_without, pooled])) < 1e-5


@pytest.mark.parametrize(("kind", "skip"), [("sd15", 1), ("sd21-base", 1), ("sdxl", 1), ("sd15", 0)])
def test_clip_skip_is_that_of_diffusers(checkpoint, pipeline, kind, skip):
    """Whole pictures, of which the negative prompt skips nothing."""
    pipe = oracle_pipeline(checkpoint(kind))
    encoder = pipe.text_encoder
    if kind != "sdxl" and not hasattr(encoder, "text_model"):  # where this diffusers looks for it
        encoder.text_model = SimpleNamespace(final_layer_norm=encoder.final_layer_norm)
    options = {"negative_prompt": "blurry", "steps": 4, "guidance_scale": 5.0, "height": 64, "width": 64}
    expected, plain = (
        generate(checkpoint(kind), "a cat", pipe=pipe, seed=[3], interval=2, options=more, **options)["latents"]
        for more in ({"clip_skip": skip}, {})
    )
    result = pipeline(kind)("a cat", seeds=[3], cache_interval=2, clip_skip=skip, **options)
    assert error(to_torch_layout(result.latents), expected) < 1e-4
    assert (error(plain, expected) > 1e-2) == (skip > 0)


def test_clip_skip_of_a_long_prompt_that_is_negative_too(pipeline):
    """Each half of the batch has its own, in every chunk."""
    prompt, checkpoint = "a cat " * 50, pipeline("sd15").checkpoint
    both = encoded(checkpoint, [prompt], [prompt], long=True, clip_skip=1).context
    plain, skipped = (encoded(checkpoint, [prompt], long=True, clip_skip=skip).context[0] for skip in (0, 1))
    assert error(both[0], plain) < 1e-6 and error(both[1], skipped) < 1e-6 and error(plain, skipped) > 1e-2


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_clip_skip_leaves_a_layer(pipeline, kind):
    layers = pipeline(kind).checkpoint.part("text_encoder").config["num_hidden_layers"]
    most = layers - 1 - (kind == "sdxl")
    pipeline(kind).settings("a cat", clip_skip=most)
    with pytest.raises(UsageError, match=f"clip_skip should be at most {most} for this model's text_encoder, got"):
        pipeline(kind).settings("a cat", clip_skip=most + 1)
