"""A checkpoint written anew in MLX's layout, and pickle files as safetensors."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import CheckpointError, Failure, UsageError, called
from ..media.files import check_writable, real_path, whole, why
from . import pickles, weights
from .checkpoint import Checkpoint
from .families import COMPONENTS, ENCODERS
from .folder import PRICES, find_prices
from .names import PICKLES

# What is written here, as paths in the folder
_OWN = re.compile(
    r"model_index\.json|scheduler/scheduler_config\.json"
    rf"|({'|'.join(COMPONENTS)})/(config\.json|{re.escape(weights.CONVERTED)})"
    rf"|({'|'.join(ENCODERS.values())})/[^/]+\.(json|txt)"
)
_OF_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")
_TYPES = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}


@dataclass(frozen=True)
class Converted:
    """What became of one component: parameters, bytes on disk, type, and linear layers quantized and left."""

    name: str
    parameters: int
    bytes: int
    dtype: str
    quantized: int
    left: int


def convert(
    model: str,
    output: Path,
    *,
    dtype: mx.Dtype | None = None,
    bits: int | None = None,
    force: bool = False,
    prediction_type: str | None = None,
    vae: str | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Converted]:
    """Write a checkpoint anew with MLX's layout: all that drawing needs and nothing else, whole or not at all.

    dtype: None keeps the types of the files; bits: 4 or 8 quantizes the linear layers of the U-Net and the text
    encoders; force: replace an `output` that exists; prediction_type, vae: see `Checkpoint.open`; progress: called with
    each component's name before it starts.

    A pickle file may also become one .safetensors file, with the same tensors by the same names: a LoRA, a textual
    inversion, a VAE, a ControlNet, an upscaler, or a whole checkpoint.

    Raises:
        UsageError: `output` exists, and `force` is not given, or holds what is not from here.
        CheckpointError: the model cannot be had, or is damaged or not supported.
        Failure: `output` cannot be written.
    """
    try:
        output = real_path(output)  # "." and links would not survive being renamed
    except OSError as error:  # links in a circle, or a name that is too long
        raise Failure(f"cannot write {output}: {error.strerror or error}") from None
    if output.exists() and not force:
        raise UsageError(f"{output} exists; pass --force to replace it")
    if output.suffix == ".safetensors":
        if bits is not None or vae is not None:
            raise UsageError(f"{called('quantize' if vae is None else 'vae')} has no meaning for one file of tensors")
        return [_convert_file(Path(model), output, dtype, prediction_type)]
    if output.exists() and not (output / "model_index.json").is_file():
        raise UsageError(f"{output} exists and is no checkpoint, so it is not replaced; remove it yourself")
    with _unpickled(model, output) as model, _unpickled(vae, output) as vae:
        half = dtype is not None and dtype == mx.float16
        checkpoint = Checkpoint.open(model, half=half, prediction_type=prediction_type, vae=vae)
        checkpoint.source.scheduler()
        if output.exists() and output == checkpoint.source.path.resolve():
            raise UsageError(f"{output} is the model itself; name another folder")
        return _convert_whole(checkpoint, output, dtype, bits, progress)


def _convert_file(file: Path, output: Path, dtype: mx.Dtype | None, prediction_type: str | None) -> Converted:
    if file.suffix in PICKLES and not file.exists():
        raise CheckpointError(f"there is no file {file}")
    if not _is_pickle(file):
        raise UsageError(
            f"{output} would be one file, which is made of a pickle file ({', '.join(PICKLES)}), and {file} is none; "
            "name a folder"
        )
    if file.resolve() == output:
        raise UsageError(f"{output} is the file itself; name another one")
    check_writable(output)
    pickled = pickles.read(file)
    said = {} if prediction_type is None else {"modelspec.prediction_type": prediction_type}
    with whole(output) as part:
        counts = pickled.write(part, dtype, said)
    types = (re.sub(r"^(BF|F|I|U)(?=\d)", lambda match: _TYPES[match[1]], kind).lower() for kind in counts)
    return Converted("tensors", sum(counts.values()), output.stat().st_size, ", ".join(types), 0, 0)


def _is_pickle(file: Path) -> bool:
    return os.path.isfile(file) and (file.suffix in PICKLES or weights.looks_pickled(file))


@contextmanager
def _unpickled(model: str | None, output: Path) -> Iterator[str | None]:
    """What may be read in place of a model: itself, or, as long as this lasts, a copy beside `output` that has
    safetensors where the model has pickles.

    Raises:
        CheckpointError: see `pickles.read`.
        Failure: there is no room for the copy.
    """
    path = Path(model or "")
    parts = ["", *COMPONENTS] if os.path.isdir(path) else []
    parts = {path / part: found for part in parts if (found := _pickles_in(path / part))}
    single = _is_pickle(path)
    if model is None or not (single or parts):
        yield model
        return
    near = next(folder for folder in output.parents if folder.is_dir())
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=near))
    except OSError as error:
        raise Failure(f"cannot write {output}: {error.strerror}") from None
    copy = temporary / (f"{path.stem}.safetensors" if single else path.resolve().name)
    try:
        try:
            if single:
                pickles.read(path).write(copy)
            else:
                _copy_unpickled(path, copy, parts)
        except OSError as error:
            raise Failure(f"cannot write {temporary}: {why(error)}") from None
        yield str(copy)
    except CheckpointError as error:
        said = str(error).replace(str(copy), str(path))
        if single and said != str(error):
            said += "; for the tensors as they are, name a .safetensors file as --output"
        raise CheckpointError(said) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _pickles_in(folder: Path) -> list[Path]:
    """The pickle files that have a component's weights, if only such have them."""
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    with suppress(CheckpointError):
        weights.component_files(folder)
        return []
    for stem in ("diffusion_pytorch_model", "pytorch_model"):
        for variant in ("", r"\.fp16"):
            for number in ("", r"-\d+-of-\d+"):
                if found := [
                    name for name in names if re.fullmatch(f"{stem}({variant}{number}|{number}{variant}).bin", name)
                ]:
                    return [folder / name for name in found]
    return []


def _copy_unpickled(source: Path, copy: Path, parts: dict[Path, list[Path]]) -> None:
    """Links to all of a model's folder, and safetensors in place of its parts' pickles."""
    copy.mkdir()
    for entry in source.iterdir():
        (copy / entry.name).symlink_to(entry.resolve())
    for folder, files in parts.items():
        here = copy / folder.relative_to(source)
        if here != copy:
            here.unlink()
            here.mkdir()
            for entry in folder.iterdir():
                (here / entry.name).symlink_to(entry.resolve())
        places = {}
        for number, file in enumerate(files, 1):
            pickled = pickles.read(file)
            name = "model" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}"
            pickled.write(here / f"{name}.safetensors")
            places |= dict.fromkeys(pickled.tensors, f"{name}.safetensors")
        if len(files) > 1:
            _write_json(here / "model.safetensors.index.json", {"weight_map": places})


def _convert_whole(
    checkpoint: Checkpoint,
    output: Path,
    dtype: mx.Dtype | None,
    bits: int | None,
    progress: Callable[[str], None],
) -> list[Converted]:
    _check_own(output, checkpoint)
    made = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise Failure(f"cannot write {output}: {error.strerror}") from None
    try:
        new = temporary / "new"
        new.mkdir()
        report = [_convert_one(checkpoint, name, new, dtype, bits, progress) for name in checkpoint.components]
        _copy_settings(checkpoint, new)
        _check_own(output, checkpoint)
        _put_in_place(new, output, temporary / "old")
    except Failure:
        raise
    except (OSError, RuntimeError) as error:  # MLX raises the latter
        raise Failure(f"cannot write {output}: {why(error)}") from None
    finally:
        if output.exists() or not (temporary / "old").exists():
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in () if output.exists() else made:
            with suppress(OSError):  # something else may be in it by now
                folder.rmdir()
    return report


def _check_own(output: Path, checkpoint: Checkpoint) -> None:
    """Raises UsageError if a folder that is to be replaced holds more than this module writes, or what calibrating its
    model took hours to find."""
    prices = find_prices(checkpoint.source.path)
    foreign = []
    for file in sorted(output.rglob("*")) if output.is_dir() else ():
        name = file.relative_to(output).as_posix()
        if file.is_dir() and not file.is_symlink() or file.name in _OF_SYSTEMS:
            continue
        copied = name == PRICES and prices is not None and prices.read_bytes() == file.read_bytes()
        if not (copied or _OWN.fullmatch(name)):
            foreign.append(name)
    if foreign:
        raise UsageError(
            f"{output} holds what convert.py did not write: {weights.some(foreign)}; move that elsewhere, or name "
            "another folder"
        )


def _put_in_place(new: Path, output: Path, old: Path) -> None:
    """Rename a folder to `output`; what is there is first set aside as `old`, and put back if that fails.

    Raises:
        OSError: it failed, and `output` is what it was.
        Failure: `output` could not be put back either; says where it is.
    """
    try:
        if output.exists():
            output.rename(old)
        new.rename(output)
    except BaseException:  # Ctrl-C too
        if old.exists() and not output.exists():
            try:
                old.rename(output)
            except OSError as error:
                reason = error.strerror or error
                raise Failure(
                    f"cannot write {output}: {reason}; what was there could not be put back: it is now {old}"
                ) from None
        raise


def _convert_one(
    checkpoint: Checkpoint,
    name: str,
    target: Path,
    dtype: mx.Dtype | None,
    bits: int | None,
    progress: Callable[[str], None],
) -> Converted:
    progress(name)
    module = checkpoint.load(name, dtype)
    parameters = sum(p.size for _, p in tree_flatten(module.parameters()))
    kind = str(next(p.dtype for _, p in tree_flatten(module.parameters()))).removeprefix("mlx.core.")
    was = next((m.bits for m in module.modules() if isinstance(m, nn.QuantizedLinear)), None)
    quantized = left = 0
    if bits is not None and name != "vae":
        if was is not None:
            raise CheckpointError(
                f"{checkpoint.part(name).where} is already quantized, to {was} bits; start from the original"
            )
        quantized, left = weights.quantize(module, bits)
        was = bits
    size = weights.save(module, target / name, bits=was)
    _write_json(target / name / "config.json", checkpoint.part(name).config)
    return Converted(name, parameters, size, kind, quantized, left)


def _copy_settings(checkpoint: Checkpoint, target: Path) -> None:
    """model_index.json, the scheduler's config, the tokenizers, and what caches cost if that was measured."""
    tokenizers = checkpoint.family.encoders.values()
    names = {*checkpoint.components, *tokenizers, "scheduler"}
    index = {name: said for name, said in checkpoint.index.items() if name in names or not isinstance(said, list)}
    if "vae" in checkpoint.components:  # which may have another name in the source
        index["vae"] = ["diffusers", checkpoint.part("vae").config.get("_class_name", "AutoencoderKL")]
    _write_json(target / "model_index.json", index)
    (target / "scheduler").mkdir()
    _write_json(target / "scheduler" / "scheduler_config.json", checkpoint.source.scheduler())
    for tokenizer in tokenizers:
        (target / tokenizer).mkdir()
        checkpoint.source.write_tokenizer(tokenizer, target / tokenizer)
    if (prices := find_prices(checkpoint.source.path)) is not None:
        shutil.copyfile(prices, target / PRICES)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
