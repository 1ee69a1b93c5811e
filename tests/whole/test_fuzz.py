"""Flags, pictures, texts in pictures, safetensors headers and configs that nobody would write, thrown at generate.py.

Whatever comes in, what comes out is a picture or one line that starts with "error: ", and nothing half-written. Here
each kind gets some examples from a fixed seed; many more from another:

    FUZZ_EXAMPLES=1000 FUZZ_SEED=1 python -m pytest tests/whole/test_fuzz.py
"""

import contextlib
import copy
import io
import json
import os
import re
import shutil
import signal
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save
from tiny import write_taesd

from mlx_deepcache.apps.flags import generate_parser
from mlx_deepcache.apps.generate import main_generate

LONGEST = 120  # seconds; no example of these takes ten
EXAMPLES, SEED = (int(os.environ.get(name, usual)) for name, usual in (("FUZZ_EXAMPLES", 15), ("FUZZ_SEED", 20261121)))
settings.register_profile(
    "fuzz", max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
settings.load_profile("fuzz")

NUMBERS = [
    "0",
    "1",
    "2",
    "-1",
    "3",
    "0.5",
    "-0",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 30,
    "1_0",
    "٣",
    "0x10",
    "",
]
WORDS = [
    "",
    " ",
    "a cat",
    "\0",
    "\x1b[31m",
    "é",
    "\ud800",
    "(a:1e9)",
    "((((",
    "<lora:x:1>",
    "a" * 3000,
    "🍎",
    "-",
    "--",
]
FILES = ["", ".", "..", "/", "/dev/null", "missing", "x" * 300, "picture.png", "text.txt", "model", "\0", "loop", "-"]


@pytest.fixture(scope="module")
def bench(checkpoint, tmp_path_factory):
    """A folder with a model, a picture, latents and a VAE to spoil."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(checkpoint("sd15"), folder / "model")
    write_taesd(folder / "taesd")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "picture.png")
    (folder / "text.txt").write_text("a cat\na dog\n")
    (folder / "loop").symlink_to("loop")
    return folder


def run(bench, *flags):
    """generate.py in an empty folder, and what it must keep to: an exit code, one line, nothing left behind."""
    flags = ["--model", "model", "--prompt", "a cat", "--height", "64", "--width", "64", "--steps", "1", *flags]
    before, out, err = Path.cwd(), io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in bench.iterdir():
            Path(folder, file.name).symlink_to(os.readlink(file) if file.is_symlink() else file)
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("sys.stdin", io.StringIO("a cat\n"))
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(LONGEST)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main_generate([str(flag) for flag in flags])
        except SystemExit as stop:  # argparse's own way out
            code = stop.code
        finally:
            signal.alarm(0)
            os.chdir(before)
        parts = [file.name for file in Path(folder).rglob("*") if ".part" in file.name]
    said = err.getvalue()
    assert code in (0, 1, 2), said
    assert "Traceback" not in said
    assert not parts
    errors = [line for line in said.splitlines() if re.match(r"(generate\.py: )?error: ", line)]
    assert len(errors) == (code != 0) or "prompts could not be drawn" in said, said
    assert not code or said.rstrip("\n").endswith(errors[-1]), said
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]|\x1b(?!\[A)", said), repr(said)
    assert all(len(line) < 2000 for line in errors), said


def too_long(*_):
    raise AssertionError(f"it took more than {LONGEST} s")


# Flags

SKIPPED = {"help", "version", "model", "refiner"}
FEW = {"steps": ["0", "1", "2", "1000", "1001"], "num_images": ["0", "1", "2", "100001"], "seeds": None}


def value_of(action):
    kinds = [st.sampled_from([*WORDS, *NUMBERS])]
    if action.dest in FEW and FEW[action.dest]:
        return st.sampled_from([*FEW[action.dest], "-1", "x", "1.5", "9" * 30])
    if action.choices:
        kinds += [st.sampled_from([str(choice) for choice in action.choices])] * 2
    if action.metavar and re.search("FILE|DIR|M$", str(action.metavar)):
        kinds.append(st.sampled_from(FILES))
    if action.dest == "cache":
        names = ["deepcache", "adaptive", "taylorseer", "spectrum", "pab", "fastercache", "tgate", "guidance", "auto"]
        keys = [
            "interval",
            "branch",
            "start",
            "end",
            "steps",
            "order",
            "threshold",
            "step",
            "spatial",
            "center",
            "power",
        ]
        pair = st.builds("{}={}".format, st.sampled_from(keys), st.sampled_from([*NUMBERS, "F.", "0-1+3", "x"]))
        kinds += [st.builds("{}:{}".format, st.sampled_from(names), st.lists(pair, max_size=3).map(",".join))] * 3
    return st.one_of(*kinds)


def flag_and_value(action):
    flag = max(action.option_strings, key=len)
    if action.nargs == 0:
        return st.just([flag])
    return value_of(action).map(lambda value: [f"{flag}={value}"])


FLAGS = [a for a in generate_parser()._actions if a.option_strings and a.dest not in SKIPPED]


@seed(SEED)
@given(st.lists(st.sampled_from(FLAGS).flatmap(flag_and_value), max_size=5))
@example([["--lora=--"]])  # found: argparse makes an empty list of it
@example([["--seed=--"]])
@example([["--save-latents=\ud800"]])  # found: no file can be called so
def test_flags(bench, flags):
    run(bench, *(part for flag in flags for part in flag))


# Bytes

CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "drop", "repeat", "insert"]), st.floats(0, 1), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


def changed(data, changes):
    for kind, where, value in changes:
        at = int(where * max(len(data) - 1, 0))
        middle = {"set": bytes([value]), "drop": b"", "insert": bytes([value]) * (1 + value % 9)}
        if kind == "cut":
            data = data[:at]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 8 * value] * 2 + data[at + 8 * value :]
        else:
            data = data[:at] + middle[kind] + data[at + (kind != "insert") :]
    return data


def encoded(kind, mode):
    out = io.BytesIO()
    values = np.random.default_rng(1).integers(0, 256, (24, 40, 3), np.uint8)
    picture = Image.fromarray(values[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(values)
    picture = picture if picture.mode == mode else picture.convert(mode)
    picture.save(out, kind, **({"save_all": True, "append_images": [picture]} if kind in ("GIF", "TIFF") else {}))
    return out.getvalue()


PICTURES = [
    encoded(*how)
    for how in [
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "I;16"),
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
        ("GIF", "P"),
        ("TIFF", "RGB"),
        ("BMP", "L"),
        ("WEBP", "RGB"),
    ]
]


@seed(SEED)
@given(st.sampled_from(PICTURES), CHANGES, st.sampled_from(["--image", "--mask", "--from-image"]))
def test_pictures(bench, data, changes, flag):
    (bench / "spoilt.png").write_bytes(changed(data, changes))
    image = ["--image", "picture.png"] if flag == "--mask" else []
    run(bench, *image, flag, "spoilt.png")


# Texts in pictures

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from([*WORDS, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted({a.option_strings[0].removeprefix("--").replace("-", "_") for a in FLAGS} | {"seed", "version", "dtype"})
PARAMETERS = [
    "a cat\nNegative prompt: a dog\nSteps: 1, Sampler: DDIM, CFG scale: 7, Seed: 5, Size: 64x64, Model: x, RNG: NV",
    'a <lora:ink:0.8> cat\nSteps: 1, Sampler: Euler a, Schedule type: Karras, Seed: 1, Lora hashes: "ink: abc, b: c"',
    "Steps: 1, Size: 99999999x1, Seed: -1, Denoising strength: 0.5, Hires upscale: 2, Clip skip: 2, VAE: a.pt",
]


@seed(SEED)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_recorded_settings(bench, values):
    info = PngInfo()
    info.add_text("mlx_deepcache", json.dumps({"prompt": "a cat", "steps": 1, "height": 64, "width": 64} | values))
    Image.new("RGB", (8, 8)).save(bench / "told.png", pnginfo=info)
    run(bench, "--from-image", "told.png")


@seed(SEED)
@given(st.sampled_from(PARAMETERS), CHANGES, st.booleans())
def test_parameters(bench, text, changes, compressed):
    info = PngInfo()
    info.add_itxt("parameters", changed(text.encode(), changes).decode(errors="replace"), zip=compressed)
    Image.new("RGB", (8, 8)).save(bench / "told.png", pnginfo=info)
    run(bench, "--from-image", "told.png", "--steps", "1")


# Headers

HEADER = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(
            ["F32", "F16", "BF16", "F64", "I64", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "U32", "", "X", 3]
        ),
        "shape": st.lists(st.sampled_from([0, 1, 4, 8, -1, 2**31, 2**63, 2**70, 1.5, None]), max_size=5),
        "data_offsets": st.lists(st.sampled_from([0, 4, 64, 1024, 4096, -1, 2**63, 2**70, None]), max_size=3),
    },
)
TENSORS = {
    "--latents": {"latents": np.zeros((1, 4, 8, 8), np.float32)},
    "--lora": {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": np.zeros((1, 64), np.float32),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": np.zeros((64, 1), np.float32),
    },
    "--embedding": {"emb_params": np.zeros((1, 64), np.float32)},
}


@seed(SEED)
@given(st.sampled_from(list(TENSORS)), HEADER, st.none() | st.integers(0, 2**64 - 1), CHANGES | st.just([]), JSON)
def test_headers(bench, flag, entry, length, changes, metadata):
    data = save(TENSORS[flag])
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = next(iter(header))
    header[name] |= entry
    if metadata is not None:
        header["__metadata__"] = metadata
    told = json.dumps(header).encode()
    data = struct.pack("<Q", len(told) if length is None else length) + told + body
    (bench / "spoilt.safetensors").write_bytes(changed(data, changes))
    run(bench, flag, "spoilt.safetensors")


# Configs

CONFIGS = [
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
]


@seed(SEED)
@given(st.sampled_from(CONFIGS), st.integers(0, 99), JSON | st.sampled_from([0, -1, 10**9, 2**70, [], {}, "x", [0]]))
@example("scheduler/scheduler_config.json", 10, [None, []])  # found: betas that are no numbers
@example("vae/config.json", 86, 0)  # found: latents without channels
@example("text_encoder/config.json", 15, 10**9)  # found: layers without end
@example("vae/config.json", 95, 2**70)  # found: a scale that MLX could not take
def test_configs(bench, file, which, value):
    """One value of one config."""
    place = bench / "model" / file
    was = place.read_text()
    config = copy.deepcopy(json.loads(was))
    key = sorted(config)[which % len(config)]
    place.write_text(json.dumps(config | {key: value}))
    try:
        run(bench)
    finally:
        place.write_text(was)


@seed(SEED)
@given(st.sampled_from([*CONFIGS, "tokenizer/vocab.json", "tokenizer/merges.txt"]), CHANGES)
def test_spoilt_configs(bench, file, changes):
    place = bench / "model" / file
    was = place.read_bytes()
    place.write_bytes(changed(was, changes))
    try:
        run(bench)
    finally:
        place.write_bytes(was)
