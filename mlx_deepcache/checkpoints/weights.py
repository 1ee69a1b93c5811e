"""Weights from files to modules and back: find, check, rename, lay out, load strictly, save.

Only safetensors are read; pickle files can run code. Files written here say in their metadata that they are laid out
channels-last; any other file has PyTorch's layout, with convolutions as (out, in, height, width).
"""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from ..backend.host import hold_standard_streams
from ..backend.ops import DTYPES
from ..errors import CheckpointError
from ..fields import parse_json

LAYOUT = "channels_last"
CONVERTED = "weights.safetensors"
GROUP_SIZE = 64
_STEMS = ("diffusion_pytorch_model", "model")
_MOST_HEADER = 100_000_000  # bytes, as the safetensors library has it
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


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
        raise CheckpointError(
            f"{folder} has its weights only as a pickle file, {pickles[0]}, which could run code when read; "
            "get or make a safetensors file"
        )
    raise CheckpointError(f"{folder} has no weights; expected a .safetensors file there")


def read_tensors(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """A safetensors file's tensors (read when first used) and metadata.

    Raises:
        CheckpointError: the file is missing, cut short or no safetensors file.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    if file.suffix in PICKLES:
        raise CheckpointError(f"{file} is a pickle file, which could run code when read; only safetensors are read")
    try:
        hold_standard_streams()
        with safe_open(file, framework="numpy") as header:  # checks the header against the file's length
            metadata = header.metadata() or {}
        return mx.load(str(file), format="safetensors"), metadata
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if _looks_pickled(file):
            raise CheckpointError(
                f"{file} is a pickle file by another name, which could run code when read; only safetensors are read"
            ) from None
        raise CheckpointError(f"{file} is damaged or no safetensors file ({error}); download it again") from None


def _looks_pickled(file: Path) -> bool:
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
        name = name.removeprefix("text_model.")
        if name.endswith("embeddings.position_ids"):  # 0, 1, 2, ...; no weights
            continue
        parts = name.split(".")
        if "attentions" in parts and parts[-2] in old:
            name = ".".join([*parts[:-2], old[parts[-2]], parts[-1]])
        out[name] = tensor
    return out


def to_channels_last(tensors: dict[str, mx.array], shapes: dict[str, tuple[int, ...]]) -> dict[str, mx.array]:
    """From PyTorch's layout: convolutions to (out, height, width, in), and 1x1 ones to the matrices they are."""
    out = {}
    for name, tensor in tensors.items():
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
        if "bits" in metadata:
            quantize(module, int(metadata["bits"]), lambda name: f"{name}.scales" in tensors)
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


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: p.shape for name, p in tree_flatten(module.parameters())}


def some(names: list[str]) -> str:
    """The first of them and how many more, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
