"""Hires fix: a picture drawn small, enlarged and drawn over, against diffusers' two pipelines one after the other."""

import json

import numpy as np
import oracle
import pytest
import torch
from helpers import error, smooth, to_torch_layout
from PIL import Image
from safetensors.torch import save_file
from tiny import write_controlnet
from torch.nn import functional as F

from mlx_deepcache import Control, StableDiffusion
from mlx_deepcache.apps.flags import generate_parser
from mlx_deepcache.errors import UsageError
from mlx_deepcache.generation import record
from mlx_deepcache.generation.options import A1111_UPSCALERS

PROMPT, SEEDS = "a small red cat", [3, 4]
FIRST = {"guidance_scale": 2.0, "height": 72, "width": 104}
HIRES = {"hires_scale": 1.5, "hires_strength": 0.5, "hires_steps": 4}
LARGE = {"height": 112, "width": 160}  # 9 x 13 latents become 14 x 20

# As A1111 has them (modules/shared.py)
MODES = {
    "latent": {"mode": "bilinear"},
    "latent-antialias": {"mode": "bilinear", "antialias": True},
    "latent-bicubic": {"mode": "bicubic"},
    "latent-bicubic-antialias": {"mode": "bicubic", "antialias": True},
    "latent-nearest": {"mode": "nearest"},
    "latent-nearest-exact": {"mode": "nearest-exact"},
}


def ours(pipe, interval, branch, steps=6, **options):
    seen = []
    cache = {"cache_interval": interval, "cache_branch": branch}
    result = pipe(PROMPT, seeds=SEEDS, steps=steps, on_step=seen.append, **FIRST, **HIRES, **cache, **options)
    return result, [step.full for step in seen for _ in range(step.calls)]


def over(folder, start, **options):
    """diffusers' image to image of a picture or latents: the last 4 of 8 steps."""
    return oracle.from_picture(
        folder, PROMPT, start, strength=0.5, steps=8, guidance_scale=2.0, seed=SEEDS, num_images=2, **LARGE, **options
    )


@pytest.mark.parametrize(
    ("kind", "upscaler", "scheduler", "interval"),
    [
        ("sd15", "latent", "ddim", 1),
        ("sd15", None, "euler-a", 2),  # which is latent, and noise in the steps
        ("sd15", "latent-antialias", "heun", 2),
        ("sd15", "latent-bicubic", "dpm++2m", 3),
        ("sd15", "latent-bicubic-antialias", "unipc", 2),
        ("sd21", "latent-nearest", None, 2),
        ("sdxl", "latent-nearest-exact", None, 2),  # which is told both sizes
    ],
)
def test_latents(checkpoint, pipeline, kind, upscaler, scheduler, interval):
    """The cache begins anew over the larger ones."""
    cache = {"interval": interval, "branch": 1, "scheduler": scheduler}
    small = oracle.generate(checkpoint(kind), PROMPT, steps=6, seed=SEEDS, num_images=2, **FIRST, **cache)
    large = F.interpolate(torch.tensor(small["latents"]), size=(14, 20), **MODES[upscaler or "latent"])
    expected = over(checkpoint(kind), large, **cache)
    result, full = ours(pipeline(kind), interval, 1, scheduler=scheduler, hires_upscaler=upscaler)
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4
    assert full == small["full"] + expected["full"] and expected["full"][0]
    assert result.images[0].size == (160, 112)


def lanczos(images):
    return [image.resize((160, 112), Image.Resampling.LANCZOS) for image in images]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_pictures(checkpoint, pipeline, kind):
    """Pictures are enlarged in 256 shades, and the encoder's noise comes first."""
    small = pipeline(kind)(PROMPT, seeds=SEEDS, steps=6, cache_interval=2, scheduler="ddim", **FIRST)
    expected = over(checkpoint(kind), lanczos(small.images), scheduler="ddim", interval=2)
    result, full = ours(pipeline(kind), 2, 0, scheduler="ddim", hires_upscaler="lanczos")
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4
    assert full[6:] == expected["full"]
    freed = StableDiffusion.from_pretrained(str(checkpoint(kind)), "float32", keep=False)
    assert np.array_equal(ours(freed, 2, 0, scheduler="ddim", hires_upscaler="lanczos")[0].latents, result.latents)


def test_pictures_by_a_net(checkpoint, pipeline, tmp_path):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.PReLU(8), torch.nn.Conv2d(8, 12, 3, padding=1)]
    net = torch.nn.Sequential(*layers)
    save_file({f"body.{name}": tensor for name, tensor in net.state_dict().items()}, tmp_path / "net.safetensors")
    small, large = pipeline("sd15")(PROMPT, seeds=SEEDS, steps=6, cache_interval=1, scheduler="ddim", **FIRST), []
    for image in small.images:
        x = torch.tensor(np.asarray(image).transpose(2, 0, 1).copy())[None] / 255
        with torch.no_grad():
            y = F.pixel_shuffle(net(x), 2) + F.interpolate(x, scale_factor=2, mode="nearest")
        large.append(Image.fromarray((y[0].permute(1, 2, 0).clamp(0, 1) * 255).round().numpy().astype(np.uint8)))
    expected = over(checkpoint("sd15"), lanczos(large), scheduler="ddim")
    file = str(tmp_path / "net.safetensors")
    result, _ = ours(pipeline("sd15"), 1, 0, scheduler="ddim", hires_net=file)
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-3  # where a shade is another one


def test_settings(pipeline):
    """As many steps again, at 0.7; multiply-adds and memory of both sizes."""
    pipe = pipeline("sd15")
    settings = pipe.settings(PROMPT, steps=20, scheduler="ddim", hires_scale=2, height=64, width=64)
    assert [len(leg.plan.steps) for leg in settings.legs] == [20, 20]
    assert (settings.hires_strength, settings.hires_steps, settings.hires_upscaler) == (0.7, 20, "latent")
    assert settings.legs[1].plan.steps == settings.legs[1].plan.steps[-20:]
    assert settings.size(settings.legs[1]) == (128, 128) and (settings.height, settings.width) == (64, 64)
    plain = pipe.settings(PROMPT, steps=20, scheduler="ddim", height=64, width=64)
    whole = pipe.settings(PROMPT, steps=20, scheduler="ddim", height=128, width=128)
    needed, small, large = (pipe.estimate(given)["denoise"] for given in (settings, plain, whole))
    assert small < needed == large
    costs = [
        pipe(PROMPT, scheduler="ddim", cache_interval=2, cache_branch=1, **options).stats
        for options in (
            {"steps": 4, "height": 64, "width": 64, "hires_scale": 2, "hires_steps": 2, "hires_strength": 1},
            {"steps": 4, "height": 64, "width": 64},
            {"steps": 2, "height": 128, "width": 128},
        )
    ]
    for name in ("unet_macs", "unet_macs_uncached"):
        assert costs[0][name] == costs[1][name] + costs[2][name]
    assert costs[0]["steps"] == ["full", "cached", "full", "cached", "full", "cached"]


def test_controlnets_follow_in_both_passes(pipeline, tmp_path):
    net, followed = write_controlnet("sd15", tmp_path / "net"), smooth(72, 104)
    settings = pipeline("sd15").settings(PROMPT, controls=[Control(net, followed)], hires_scale=2, **FIRST)
    small, large = (leg.controls[0].image for leg in settings.legs)
    assert small.shape == (1, 72, 104, 3) and large.shape == (1, 144, 208, 3)
    assert np.array_equal(large[0], np.asarray(followed.resize((208, 144), Image.Resampling.LANCZOS)))
    result = pipeline("sd15")(PROMPT, controls=[Control(net, followed)], hires_scale=2, steps=2, **FIRST)
    assert result.latents.shape == (1, 18, 26, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hires_scale": 1.0}, "hires_scale should be a number above 1"),
        ({"hires_steps": 4}, "hires_steps has no meaning without a hires_scale"),
        ({"hires_scale": 2, "image": smooth(64, 64)}, "leave out image"),
        ({"hires_scale": 2, "hires_net": "x.safetensors", "hires_upscaler": "latent"}, "leave one out"),
        ({"hires_scale": 2, "hires_steps": 900, "hires_strength": 0.5}, "the last of 1800"),
        (
            {"hires_scale": 2, "cache": "tgate:step=15", "steps": 20, "hires_steps": 4},
            "the second pass has 5 steps",
        ),  # PNDM's
        ({"hires_scale": 2, "frames": 4}, "hires_scale does not go with frames"),
    ],
)
def test_refused(pipeline, options, words):
    with pytest.raises(UsageError, match=words):
        pipeline("sd15").settings(PROMPT, **options)


def test_a_refiner_does_not_go_with_it(checkpoint):
    pipe = StableDiffusion.from_pretrained(str(checkpoint("sdxl")), "float32", refiner=str(checkpoint("refiner")))
    with pytest.raises(UsageError, match="hires_scale and a refiner do not go together"):
        pipe.settings(PROMPT, hires_scale=2)


@pytest.mark.filterwarnings("ignore:it does not say whose random numbers")
def test_a1111s_words(tmp_path):
    """Its denoising strength is the second pass's there; our own text says the same."""
    text = "x\nSteps: 20, Sampler: DDIM, Seed: 1, Size: 64x64, Denoising strength: 0.55, Hires upscale: 1.5, "
    text += "Hires steps: 9, Hires upscaler: Latent (nearest-exact), Version: v1.10.1"
    found, unknown = record.from_a1111(text, tmp_path / "a.png")
    hires = {key: value for key, value in found.items() if key.startswith("hires")}
    assert hires == {
        "hires_scale": "1.5",
        "hires_steps": "9",
        "hires_strength": "0.55",
        "hires_upscaler": "latent-nearest-exact",
    }
    assert unknown == ["Version"] and "strength" not in found
    args = generate_parser().parse_args(record.as_flags(found, tmp_path / "a.png", set()))
    assert (args.hires_scale, args.hires_steps, args.hires_strength) == (1.5, 9, 0.55)
    settings = {"prompt": "x", "width": 64, "height": 64, "steps": 20, "seed": 1, "version": "v"} | json.loads(
        json.dumps({"hires_scale": 1.5, "hires_steps": 9, "hires_strength": 0.55, "hires_upscaler": "latent-bicubic"})
    )
    said = record.parameters_text(settings)
    for words in ("Hires upscale: 1.5", "Hires steps: 9", "Denoising strength: 0.55", "Latent (bicubic)"):
        assert words in said
    assert "Hires upscaler: 4x-Sharp" in record.parameters_text(
        settings | {"hires_upscaler": "lanczos", "hires_net": "nets/4x-Sharp.safetensors"}
    )
    assert set(A1111_UPSCALERS) == {*MODES, "lanczos"}
