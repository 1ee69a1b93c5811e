"""Weights from files to modules and back: find, check, rename, lay out, load strictly, save.

Only safetensors are read; pickle files can run code, and `convert` makes safetensors of them. Files written here say in
their metadata that they are laid out channels-last; any other file has PyTorch's layout, with convolutions as (out, in,
height, width).
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from ..backend.host import hold_standard_streams
from ..backend.ops import DTYPES
from ..errors import CheckpointError
from ..fields import parse_json
from .names import PICKLES

LAYOUT = "channels_last"
CONVERTED = "weights.safetensors"
GROUP_SIZE = 64
_STEMS = ("diffusion_pytorch_model", "model")
_MOST_HEADER = 100_000_000  # bytes, as the safetensors library has it


def component_files(folder: Path, names: list[str] | None = None) -> list[str]:
    """The weight files of one component's folder, best first kind: ours, one file, sharded, each before its fp16 twin.

    names: the folder's files, where it is not on this disk.

    Raises:
        CheckpointError: there are none, or only pickles.
    """
    if names is None:
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    if CONVERTED in names:
        return [CONVERTED]
    for variant in ("", ".fp16"):
        for base in _STEMS:
            if f"{base}{variant}.safetensors" in names:
                return [f"{base}{variant}.safetensors"]
            index = f"{base}.safetensors.index{variant}.json"
            if index in names:
                counted = re.escape(variant) + r"-\d+-of-\d+|-\d+-of-\d+" + re.escape(variant)  # new and old names
                return [index, *sorted(n for n in names if re.fullmatch(f"{base}({counted}).safetensors", n))]
    pickles = [n for n in names if n.endswith(PICKLES)]
    if pickles:
        whole = (folder.parent / "model_index.json").is_file()
        here = (folder / pickles[0]).is_file()
        raise CheckpointError(
            f"{folder} has its weights only as a pickle file, {pickles[0]}, which could run code when read; "
            + (conversion(folder.parent if whole else folder / pickles[0]) if here else "download it for convert.py")
        )
    raise CheckpointError(f"{folder} has no weights; expected a .safetensors file there")


def conversion(pickled: Path) -> str:
    """What makes safetensors of a pickle file, or of a model's folder with such files, as the end of a message."""
    output = Path(f"{pickled}-mlx") if pickled.is_dir() else pickled.with_suffix(".safetensors")
    if output == pickled:  # a pickle by another name
        output = pickled.with_name(f"{pickled.stem}-converted.safetensors")
    command = ["python", "convert.py", "--model", str(pickled), "--output", str(output)]
    return f"what reads it safely is {shlex.join(command)}"


def read_header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str], dict[str, str]]:
    """The shapes of a safetensors file's tensors, the types of their numbers as the file calls them, and metadata.

    Raises:
        CheckpointError: the file is missing, cut short or no safetensors file, or has numbers of an unknown type.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    if file.suffix in PICKLES:
        raise CheckpointError(f"{file} is a pickle file, which could run code when read; {conversion(file)}")
    try:
        hold_standard_streams()
        with safe_open(file, framework="numpy") as header:  # checks the header against the file's length
            slices = {name: header.get_slice(name) for name in header.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            types, metadata = {name: part.get_dtype() for name, part in slices.items()}, header.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise _unreadable(file, error) from None
    if odd := [name for name, kind in types.items() if kind not in (*_LOADED, *_BY_HAND)]:
        raise CheckpointError(
            f"{file} has numbers of type {types[odd[0]]} ({some(odd)}), which are not supported, only floating "
            "point of 8 bits (E4M3, E5M2), 16, 32 and 64"
        )
    return shapes, types, metadata


def read_tensors(file: Path, prefix: str = "") -> tuple[dict[str, mx.array], dict[str, str]]:
    """A safetensors file's tensors whose names start with a prefix (read when first used, where MLX can), and metadata.

    Numbers of 8 bits are widened to 16, which hold each of them exactly, and those of 64 bits made float32.

    Raises:
        CheckpointError: see `read_header`.
    """
    _, types, metadata = read_header(file)
    try:
        if _BY_HAND & set(types.values()):
            tensors = _read_by_hand(file, prefix)
        else:
            tensors = mx.load(str(file), format="safetensors")
            tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        narrow = [name for name in tensors if types[name].startswith("F8")]
        for name in narrow:
            if types[name] == "F8_E4M3":  # which MLX leaves as bytes
                tensors[name] = mx.from_fp8(tensors[name], mx.float16)
        if narrow:
            _apply_scales(tensors, narrow)
        return tensors, metadata
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreadable(file, error) from None


# The types of numbers in safetensors files that MLX reads, and those that it does not
_LOADED = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32, "C64": mx.complex64, "BOOL": mx.bool_}
_LOADED |= {
    f"{sign}{bits}": getattr(mx, f"{kind}{bits}")
    for sign, kind in (("U", "uint"), ("I", "int"))
    for bits in (8, 16, 32, 64)
}
_LOADED |= {"F8_E4M3": mx.uint8}
_BY_HAND = {"F8_E5M2", "F64"}


def _read_by_hand(file: Path, prefix: str) -> dict[str, mx.array]:
    """All tensors of a file at once."""
    with file.open("rb") as opened:
        header = parse_json(opened.read(int.from_bytes(opened.read(8), "little")))
        start = opened.tell()
    data, tensors = np.memmap(file, np.uint8, "r", start), {}
    for name, about in header.items():
        if name == "__metadata__" or not name.startswith(prefix):
            continue
        raw, kind = data[slice(*about["data_offsets"])], about["dtype"]
        if kind == "F64":
            with np.errstate(over="ignore"):
                tensor = mx.array(raw.view("<f8").astype(np.float32))
        elif kind == "F8_E5M2":  # the upper half of a float16
            tensor = (mx.array(raw).astype(mx.uint16) << 8).view(mx.float16)
        else:
            tensor = mx.array(raw).view(_LOADED[kind])
        tensors[name] = tensor.reshape(about["shape"])
    return tensors


def _apply_scales(tensors: dict[str, mx.array], narrow: list[str]) -> None:
    """Multiply weights by the scales that some programs store beside those of 8 bits, one each or one an output."""
    tensors.pop("scaled_fp8", None)  # ComfyUI's mark of such files
    for name in narrow:
        layer = name.removesuffix("weight")
        for scale, of_inputs in (("scale_weight", "scale_input"), ("weight_scale", "input_scale")):
            tensors.pop(layer + of_inputs, None)  # for products of 8 bits, which are not made here
            if (factor := tensors.pop(layer + scale, None)) is not None:
                factor = factor.astype(mx.float32).reshape(-1, *[1] * (tensors[name].ndim - 1))
                tensors[name] = tensors[name].astype(mx.float32) * factor


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    if looks_pickled(file):
        return CheckpointError(
            f"{file} is a pickle file by another name, which could run code when read; {conversion(file)}"
        )
    return CheckpointError(f"{file} is damaged or no safetensors file ({error}); download it again")


def looks_pickled(file: Path) -> bool:
    """Whether a file starts as PyTorch's do: a zip archive, or a bare pickle of protocol 2 to 5; the length that a
    safetensors file starts with may have the same first bytes, but then its others are 0."""
    try:
        with file.open("rb") as opened:
            start = opened.read(8)
    except OSError:
        return False
    pickled = start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and int.from_bytes(start, "little") > _MOST_HEADER
    return start[:4] == b"PK\x03\x04" or pickled


def read_component(folder: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """All tensors of a component's folder, and the first file's metadata.

    Raises:
        CheckpointError: see `component_files` and `read_tensors`; or a shard does not hold what the index says.
    """
    first, *rest = component_files(folder)
    if not first.endswith(".json"):
        return read_tensors(folder / first)
    try:
        index = parse_json((folder / first).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(index.values()))
        if not shards or not all(isinstance(shard, str) for shard in shards):
            raise TypeError
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(
            f"{folder / first} is no index of shards: it lacks a weight_map that names a file for each tensor"
        ) from None
    if any(Path(shard).name != shard for shard in shards):
        raise CheckpointError(f"{folder / first} names files outside its folder")
    tensors, metadata = {}, {}
    for shard in shards:
        part, metadata = read_tensors(folder / shard)
        tensors.update(part)
    for name, shard in index.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / shard} lacks {name}, which {first} says it holds")
    return tensors, metadata


def rename(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Names as the modules here have them: without transformers' prefix, and with diffusers' newer attention names."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    out = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.").removeprefix("vision_model.")
        if name.endswith("embeddings.position_ids"):  # 0, 1, 2, ...; no weights
            continue
        parts = name.split(".")
        if "attentions" in parts and parts[-2] in old:
            name = ".".join([*parts[:-2], old[parts[-2]], parts[-1]])
        out[name] = tensor
    return out


def to_channels_last(tensors: dict[str, mx.array], shapes: dict[str, tuple[int, ...]]) -> dict[str, mx.array]:
    """From PyTorch's layout: convolutions to (out, height, width, in), those over frames to (out, frames, in), and 1x1
    ones to the matrices they are."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 5 and tensor.shape[3:] == (1, 1):
            tensor = tensor[..., 0, 0].swapaxes(1, 2)
        if tensor.ndim == 4:
            tensor = tensor.transpose(0, 2, 3, 1)
            if tensor.shape[1:3] == (1, 1) and len(shapes.get(name, ())) == 2:
                tensor = tensor[:, 0, 0]
        out[name] = tensor
    return out


def fill(
    module: nn.Module, tensors: dict[str, mx.array], metadata: dict[str, str], where: str, dtype: mx.Dtype | None
) -> nn.Module:
    """Give a module its weights, exactly; dtype None keeps their types.

    tensors: by diffusers' names, in PyTorch's layout unless `metadata` says that they are as `save` wrote them; where:
    what to call their place in a message.

    Raises:
        CheckpointError: a tensor is missing, surplus or misshapen (named), or not a number of a known kind.
    """
    tensors = rename(tensors)
    if metadata.get("layout") == LAYOUT:
        if (bits := stored_bits(metadata)) is not None:
            quantize(module, bits, lambda name: f"{name}.scales" in tensors)
        shapes = _shapes(module)
    else:
        shapes = _shapes(module)
        tensors = to_channels_last(tensors, shapes)
    _check(tensors, shapes, where)
    for name, tensor in tensors.items():
        packed = tensor.dtype == mx.uint32 and f"{name.removesuffix('weight')}scales" in tensors
        if tensor.dtype not in DTYPES.values() and not packed:
            raise CheckpointError(f"{where}: {name} should be of floating point, got {tensor.dtype}")
        if dtype is not None and not packed:
            tensors[name] = tensor.astype(dtype)
    module.load_weights(list(tensors.items()), strict=True)
    module.eval()
    return module


def stored_bits(metadata: dict[str, str]) -> int | None:
    """Of the linear layers in a file that `save` wrote, if they are quantized; other programs' word is not taken."""
    bits = metadata.get("bits") if metadata.get("layout") == LAYOUT else None
    return int(bits) if bits in ("4", "8") else None


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: p.shape for name, p in tree_flatten(module.parameters())}


def some(names: list[str], most: int = 3) -> str:
    """The first of them and how many more, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check(tensors: dict[str, mx.array], shapes: dict[str, tuple[int, ...]], where: str) -> None:
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise CheckpointError(f"{where} lacks {some(missing)}, which its config asks for")
    if surplus := sorted(tensors.keys() - shapes.keys()):
        raise CheckpointError(f"{where} holds {some(surplus)}, which its config has no place for")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise CheckpointError(f"{where}: {name} should have shape {shape}, got {tensors[name].shape}")


def quantize(module: nn.Module, bits: int, wanted=lambda name: True) -> tuple[int, int]:
    """Quantize a module's linear layers in place, in groups of 64 weights; returns how many were and how many not.

    Left as they are: layers whose width is no multiple of 64, and a resnet's shortcut, which is a convolution.
    """
    done = left = 0

    def predicate(name: str, layer: nn.Module) -> bool:
        nonlocal done, left
        if not isinstance(layer, nn.Linear) or name.endswith("conv_shortcut") or not wanted(name):
            return False
        fits = layer.weight.shape[1] % GROUP_SIZE == 0
        done, left = done + fits, left + (not fits)
        return fits

    nn.quantize(module, group_size=GROUP_SIZE, bits=bits, class_predicate=predicate)
    return done, left


def save(module: nn.Module, folder: Path, *, bits: int | None = None) -> int:
    """Write a module's parameters to one file in a component's folder; returns its bytes."""
    metadata = {"format": "mlx", "layout": LAYOUT}
    if bits is not None:
        metadata |= {"bits": str(bits), "group_size": str(GROUP_SIZE)}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / CONVERTED
    mx.save_safetensors(str(file), dict(tree_flatten(module.parameters())), metadata)
    return file.stat().st_size
