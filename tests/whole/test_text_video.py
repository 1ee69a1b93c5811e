"""Whole videos of a prompt, Text2Video-Zero, against diffusers with the pip package DeepCache."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import video_oracle
from helpers import error, smooth
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny import write_controlnet

from mlx_deepcache import Control, StableDiffusion
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.diffusion.levels import Prediction, split
from mlx_deepcache.errors import UsageError
from mlx_deepcache.generation import record
from mlx_deepcache.generation.starts import moved_by
from mlx_deepcache.media.video import write_video
from mlx_deepcache.nets.attend import Attend, to_first_frame

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid", "ignore:Default grid_sample")

PROMPT = "a small red cat"
THEIRS = {"frames": "video_length", "steps": "num_inference_steps"}
SMALL = {"height": 64, "width": 96, "frames": 3, "steps": 8, "t0": 4, "t1": 6}


def reference(folder, output_type="latent", interval=1, branch=0, seed=0, **options):
    options = {THEIRS.get(name, name): value for name, value in options.items()}
    x, y = options.pop("motion", (12, 12))
    options |= {"motion_field_strength_x": x, "motion_field_strength_y": y}
    return video_oracle.from_prompt(folder, PROMPT, interval, branch, seed, output_type, **options)


def channels_first(latents):
    return np.moveaxis(np.array(latents), -1, -3)


CASES = [
    ("sd15", 1, 0, {"height": 64, "width": 96, "frames": 5, "steps": 10, "t0": 6, "t1": 8}),
    ("sd15", 2, 0, {"height": 64, "width": 96, "frames": 3, "steps": 11, "t0": 5, "t1": 8, "guidance_scale": 3.0}),
    ("sd15", 2, 4, {"height": 72, "width": 104, "frames": 5, "steps": 12, "t0": 4, "t1": 8, "motion": (-30, 7.5)}),
    ("sd15", 3, 0, {"height": 72, "width": 104, "frames": 7, "steps": 12, "t0": 3, "t1": 7}),
    ("sd15", 3, 7, {"height": 64, "width": 96, "frames": 3, "steps": 14, "t0": 5, "t1": 9, "motion": (60, -90)}),
    ("sd21", 1, 0, {"height": 72, "width": 104, "frames": 3, "steps": 10, "t0": 0, "t1": 9}),
    (
        "sd21",
        3,
        2,
        {"height": 64, "width": 96, "frames": 3, "steps": 10, "t0": 4, "t1": 7, "negative_prompt": "dog"},
    ),
    ("sdxl", 1, 0, {"height": 64, "width": 96, "frames": 3, "steps": 9, "t0": 5, "t1": 7, "guidance_scale": 7.5}),
    ("sdxl", 3, 2, {"height": 72, "width": 104, "frames": 5, "steps": 10, "t0": 3, "t1": 6, "guidance_scale": 5.0}),
    ("bk-tiny", 2, 1, {"height": 64, "width": 96, "frames": 4, "steps": 9, "t0": 5, "t1": 6}),
]


@pytest.mark.parametrize(("kind", "interval", "branch", "options"), CASES)
def test_latents_are_those_of_diffusers_and_deepcache(checkpoint, pipeline, kind, interval, branch, options):
    expected, full = reference(checkpoint(kind), "latent", interval, branch, 3, **options)
    steps = []
    result = pipeline(kind)(
        PROMPT, seeds=[3], cache_interval=interval, cache_branch=branch, on_step=steps.append, **options
    )
    ours = channels_first(result.latents)[0]
    assert error(ours, expected) < 1e-4
    assert [step.full for step in steps] == full and [step.index for step in steps] == list(range(len(full)))
    assert error(ours[1], ours[0]) > 0.05


@pytest.mark.parametrize("interval", [1, 3])
def test_frames_of_50_steps_with_the_pipelines_own_numbers(checkpoint, pipeline, interval):
    """Those of the paper: 44 and 47, and a motion of 12."""
    expected, _ = reference(checkpoint("sd15"), "np", interval, 0, 5, frames=3, height=64, width=64)
    result = pipeline("sd15")(PROMPT, seeds=[5], frames=3, height=64, width=64, cache_interval=interval)
    assert len(result.stats["steps"]) == 2 + 3 + 48
    ours = np.stack([np.asarray(frame) for frame in result.videos[0]]).astype(float)
    assert ours.shape == (3, 64, 64, 3) and not result.images
    assert np.abs(ours - (expected * 255).round()).mean() < 0.1  # grey levels


@pytest.mark.parametrize("motion", [(12, 12), (0, 0), (-12, 5), (40, -3.5), (600, -900), (0.5, 0.25), (8, 16)])
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (64, 48), (12, 96)])
def test_frames_are_moved_as_in_diffusers(size, motion):
    places = np.arange(size[0] * size[1], dtype=np.float32).reshape(1, *size, 1).repeat(4, axis=3)
    expected = video_oracle.moved(places[0].transpose(2, 0, 1), 9, *motion)
    for k in range(1, 9):
        ours = moved_by(mx.array(places), *(k * distance for distance in motion))
        assert np.array_equal(channels_first(ours)[0], expected[k - 1])


RNG = np.random.default_rng(0)
DOTS = RNG.integers(0, 2, (64, 96, 1), np.uint8).repeat(3, axis=2)
FOLLOWED = [Image.fromarray(DOTS * level) for level in (255, 90, 170, 40)]


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Two tiny ControlNets' folders."""
    return [str(write_controlnet("sd15", tmp_path_factory.mktemp("net"), seed)) for seed in range(2)]


@pytest.mark.parametrize(
    ("count", "interval", "branch", "scheduler", "options"),
    [
        (1, 1, 0, "ddim", {"steps": 6}),
        (2, 2, 4, "dpm++2m", {"steps": 5, "guidance_scale": 3.0}),
        (1, 3, 1, "ddim", {"steps": 7, "guidance_scale": 1.0}),
    ],
)
def test_frames_follow_pictures(checkpoint, pipeline, nets, count, interval, branch, scheduler, options):
    """As diffusers' documentation puts it together: StableDiffusionControlNetPipeline with CrossFrameAttnProcessor in
    the U-Net and the ControlNets, and the same noise for all frames."""
    seen = [FOLLOWED[:3], FOLLOWED[1:]][:count]
    theirs = {THEIRS.get(name, name): value for name, value in options.items()}
    expected = video_oracle.followed(
        checkpoint("sd15"), nets[:count], seen, PROMPT, interval, branch, 3, scheduler, **theirs
    )
    result = pipeline("sd15")(
        PROMPT,
        seeds=[3],
        frames=3,
        controls=[Control(net, pictures) for net, pictures in zip(nets, seen, strict=False)],
        control_every_step=True,
        scheduler=scheduler,
        height=64,
        width=96,
        cache_interval=interval,
        cache_branch=branch,
        **options,
    )
    ours = channels_first(result.latents)[0]
    assert error(ours, expected) < 2e-5
    assert error(ours[1], ours[0]) > 5e-4  # these nets say little
    assert len(result.videos[0]) == 3 and result.stats["controlnet_macs"] > 0


def test_each_seed_is_a_video_of_its_own(pipeline):
    pipe, options = pipeline("sd15"), SMALL | {"cache_interval": 2}
    both = pipe(PROMPT, seeds=[1, 2], **options)
    for seed, latents in zip((1, 2), both.latents, strict=True):
        assert error(latents, pipe(PROMPT, seeds=[seed], **options).latents[0]) < 1e-5
    assert error(both.latents[0], both.latents[1]) > 0.05
    assert [len(video) for video in both.videos] == [3, 3]


def test_given_latents_are_the_first_frames_start(checkpoint, pipeline):
    noise = np.random.default_rng(0).standard_normal((1, 8, 12, 4), dtype=np.float32)
    given = video_oracle.as_torch(channels_first(noise))
    expected, _ = reference(checkpoint("sd15"), latents=given, **SMALL)
    ours = pipeline("sd15")(PROMPT, latents=noise, cache_interval=1, **SMALL).latents
    assert error(channels_first(ours)[0], expected) < 1e-4
    with pytest.raises(UsageError, match=r"latents should have shape \(1, 8, 12, 4\)"):
        pipeline("sd15")(PROMPT, latents=ours, **SMALL)


def test_interval_1_is_bit_equal_to_loops_without_cache_code(pipeline):
    """The plain loops below know nothing of features, branches, schedules or legs."""
    pipe = pipeline("sd15")
    settings = pipe.settings(PROMPT, cache_interval=1, seeds=[1, 2], **SMALL)
    *_, last = pipe.denoise(settings)
    run, steps = pipe.denoise(settings), [step for leg in settings.legs for step in leg.plan.steps]
    unet, cond, x = pipe.component("unet"), pipe.component("unet").prepare(run.encode()), run.prepare_latents().x

    def loop(x, steps, attend):
        temb = unet.time_embed(mx.array([step.here.t for step in steps]), cond)
        for i, step in enumerate(steps):

            def denoise(x, level, i=i):
                parts = {"attend": Attend(inner=attend)}
                skips = unet.shallow(mx.concatenate([x, x]), temb[i], cond, 0, **parts)
                features = unet.deep(skips[-1], temb[i], cond, 0, **parts)
                without, given = mx.split(unet.finish(skips, features, temb[i], cond, 0, **parts), 2)
                out = without + 7.5 * (given - without)
                return Prediction(out, *split("epsilon", out, x, level), x)

            x, _ = settings.legs[0].plan.solver(denoise, x, step, None, None)
        return x

    def alone(layer, x, keys_values):
        return layer(x, keys_values)

    at_t1 = loop(x, steps[:1], alone)
    at_t0 = loop(at_t1, steps[1:3], alone)
    frames = settings.legs[-1].start([at_t1, at_t0], run.noise, run._redraw)
    assert mx.array_equal(loop(frames, steps[3:], to_first_frame), last.latents)


def test_all_frames_look_at_the_first(pipeline):
    """In a layer by itself: its keys and values are the first frame's, and of the prompt nothing changes."""
    block = pipeline("sd15").component("unet").down_blocks[0].attentions[0].transformer_blocks[0]
    x = mx.random.normal((2, 3, 20, 32), key=mx.random.key(0))
    first, keys_values = x[:, :1], block.attn2.keys_values(mx.random.normal((2, 7, 32), key=mx.random.key(1)))
    out, alone = to_first_frame(block.attn1, x), block.attn1(x)
    assert error(out[:, 0], alone[:, 0]) < 1e-6 and error(out[:, 1:], alone[:, 1:]) > 0.05
    same = to_first_frame(block.attn1, mx.concatenate([first, x[:, 2:]], axis=1))
    assert error(same[:, 1], out[:, 2]) < 1e-6
    assert mx.array_equal(to_first_frame(block.attn2, x, keys_values), block.attn2(x, keys_values))


def test_nothing_survives_a_generation_or_a_loop(pipeline):
    pipe, options = pipeline("sd15"), {"cache_interval": 3, "seeds": [7]} | SMALL
    first = pipe(PROMPT, **options)
    pipe(PROMPT, **options | {"frames": 2, "height": 128, "cache_branch": 5})
    steps = pipe.denoise(pipe.settings(PROMPT, **options))
    next(steps), next(steps), next(steps), steps.close()  # cancelled within the second loop
    assert mx.array_equal(pipe(PROMPT, **options).latents, first.latents)
    assert first.stats["steps"] == ["full"] + ["full", "cached"] + ["full", "cached", "cached"] * 2 + ["full"]


def test_guidance_in_turn_and_a_compiled_unet_are_the_same(checkpoint, pipeline):
    options = {"cache_interval": 2, "seeds": [7]} | SMALL
    plain = pipeline("sd15")(PROMPT, **options)
    for how in ({"low_memory": True}, {"compile": "on"}, {"keep": False}):
        other = StableDiffusion(pipeline("sd15").checkpoint, "float32", **how)(PROMPT, **options)
        assert error(other.latents, plain.latents) < 1e-5
        if "compile" not in how:  # in tiles, which here is one
            pair = (np.asarray(result.videos[0][2]).astype(float) for result in (other, plain))
            assert np.abs(np.subtract(*pair)).mean() < 0.1
    assert other.stats["unet_macs"] < other.stats["unet_macs_uncached"]


def test_without_guidance(pipeline):
    options = SMALL | {"cache_interval": 2}
    steps = []
    plain = pipeline("sd15")(PROMPT, guidance_scale=1, on_step=steps.append, **options)
    assert {work.pictures for step in steps for work in step.work} == {1}
    assert error(plain.latents, pipeline("sd15")(PROMPT, **options).latents) > 0.05


@pytest.fixture(scope="module")
def uncached(pipeline):
    """14 steps, drawn once."""
    return pipeline("sd15")(PROMPT, cache_interval=1, seeds=[7], **SMALL | {"steps": 14})


@pytest.mark.parametrize(
    "cache", ["adaptive:threshold=0", "taylorseer:order=1", "spectrum", "pab", "fastercache", "guidance:end=0.5"]
)
def test_other_caches(pipeline, uncached, cache):
    """Those that change nothing by their settings change nothing; the others save work, and their error is bounded."""
    pipe, options, plain = pipeline("sd15"), {"seeds": [7]} | SMALL | {"steps": 14}, uncached
    interval = {"cache_interval": 3} if cache in ("taylorseer:order=1", "spectrum") else {}
    other = pipe(PROMPT, **options, cache=[cache], **interval)
    assert (error(other.latents, plain.latents) == 0) == cache.startswith("adaptive")
    assert error(other.latents, plain.latents) < 1
    assert (other.stats["unet_macs"] < plain.stats["unet_macs"]) == (not cache.startswith("adaptive"))


def test_fewer_steps_keep_the_papers_share(pipeline):
    for steps, t0, t1 in ((50, 44, 47), (25, 22, 24), (4, 3, 4), (2, 0, 1)):
        settings = pipeline("sd15").settings(PROMPT, frames=2, steps=steps)
        assert settings.t0 < settings.t1 < steps
        if steps > 4:
            assert (settings.t0, settings.t1) == (t0, t1)


@pytest.fixture
def generate(checkpoint, tmp_path, monkeypatch, capfd):
    """Run generate.py in an empty folder: its exit code, what it said, and its errors."""
    monkeypatch.chdir(tmp_path)
    smooth(64, 96).save("in.png")
    save_file({"latents": np.zeros((1, 3, 4, 8, 12), np.float32)}, "five.safetensors")

    def run(*flags, kind="sd15"):
        try:
            code = main_generate(["--model", str(checkpoint(kind)), *map(str, flags)])
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


FLAGS = ["--prompt", PROMPT, "--frames", 3, "--steps", 6, "--t0", 3, "--t1", 4, "--height", 64, "--width", 96]


@pytest.mark.parametrize("output", ["a.mp4", "a.webp", "a.png"])
def test_settings_go_with_the_video_and_back(generate, tmp_path, output):
    more = ["--motion=-20,4.5", "--seed", 4, "--save-latents", "a.safetensors"]
    assert generate(*FLAGS, *more, "--output", output)[0] == 0
    settings, unknown = record.read(tmp_path / output)
    assert not unknown and settings["scheduler"] == "ddim"
    assert {name: settings[name] for name in ("frames", "fps", "motion", "t0", "t1")} == {
        "frames": 3,
        "fps": 4,
        "motion": "-20,4.5",
        "t0": 3,
        "t1": 4,
    }
    assert main_generate(["--from-image", output, "--output", "b.gif", "--save-latents", "b.safetensors"]) == 0
    with Image.open("b.gif") as animation:
        assert (animation.n_frames, animation.size, animation.info["duration"]) == (3, (96, 64), 250)
    a, b = (load_file(tmp_path / name)["latents"] for name in ("a.safetensors", "b.safetensors"))
    assert a.shape == (1, 3, 4, 8, 12) and np.array_equal(a, b)


def test_sheets_steps_and_statistics(generate, tmp_path):
    more = ["--grid", "--compare", "--save-steps", "steps", "--stats", "s.json", "--cache-interval", 2]
    code, out, err = generate(*FLAGS, "--output", "a.gif", *more)
    assert code == 0, err
    assert "PSNR to the uncached video: " in out and Image.open("a-grid.png").size == (2 * 96, 2 * 64)
    with Image.open("a-compare.gif") as compared:
        assert compared.n_frames == 3
    assert len(list((tmp_path / "steps").iterdir())) == 1 + 1 + 5
    assert json.loads((tmp_path / "s.json").read_text())["steps"] == ["full"] * 3 + ["cached", "full"] * 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fps", 7], "--fps is for videos of a prompt: Stable Diffusion 1.x draws a picture without --frames"),
        (["--motion", "1,2"], "--motion is for videos of a prompt"),
        (["--t0", 3], "--t0 is for videos of a prompt"),
        (["--t1", 3], "--t1 is for videos of a prompt"),
        (["--frames", 1], "--frames should be 2 or more for videos of a prompt, got 1"),
        (["--frames", 3, "--motion", "12"], "argument --motion: expected two numbers, X,Y, got '12'"),
        (["--frames", 3, "--motion", "1,nan"], "expected two numbers, X,Y, got '1,nan'"),
        (
            ["--frames", 3, "--t0", 40, "--t1", 40],
            "should rise from one to the next, got 40, 40 and 50",
        ),
        (["--frames", 3, "--t1", 50], "should rise from one to the next, got 44, 50 and 50"),
        (["--frames", 3, "--steps", 1], "--t0, --t1 and --steps should rise"),
        (
            ["--frames", 3, "--image", "in.png"],
            "of a prompt alone: leave out --image, or use --model svd",
        ),
        (["--frames", 3, "--image", "in.png", "--strength", 0.5], "--strength does not go with --frames"),
        (["--frames", 3, "--motion-bucket", 9], "--motion-bucket does not go with --frames"),
        (["--frames", 3, "--scheduler", "euler"], "are drawn with ddim; leave out --scheduler euler"),
        (["--frames", 3, "--cache", "tgate"], "videos of a prompt begin with 2 steps that have a cache of their own"),
        (["--frames", 3, "--latents", "five.safetensors"], "latents should have shape (1, 4, 8, 12)"),
    ],
)
def test_what_cannot_be_is_one_line(generate, tmp_path, flags, words):
    code, out, err = generate("--prompt", "x", *flags, "--output", "out.png", "--quiet")
    assert code == 2 and out == "" and words in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("refiner", "--refiner is for pictures: it has no meaning for videos of a prompt"),
        ("lcm", "need an ordinary model, and this one draws in a few steps of its own"),
        ("inpaint", "need an ordinary model, and this one fills in pictures"),
    ],
)
def test_models_that_cannot(generate, kind, words):
    code, _, err = generate("--prompt", "x", "--frames", 3, "--quiet", kind=kind)
    assert code == 2 and words in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def following(pipeline, nets):
    """Latents of a video that follows three pictures, and of one that follows them turned round."""
    options = {"frames": 3, "steps": 5, "cache_interval": 1, "seeds": [4], "height": 64, "width": 96}
    videos = (
        pipeline("sd15")(PROMPT, controls=[Control(nets[0], seen)], **options)
        for seen in (FOLLOWED[:3], FOLLOWED[2::-1])
    )
    return [channels_first(video.latents) for video in videos]


@pytest.mark.parametrize("kind", ["folder", "a.gif", "a.webp", "a.png", "a.mp4"])
def test_pictures_to_follow_as_files(generate, following, nets, tmp_path, kind):
    """The same video as from the pictures themselves, whose order is that of numbers and not of letters; where they are
    kept with a loss, nearly."""
    frames = FOLLOWED[:3]
    if kind == "folder":
        Path(kind).mkdir()
        Path(kind, "notes.txt").write_text("no picture")
        for number, frame in zip((2, 9, 10), frames, strict=True):
            frame.save(Path(kind, f"pose{number}.png"))
    else:
        write_video(Path(kind), [np.asarray(frame) for frame in frames], 4)
    more = ["--controlnet", nets[0], "--control-image", kind, "--steps", 5, "--cache-interval", 1, "--seed", 4]
    more += ["--height", 64, "--width", 96, "--dtype", "float32"]
    code, _, err = generate(
        "--prompt", PROMPT, "--frames", 3, *more, "--save-latents", "a.safetensors", "--output", "o"
    )
    assert code == 0, err
    made = load_file("a.safetensors")["latents"]
    same, turned = (error(made, latents) for latents in following)
    assert same < turned / 5 and (kind.endswith(("gif", "webp", "mp4")) or same < 1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--frames", 4, "--control-image", "three"], "of 4 frames is to follow as many pictures, and three has 3"),
        (["--frames", 2, "--control-image", "three"], "of 2 frames is to follow as many pictures, and three has 3"),
        (["--frames", 2, "--control-image", "three.gif"], "as many pictures, and three.gif has 3"),
        (["--frames", 4, "--control-image", "three.mp4"], "as many pictures, and three.mp4 has 3"),
        (["--frames", 2, "--control-image", "three.mp4"], "as many pictures, and three.mp4 has 3"),
        (["--frames", 3, "--control-image", "in.png"], "as many pictures, and in.png has 1"),
        (["--frames", 3, "--control-image", "three", "--motion", "1,2"], "its pictures say what moves"),
        (["--frames", 3, "--control-image", "three", "--t0", 3], "--t0 does not go with --controlnet"),
        (["--control-image", "three"], "three cannot be read"),
    ],
)
def test_pictures_that_cannot_be_followed(generate, nets, tmp_path, flags, words):
    arrays = [np.asarray(frame) for frame in FOLLOWED[:3]]
    for name in ("three", "three.gif", "three.mp4"):
        write_video(Path(name), arrays, 4)
    code, out, err = generate("--prompt", "x", "--controlnet", nets[0], *flags, "--output", "out.png", "--quiet")
    assert code in (1, 2) and out == "" and words in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))
