"""Whole videos of Stable Video Diffusion against diffusers with the pip package DeepCache."""

import copy
import functools
import shutil

import cache_oracle
import mlx.core as mx
import numpy as np
import peft
import pytest
import tiny_video
import torch
import video_oracle
from helpers import PICTURE, error, smooth
from mlx.utils import tree_flatten
from PIL import Image
from safetensors.numpy import save_file
from tiny import write_json

from mlx_deepcache import PyramidAttentionBroadcast, StableDiffusion
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.backend.ops import on_gpu
from mlx_deepcache.cache.deepcache import CacheWarning
from mlx_deepcache.cache.macs import unet_macs
from mlx_deepcache.diffusion.levels import Prediction, split
from mlx_deepcache.errors import UsageError
from mlx_deepcache.media.pictures import to_uint8
from mlx_deepcache.nets.unet_parts import UNetConfig
from mlx_deepcache.unet import UNet2DConditionModel

THEIRS = {
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance_scale": "max_guidance_scale",
    "motion_bucket": "motion_bucket_id",
    "noise_aug": "noise_aug_strength",
    "decode_chunk": "decode_chunk_size",
}
SMALL = {"height": 64, "width": 96, "frames": 3, "steps": 6}


def reference(folder, image, output_type="latent", interval=1, branch=0, seed=0, **options):
    options = {THEIRS.get(name, name): value for name, value in options.items()}
    return video_oracle.generate(folder, image, interval, branch, seed, output_type, **options)


def channels_first(latents):
    return np.moveaxis(np.array(latents), -1, -3)


def cases():
    """Every interval at six branches, to the second full step; sizes (the second does not halve exactly), frame counts
    and what the model is told take turns."""
    count = 0
    for interval in (1, 2, 3, 5):
        for branch in (0, 1, 2, 4, 7, 11):
            size = ({"height": 64, "width": 96}, {"height": 72, "width": 104})[count % 2]
            told = (
                {},
                {"fps": 12, "motion_bucket": 40, "noise_aug": 0.3, "guidance_scale": 2.5, "min_guidance_scale": 1.5},
                {"guidance_scale": 1.0},
            )[count % 3]
            yield interval, branch, {"frames": (3, 5, 2, 4)[count % 4], "steps": max(3, interval + 1)} | size | told
            count += 1


@pytest.mark.parametrize(("interval", "branch", "options"), list(cases()))
def test_latents_are_those_of_diffusers_and_deepcache(video_checkpoint, video_pipeline, interval, branch, options):
    """Of two videos of one picture, with seeds of their own."""
    expected, full = reference(video_checkpoint, [PICTURE] * 2, "latent", interval, branch, [3, 4], **options)
    steps = []
    result = video_pipeline(
        image=PICTURE, seeds=[3, 4], cache_interval=interval, cache_branch=branch, on_step=steps.append, **options
    )
    assert error(channels_first(result.latents), expected) < 1e-4
    assert [step.full for step in steps] == full
    assert error(result.latents[0], result.latents[1]) > 0.05


def test_one_frame(video_checkpoint, video_pipeline):
    """Its guidance is that of a first frame, where diffusers needs more than 1."""
    options = SMALL | {"frames": 1, "min_guidance_scale": 2.0}
    expected, _ = reference(video_checkpoint, PICTURE, **options)
    assert error(channels_first(video_pipeline(image=PICTURE, cache_interval=1, **options).latents), expected) < 1e-4
    assert video_pipeline.settings(image=PICTURE, frames=1).legs[0].guidance_scale is None


def test_25_steps_and_frames_decoded_in_chunks(video_checkpoint, video_pipeline):
    options = {"frames": 5, "height": 64, "width": 64, "decode_chunk": 2}
    expected, _ = reference(video_checkpoint, PICTURE, "latent", 3, 1, 5, **options)
    result = video_pipeline(image=PICTURE, seeds=[5], cache_interval=3, cache_branch=1, **options)
    assert len(result.stats["steps"]) == 25
    assert error(channels_first(result.latents), expected) < 1e-3
    theirs, _ = reference(video_checkpoint, PICTURE, "np", 3, 1, 5, **options)
    ours = np.stack([np.asarray(frame) for frame in result.videos[0]]).astype(float)
    assert ours.shape == (5, 64, 64, 3)
    assert np.abs(ours - (theirs[0] * 255).round()).mean() < 0.1  # grey levels
    whole = video_pipeline.decode(result.latents)
    assert np.abs(whole[0] - ours).mean() > 1  # a chunk sees only itself


@pytest.mark.parametrize("make", ["alpha", "tall", "small"])
def test_pictures_of_all_kinds(video_checkpoint, video_pipeline, make):
    """Transparency is white, for which diffusers is given the picture without any."""
    if make == "alpha":
        picture = smooth(60, 80).convert("RGBA")
        picture.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 80).astype(np.uint8), (60, 1))))
        given = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    else:
        picture = given = smooth(*{"tall": (300, 40), "small": (9, 11)}[make])
    expected, _ = reference(video_checkpoint, given, seed=1, **SMALL)
    result = video_pipeline(image=picture, seeds=[1], cache_interval=1, **SMALL)
    assert error(channels_first(result.latents), expected) < 1e-4


def test_results_are_saved(video_pipeline, tmp_path):
    result = video_pipeline(image=PICTURE, seeds=[1, 2], cache_interval=1, **SMALL)
    assert result.images == [] and [len(video) for video in result.videos] == [3, 3]
    result.save(tmp_path / "a.png", 1)
    with Image.open(tmp_path / "a.png") as image:
        assert image.n_frames == 3 and image.info["duration"] == pytest.approx(1000 / 7, abs=1)
        image.seek(2)
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(result.videos[1][2]))


def test_the_picture_says_what_is_drawn(video_pipeline):
    one, other = (video_pipeline(image=smooth(64, 96, seed=seed), cache_interval=1, **SMALL) for seed in (0, 1))
    assert error(one.latents, other.latents) > 0.01


@pytest.fixture(scope="module")
def uncached(video_pipeline):
    """uncached(steps, seed): that video of PICTURE, drawn once."""
    options = {"image": PICTURE, "cache_interval": 1} | SMALL
    return functools.cache(lambda steps, seed: video_pipeline(**options | {"steps": steps, "seeds": [seed]}))


@pytest.mark.parametrize("option", [{"fps": 12}, {"motion_bucket": 200}, {"noise_aug": 0.2}, {"min_guidance_scale": 2}])
def test_each_option_changes_the_video(video_pipeline, uncached, option):
    options = {"image": PICTURE, "seeds": [7], "cache_interval": 1} | SMALL | {"steps": 3} | option
    assert error(video_pipeline(**options).latents, uncached(3, 7).latents) > 1e-3


def test_interval_1_is_bit_equal_to_a_loop_without_cache_code(video_pipeline):
    """The plain loop below knows nothing of features, branches or schedules."""
    settings = video_pipeline.settings(image=PICTURE, cache_interval=1, seeds=[1, 2], **SMALL)
    *_, last = video_pipeline.denoise(settings)
    run = video_pipeline.denoise(settings)
    started, unet, plan = run.prepare_latents(), video_pipeline.component("unet"), settings.legs[0].plan
    cond = unet.prepare(run.encode())
    temb = unet.time_embed(mx.array([step.here.t for step in plan.steps]), cond)
    scale, x = mx.array(settings.legs[0].guidance_scale).reshape(-1, 1, 1, 1), started.x
    for i, step in enumerate(plan.steps):

        def denoise(x, level, i=i):
            shown = mx.concatenate([mx.concatenate([x, x]), started.beside], axis=-1)
            without, given = mx.split(unet(shown, temb[i], cond)[0], 2)
            out = without + scale * (given - without)
            return Prediction(out, *split("v_prediction", out, x, level), x)

        x, _ = plan.solver(denoise, x, step, None, run.noise)
    assert mx.array_equal(x, last.latents)


def test_nothing_survives_a_generation(video_pipeline):
    options = {"image": PICTURE, "cache_interval": 3, "seeds": [7]} | SMALL
    first = video_pipeline(**options)
    video_pipeline(**options | {"frames": 2, "height": 128, "cache_branch": 5})
    steps = video_pipeline.denoise(video_pipeline.settings(**options))
    next(steps), next(steps), steps.close()  # cancelled on a cached step
    assert mx.array_equal(video_pipeline(**options).latents, first.latents)


def test_guidance_in_turn_and_a_compiled_unet_are_the_same(video_checkpoint, video_pipeline):
    options = {"image": PICTURE, "cache_interval": 2, "seeds": [7]} | SMALL
    plain = video_pipeline(**options)
    for how in ({"low_memory": True}, {"compile": "on"}):
        other = StableDiffusion(video_pipeline.checkpoint, "float32", **how)(**options)
        assert error(other.latents, plain.latents) < 1e-5


@pytest.mark.parametrize("cache", ["adaptive:threshold=0", "taylorseer:order=1", "spectrum", "guidance:end=0.5"])
def test_other_caches(video_pipeline, uncached, cache):
    options = {"image": PICTURE, "seeds": [7]} | SMALL | {"steps": 10}
    plain = uncached(10, 7)
    if cache.startswith("adaptive"):  # never reuses
        assert mx.array_equal(video_pipeline(**options, cache=cache).latents, plain.latents)
        loose = video_pipeline(**options, cache="adaptive:threshold=0.5")
        assert loose.stats["cached_steps"] > 0
    elif cache.startswith("guidance"):
        halved = video_pipeline(**options, cache=[cache], cache_interval=1)
        assert halved.stats["unet_macs"] == plain.stats["unet_macs"] * 3 // 4
        assert error(halved.latents, plain.latents) > 1e-4
    else:  # the third full step's features are the first that differ from copied ones
        copied = video_pipeline(**options, cache_interval=3)
        forecast = video_pipeline(**options, cache=[cache], cache_interval=3)
        assert forecast.stats["steps"] == copied.stats["steps"]
        assert 0 < error(forecast.latents, copied.latents) < 1


@pytest.mark.parametrize(
    ("spatial", "temporal", "cross"), [(2, 4, 3), (3, None, None), (None, 2, None), (2, 2, 6), (None, None, 2)]
)
def test_pyramid_attention_broadcast(video_checkpoint, video_pipeline, uncached, spatial, temporal, cross):
    """diffusers' hooks inside a window of its timesteps, with identifiers that tell blocks over frames from others: by
    its own, these are spatial as well."""
    window, options = (-1, 2), SMALL | {"steps": 10}
    shared = video_oracle.shared(str(video_checkpoint))
    pipe = type(shared)(**shared.components | {"unet": copy.deepcopy(shared.unet)})
    pipe.set_progress_bar_config(disable=True)
    kinds = {"spatial": spatial, "temporal": temporal, "cross": cross}
    ranges = {f"{kind}_attention_block_skip_range": every for kind, every in kinds.items()}
    ranges |= {f"{kind}_attention_timestep_skip_range": window for kind in kinds}
    cache_oracle.broadcast(
        pipe, cache_oracle.Calls(pipe), spatial_attention_block_identifiers=(r"\.transformer_blocks",), **ranges
    )
    renamed = {THEIRS.get(name, name): value for name, value in options.items()}
    with torch.no_grad():
        expected = pipe(PICTURE, generator=torch.Generator().manual_seed(3), output_type="latent", **renamed).frames
    policy = PyramidAttentionBroadcast(**ranges)
    result = video_pipeline(image=PICTURE, seeds=[3], cache=[policy], **options)
    assert error(channels_first(result.latents), expected) < 1e-4
    plain = uncached(10, 3)
    changed = error(plain.latents, result.latents)
    one_token = not spatial and not temporal  # attention to the picture, which gives the same at every step
    assert changed < 1e-5 if one_token else changed > 1e-3
    assert result.stats["unet_macs"] < plain.stats["unet_macs"]


def test_windows_of_other_timesteps_are_told(video_pipeline):
    with pytest.warns(CacheWarning, match="pab uses nothing again: these steps' timesteps, 1.6.* to -1.5"):
        video_pipeline.settings(image=PICTURE, cache=["pab"])


def test_half_precision_is_close(video_checkpoint, video_pipeline):
    options = {"image": PICTURE, "cache_interval": 1} | SMALL
    half = StableDiffusion.from_pretrained(str(video_checkpoint), "float16")(**options)
    assert error(half.latents, video_pipeline(**options).latents) < 0.05


def test_the_vae_encodes_in_float32_and_decodes_in_half(video_checkpoint, video_pipeline):
    """As in diffusers: its encoder alone would overflow."""
    half = StableDiffusion.from_pretrained(str(video_checkpoint), "float16")
    settings = half.settings(image=PICTURE, **SMALL)
    beside = half.denoise(settings).prepare_latents().beside
    vae = half.component("vae")
    assert {p.dtype for _, p in tree_flatten(vae.parameters())} == {mx.float16}
    latents = mx.random.normal((1, 2, 8, 8, 4), key=mx.random.key(0))
    half.decode(latents)
    expected = np.array(vae.decode(latents.astype(mx.float16)).astype(mx.float32))
    vae.set_dtype(mx.float32)
    pixels = mx.array(settings.start.picture)[None].astype(mx.float32) / 255 * 2 - 1
    noisy = pixels + settings.noise_aug * half.denoise(settings).noise(settings.start.picture.shape)
    assert error(beside[1, 0], vae.encode(noisy)[0] / settings.start.scaling) < 1e-6
    # from float32 weights; a GPU, unlike the CPU, computes in half precision from those that are
    assert np.abs(to_uint8(expected) - half.decode(latents).astype(float)).max() <= (3 if on_gpu() else 1)


def test_multiply_adds_are_those_counted_of_diffusers():
    """Of one half of guidance, 14 frames of 576 x 1024: with the two products of attention 22,401 G on a full call and
    1,896 G on a cached one at branch 0, by hooks on diffusers' own layers."""
    unet = UNet2DConditionModel(UNetConfig.from_dict({"_class_name": "UNetSpatioTemporalConditionModel"}))
    full, cached = unet_macs(unet, (14, 72, 128), 0, 1)
    assert full == pytest.approx(22401e9, rel=0.01)
    assert cached == pytest.approx(1896e9, rel=0.02)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "a rocket", "--image", "in.png"], "reads a picture and no prompt; leave the prompt out"),
        (["--prompt-file", "prompts", "--image", "in.png"], "reads a picture and no prompt"),
        (["--prompt", ""], "makes a video of a picture: give --image"),
        ([], "makes a video of a picture: give --image"),
        (["--image", "in.png", "--negative-prompt", "blurry"], "--negative-prompt is for models of pictures"),
        (
            ["--image", "in.png", "--motion", "1,2"],
            "--motion is for models of videos of a prompt, and this one",
        ),
        (["--image", "in.png", "--strength", "0.5"], "--strength is for models of pictures"),
        (["--image", "in.png", "--mask", "in.png"], "--mask is for models of pictures"),
        (["--image", "in.png", "--scheduler", "ddim"], "its scheduler can be euler only"),
        (["--image", "in.png", "--cache", "fastercache"], "fastercache is for pictures"),
        (["--image", "in.png", "--height", "100"], "--height should be a positive multiple of 8 pixels, got 100"),
        (["--image", "in.png", "--frames", "0"], "expected a whole number, 1 or more, got '0'"),
        (["--image", "in.png", "--cache-branch", "12", "--cache-interval", "2"], "cache branch must be in [0, 12)"),
        (["--image", "in.png", "--vae-tiling", "on"], "--decode-chunk takes less memory too"),
        (["--image", "in.png", "--embedding", "a.safetensors"], "embeddings are for models that read a prompt"),
    ],
)
def test_what_cannot_be_is_one_line(video_checkpoint, tmp_path, monkeypatch, capfd, flags, words):
    monkeypatch.chdir(tmp_path)
    smooth(64, 96).save("in.png")
    (tmp_path / "prompts").write_text("a rocket\na cat\n")
    save_file({"a": np.zeros(2, np.float32)}, "a.safetensors")
    one_error(["--model", str(video_checkpoint), *flags, "--quiet"], words, capfd)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("flags", [["--motion-bucket", "9"], ["--noise-aug", "0"], ["--decode-chunk", "1"]])
def test_a_model_of_pictures_knows_nothing_of_videos(checkpoint, tmp_path, monkeypatch, capfd, flags):
    monkeypatch.chdir(tmp_path)
    words = f"{flags[0]} is for models of videos, and this one, Stable Diffusion 1.x, draws pictures"
    one_error(["--model", str(checkpoint("sd15")), "--prompt", "x", *flags, "--quiet"], words, capfd)


def test_a_vae_of_pictures_decodes_frame_by_frame(video_checkpoint, video_pipeline, checkpoint, tmp_path):
    """As diffusers' pipeline takes an AutoencoderKL in place of its own; in the folder, and from elsewhere."""
    folder = shutil.copytree(video_checkpoint, tmp_path / "model")
    shutil.rmtree(folder / "vae")
    shutil.copytree(checkpoint("sd15") / "vae", folder / "vae")
    write_json(folder / "model_index.json", tiny_video.INDEX | {"vae": ["diffusers", "AutoencoderKL"]})
    expected, _ = reference(folder, PICTURE, "np", seed=3, **SMALL)
    options = {"image": PICTURE, "seeds": [3], "cache_interval": 1} | SMALL
    for pipe in (
        StableDiffusion.from_pretrained(str(folder), "float32"),
        StableDiffusion.from_pretrained(str(video_checkpoint), "float32", vae=str(checkpoint("sd15"))),
    ):
        result = pipe(**options)
        ours = np.stack([np.asarray(frame) for frame in result.videos[0]]).astype(float)
        assert np.abs(ours - (expected[0] * 255).round()).mean() < 0.1  # grey levels
        assert result.stats["estimated_memory_bytes_by_phase"]["decode"] > 0
    own = np.stack([np.asarray(frame) for frame in video_pipeline(**options).videos[0]])
    assert np.abs(ours - own).mean() > 1


@pytest.mark.parametrize("names", ["peft", "kohya"])
def test_loras(video_checkpoint, video_pipeline, tmp_path, names):
    """As PEFT's layers compute them, in both kinds of transformer blocks and in convolutions over frames."""
    shared = video_oracle.shared(str(video_checkpoint))
    pipe = type(shared)(**shared.components | {"unet": copy.deepcopy(shared.unet)})
    pipe.set_progress_bar_config(disable=True)
    config = peft.LoraConfig(r=3, lora_alpha=1.5, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj"])
    peft.inject_adapter_in_model(config, pipe.unet)
    out, generator = {}, torch.Generator().manual_seed(5)
    for name, layer in pipe.unet.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part)["default"].weight
            with torch.no_grad():
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
            kohya = "lora_unet_" + name.replace(".", "_") + (".lora_down" if part == "lora_A" else ".lora_up")
            out[f"unet.{name}.{part}.weight" if names == "peft" else f"{kohya}.weight"] = weight.detach().numpy()
        out[f"{kohya.partition('.')[0]}.alpha" if names == "kohya" else f"unet.{name}.alpha"] = np.float32(1.5)
    assert any(value.ndim == 5 for value in out.values()) and any("temporal_transformer" in name for name in out)
    save_file({name: np.ascontiguousarray(value) for name, value in out.items()}, tmp_path / "lora.safetensors")
    renamed = {THEIRS.get(name, name): value for name, value in SMALL.items()}
    with torch.no_grad():
        expected = pipe(PICTURE, generator=torch.Generator().manual_seed(3), output_type="latent", **renamed).frames
    options = {"image": PICTURE, "seeds": [3], "cache_interval": 1} | SMALL
    ours = StableDiffusion.from_pretrained(str(video_checkpoint), "float32", loras=[tmp_path / "lora.safetensors"])
    assert error(channels_first(ours(**options).latents), expected) < 1e-4
    assert error(channels_first(video_pipeline(**options).latents), expected) > 0.01


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--frames", "3000"], "3000 frames of 256 x 256 pixels would take about"),
        pytest.param(
            ["--frames", "60", "--decode-chunk", "60"],
            "GB; without --decode-chunk 60 it fits",
            marks=pytest.mark.skipif(on_gpu(), reason="a GPU needs more for each frame"),
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(video_checkpoint, tmp_path, monkeypatch, capfd, flags, words):
    monkeypatch.chdir(tmp_path)
    smooth(64, 96).save("in.png")
    size = ["--height", "256", "--width", "256", "--memory-limit", "0.5"]
    before = mx.get_memory_limit()
    try:
        one_error(["--model", str(video_checkpoint), "--image", "in.png", *size, *flags, "--quiet"], words, capfd)
    finally:
        mx.set_memory_limit(before)
    assert not list(tmp_path.glob("out*"))


def test_videos_are_estimated_as_they_are_decoded(video_checkpoint):
    """Never in tiles, which is how little memory is made to do for pictures."""
    large = {"image": PICTURE, "height": 1024, "width": 1024, "frames": 4, "decode_chunk": 2}
    checkpoint = StableDiffusion.from_pretrained(str(video_checkpoint)).checkpoint
    freed = StableDiffusion(checkpoint, "float32", keep=False)
    low = StableDiffusion(checkpoint, "float32", low_memory=True)
    peaks = [pipe.estimate(pipe.settings(**large)) for pipe in (freed, low)]
    assert peaks[0]["decode"] == peaks[1]["decode"] and peaks[0]["denoise"] > peaks[1]["denoise"]


def one_error(flags, words, capfd):
    try:
        code = main_generate(flags)
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert code == 2 and out == "" and words in err and err.count("\n") == 1


def test_latents_of_another_shape(video_pipeline):
    with pytest.raises(UsageError, match=r"\(1, 3, 8, 12, 4\), \(N, frames, height, .*channels first: transpose"):
        video_pipeline(image=PICTURE, latents=np.zeros((1, 3, 4, 8, 12), np.float32), **SMALL)
    with pytest.raises(UsageError, match=r"should have shape \(N, frames, height, width, 4\), got \(1, 8, 12, 4\)"):
        video_pipeline.decode(mx.zeros((1, 8, 12, 4)))
