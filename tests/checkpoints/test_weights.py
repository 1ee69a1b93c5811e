"""convert.py, the files that a checkpoint may consist of, and which of them are asked of the hub."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from helpers import PICTURE
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import Hub, files, write_controlnet

from mlx_deepcache import Control, StableDiffusion
from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.checkpoints import hub
from mlx_deepcache.checkpoints.names import hub_id
from mlx_deepcache.checkpoints.weights import read_component, read_tensors
from mlx_deepcache.errors import CheckpointError
from mlx_deepcache.fields import file_and_scale, file_and_word

REPOSITORY = Path(__file__).parents[2]
COMPONENTS = {"sd15": ("text_encoder", "unet", "vae"), "sdxl": ("text_encoder", "text_encoder_2", "unet", "vae")}
TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@pytest.fixture
def copy(checkpoint, tmp_path):
    """copy(kind): a checkpoint to change."""
    return lambda kind="sd15": shutil.copytree(checkpoint(kind), tmp_path / f"copy-of-{kind}")


@pytest.fixture
def output(tmp_path):
    """The folder to convert to, the only thing in the folder that it is in."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model"


def convert(source, output, *flags):
    return main_convert([str(flag) for flag in ("--model", source, "--output", output, *flags)])


def draw(model):
    """Final latents and the picture, in float32."""
    pipe = StableDiffusion.from_pretrained(str(model), "float32", keep=False)
    result = pipe("a cat", steps=2, height=32, width=32, seeds=[3], cache_interval=2)
    return np.array(result.latents), np.array(result.images[0])


def assert_same_picture(model, reference):
    for ours, theirs in zip(draw(model), draw(reference), strict=True):
        assert np.array_equal(ours, theirs)


def content(folder):
    return {name: (folder / name).read_bytes() for name in files(folder)}


def only_weights(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def header(file):
    """Metadata, and each tensor's type and shape."""
    with safe_open(file, framework="numpy") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return opened.metadata(), {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


def to_half(file):
    """Rewrite a file as its fp16 variant."""
    tensors = {name: t.astype(np.float16) if t.dtype == np.float32 else t for name, t in load_file(file).items()}
    save_file(tensors, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    file.unlink()


def shard(file, variant="", old=False):
    """Split a file in two, as diffusers and transformers do; old versions put the variant after the number."""
    tensors = load_file(file)
    names = sorted(tensors)
    parts, weight_map = (names[::2], names[1::2]), {}
    for i, part in enumerate(parts, 1):
        number = f"-{i:05}-of-00002"
        name = f"{file.stem}{number + variant if old else variant + number}.safetensors"
        save_file({n: tensors[n] for n in part}, file.with_name(name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    file.with_name(f"{file.stem}.safetensors.index{variant}.json").write_text(json.dumps(index))
    file.unlink()


def fails(capfd, code, *words):
    """One line on stderr that says what went wrong."""
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    return code == 1 and len(lines) == 1 and "Traceback" not in err and all(word in lines[0] for word in words)


# ---------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_convert(checkpoint, output, capfd, kind):
    source = checkpoint(kind)
    (output.parent / "other").write_text("left alone")
    assert convert(source, output) == 0
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in COMPONENTS[kind] if "text" in name]
    expected = {"model_index.json", "scheduler/scheduler_config.json"}
    expected |= {f"{name}/{file}" for name in COMPONENTS[kind] for file in ("config.json", "weights.safetensors")}
    expected |= {f"{name}/{file}" for name in tokenizers for file in files(source / name)}
    assert files(output) == expected
    assert sorted(os.listdir(output.parent)) == ["model", "other"]
    for name in COMPONENTS[kind]:
        metadata, _ = header(output / name / "weights.safetensors")
        assert metadata["layout"] == "channels_last"
    assert_same_picture(output, source)

    out, err = capfd.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    total = 0
    for name in COMPONENTS[kind]:
        tensors = load_file(only_weights(source / name))
        numbers = sum(t.size for n, t in tensors.items() if not n.endswith("position_ids"))
        total += numbers
        size = (output / name / "weights.safetensors").stat().st_size
        assert rows[name] == [f"{numbers:,}", f"{size:,}", "float32"]
    assert rows["together"][0] == f"{total:,}"
    assert "converting vae" in err  # the bar


def test_convert_needs_only_what_it_writes(copy, output):
    """Nothing of the source is used afterwards, and converting once more changes nothing."""
    source = copy()
    assert convert(source, output) == 0
    reference = draw(source)
    shutil.rmtree(source)
    assert all(map(np.array_equal, draw(output), reference))
    again = output.with_name("again")
    assert convert(output, again) == 0
    assert content(again) == content(output)


def test_convert_leaves_out_what_is_not_needed(copy, output):
    source = copy()
    for name in ("safety_checker/model.safetensors", "unet/diffusion_pytorch_model.bin", "v1-5.ckpt", "README.md"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("not needed")
    index = json.loads((source / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (source / "model_index.json").write_text(json.dumps(index))
    assert convert(source, output) == 0
    assert {Path(name).parts[0] for name in files(output)} == {
        *COMPONENTS["sd15"],
        "tokenizer",
        "scheduler",
        "model_index.json",
    }
    assert "safety_checker" not in json.loads((output / "model_index.json").read_text())
    assert not [name for name in files(output) if name.endswith(".bin")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(checkpoint, output, dtype):
    assert convert(checkpoint("sd15"), output, "--dtype", dtype) == 0
    for name in COMPONENTS["sd15"]:
        _, tensors = header(output / name / "weights.safetensors")
        assert {kind for kind, _ in tensors.values()} == {TYPES[dtype]}
    if dtype == "float32":
        assert_same_picture(output, checkpoint("sd15"))
    else:
        ours, exact = draw(output)[0], draw(checkpoint("sd15"))[0]
        assert 0 < np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 0.2


def test_values_and_layout(checkpoint, output):
    """Every number of the source is in the output once, convolutions transposed, nothing else touched."""
    assert convert(checkpoint("sdxl"), output) == 0
    for name in COMPONENTS["sdxl"]:
        source = load_file(only_weights(checkpoint("sdxl") / name))
        made = load_file(output / name / "weights.safetensors")
        assert {n.removeprefix("text_model.") for n in source} == made.keys()
        for full_name, tensor in source.items():
            if tensor.ndim == 4:
                tensor = tensor.transpose(0, 2, 3, 1)
            ours = made[full_name.removeprefix("text_model.")]
            assert np.array_equal(ours.reshape(tensor.shape), tensor)


@pytest.mark.parametrize("variant", ["one file", "fp16", "sharded", "sharded fp16"])
def test_variants(copy, output, variant):
    """A variant draws what the same numbers in one plain file draw, as it is and converted; types are kept."""
    source = copy()
    plain = shutil.copytree(source, source.with_name("plain"))
    for name in COMPONENTS["sd15"]:
        file = only_weights(source / name)
        if "fp16" in variant:
            to_half(file)
            half = only_weights(source / name)
            shutil.copyfile(half, plain / name / file.name)
            half.rename(file)
        if "sharded" in variant:
            shard(file, ".fp16" if "fp16" in variant else "")
        elif "fp16" in variant:
            file.rename(file.with_suffix(".fp16.safetensors"))
    assert_same_picture(source, plain)
    assert convert(source, output) == 0
    assert_same_picture(output, plain)
    _, tensors = header(output / "unet" / "weights.safetensors")
    assert {kind for kind, _ in tensors.values()} == {"F16" if "fp16" in variant else "F32"}


def test_plain_files_come_before_fp16(copy, checkpoint):
    source = copy()
    file = only_weights(source / "unet")
    whole = file.read_bytes()
    to_half(file)
    file.write_bytes(whole)
    assert_same_picture(source, checkpoint("sd15"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda index, unet: sorted(unet.glob("*.safetensors"))[0].unlink(), ["00001-of-00002.safetensors is missing"]),
        (lambda index, unet: index.pop("weight_map"), ["weight_map"]),
        (lambda index, unet: index.update(weight_map=["a"]), ["weight_map"]),
        (lambda index, unet: index.update(weight_map={}), ["unet"]),
        (lambda index, unet: index["weight_map"].update(a="../vae/diffusion_pytorch_model.safetensors"), ["outside"]),
        (lambda index, unet: index["weight_map"].update(a=7), ["weight_map"]),
        (
            lambda index, unet: index["weight_map"].update(extra="diffusion_pytorch_model-00001-of-00002.safetensors"),
            ["lacks extra"],
        ),
        (lambda index, unet: index["weight_map"].pop("conv_in.bias"), []),
    ],
    ids=["missing", "no-map", "list", "empty", "outside", "number", "lacking", "unlisted"],
)
def test_damaged_shards(copy, output, capfd, damage, words):
    source = copy()
    shard(only_weights(source / "unet"))
    (file,) = (source / "unet").glob("*.index.json")
    index = json.loads(file.read_text())
    damage(index, source / "unet")
    file.write_text(json.dumps(index))
    code = convert(source, output)
    if words:
        assert fails(capfd, code, *words)
        assert os.listdir(output.parent) == []
    else:  # the shards hold it all, whatever the index forgets
        assert code == 0


# ------------------------------------------------------------------------------------------------- whole or not at all


def test_existing_folder_needs_force(checkpoint, output, capfd):
    assert convert(checkpoint("sd15"), output) == 0
    before = content(output)
    assert convert(checkpoint("sdxl"), output) == 2
    assert "--force" in capfd.readouterr().err.splitlines()[-1]
    assert content(output) == before
    assert convert(checkpoint("sdxl"), output, "--force") == 0
    assert (output / "text_encoder_2").is_dir()
    assert_same_picture(output, checkpoint("sdxl"))
    assert os.listdir(output.parent) == ["model"]


def test_force_does_not_remove_what_is_no_checkpoint(checkpoint, output, capfd):
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    assert convert(checkpoint("sd15"), output, "--force") == 2
    assert "no checkpoint" in capfd.readouterr().err.splitlines()[-1]
    assert content(output.parent) == {"model/thesis.tex": b"years of work"}


@pytest.mark.parametrize(
    "name",
    ["thesis.tex", "lora.safetensors", "unet/notes.txt", "unet/diffusion_pytorch_model.safetensors", "old/a/b.txt"],
)
def test_force_keeps_what_is_not_its_own(checkpoint, output, capfd, name):
    assert convert(checkpoint("sd15"), output) == 0
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_text("years of work")
    before = content(output.parent)
    assert convert(checkpoint("sdxl"), output, "--force") == 2
    assert f"holds what convert.py did not write: {name}; move" in capfd.readouterr().err.splitlines()[-1]
    assert content(output.parent) == before


def test_force_keeps_what_calibrating_found(checkpoint, copy, output, capfd):
    """It took hours; but a copy of the source's own is no loss."""
    source = copy()
    (source / "cache_front.json").write_text("measured")
    assert convert(source, output) == 0
    assert convert(source, output, "--force") == 0
    (output / "cache_front.json").write_text("measured again")
    assert convert(source, output, "--force") == 2
    assert "cache_front.json" in capfd.readouterr().err.splitlines()[-1]
    (output / "cache_front.json").unlink()
    (output / ".DS_Store").write_text("a system's")
    assert convert(source, output, "--force") == 0


def test_force_keeps_what_comes_meanwhile(checkpoint, output, monkeypatch):
    assert convert(checkpoint("sd15"), output) == 0
    copyfile = shutil.copyfile

    def meanwhile(*files):
        (output / "late.txt").write_text("new")
        copyfile(*files)

    monkeypatch.setattr(shutil, "copyfile", meanwhile)
    assert convert(checkpoint("sdxl"), output, "--force") == 2
    assert (output / "late.txt").is_file() and not (output / "text_encoder_2").exists()
    assert os.listdir(output.parent) == ["model"]


def test_force_replaces_the_working_folder(checkpoint, output, monkeypatch):
    assert convert(checkpoint("sd15"), output) == 0
    monkeypatch.chdir(output)
    assert convert(checkpoint("sdxl"), ".", "--force") == 0
    assert os.listdir(output.parent) == ["model"]
    assert_same_picture(output, checkpoint("sdxl"))


def test_force_through_a_link(checkpoint, output):
    assert convert(checkpoint("sd15"), output) == 0
    link = output.with_name("link")
    link.symlink_to("model")
    assert convert(checkpoint("sdxl"), link, "--force") == 0
    assert sorted(os.listdir(output.parent)) == ["link", "model"]
    assert link.is_symlink()
    assert_same_picture(output, checkpoint("sdxl"))


def test_disk_full(checkpoint, output, capfd, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    assert convert(checkpoint("sd15"), output) == 0
    before = content(output.parent)
    monkeypatch.setattr(shutil, "copyfile", full)  # as the tokenizer is written, after the weights
    assert fails(capfd, convert(checkpoint("sdxl"), output, "--force"), "cannot write", "No space left")
    assert content(output.parent) == before


@pytest.mark.parametrize("force", [False, True])
def test_disk_full_of_weights(checkpoint, output, force):
    """The system's own limit, in a process of its own; MLX tells no reason."""
    if force:
        assert convert(checkpoint("sd15"), output) == 0
    before = content(output.parent)
    flags = ["--model", str(checkpoint("sd15")), "--output", str(output), *["--force"][:force]]
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        f"from mlx_deepcache.apps.convert import main_convert; raise SystemExit(main_convert({flags}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"^error: cannot write .*model: No space left on device, .*\n$", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert content(output.parent) == before
    assert os.listdir(output.parent) == ["model"][:force]


def failing_rename(monkeypatch, fails):
    """Path.rename raises where fails(source, target) says so."""
    plain = Path.rename

    def rename(self, target):
        if fails(self, Path(target)):
            raise OSError(5, "Input/output error")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", rename)


def test_a_new_folder_that_cannot_be_put_in_place(checkpoint, output, capfd, monkeypatch):
    """The old one is put back."""
    assert convert(checkpoint("sd15"), output) == 0
    before = content(output.parent)
    failing_rename(monkeypatch, lambda source, target: target == output and (source / "text_encoder_2").is_dir())
    assert fails(capfd, convert(checkpoint("sdxl"), output, "--force"), "cannot write", "Input/output error")
    assert content(output.parent) == before


def test_an_old_folder_that_cannot_be_put_back(checkpoint, output, capfd, monkeypatch):
    """It is kept where it is, and the message says where."""
    assert convert(checkpoint("sd15"), output) == 0
    before = content(output)
    failing_rename(monkeypatch, lambda source, target: target == output)
    code = convert(checkpoint("sdxl"), output, "--force")
    (kept,) = output.parent.glob(".model.*/old")
    assert content(kept) == before and not output.exists()
    assert fails(capfd, code, "cannot write", "Input/output error", f"could not be put back: it is now {kept}")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("damage", ["vae cut", "no tokenizer", "no scheduler", "scheduler no JSON", "NaN config"])
def test_failure_leaves_all_as_it_was(checkpoint, copy, output, capfd, damage, force):
    source = copy()
    if force:
        assert convert(checkpoint("sd15"), output) == 0
    before = content(output.parent)
    word = damage.split()[0]
    if damage == "vae cut":
        file = only_weights(source / "vae")
        file.write_bytes(file.read_bytes()[:-100])
        word = "damaged"
    elif damage == "no tokenizer":
        shutil.rmtree(source / "tokenizer")
        word = "tokenizer"
    elif damage == "no scheduler":
        shutil.rmtree(source / "scheduler")
        word = "scheduler"
    elif damage == "scheduler no JSON":
        (source / "scheduler" / "scheduler_config.json").write_text("{")
    else:
        (source / "text_encoder" / "config.json").write_text('{"hidden_size": NaN}')
        word = "CLIPConfig"
    assert fails(capfd, convert(source, output, *["--force"][:force]), word)
    assert content(output.parent) == before
    assert os.listdir(output.parent) == ["model"][:force]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_leave_nothing(checkpoint, output, capfd, monkeypatch, number, code):
    monkeypatch.setattr(shutil, "copyfile", lambda *_: signal.raise_signal(number))
    usual = {signal.SIGINT: signal.default_int_handler}.get(number, signal.SIG_DFL)
    was = signal.signal(number, usual)  # a shell's background jobs ignore some
    try:
        assert convert(checkpoint("sd15"), output / "in" / "new folders") == code
        before = signal.getsignal(number)
    finally:
        signal.signal(number, was)
    assert capfd.readouterr().err.splitlines()[-1] == "cancelled; nothing was written"
    assert os.listdir(output.parent) == []
    assert before == usual


def test_messages_speak_of_models(checkpoint, output, capfd, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("mlx_deepcache.checkpoints.convert.convert", full)
    assert fails(capfd, convert(checkpoint("sd15"), output), "not enough memory; a component is converted as a whole")


# --------------------------------------------------------------------------------------------------------- quantize


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize(copy, output, capfd, bits):
    source = copy("sdxl")
    assert convert(source, output, "--quantize", bits) == 0
    out = capfd.readouterr().out
    for name in COMPONENTS["sdxl"]:
        tensors = {n.removeprefix("text_model."): t for n, t in load_file(only_weights(source / name)).items()}
        made, metadata = mx.load(str(output / name / "weights.safetensors"), return_metadata=True)
        linear = {n for n, t in tensors.items() if t.ndim == 2 and "embeddings" not in n} if name != "vae" else set()
        fits = {n for n in linear if tensors[n].shape[1] % 64 == 0}
        assert {n for n, t in made.items() if t.dtype == mx.uint32} == fits
        if name == "vae":
            assert "bits" not in metadata
            continue
        assert fits  # so that something is quantized, and
        assert linear - fits  # something left
        assert f"{len(fits)} linear layers in {bits} bits, {len(linear - fits)} left" in out
        for weight in fits:
            packed, stem = made[weight], weight.removesuffix("weight")
            assert packed.shape[1] == tensors[weight].shape[1] * bits // 32
            again = mx.dequantize(packed, made[f"{stem}scales"], made[f"{stem}biases"], group_size=64, bits=bits)
            groups = tensors[weight].reshape(-1, 64)
            step = (groups.max(1) - groups.min(1)) / (2**bits - 1)
            off = np.abs(np.array(again).reshape(-1, 64) - groups) / step[:, None]
            assert off.max() < 1.2  # half a step, and the far end of a group may be cut by one
            assert off.mean() < 0.35
    exact, rough = draw(source)[0], draw(output)[0]
    assert 1e-6 < np.linalg.norm(rough - exact) / np.linalg.norm(exact) < (0.6 if bits == 4 else 0.05)


def test_quantize_reads_back_in_half(checkpoint, output):
    assert convert(checkpoint("sd15"), output, "--quantize", 8, "--dtype", "float16") == 0
    _, tensors = header(output / "unet" / "weights.safetensors")
    assert {kind for kind, _ in tensors.values()} == {"U32", "F16"}
    assert np.isfinite(draw(output)[0]).all()
    small, plain = (output / "unet" / "weights.safetensors").stat().st_size, output.with_name("plain")
    assert convert(checkpoint("sd15"), plain, "--dtype", "float16") == 0
    assert small < (plain / "unet" / "weights.safetensors").stat().st_size


def test_quantize_twice_is_refused(checkpoint, output, capfd):
    assert convert(checkpoint("sd15"), output, "--quantize", 8) == 0
    code = convert(output, output.with_name("twice"), "--quantize", 4)
    assert fails(capfd, code, "already quantized, to 8 bits")
    assert os.listdir(output.parent) == ["model"]


# -------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return Hub(monkeypatch, tmp_path / "cache")


def publish(source):
    """Add what published repositories also hold, and fp16 twins."""
    for component in COMPONENTS["sd15"]:
        file = only_weights(source / component)
        whole = file.read_bytes()
        to_half(file)
        file.write_bytes(whole)
        file.with_suffix(".bin").write_bytes(b"pickle")
        file.with_suffix(".non_ema.safetensors").write_bytes(b"another variant")
        (source / component / "model.onnx").write_bytes(b"onnx")
    for name in ("safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json", "v1-5.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"not needed")
    return source


@pytest.mark.parametrize("half", [False, True])
def test_only_needed_files_are_downloaded(copy, checkpoint, fake_hub, half):
    fake_hub.repositories["somebody/model"] = publish(copy())
    folder = hub.find("somebody/model", half=half)
    needed = files(checkpoint("sd15"))
    if half:
        needed = {name.replace(".safetensors", ".fp16.safetensors") for name in needed}
    assert files(folder) == needed
    assert fake_hub.calls == [("list", "somebody/model", None)]
    assert np.isfinite(draw(folder)[0]).all()


def test_a_controlnet_is_downloaded_alone(pipeline, fake_hub, tmp_path):
    net = write_controlnet("sd15", tmp_path / "net")
    options = {"steps": 1, "height": 64, "width": 64}
    expected = pipeline("sd15")("a cat", controls=[Control(str(net), PICTURE)], **options).latents
    for name in ("README.md", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"):
        (net / name).write_bytes(b"not needed")
    fake_hub.repositories["somebody/net"] = net
    result = pipeline("sd15")("a cat", controls=[Control("somebody/net", PICTURE)], **options)
    assert np.array_equal(result.latents, expected)
    assert files(fake_hub.snapshot("somebody/net")) == {"config.json", "diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize("whole", [False, True])
def test_a_vae_is_downloaded_alone(copy, checkpoint, fake_hub, whole):
    """From a repository of its own, or from a model's."""
    source = publish(copy())
    fake_hub.repositories["somebody/vae"] = source if whole else source / "vae"
    model, options = str(checkpoint("sd15")), {"steps": 1, "height": 64, "width": 64}
    expected = StableDiffusion.from_pretrained(model, "float32")("a cat", **options)
    result = StableDiffusion.from_pretrained(model, "float32", vae="somebody/vae")("a cat", **options)
    assert np.array_equal(result.images[0], expected.images[0])
    needed = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert files(fake_hub.snapshot("somebody/vae")) == {f"vae/{name}" if whole else name for name in needed}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_shards_are_downloaded(copy, checkpoint, fake_hub, half, old):
    source = copy()
    file = only_weights(source / "unet")
    whole = file.read_bytes()
    shard(file, ".fp16", old)
    fp16 = {name for name in files(source) if ".fp16" in name}
    file.write_bytes(whole)
    shard(file)
    plain = {name for name in files(source) - fp16 if name.startswith("unet/") and name != "unet/config.json"}
    fake_hub.repositories["somebody/model"] = source
    folder = hub.find("somebody/model", half=half)
    assert files(folder) == files(source) - (plain if half else fp16)
    assert_same_picture(folder, checkpoint("sd15"))


def test_convert_from_the_hub(copy, checkpoint, fake_hub, output):
    fake_hub.repositories["somebody/model"] = publish(copy())
    assert convert("somebody/model@v1.0", output) == 0
    assert fake_hub.calls == [("list", "somebody/model", "v1.0")]
    assert_same_picture(output, checkpoint("sd15"))


def test_pickles_only_on_the_hub(copy, fake_hub):
    source = copy()
    only_weights(source / "unet").rename(source / "unet" / "diffusion_pytorch_model.bin")
    fake_hub.repositories["somebody/model"] = source
    with pytest.raises(CheckpointError, match="pickle file, diffusion_pytorch_model.bin"):
        hub.find("somebody/model")
    assert fake_hub.got == ["model_index.json"]  # and no weights


def test_what_is_here_is_not_asked_for(checkpoint, fake_hub, monkeypatch, capfd):
    """Nor is the hub, unless a revision is named; and if it does not answer then, what is here is used."""
    fake_hub.repositories["somebody/model"] = checkpoint("sd15")
    monkeypatch.setattr(huggingface_hub.utils, "are_progress_bars_disabled", lambda: False)
    folder = hub.find("somebody/model")
    assert re.search(r"^fetching somebody/model from the Hugging Face hub: \d+ files, \d+\.\d MB$", *told(capfd))
    assert files(folder) == files(checkpoint("sd15"))
    fake_hub.calls.clear()
    for name in ("somebody/model", f"somebody/model@{fake_hub.SHA}"):
        assert hub.find(name) == folder
    assert (fake_hub.calls, told(capfd)) == ([], [])
    assert hub.find("somebody/model@main") == folder
    assert (fake_hub.calls, told(capfd)) == ([("list", "somebody/model", "main")], [])

    def silent(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "model_info", silent)
    with pytest.warns(UserWarning, match="does not answer; somebody/model is used as it is here"):
        assert hub.find("somebody/model@main") == folder
    with pytest.raises(
        CheckpointError, match=r"somebody/other is no folder here, and .* does not answer \(no network\)"
    ):
        hub.find("somebody/other")


def told(capfd):
    """The lines of a download, its bar left out."""
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("fetching")]


@pytest.mark.parametrize(
    "lacks",
    ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "scheduler/scheduler_config.json", "tokenizer"],
)
def test_what_is_here_in_part_is_completed(checkpoint, fake_hub, lacks):
    """A download was cut short, or another program wanted less."""
    fake_hub.repositories["somebody/model"] = checkpoint("sd15")
    folder = hub.find("somebody/model")
    shutil.rmtree(folder / lacks) if lacks == "tokenizer" else (folder / lacks).unlink()
    fake_hub.got.clear()
    assert hub.find("somebody/model") == folder
    assert files(folder) == files(checkpoint("sd15"))


def test_a_shard_that_lacks_is_fetched(copy, fake_hub):
    source = copy()
    shard(only_weights(source / "unet"))
    fake_hub.repositories["somebody/model"] = source
    folder = hub.find("somebody/model")
    next(folder.glob("unet/*-00001-*")).unlink()
    assert files(hub.find("somebody/model")) == files(source)


def test_offline(checkpoint, fake_hub, monkeypatch):
    fake_hub.repositories["somebody/model"] = checkpoint("sd15")
    folder = hub.find("somebody/model@abc")
    fake_hub.calls.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.find("somebody/model@abc") == folder
    with pytest.raises(CheckpointError, match="somebody/else is no folder here and not in the cache, and HF_HUB_OFF"):
        hub.find("somebody/else")
    assert fake_hub.calls == []


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ('{"_class_name": "FluxPipeline"}', "somebody/model holds a FluxPipeline, which is not supported"),
        ("[]", "should hold a JSON object"),
        (None, "it lacks model_index.json; a whole checkpoint in one file is named somebody/model:whole.safetensors"),
    ],
)
def test_a_model_is_judged_before_its_weights(copy, fake_hub, index, words):
    source = copy()
    (source / "whole.safetensors").write_text("weights")
    (source / "model_index.json").unlink() if index is None else (source / "model_index.json").write_text(index)
    fake_hub.repositories["somebody/model"] = source
    with pytest.raises(CheckpointError, match=words):
        hub.find("somebody/model")
    assert fake_hub.got == ["model_index.json"] * (index is not None)


def test_one_file_of_a_repository(copy, fake_hub, tmp_path):
    """A whole checkpoint, as well as a LoRA or an embedding; where none is named, the only one."""
    fake_hub.repositories["somebody/files"] = folder = tmp_path / "files"
    (folder / "sub").mkdir(parents=True)
    for name in ("sub/a.safetensors", "README.md", "adapter_config.json", "sub/adapter_config.json"):
        (folder / name).write_text(name)
    assert hub.find_file("somebody/files").read_text() == "sub/a.safetensors"
    assert fake_hub.got == ["sub/a.safetensors", "sub/adapter_config.json"]
    fake_hub.calls.clear()
    assert hub.find_file("somebody/files:sub/a.safetensors").read_text() == "sub/a.safetensors"
    assert fake_hub.calls == []
    (folder / "b.safetensors").write_text("b")
    assert hub.find("somebody/files:b.safetensors", alone=True).read_text() == "b"
    with pytest.raises(CheckpointError, match="2 files, b.safetensors, sub/a.safetensors; name one, somebody/files:b"):
        hub.find_file("somebody/files")
    with pytest.raises(CheckpointError, match="no file 'c.safetensors'; did you mean b.safetensors.; it has b.safe"):
        hub.find_file("somebody/files:c.safetensors")
    fake_hub.repositories["somebody/pickles"] = tmp_path / "pickles"
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "x.bin").write_text("pickle")
    with pytest.raises(CheckpointError, match="no safetensors file, only pickle files, which could run code .*x.bin"):
        hub.find_file("somebody/pickles")


def test_all_that_may_be_fetched(checkpoint, fake_hub, tmp_path, capfd):
    """LoRAs, embeddings, VAEs and ControlNets by hub id, as flags and in Python, give what their files give."""
    rng = np.random.default_rng(0)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{layer}.lora_A.weight": rng.standard_normal((2, 48)), f"{layer}.lora_B.weight": np.ones((48, 2))}
    adds = tmp_path / "adds"
    adds.mkdir()
    save_file({name: tensor.astype("f") for name, tensor in lora.items()}, adds / "ink.safetensors")
    save_file({"<wug>": rng.standard_normal((1, 32)).astype("f")}, adds / "wug.safetensors")
    net = write_controlnet("sd15", tmp_path / "net")
    PICTURE.save("in.png")
    fake_hub.repositories |= {"o/adds": adds, "o/model": checkpoint("sd15"), "o/net": net}
    small = ["--prompt", "a wug cat", "--steps", "2", "--height", "64", "--width", "64", "--quiet", "--overwrite"]
    small += ["--control-image", "in.png", "--dtype", "float32"]

    def flags(lora, word, vae, net, output):
        return [*small, "--lora", lora, "--embedding", word, "--vae", vae, "--controlnet", net, "--output", output]

    model = str(checkpoint("sd15"))
    local = flags(f"{adds}/ink.safetensors:0.5", f"{adds}/wug.safetensors:wug", f"{model}/vae", str(net), "a.png")
    fetched = flags("o/adds:ink.safetensors:0.5", "o/adds:wug.safetensors:wug", "o/model", "o/net@main", "b.png")
    assert main_generate(["--model", model, *local]) == main_generate(["--model", model, *fetched]) == 0
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert np.array_equal(a, b)
        assert json.loads(b.text["mlx_deepcache"])["lora"] == ["o/adds:ink.safetensors:0.5"]
    pipe = StableDiffusion.from_pretrained(
        model,
        "float32",
        loras=[("o/adds:ink.safetensors", 0.5)],
        embeddings=[("o/adds:wug.safetensors", "wug")],
        vae="o/model",
    )
    result = pipe("a wug cat", steps=2, height=64, width=64, controls=[Control("o/net", PICTURE)])
    with Image.open("a.png") as a:
        assert np.array_equal(a, result.images[0])
    assert main_generate(["--model", model, *small[:-4], "--lora", "o/adds"]) == 1
    assert "o/adds has 2 files, ink.safetensors, wug.safetensors; name one, o/adds:ink" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "file", "second"),
    [
        ("o/n", "o/n", None),
        ("o/n:x.safetensors", "o/n:x.safetensors", None),
        ("o/n@v1:a/x.safetensors:w", "o/n@v1:a/x.safetensors", "w"),
        ("o/n:w", "o/n", "w"),
        ("x.safetensors:w", "x.safetensors", "w"),
    ],
)
def test_a_repositorys_file_and_a_word(text, file, second):
    assert file_and_word(text) == (Path(file), second)
    scaled = f"{file}:0.5"
    assert file_and_scale(scaled) == (Path(file), 0.5) and file_and_scale(file) == (Path(file), 1.0)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/name@refs/pr/1:sub/x.safetensors", ("owner/name", "refs/pr/1", "sub/x.safetensors")),
        ("owner/name:a b.safetensors", ("owner/name", None, "a b.safetensors")),
        ("owner/x.safetensors", None),
        ("./owner/name", None),
        ("../name", None),
        ("a/b/c", None),
        ("owner/name:../x", None),
        ("owner/name@../x", None),
    ],
)
def test_hub_ids(text, parts):
    assert hub_id(text) == parts


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "sdxl-turbo"])
def test_short_names_try_mirrors_in_order(checkpoint, fake_hub, capfd, output, name):
    mirrors = hub.SHORT_NAMES[name]
    assert fails(capfd, convert(name, output), *mirrors, "Hugging Face hub")
    assert fake_hub.calls == [("list", mirror, None) for mirror in mirrors]
    fake_hub.repositories[mirrors[-1]] = checkpoint("sd15")
    fake_hub.calls.clear()
    assert hub.find(name).is_dir()
    assert fake_hub.calls == [("list", mirror, None) for mirror in mirrors]


def test_a_mirror_that_is_here_is_used(checkpoint, fake_hub):
    """Though the first one is not: nothing is asked of the hub, which may be out of reach."""
    fake_hub.repositories[hub.SHORT_NAMES["sd15"][-1]] = checkpoint("sd15")
    folder = hub.find("sd15")
    fake_hub.calls.clear()
    assert hub.find("sd15") == folder
    assert fake_hub.calls == []


def test_a_folder_comes_before_a_repository(checkpoint, fake_hub, tmp_path):
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody" / "model").symlink_to(checkpoint("sd15"))
    assert hub.find("somebody/model").samefile(checkpoint("sd15"))
    assert fake_hub.calls == []


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing@main"])
def test_no_such_repository(fake_hub, output, capfd, name):
    assert fails(capfd, convert(name, output), "nobody/nothing", "404 Client Error", "HF_TOKEN")
    assert os.listdir(output.parent) == []


@pytest.mark.parametrize("name", ["a/b/c", "../x/y", "a b/c", "nothing", "owner/name@", "@main", ""])
def test_no_repository_name(fake_hub, name):
    with pytest.raises(CheckpointError, match="model"):
        hub.find(name)
    assert fake_hub.calls == []


@pytest.mark.parametrize(
    ("start", "pickled"),
    [
        (b"\x80\x02\0\0\0\0\0\0{", False),  # a header of 640 bytes, cut short
        (b"\x80\x02", False),
        (b"\x80\0\0\0\0\0\0\0{", False),
        (b"\x80\x04\x15\0\0\0\0\0{", False),
        (pickle.dumps({"a": 1}, 2), True),
        (pickle.dumps({"a": 1}, 4), True),
        (pickle.dumps(list(range(9999)), 5), True),
        (b"PK\x03\x04\x14\0\0\0", True),
    ],
)
def test_pickles_are_told_from_files_cut_short(tmp_path, start, pickled):
    (tmp_path / "a.safetensors").write_bytes(start)
    words = "pickle file by another name" if pickled else "damaged or no safetensors"
    with pytest.raises(CheckpointError, match=words):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "text",
    ["null", "[" * 100_000, '{"weight_map":' + "[" * 100_000, '{"weight_map": {}}']
    + [f'{{"weight_map": {{"a": {value}}}}}' for value in ("null", "3", "[]", '["x"]', "{}")],
    ids=lambda text: text[:25],
)
def test_an_index_that_names_no_files(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is no index of shards"):
        read_component(tmp_path)


def test_an_output_whose_links_run_in_a_circle(copy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    model = str(copy())
    for output in ("loop", "loop/x"):
        assert main_convert(["--model", model, "--output", output, "--force"]) == 1
        assert f"error: cannot write {output}: Too many levels of symbolic links" in capsys.readouterr().err
