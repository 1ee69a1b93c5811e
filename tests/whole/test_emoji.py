"""The bundled model against diffusers and the pip package DeepCache, on the same files; no picture is stored."""

import numpy as np
import pytest
from helpers import at, conditioning, error, to_mlx, to_torch_layout, token_rows, unet_inputs
from oracle import generate, text_encoder, token_ids, unet_cached_call, unet_call, vae_decode, vae_encode

from mlx_deepcache import StableDiffusion
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.checkpoints.checkpoint import BUNDLED
from mlx_deepcache.checkpoints.tokenizer import load_tokenizer

PROMPTS = ["a red apple", "a drawing of a cat", "", "three weird words: zyzzyva, quokka!"]


@pytest.fixture(scope="module")
def emoji():
    return StableDiffusion.from_pretrained(None, "float32")


def test_text_encoder(emoji):
    ids = token_rows(load_tokenizer(BUNDLED / "tokenizer"), PROMPTS)
    assert np.array_equal(ids, token_ids(BUNDLED, PROMPTS))
    hidden, _ = emoji.component("text_encoder")(ids)
    assert error(hidden, text_encoder(BUNDLED, np.array(ids))["last"]) < 1e-4


def test_unet(emoji):
    unet = emoji.component("unet")
    x, context, _ = unet_inputs(unet.config)
    prompt = unet.prepare(conditioning(context, None))
    out, features = unet(to_mlx(x), at(unet, prompt, 701), prompt, branch=1)
    assert error(to_torch_layout(out), unet_call(BUNDLED, x, 701, context)) < 1e-4
    cached, _ = unet(to_mlx(x), at(unet, prompt, 681), prompt, branch=1, reused=features)
    expected = unet_cached_call(BUNDLED, 1, (x, 701), (x, 681), context)
    assert error(to_torch_layout(cached), expected) < 1e-4


def test_vae(emoji):
    vae, rng = emoji.component("vae"), np.random.default_rng(0)
    latents = rng.standard_normal((1, 4, 16, 16), dtype=np.float32)
    assert error(to_torch_layout(vae.decode(to_mlx(latents))), vae_decode(BUNDLED, latents)) < 1e-4
    image = rng.uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
    assert error(to_torch_layout(vae.encode(to_mlx(image))), vae_encode(BUNDLED, image)) < 1e-4


@pytest.mark.parametrize(("interval", "branch"), [(1, 0), (3, 0), (5, 1)])
def test_a_whole_run_with_the_defaults(emoji, interval, branch):
    """50 DDIM steps, guidance 5."""
    expected = generate(BUNDLED, "a red apple", steps=50, guidance_scale=5, interval=interval, branch=branch, seed=[1])
    ours = emoji("a red apple", seeds=[1], cache_interval=interval, cache_branch=branch)
    assert error(to_torch_layout(ours.latents), expected["latents"]) < 1e-3
    assert np.abs(np.asarray(ours.images[0]).astype(float) - expected["image"][0]).mean() < 1


def test_caching_costs_less_picture_than_fewer_steps(emoji):
    """The point of it: at the same number of full passes, cached steps stay nearer to the 50-step picture."""

    def picture(**options):
        return np.array(emoji("a rocket", seeds=[2], **options).latents)

    plain = picture(cache_interval=1)
    for interval, steps in ((3, 17), (5, 10)):
        assert error(picture(cache_interval=interval), plain) < error(picture(steps=steps, cache_interval=1), plain)


def test_it_is_the_default_model(tmp_path, capsys):
    assert main_generate(["--prompt", "a red apple", "--steps", "12", "--output", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "bundled text-to-emoji model" in out and "--model sd15" in out
    assert (tmp_path / "a.png").is_file()


def test_it_is_drawn_in_the_colours_asked_for(emoji):
    """A red apple is red and a green one green, on white, as a stranger would name them."""
    for prompt, channel in (("a red apple", 0), ("a green apple", 1)):
        image = np.asarray(emoji(prompt).images[0]).astype(float)
        middle = image[24:48, 20:44].mean((0, 1))
        assert middle.argmax() == channel and middle[channel] > 1.3 * np.delete(middle, channel).max()
        corners = np.stack([image[:6, :6], image[:6, -6:], image[-6:, :6], image[-6:, -6:]])
        assert corners.mean() > 235


def test_the_model_fits_in_the_package():
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*")) < 40 * 2**20
