"""PyTorch's checkpoints without PyTorch: `.ckpt`, `.pt`, `.pth` and `.bin`, which `convert.py` reads and nothing else.

A pickle is a program, and Python's own reader runs what it names. Here `pickletools` parses the opcodes, and this
module is the machine that they are for, without a way to import, call or set anything: a name is looked up in `_NAMES`,
and one that is not there ends it. What is made are Python's plain values, and `Tensor`s, which say where numbers lie.

Both formats of `torch.save` (torch/serialization.py) are known: since 1.6 a zip archive with data.pkl and a file for
each storage, before that pickles in a row and then the storages.
"""

from __future__ import annotations

import io
import json
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..fields import shown

# SD 1.5 with its optimizer's state has about a megabyte of pickle and 200,000 opcodes
_MOST_BYTES = 64 << 20
_MOST_OPCODES = 4_000_000
_MOST_DEPTH = 100  # marks within marks
_MOST_NAME = 1000
_MOST_DIRECTORY = 16 << 20  # bytes of a zip archive's list of what is in it
_MOST_AXES = 8
_MOST_NUMBERS = 1 << 40  # of one tensor
_MOST_GROWTH = 4  # all tensors together, of the file: some are parts of one storage, and may overlap

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what the older format starts with

# PyTorch's storages -> what safetensors calls such numbers, and NumPy's type to carry them in
_KINDS = {
    "DoubleStorage": ("F64", "<f8"),
    "FloatStorage": ("F32", "<f4"),
    "HalfStorage": ("F16", "<f2"),
    "BFloat16Storage": ("BF16", "<u2"),
    "LongStorage": ("I64", "<i8"),
    "IntStorage": ("I32", "<i4"),
    "ShortStorage": ("I16", "<i2"),
    "CharStorage": ("I8", "i1"),
    "ByteStorage": ("U8", "u1"),
    "BoolStorage": ("BOOL", "u1"),
}
_WIDTHS = {said: np.dtype(carrier).itemsize for said, carrier in _KINDS.values()}
_FLOATS = ("F64", "F32", "F16", "BF16")
_CAST = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


@dataclass(frozen=True, eq=False)
class _Name:
    """A name that a pickle may say: what a call of it gives, or None if it is never called; `kind`: of a storage."""

    make: Callable[..., Any] | None
    kind: str | None = None


@dataclass(frozen=True)
class Storage:
    """`numel` numbers of one type, from number `start` of what the file keeps under a key."""

    kind: str
    key: str
    numel: int
    start: int = 0


@dataclass(frozen=True)
class Tensor:
    """Where a tensor's numbers lie in its storage; offset and strides in numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Parameters:
    """A ParameterDict, as the first textual inversions have it; its parameters come with its state."""

    tensors: dict | None = None


_NOTHING = object()  # what carries no weights: a number of NumPy's in a trainer's notes


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple, *rest: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v2, and before 0.4 _rebuild_tensor; what follows is of gradients."""
    if not isinstance(storage, Storage) or not (isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise ValueError("a tensor is made of something else than a storage, a shape and strides")
    if len(shape) != len(strides) or len(shape) > _MOST_AXES:
        raise ValueError(f"a tensor should have a stride for each of at most {_MOST_AXES} axes")
    if not all(type(n) is int and 0 <= n <= _MOST_NUMBERS for n in (offset, *shape, *strides)):
        raise ValueError("a tensor's offset, sizes and strides should be whole numbers from 0")
    if math.prod(max(1, n) for n in shape) > _MOST_NUMBERS:
        raise ValueError("a tensor is too large")
    numbers = math.prod(shape)
    if numbers and offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) >= storage.numel:
        raise ValueError("a tensor reaches beyond its storage")
    if numbers > storage.numel:
        raise ValueError("a tensor has more numbers than its storage")
    return Tensor(storage, offset, shape, strides)


def _parameter(tensor: Tensor, *rest: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter is made of something else than a tensor")
    return tensor


def _ordered() -> dict:  # what is in it comes after
    return {}


def _nothing(*of: Any) -> object:
    return _NOTHING


_NAMES = {
    ("torch._utils", "_rebuild_tensor_v2"): _Name(_tensor),
    ("torch._utils", "_rebuild_tensor"): _Name(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Name(_parameter),
    ("torch.nn.modules.container", "ParameterDict"): _Name(_Parameters),
    ("collections", "OrderedDict"): _Name(_ordered),
    # Lightning's notes in SD 1.x's and LDM's checkpoints: the best loss, a number of NumPy's, under the class of what
    # kept it. That class is a key there and is never called, so it is known only to be named.
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): _Name(None),
    ("numpy.core.multiarray", "scalar"): _Name(_nothing),
    ("numpy._core.multiarray", "scalar"): _Name(_nothing),
    ("numpy", "dtype"): _Name(_nothing),
    ("_codecs", "encode"): _Name(_nothing),
    ("__builtin__", "set"): _Name(_nothing),  # among the notes of a ParameterDict
} | {("torch", name): _Name(None, name) for name in _KINDS}


def read(file: Path) -> Pickled:
    """The tensors of a file that `torch.save` wrote; the file is mapped, and each is read when it is asked for.

    Raises:
        CheckpointError: the file is missing, damaged or cut short, names anything that is no part of a tensor, or holds
            no dictionary of tensors.
    """
    try:
        data = np.memmap(file, np.uint8, "r")
        value, places = (_read_zip if bytes(data[:4]) == b"PK\x03\x04" else _read_row)(data)
        tensors = _weights(value)
        for tensor in tensors.values():
            _bytes_of(tensor.storage, places)
        size = sum(math.prod(tensor.shape) * _width(tensor.storage) for tensor in tensors.values())
        if size > _MOST_GROWTH * len(data):
            raise ValueError("its tensors repeat each other, and would take many times the file's size")
        return Pickled(file, data, places, tensors)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {file}") from None
    except _Forbidden as error:
        raise CheckpointError(
            f"{file} names {error}, which is no part of a tensor and could run code; nothing of it was run or kept. "
            "Get another file of this model"
        ) from None
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else shown(error, 200)
        raise CheckpointError(f"{file} cannot be read as a file of PyTorch's: {reason}") from None


@dataclass(frozen=True)
class Pickled:
    """A file of PyTorch's, read only in part. places: a storage's key -> where its bytes start, and how many they are;
    tensors: by name."""

    file: Path
    data: np.ndarray
    places: dict[str, tuple[int, int]]
    tensors: dict[str, Tensor]

    def numbers(self, tensor: Tensor) -> np.ndarray:
        """A view of the file; bfloat16 as uint16."""
        start, stop = _bytes_of(tensor.storage, self.places)
        numbers = self.data[start:stop].view(_KINDS[tensor.storage.kind][1])[tensor.offset :]
        if not math.prod(tensor.shape):
            return numbers[:0].reshape(tensor.shape)
        strides = [n * numbers.itemsize for n in tensor.strides]
        return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False)

    def write(
        self, file: Path, dtype: mx.Dtype | None = None, metadata: dict[str, str] | None = None
    ) -> dict[str, int]:
        """Write all tensors to a safetensors file, one after the other; returns how many numbers of each type.

        dtype: for those of floating point; None keeps their types. metadata: what else the file should say.

        Raises:
            OSError: the file cannot be written.
        """
        kinds = {name: _kind(tensor, dtype) for name, tensor in self.tensors.items()}
        header, end, counts = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0, dict.fromkeys(kinds.values(), 0)
        for name, tensor in self.tensors.items():
            count = math.prod(tensor.shape)
            start, end = end, end + count * _WIDTHS[kinds[name]]
            header[name] = {"dtype": kinds[name], "shape": tensor.shape, "data_offsets": [start, end]}
            counts[kinds[name]] += count
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in self.tensors.items():
                out.write(_in_order(self.numbers(tensor), _KINDS[tensor.storage.kind][0], kinds[name]))
        return counts


def _kind(tensor: Tensor, dtype: mx.Dtype | None) -> str:
    """What safetensors calls a tensor's numbers, floating point made `dtype`."""
    kind = _KINDS[tensor.storage.kind][0]
    return kind if dtype is None or kind not in _FLOATS else _CAST[dtype]


def _in_order(numbers: np.ndarray, kind: str, wanted: str) -> memoryview:
    """The bytes of one tensor, row by row, in another type of floating point if need be."""
    numbers = np.ascontiguousarray(numbers)
    if kind != wanted:
        with np.errstate(over="ignore"):
            array = mx.array(numbers.astype(np.float32 if kind == "F64" else numbers.dtype))
        array = array.view(mx.bfloat16) if kind == "BF16" else array
        array = array.astype(next(dtype for dtype, said in _CAST.items() if said == wanted))
        numbers = np.array(array.view(mx.uint16) if wanted == "BF16" else array)
    return memoryview(numbers.reshape(-1).view(np.uint8))


def _width(storage: Storage) -> int:
    return _WIDTHS[_KINDS[storage.kind][0]]


def _bytes_of(storage: Storage, places: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Where a storage's bytes start and end in the file; raises ValueError if there are not so many."""
    if storage.key not in places:
        raise ValueError(f"it lacks the numbers {_short(storage.key)} of a tensor")
    width = _width(storage)
    at, length = places[storage.key]
    start, stop = storage.start * width, (storage.start + storage.numel) * width
    if stop > length:
        raise ValueError(f"it is cut short: a tensor has fewer numbers than it should ({_short(storage.key)})")
    return at + start, at + stop


# What a checkpoint's tensors are called


def _weights(value: Any) -> dict[str, Tensor]:
    """The tensors by name, of what a file holds: they themselves, a `state_dict` or an upscaler's average among a
    trainer's notes, a textual inversion's vectors (as A1111's safetensors call them, the word being the file's name),
    or DDPM's list.

    DDIM's code saves [model, optimizer, epoch, step, moving average], with the names of DataParallel, and draws with
    the average (runners/diffusion.py).
    """
    if isinstance(value, (list, tuple)) and len(value) >= 4 and all(isinstance(value[i], dict) for i in (0, 1)):
        model = _named(value[0])
        averages = _named(value[-1]) if len(value) > 4 and isinstance(value[-1], dict) else {}
        if averages.keys() - model.keys():
            raise ValueError("its moving average is of another net than its model")
        found = model | averages
    elif not isinstance(value, dict):
        raise ValueError("it holds no dictionary of tensors")
    elif "string_to_param" in value:
        vectors = value["string_to_param"]
        vectors = vectors.tensors if isinstance(vectors, _Parameters) else vectors
        if not isinstance(vectors, dict) or len(vectors) != 1:
            raise ValueError("a textual inversion should be of one word")
        found = _named(dict.fromkeys(["emb_params"], *vectors.values()))
    else:
        inner = (value.get(name) for name in ("state_dict", "params_ema", "params"))  # the last two are BasicSR's
        found = _named(next((tensors for tensors in inner if isinstance(tensors, dict)), value))
    if not found:
        raise ValueError("it holds no dictionary of tensors")
    for name in found:
        if name == "__metadata__" or not name.isprintable() or len(name) > _MOST_NAME:
            raise ValueError(f"a tensor cannot be called {_short(name)}")
    return found


def _named(state: dict) -> dict[str, Tensor]:
    found = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if odd := [name for name in found if not isinstance(name, str)]:
        raise ValueError(f"a tensor should be called by a text, got {_short(odd[0])}")
    parallel = bool(found) and all(name.startswith("module.") for name in found)
    return {name.removeprefix("module.") if parallel else name: tensor for name, tensor in found.items()}


# The two formats: what was saved, and where its storages are


def _read_zip(data: np.ndarray) -> tuple[Any, dict[str, tuple[int, int]]]:
    try:
        with zipfile.ZipFile(_Window(data)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, struct.error, RuntimeError, OverflowError, LookupError) as error:
        raise ValueError(f"it is cut short or no zip archive ({error})") from None
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it is a zip archive with {len(pickles) or 'no'} data.pkl, where torch.save writes one")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise ValueError("it is a TorchScript program")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and (order.file_size != 6 or bytes(_slice(data, _stored(data, order))) != b"little"):
        raise ValueError("its numbers are not little-endian")
    storages = f"{prefix}data/"
    places = {
        name.removeprefix(storages): _stored(data, entry)
        for name, entry in entries.items()
        if name.startswith(storages) and not name.endswith("/")
    }
    pickle = _slice(data, _stored(data, entries[pickles[0]]))
    if len(pickle) > _MOST_BYTES:
        raise ValueError(f"its data.pkl is larger than {_MOST_BYTES >> 20} MB")
    return _Machine(viewed=False).run(io.BytesIO(pickle)), places


def _stored(data: np.ndarray, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of a zip archive's entry are. torch.save packs nothing, so nothing is ever unpacked here."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
        raise ValueError(f"{_short(entry.filename)} in it is packed or locked, which torch.save does not do")
    start = entry.header_offset
    header = bytes(data[start : start + 30]) if start >= 0 else b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"it is damaged: {_short(entry.filename)} is not where the archive says")
    start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + entry.file_size > len(data):
        raise ValueError(f"it is cut short in {_short(entry.filename)}")
    return start, entry.file_size


def _slice(data: np.ndarray, place: tuple[int, int]) -> memoryview:
    return memoryview(data[place[0] : place[0] + place[1]])


class _Window:
    """A mapped file as zipfile wants one, of which it reads only what is in the archive and where."""

    def __init__(self, data: np.ndarray):
        self._data, self._at = data, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, len(self._data))[whence]
        if at < 0:
            raise ValueError("it is damaged: something should lie before its start")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, length: int = -1) -> bytes:
        left = max(0, len(self._data) - self._at)
        length = left if length is None or length < 0 else min(length, left)
        if length > _MOST_DIRECTORY:
            raise ValueError("the list of what is in it is too long")
        found = bytes(self._data[self._at : self._at + length])
        self._at += length
        return found


def _read_row(data: np.ndarray) -> tuple[Any, dict[str, tuple[int, int]]]:
    stream = io.BytesIO(bytes(data[:_MOST_BYTES]))
    machine = _Machine(viewed=True)
    try:
        started = machine.run(stream) == _MAGIC
    except ValueError:
        started = False
    if not started:
        raise ValueError("it is no file of torch.save, or from before PyTorch 0.1.11")
    if machine.run(stream) != _PROTOCOL:
        raise ValueError("it is of an unknown version")
    about = machine.run(stream)
    if not isinstance(about, dict) or about.get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    value, keys = machine.run(stream), machine.run(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it is damaged: it lacks the list of its numbers")
    places, at = {}, stream.tell()
    for key in keys:
        kind, numel = machine.storages.get(key, (None, 0))
        if kind is None:
            raise ValueError(f"it is damaged: no tensor is said to have the numbers {_short(key)}")
        said = int.from_bytes(bytes(data[at : at + 8]), "little")
        length = numel * _WIDTHS[_KINDS[kind][0]]
        if said != numel or at + 8 + length > len(data):
            raise ValueError(f"it is cut short or damaged: it lacks the numbers {_short(key)} of a tensor")
        places[key], at = (at + 8, length), at + 8 + length
    return value, places


# The machine


class _Forbidden(Exception):
    """A name that no tensor is made of."""


_PLAIN = (  # opcodes that carry their value
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Machine:
    """What runs pickles of protocols 2 to 5, as far as torch.save uses them.

    viewed: whether storages say which part of another they are, as the older format has them; storages: of that format,
    by key: their type and how many numbers the file keeps for them.
    """

    def __init__(self, viewed: bool):
        self._viewed = viewed
        self.storages: dict[str, tuple[str, int]] = {}

    def run(self, stream: io.BytesIO) -> Any:
        """The value of the pickle that starts here; raises ValueError if it is damaged or too much, or _Forbidden."""
        try:
            return self._run(stream)
        except LookupError:
            raise ValueError("its pickle is damaged: it takes what is not there") from None
        except TypeError:
            raise ValueError("its pickle is damaged: something is made of the wrong parts") from None

    def _run(self, stream: io.BytesIO) -> Any:
        stack, below, memo = [], [], {}
        for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
            if count >= _MOST_OPCODES:
                raise ValueError(f"its pickle has more than {_MOST_OPCODES:,} opcodes")
            name = opcode.name
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name in _PLAIN:
                stack.append(arg)
            elif name in _VALUES:
                stack.append(_VALUES[name])
            elif name == "MARK":
                if len(below) >= _MOST_DEPTH:
                    raise ValueError(f"its pickle is nested more than {_MOST_DEPTH} deep")
                below.append(stack)
                stack = []
            elif name == "TUPLE":
                stack, items = below.pop(), stack
                stack.append(tuple(items))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(items[::-1]))
            elif name in ("EMPTY_LIST", "EMPTY_DICT"):
                stack.append([] if name == "EMPTY_LIST" else {})
            elif name in ("APPEND", "APPENDS"):
                if name == "APPEND":
                    items = [stack.pop()]
                else:
                    stack, items = below.pop(), stack
                if not isinstance(stack[-1], list):
                    raise ValueError("its pickle is damaged: it appends to what is no list")
                stack[-1].extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                if name == "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    items = [key, value]
                else:
                    stack, items = below.pop(), stack
                _put(stack[-1], items)
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                if name == "GLOBAL":
                    module, _, said = arg.partition(" ")
                else:
                    said, module = stack.pop(), stack.pop()
                stack.append(_known(module, said))
            elif name in ("REDUCE", "NEWOBJ"):
                args, maker = stack.pop(), stack.pop()
                stack.append(_made(maker, args))
            elif name == "BUILD":
                state = stack.pop()
                _tell(stack[-1], state)
            elif name == "BINPERSID":
                stack.append(self._kept(stack.pop()))
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"its pickle has the opcode {name}, which torch.save does not write")
        raise ValueError("its pickle has no end")

    def _kept(self, said: Any) -> Storage | _Name:
        """("storage", its type, key, device, how many numbers), and in the older format, of which part: None or (key,
        from which number, how many); or in that ("module", a class, its file, its source)."""
        if self._viewed and isinstance(said, tuple) and len(said) == 4 and said[0] == "module":
            return said[1]
        if not (isinstance(said, tuple) and len(said) == 5 + self._viewed and said[0] == "storage"):
            raise ValueError("its pickle is damaged: it asks for something else than a storage")
        name, key, _, numel = said[1:5]
        if not isinstance(name, _Name) or name.kind is None:
            raise ValueError("its pickle is damaged: a storage is of no known type")
        part = said[5] if self._viewed and said[5] is not None else (key, 0, numel)
        if not (isinstance(part, tuple) and len(part) == 3 and isinstance(key, str)):
            raise ValueError("its pickle is damaged: a storage should have a key, and be a part of another or whole")
        if not all(type(n) is int and 0 <= n <= _MOST_NUMBERS for n in (numel, *part[1:])) or sum(part[1:]) > numel:
            raise ValueError("its pickle is damaged: a storage has an impossible size")
        if self.storages.setdefault(key, (name.kind, numel)) != (name.kind, numel):
            raise ValueError("its pickle is damaged: a storage is said to be of two types or sizes")
        return Storage(name.kind, key, part[2], part[1])


def _known(module: Any, name: Any) -> _Name:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("its pickle is damaged: a name is no text")
    if (module, name) not in _NAMES:
        raise _Forbidden(_short(f"{module}.{name}"))
    return _NAMES[module, name]


def _made(maker: Any, args: Any) -> Any:
    if not isinstance(maker, _Name) or maker.make is None or not isinstance(args, tuple):
        raise ValueError("its pickle calls what cannot be called")
    return maker.make(*args)


def _tell(made: Any, state: Any) -> None:
    """A pickle sets the attributes of what it made. There are none here; those of dictionaries hold no weights."""
    if isinstance(made, _Parameters):
        made.tensors = state.get("_parameters") if isinstance(state, dict) else None
    elif not isinstance(made, dict) and made is not _NOTHING:
        raise ValueError("its pickle sets attributes of what has none")


def _put(target: Any, items: list) -> None:
    """Keys and values in turn; a key that holds others could be nested too deep to be looked up."""
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("its pickle is damaged: it puts keys into what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not (key is None or isinstance(key, (str, int, float, bytes, _Name))):
            raise ValueError("its pickle has a dictionary with keys that are no texts or numbers")
        target[key] = value


def _short(value: Any) -> str:
    """As part of a message: a number may have more digits than Python writes out."""
    return shown(value, 80) if isinstance(value, str) else type(value).__name__
