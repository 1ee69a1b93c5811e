"""Bad input ends in one clear line, and leaves nothing half-written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tqdm
from PIL import Image
from running import (
    REPOSITORY,
    SMALL,
    UNET,
    VAE,
    assert_fails,
    edit,
    edit_tensors,
    exit_code,
    final_latents,
    left,
    pixels,
    recorded,
)
from safetensors.numpy import save_file

import mlx_deepcache
from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.checkpoints.checkpoint import Checkpoint
from mlx_deepcache.errors import out_of_memory


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--height", 60], "height should be a positive multiple of 8"),
        (["--width", 4], "width should be a positive multiple of 8"),
        (["--height", 8, "--width", 8], "16 values or more"),
        (["--height", -64], "--height"),
        (["--steps", 0], "--steps"),
        (["--steps", -3], "--steps"),
        (["--steps", 1000], "fewer than 1000 with pndm"),
        (["--steps", 1001], "from 1 to 1000"),
        (["--steps", "many"], "--steps"),
        (["--num-images", 0], "--num-images"),
        (["--cache-interval", 0], "--cache-interval"),
        (["--cache-interval", -3], "--cache-interval"),
        (["--cache-branch", 12], "[0, 12)"),
        (["--cache-branch", -1], "--cache-branch"),
        (["--scheduler", "dpm++3m"], "dpm++2m-karras"),
        (["--rng", "dice"], "torch-cuda"),
        (["--dtype", "int8"], "bfloat16"),
        (["--guidance-scale", "nan"], "--guidance-scale"),
        (["--output", "out.jpg"], ".png"),
        (["--output", ""], ".png"),
        (["--output", "out.png", "--stats", "out.png"], "--stats"),
        (["--output", "out.png", "--save-latents", "./out.png"], "--save-latents"),
        (["--prompt", "a \udcff cat"], "prompt"),
        (["--num", 2], "--num"),
    ],
)
def test_usage_errors(draw, capfd, flags, word):
    assert_fails(capfd, draw(*flags), 2, word)


def test_branch_range_is_the_models(draw, checkpoint, capfd):
    assert_fails(capfd, draw("--cache-branch", 9, model=checkpoint("sdxl")), 2, "[0, 9)", "9")


@pytest.mark.parametrize("flag", ["--output", "--stats", "--save-latents"])
@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("missing/out.png", "no folder"),
        ("{folder}", "is a folder"),
        ("x" * 300 + ".png", "name too long"),
    ],
)
def test_unwritable(draw, capfd, tmp_path, flag, file, word):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert_fails(capfd, draw(flag, file.format(folder=folder)), 1, "cannot write", word)


def test_one_of_several_is_unwritable(draw, capfd, monkeypatch):
    Path("out-2.png").mkdir()
    monkeypatch.setattr(tqdm.tqdm, "update", None)  # found before the first step
    code = draw("--num-images", 2)
    assert "cannot write out-2.png: it is a folder" in capfd.readouterr().err
    assert (code, left()) == (1, ["out-2.png"])


def test_out_of_memory(draw, capfd):
    size = 8 * 10**7
    assert_fails(capfd, draw("--quiet", "--height", size, "--width", size), 2, "memory", "the largest size that fits")


def test_read_only_folder(draw, capfd, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir(mode=0o555)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # root may write anywhere
    assert_fails(capfd, draw("--output", tmp_path / "locked" / "out.png"), 1, "permission denied", "locked")


def test_disk_full(draw, capfd, monkeypatch):
    def save(self, file, **options):
        Path(file).write_text("half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    assert_fails(capfd, draw("--steps", 1), 1, "cannot write out.png", "No space left")


@pytest.mark.parametrize(("flag", "file"), [("--stats", "s.json"), ("--save-latents", "l.safetensors")])
def test_disk_full_beside_the_picture(draw, checkpoint, capfd, monkeypatch, flag, file):
    """What was there before stays."""
    checkpoint("sd15")  # written while there is room

    def write_text(self, *_, **__):
        self.write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    def save_safetensors(name, *_, **__):
        Path(name).write_bytes(b"half a fi")
        raise RuntimeError("[save_safetensors] No space left on device")

    Path(file).write_bytes(b"old")
    monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr(mx, "save_safetensors", save_safetensors)
    assert draw("--steps", 1, flag, file) == 1
    assert re.search(rf"^error: cannot write {file}: .*No space left on device$", capfd.readouterr().err, re.MULTILINE)
    assert (left(), Path(file).read_bytes()) == (sorted([file, "out.png"]), b"old")


@pytest.mark.parametrize("name", ["no such model", "", "./nowhere", "x" * 5000, "nobody/nothing"])
def test_no_such_model(draw, capfd, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_fails(capfd, draw(model=name), 1, "model" if "nobody" not in name else "nobody/nothing is no folder")


@pytest.mark.parametrize("kind", ["empty", "file", "other"])
def test_no_checkpoint(draw, capfd, tmp_path, kind):
    model = tmp_path / "model"
    if kind == "file":
        model.write_text("")
    else:
        model.mkdir()
    if kind == "other":
        (model / "config.json").write_text("{}")
    assert_fails(capfd, draw(model=model), 1, "is no checkpoint", "model_index.json")


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_folder(draw, copy, capfd, name):
    model = copy()
    shutil.rmtree(model / name)
    assert_fails(capfd, draw("--quiet", model=model), 1, name)


@pytest.mark.parametrize("file", [UNET, VAE, "text_encoder/model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "header", "empty", "html"])
def test_damaged_weights(draw, copy, capfd, file, damage):
    model = copy()
    whole = (model / file).read_bytes()
    (model / file).write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "header": whole[:8] + b"\0" * 64 + whole[72:],
            "empty": b"",
            "html": b"<!doctype html><title>404</title>",
        }[damage]
    )
    assert_fails(capfd, draw("--quiet", model=model), 1, str(Path(file).parent), "damaged")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("conv_in.bias"), ["lacks conv_in.bias"]),
        (lambda t: t.update({"lora.up": np.zeros(3, "f")}), ["holds lora.up"]),
        (lambda t: t.update({"conv_in.bias": np.zeros(5, "f")}), ["conv_in.bias", "(32,)", "(5,)"]),
        (lambda t: t.update({"conv_in.weight": np.zeros((32, 9, 3, 3), "f")}), ["conv_in.weight"]),
        (lambda t: t.update({"conv_in.bias": np.zeros(32, "int32")}), ["conv_in.bias", "floating point"]),
    ],
    ids=["missing", "surplus", "misshapen", "inpainting", "integers"],
)
def test_wrong_tensors(draw, copy, capfd, change, words):
    model = copy()
    edit_tensors(model / UNET, change)
    assert_fails(capfd, draw(model=model), 1, "unet", *words)


def test_pickle_only(draw, copy, capfd):
    model = copy()
    (model / UNET).rename((model / UNET).with_suffix(".bin"))
    assert_fails(capfd, draw(model=model), 1, "diffusion_pytorch_model.bin", "pickle")


def test_no_weights(draw, copy, capfd):
    model = copy()
    (model / UNET).unlink()
    assert_fails(capfd, draw(model=model), 1, "unet", "no weights")


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("unet/config.json", {"class_embed_type": "timestep"}, ["class_embed_type", "timestep"]),
        ("unet/config.json", {"mid_block_type": "UNetMidBlock2D"}, ["mid_block_type"]),
        ("unet/config.json", {"in_channels": 8}, ["8 channels", "inpainting"]),
        ("unet/config.json", {"cross_attention_dim": "wide"}, ["cross_attention_dim"]),
        ("unet/config.json", {"block_out_channels": 32}, ["block_out_channels"]),
        ("unet/config.json", {"norm_num_groups": 0}, ["norm_num_groups"]),
        ("unet/config.json", {"attention_head_dim": [1, 2]}, ["attention_head_dim"]),
        ("vae/config.json", {"act_fn": "relu"}, ["act_fn", "relu"]),
        ("vae/config.json", {"scaling_factor": "large"}, ["scaling_factor"]),
        ("text_encoder/config.json", {"hidden_act": "relu"}, ["hidden_act", "relu"]),
        ("text_encoder/config.json", {"num_attention_heads": 7}, ["num_attention_heads"]),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowScheduler"}, ["FlowScheduler"]),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, ["prediction_type", "flow"]),
        ("scheduler/scheduler_config.json", {"beta_start": "low"}, ["beta_start"]),
        ("model_index.json", {"_class_name": "FluxPipeline"}, ["FluxPipeline"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_unsupported_config(draw, copy, capfd, file, values, words):
    model = copy()
    edit(model / file, **values)
    assert_fails(capfd, draw("--quiet", model=model), 1, *words)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000], ids=lambda text: text[:5])
@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
    ],
)
def test_damaged_json(draw, copy, capfd, file, text):
    model = copy()
    (model / file).write_text(text)
    assert_fails(capfd, draw("--quiet", model=model), 1, "tokenizer" if "vocab" in file else file)


def test_tokenizer_of_another_checkpoint(draw, copy, capfd):
    """A text encoder with fewer tokens than the tokenizer: MLX would read past the end of the table."""
    model, name = copy(), "text_model.embeddings.token_embedding.weight"
    edit(model / "text_encoder/config.json", vocab_size=500)
    edit_tensors(model / "text_encoder/model.safetensors", lambda t: t.update({name: t[name][:500].copy()}))
    assert_fails(capfd, draw("--quiet", model=model), 1, "token", "500")


@pytest.mark.parametrize("length", [None, 10**30, 100])
def test_tokenizer_length_left_out(draw, copy, length):
    """Some tokenizer configs leave model_max_length out, or give a placeholder: CLIP reads 77."""
    expected = final_latents(draw)
    model = copy()
    file = model / "tokenizer/tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("model_max_length")
    file.write_text(json.dumps(config if length is None else config | {"model_max_length": length}))
    assert np.array_equal(final_latents(draw, "--model", model), expected)


@pytest.mark.parametrize(
    ("tensors", "code", "words"),
    [
        ({"latents": np.zeros((1, 4, 8, 7), "f")}, 2, ["(1, 4, 8, 8)", "(1, 4, 8, 7)"]),
        ({"latents": np.zeros((1, 3, 8, 8), "f")}, 2, ["(1, 4, 8, 8)", "(1, 3, 8, 8)"]),
        ({"latents": np.zeros((4, 8, 8), "f")}, 1, ["(4, 8, 8)"]),
        ({"latents": np.full((1, 4, 8, 8), np.nan, "f")}, 1, ["NaN"]),
        ({"latents": np.full((1, 4, 8, 8), np.inf, "f")}, 1, ["infinite"]),
        ({"latents": np.zeros((0, 4, 8, 8), "f")}, 1, ["latents"]),
        ({"noise": np.zeros((1, 4, 8, 8), "f")}, 1, ["`latents`", "noise"]),
        ({}, 1, ["`latents`", "none"]),
        (None, 1, ["missing"]),
        ("text", 1, ["no safetensors file"]),
    ],
    ids=["width", "channels", "dimensions", "nan", "inf", "none", "name", "empty", "no-file", "text"],
)
def test_bad_latents(draw, capfd, tmp_path, tensors, code, words):
    file = tmp_path / "noise.safetensors"
    if isinstance(tensors, dict):
        save_file(tensors, file)
    elif tensors is not None:
        file.write_text(tensors)
    assert_fails(capfd, draw("--quiet", "--latents", file), code, *words)


def test_latents_and_num_images_differ(draw, capfd, tmp_path):
    save_file({"latents": np.zeros((2, 4, 8, 8), "f")}, tmp_path / "noise.safetensors")
    code = draw("--quiet", "--latents", tmp_path / "noise.safetensors", "--num-images", 3)
    assert_fails(capfd, code, 2, "(3, 4, 8, 8)", "(2, 4, 8, 8)")


def nan_weights(name):
    return lambda tensors: tensors[name].fill(np.nan)


def test_nan_in_the_unet(draw, copy, capfd):
    model = copy()
    edit_tensors(model / UNET, nan_weights("conv_in.weight"))
    code = draw("--save-latents", "l.safetensors", "--stats", "s.json", "--quiet", model=model)
    assert_fails(capfd, code, 1, "latents", "NaN", "a lower --guidance-scale", "check the checkpoint")


@pytest.mark.parametrize(
    ("flags", "first"),
    [
        (["--prompt", "a (cat:50)"], "smaller weights in the prompt or "),
        (["--prompt", "a (cat:50)", "--plain-prompt", "--dtype", "float16"], "--dtype float32 or "),
        (["--prompt", "a cat", "--guidance-scale", 1], "another --scheduler"),
    ],
)
def test_advice_on_nan_fits_its_cause(draw, copy, capfd, flags, first):
    model = copy()
    edit_tensors(model / UNET, nan_weights("conv_in.weight"))
    assert_fails(capfd, draw("--quiet", *flags, model=model), 1, f"try {first}")


@pytest.mark.parametrize("weight", ["1e38", "-101", "9" * 400])
def test_huge_weights(draw, capfd, weight):
    weight = weight if "e" not in weight else "1" + "0" * 38
    assert_fails(capfd, draw("--quiet", "--prompt", f"a (cat:{weight})"), 2, "from -100 to 100", "'cat'")
    assert_fails(capfd, draw("--quiet", "--negative-prompt", "(" * 60 + "cat"), 2, "from -100 to 100", "'cat'")


def test_a_bad_prompt_fails_alone(draw, checkpoint, capfd):
    """The others are drawn, under the numbers that they would have had."""
    Path("prompts").write_text("(a cat:1000)\na dog\n(a bird:-1000)\n")
    flags = ["--model", checkpoint("sd15"), "--prompt-file", "prompts", *SMALL, "--quiet"]
    code = exit_code(main_generate, [*flags, "--num-images", 2, "--stats", "s.json", "--steps", 1])
    err = capfd.readouterr().err
    assert code == 1
    assert left() == ["out-3.png", "out-4.png", "prompts", "s.json"]
    assert [recorded(f"out-{i}.png")["prompt"] for i in (3, 4)] == ["a dog"] * 2
    first, second, last = err.splitlines()
    assert first.startswith("error: prompt 1, '(a cat:1000)': a weight in a prompt")
    assert second.startswith("error: prompt 3, '(a bird:-1000)': ")
    assert last == "error: 2 of 3 prompts could not be drawn"
    assert isinstance(json.loads(Path("s.json").read_text()), dict)  # of the one batch that was drawn


def test_a_first_prompt_fails_alone_too(draw, checkpoint, capfd):
    Path("prompts").write_text("a cat <lora:gone:1>\na dog\n")
    flags = ["--model", checkpoint("sd15"), "--prompt-file", "prompts", *SMALL, "--quiet", "--lora-dir", "."]
    assert exit_code(main_generate, flags) == 1
    assert left() == ["out-2.png", "prompts"]
    assert "error: prompt 1, 'a cat <lora:gone:1>': there is no LoRA 'gone'" in capfd.readouterr().err


def test_no_prompt_can_be_drawn(draw, checkpoint, capfd):
    Path("prompts").write_text("(a cat:1000)\n(a bird:-1000)\n")
    flags = ["--model", checkpoint("sd15"), "--prompt-file", "prompts", *SMALL, "--quiet"]
    code = exit_code(main_generate, [*flags, "--grid", "--stats", "s.json"])
    assert (code, left()) == (1, ["prompts"])
    assert capfd.readouterr().err.splitlines()[-1] == "error: none of the prompts could be drawn"


def test_a_picture_is_drawn_at_the_models_size(draw, checkpoint):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save("photo.png")
    flags = ["--model", checkpoint("sd15"), "--prompt", "a cat", "--image", "photo.png", "--steps", 2, "--strength", 1]
    assert exit_code(main_generate, [*flags, "--output", "a.png"]) == 0
    side = Checkpoint.open(str(checkpoint("sd15"))).native_size[0]
    height, width, _ = pixels("a.png").shape
    assert abs(height * width / side**2 - 1) < 0.2 and abs(width / height - 4 / 3) < 0.2
    assert exit_code(main_generate, [*flags, "--output", "b.png", "--height", 48]) == 0
    assert pixels("b.png").shape == (48, 64, 3)
    assert exit_code(main_generate, [*flags, "--output", "c.png", "--height", 32, "--width", 96]) == 0
    assert pixels("c.png").shape == (32, 96, 3)


def test_nan_in_the_vae(draw, copy, capfd):
    model = copy()
    edit_tensors(model / VAE, nan_weights("decoder.conv_in.weight"))
    assert_fails(capfd, draw("--quiet", "--save-latents", "l.safetensors", model=model), 1, "VAE", "NaN")


@pytest.mark.parametrize("colour", [0, 0.3])
def test_a_picture_that_is_all_one_colour(draw, copy, capfd, colour):
    """As MLX has given on Metal, without an error, where a convolution ran out of memory."""

    def flat(tensors):
        tensors["decoder.conv_out.weight"].fill(0)
        tensors["decoder.conv_out.bias"][:] = colour * np.arange(3)

    model = copy()
    edit_tensors(model / VAE, flat)
    words = "all one colour", "--vae-tiling on", "--dtype float32", "check the VAE"
    assert_fails(capfd, draw("--quiet", model=model), 1, *words)


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_ctrl_c(draw, capfd, monkeypatch, quiet):
    steps = []

    def update(bar, n=1):
        steps.append(n)
        if len(steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tqdm.tqdm, "update", update)
    assert draw("--save-latents", "l.safetensors", "--stats", "s.json", *quiet) == 130
    out, err = capfd.readouterr()
    assert len(steps) == 2
    assert "cancelled" in err
    assert "Traceback" not in out + err
    assert left() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_clean_up_too(draw, capfd, monkeypatch, number, code):
    monkeypatch.setattr(
        Image.Image, "save", lambda self, file, **_: (file.write_text("h"), signal.raise_signal(number))
    )
    assert draw("--steps", 1) == code
    assert capfd.readouterr().err.splitlines()[-1] == "cancelled; the picture under way was not written"
    assert left() == []


def test_nohup_is_honoured(draw):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert draw("--steps", 1) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["generate.py", "convert.py"])
def test_ctrl_c_while_importing(tmp_path, name):
    """In the first tenth of a second, when no command is there to catch it: one that comes while NumPy is imported."""
    (tmp_path / "numpy.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, REPOSITORY / name, "--prompt", "x"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ncancelled; nothing was done\n")


@pytest.mark.parametrize("main", [main_generate, main_convert])
def test_ctrl_c_at_once(monkeypatch, capfd, main):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("argparse.ArgumentParser.parse_known_args", interrupted)
    assert main(["--help"]) == 130
    assert "cancelled" in capfd.readouterr().err


@pytest.mark.parametrize("model", ["whole", "vae-only"])
def test_all_parts_are_looked_for_before_drawing(draw, copy, capfd, monkeypatch, model):
    """A damaged VAE is not found out after an hour of denoising."""
    folder = copy()
    if model == "vae-only":
        (folder / VAE).write_bytes(b"damaged")
    steps = []
    monkeypatch.setattr(tqdm.tqdm, "update", lambda bar, n=1: steps.append(n))
    assert draw("--quiet", model=folder) == (0 if model == "whole" else 1)
    assert len(steps) == (4 if model == "whole" else 0)


def test_closed_pipe(checkpoint, tmp_path):
    """`generate.py | head -0` ends without a traceback."""
    flags = ["--model", checkpoint("sd15"), "--prompt", "a cat", *SMALL]
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, REPOSITORY / "generate.py", *map(str, flags)]
        done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "code", "word"),
    [
        (["--model", "no such model", "--output", "d"], 1, "no model"),
        (["--output", "d"], 2, "--model"),
        (["--model", "{sd15}", "--output", "d", "--quantize", "5"], 2, "--quantize"),
        (["--model", "{sd15}", "--output", "d", "--dtype", "int8"], 2, "--dtype"),
        (["--model", "{sd15}", "--output", "{sd15}"], 2, "exists"),
        (["--model", "{sd15}", "--output", "{sd15}", "--force"], 2, "the model itself"),
        (["--model", "{sd15}", "--output", "x" * 300], 1, "cannot write"),
        (["--model", "{sd15}", "--output", "{sd15}/model_index.json/d"], 1, "cannot write"),
    ],
)
def test_convert_errors(checkpoint, tmp_path, monkeypatch, capfd, flags, code, word):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    flags = [flag.format(sd15=checkpoint("sd15")) for flag in flags]
    assert_fails(capfd, exit_code(main_convert, flags), code, word)
    assert (checkpoint("sd15") / UNET).is_file()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--image", "nowhere.png"], 1, ["there is no picture nowhere.png"]),
        (["--mask", "mask.png"], 2, ["--mask has no meaning without an --image"]),
        (["--image", "nowhere.png", "--strength", "0.2"], 2, ["none of 3 steps", "0.3334"]),
        (["--image", "nowhere.png", "--fit", "tile"], 2, ["--fit", "crop"]),
    ],
)
def test_bad_pictures(draw, capfd, flags, code, words):
    assert_fails(capfd, draw(*flags), code, *words)


@pytest.mark.parametrize(
    "told",
    [
        "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size.",
        "[metal::malloc] Resource limit (499000) exceeded.",
        "[malloc] Unable to allocate 9 bytes.",
        "[METAL] Command buffer execution failed: Insufficient Memory "
        "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
        "cudaMallocAsync(&data, size, stream) failed: out of memory",
    ],
)
def test_a_gpu_without_memory(draw, capfd, monkeypatch, told):
    """MLX 0.32 says so by a RuntimeError, in Metal's words; the server knows them too."""

    def full(*_, **__):
        raise RuntimeError(told)

    monkeypatch.setattr(mlx_deepcache.StableDiffusion, "from_pretrained", full)
    assert_fails(capfd, draw(*SMALL), 1, "not enough memory; try a smaller --height")
    assert out_of_memory(RuntimeError(told)) and not out_of_memory(RuntimeError("[matmul] shapes"))


def test_a_gpu_that_gives_up(draw, capfd, monkeypatch):
    """As MLX 0.32 says it when the screen waits too long; an error that nobody knows stays one."""
    told = "[METAL] Command buffer execution failed: Caused GPU Timeout Error"

    def fail(*_, **__):
        raise RuntimeError(told)

    monkeypatch.setattr(mlx_deepcache.StableDiffusion, "from_pretrained", fail)
    assert_fails(capfd, draw(*SMALL), 1, f"the GPU failed ({told})", "try again, or try a smaller --height")
    told = "something else"
    with pytest.raises(RuntimeError, match=told):
        draw(*SMALL)
