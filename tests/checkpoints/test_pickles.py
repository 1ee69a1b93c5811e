"""PyTorch's pickles, against torch.load; and what else such a file may try."""

import ast
import os
import pickle
import shlex
import shutil
import struct
import sys
import tracemalloc
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import originals
import pytest
import tiny_unprompted
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file
from tiny import files

import mlx_deepcache
from mlx_deepcache import StableDiffusion
from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.checkpoints import pickles
from mlx_deepcache.errors import CheckpointError

FORMATS = {"zip": True, "row": False}
TYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def save(value, file, kind="zip", **options):
    torch.save(value, file, _use_new_zipfile_serialization=FORMATS[kind], **options)
    return file


def through(file):
    """The file's tensors, as convert.py writes them."""
    written = file.with_name("written.safetensors")
    pickles.read(file).write(written)
    return load_file(written)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor.detach()), name


# ------------------------------------------------------------------------------------------------- as torch.load has it


def states():
    """What may be in a state dict."""
    torch.manual_seed(0)
    base = torch.randn(6, 5, 4, 3)
    tensors = {str(dtype): (torch.arange(24) % 2).reshape(2, 3, 4).to(dtype) for dtype in TYPES}
    tensors |= {str(dtype) + ".random": torch.randn(3, 7).to(dtype) for dtype in TYPES[:4]}
    tensors |= {
        "whole": base,
        "part": base[2:4],
        "every other": base[::2, 1:, :, ::3],
        "transposed": base.permute(3, 0, 2, 1),
        "channels last": base.to(memory_format=torch.channels_last),
        "number": base[1, 1, 1, 1],
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base),
        "half of it": base[:3].half(),
        "positions": torch.arange(77).expand((1, -1)),
    }
    return tensors


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_all_that_a_state_dict_has(tmp_path, kind, protocol):
    file = save(states(), tmp_path / "x.pt", kind, pickle_protocol=protocol)
    assert_same(through(file), torch.load(file, weights_only=False))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_net_and_its_trainers_notes(tmp_path, kind, monkeypatch):
    """As Lightning saves them, with a class as a key and NumPy's numbers; read by PyTorch when it may run anything."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    notes = {
        "monitor": "val/loss",
        "best": np.float64(0.25),
        "last": np.float32(0.5),
        "step": np.int64(3),
        "path": None,
    }
    value = {
        "epoch": 3,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": net.state_dict(),
        "callbacks": {module.ModelCheckpoint: notes},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [1e-4], "last": (1, -(2**40), 2.5, True)}],
    }
    file = save(value, tmp_path / "x.ckpt", kind)
    assert_same(through(file), torch.load(file, weights_only=False)["state_dict"])


def test_ddims_list(tmp_path):
    """[model, optimizer, epoch, step, moving average], of which the average is drawn with."""
    net = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)))
    optimizer = torch.optim.Adam(net.parameters())
    average = {name: torch.randn_like(parameter) for name, parameter in net.module.named_parameters()}
    states = [net.state_dict(), optimizer.state_dict(), 3, 400]
    plain = {name.removeprefix("module."): tensor for name, tensor in net.state_dict().items()}
    assert_same(through(save(states, tmp_path / "x.ckpt")), plain)
    assert_same(through(save([*states, average], tmp_path / "x.ckpt")), plain | average)
    with pytest.raises(CheckpointError, match="average is of another net"):
        pickles.read(save([*states, {"else": torch.zeros(1)}], tmp_path / "x.ckpt"))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("holder", [dict, torch.nn.ParameterDict])
def test_a_textual_inversion(tmp_path, kind, holder):
    vectors = torch.nn.Parameter(torch.randn(2, 8))
    value = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": holder({"*": vectors}), "name": "thing"}
    assert_same(through(save(value, tmp_path / "x.pt", kind)), {"emb_params": vectors})
    assert_same(through(save({"<thing>": vectors[0]}, tmp_path / "x.bin", kind)), {"<thing>": vectors[0]})
    value["string_to_param"] = holder({"a": vectors, "b": vectors})
    with pytest.raises(CheckpointError, match="should be of one word"):
        pickles.read(save(value, tmp_path / "x.pt", kind))


def test_other_types_are_cast_as_pytorch_does(tmp_path):
    import mlx.core as mx

    file = save(states(), tmp_path / "x.pt")
    for dtype, theirs in ((mx.float16, torch.float16), (mx.bfloat16, torch.bfloat16), (mx.float32, torch.float32)):
        pickles.read(file).write(tmp_path / "cast.safetensors", dtype)
        expected = {
            name: tensor.float().to(theirs) if tensor.is_floating_point() else tensor
            for name, tensor in torch.load(file).items()
        }
        assert_same(load_file(tmp_path / "cast.safetensors"), expected)


def test_a_tensor_at_a_time(tmp_path):
    """16 tensors of 4 MB, none of them in order, are written with less than two of them in memory."""
    file = save({str(i): torch.zeros(1024, 1024).T for i in range(16)}, tmp_path / "x.pt")
    tracemalloc.start()
    try:
        pickles.read(file).write(tmp_path / "x.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------------------------ hostile files


def archive(file, pickle=b"", storages=(), packed=zipfile.ZIP_STORED, **others):
    with zipfile.ZipFile(file, "w", packed) as out:
        out.writestr("archive/data.pkl", pickle)
        for name, content in [*((f"data/{i}", s) for i, s in enumerate(storages)), *others.items()]:
            out.writestr(f"archive/{name}", content)
    return file


def refused(file, *words):
    with pytest.raises(CheckpointError) as caught:
        pickles.read(file)
    said = str(caught.value)
    assert str(file) in said
    assert "\n" not in said
    assert len(said) < 400 + len(str(file))
    assert all(word in said for word in words), said


class Call:
    """What pickles as a call."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def bad():
    raise AssertionError("it was called")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Call(os.system, "touch called"), f"{os.system.__module__}.system"),
        (Call(eval, "open('called', 'w')"), "builtin"),
        (Call(exec, "open('called', 'w')"), "builtin"),
        (Call(getattr, "text", "join"), "builtin"),
        (Call(Call, Call(os.system, "touch called")), "test_pickles.Call"),
        (Call(bad), "test_pickles.bad"),
        (Call(__import__, "os"), "__import__"),
        (Call(torch.load, "called"), "torch"),
        (Call(torch.hub.load, "a/b", "c"), "torch.hub"),
        (Path("called"), "athlib"),
        (np.zeros(3), "numpy"),
        (bytearray(b"x"), "bytearray"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear"),
        (torch.float32, "torch.float32"),
    ],
)
def test_calls_are_refused_by_name(tmp_path, monkeypatch, kind, value, name):
    monkeypatch.chdir(tmp_path)
    for where in ({"state_dict": {"a": torch.zeros(1)}, "x": value}, {"a": [({"b": value},)]}):
        refused(save(where, tmp_path / "x.pt", kind), name, "could run code")
    assert not (tmp_path / "called").exists()


def test_a_bare_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Call(os.system, "touch called"), 2))
    refused(tmp_path / "x.pt", ".system")
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"a": 1}, 2))
    refused(tmp_path / "x.pt", "no file of torch.save")
    assert not (tmp_path / "called").exists()


def name(module, said):
    """Under protocol 4, where a name may have dots, and a module be any text."""
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, said)) + b"\x93"


def old_name(module, said):
    return f"c{module}\n{said}\n".encode()


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_rebuild_tensor_v2.__call__"),
        ("torch", "_utils._rebuild_tensor_v2"),
        ("torch._utils._rebuild_tensor_v2", ""),
        ("torch._utils ", "_rebuild_tensor_v2"),
        ("torch", "FloatStorage.from_file"),
        ("torch", "FloatStorage.__init__.__globals__"),
        ("torch", "storage.FloatStorage"),
        ("torch.storage", "_load_from_bytes"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "OrderedDict.__class__"),
        ("collections", "_sys.modules"),
        ("COLLECTIONS", "OrderedDict"),
        ("", "collections.OrderedDict"),
        ("numpy", "dtype.__class__"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy.testing._private.utils", "runstring"),
        ("_codecs", "lookup"),
        ("_codecs", "encode.__self__"),
        ("pytorch_lightning.callbacks", "model_checkpoint.ModelCheckpoint"),
        ("mlx_deepcache.checkpoints.pickles", "_NAMES"),
    ],
)
def test_names_that_only_look_allowed(tmp_path, module, said):
    refused(archive(tmp_path / "x.pt", b"\x80\x04" + name(module, said) + b"."), "names", "could run code")
    if module and said:
        refused(archive(tmp_path / "x.pt", b"\x80\x02" + old_name(module, said) + b"."), "names", "could run code")


STORAGE = b"(X\x07\0\0\0storage" + old_name("torch", "FloatStorage") + b"X\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
REBUILD, DICT = old_name("torch._utils", "_rebuild_tensor_v2"), old_name("collections", "OrderedDict")


def tensor(*args):
    """The opcodes of {"a": a tensor}; args: the pickles of what it is made of, a storage first."""
    return b"\x80\x02}X\x01\0\0\0a" + REBUILD + b"(" + b"".join(args) + b"tRs."


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def plain(offset=0, shape=(2, 2), strides=(2, 1), *rest):
    return tensor(STORAGE, *(number(value) for value in (offset, shape, strides, False, *rest)), DICT + b")R")


def test_the_files_below_would_be_read(tmp_path):
    file = archive(tmp_path / "x.pt", plain(), [np.arange(4, dtype="f").tobytes()])
    assert_same(through(file), {"a": torch.arange(4.0).reshape(2, 2)})


LIMIT = {
    "no tensors": (b"\x80\x02}.", "no dictionary of tensors"),
    "a number": (b"\x80\x02K\x01.", "no dictionary of tensors"),
    "no end": (b"\x80\x02}", "pickle exhausted"),
    "nothing": (b"", "pickle exhausted"),
    "an unknown opcode": (b"\x80\x02\xff.", "unknown"),
    "an empty stack": (b"\x80\x02.", "takes what is not there"),
    "no such memo": (b"\x80\x02h\x05.", "takes what is not there"),
    "a memo far off": (b"\x80\x02}r\xff\xff\xff\xff0.", "POP"),
    "a mark that lacks": (b"\x80\x02}u.", "takes what is not there"),
    "an appended dictionary": (b"\x80\x02}K\x01a.", "no list"),
    "a list with keys": (b"\x80\x02]K\x01K\x01s.", "no dictionary"),
    "half a key": (b"\x80\x02}(K\x01u.", "no dictionary"),
    "a list as a key": (b"\x80\x02}]K\x01s.", "keys that are no texts"),
    "a tuple as a key": (b"\x80\x02}K\x01\x85K\x01s.", "keys that are no texts"),
    "a call of a text": (b"\x80\x02X\x01\0\0\0a)R.", "cannot be called"),
    "a call of a storage": (b"\x80\x02" + old_name("torch", "FloatStorage") + b")R.", "cannot be called"),
    "a call of what is only named": (
        b"\x80\x02" + old_name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint") + b")R.",
        "cannot be called",
    ),
    "a call with a name": (b"\x80\x02" + DICT + DICT + b"R.", "cannot be called"),
    "a call with too much": (b"\x80\x02" + DICT + b"K\x01\x85R.", "wrong parts"),
    "a name that is a number": (b"\x80\x04K\x01K\x01\x93.", "a name is no text"),
    "attributes of a text": (b"\x80\x02X\x01\0\0\0a}b.", "sets attributes"),
    "attributes of a name": (b"\x80\x02" + DICT + b"}X\x08\0\0\0__dict__}sb.", "sets attributes"),
    "attributes of a tensor": (plain()[:-2] + b"}b" + b"s.", "sets attributes"),
    "INST": (b"\x80\x02(ios\nsystem\n.", "opcode INST"),
    "OBJ": (b"\x80\x02(" + DICT + b"o.", "opcode OBJ"),
    "EXT1": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "EXT4": (b"\x80\x02\x84\x01\0\0\0.", "opcode EXT4"),
    "PERSID": (b"\x80\x02Pstorage\n.", "opcode PERSID"),
    "NEWOBJ_EX": (b"\x80\x04" + DICT + b")}\x92.", "opcode NEWOBJ_EX"),
    "NEXT_BUFFER": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "a persistent id that is a text": (b"\x80\x02X\x02\0\0\0osQ.", "something else than a storage"),
    "a persistent id of another kind": (
        STORAGE.replace(b"storage", b"modules") + b".",
        "something else than a storage",
    ),
    "a storage of no type": (
        STORAGE.replace(b"torch\nFloatStorage", b"collections\nOrderedDict") + b".",
        "no known type",
    ),
    "a storage with a number as its key": (STORAGE.replace(b"X\x01\0\0\x000", b"K\x00") + b".", "should have a key"),
    "a storage of negative size": (STORAGE.replace(b"K\x04", number(-4)) + b".", "impossible size"),
    "a storage of huge size": (STORAGE.replace(b"K\x04", number(2**200)) + b".", "impossible size"),
    "a storage that is true": (STORAGE.replace(b"K\x04", b"\x88") + b".", "impossible size"),
    "a storage of two sizes": (
        b"\x80\x02(" + STORAGE + STORAGE.replace(b"K\x04", b"K\x03") + b"t.",
        "of two types or sizes",
    ),
    "a storage that is not there": (plain().replace(b"\0\x000", b"\0\x007"), "lacks the numbers 7"),
    "a storage that leads out": (plain().replace(b"\x01\0\0\x000", b"\x0b\0\0\0../data.pkl"), "lacks the numbers"),
    "a storage cut short": (plain().replace(b"K\x04t", b"K\x05t"), "cut short"),
    "a tensor of no storage": (tensor(number("x"), *map(number, (0, (1,), (1,)))), "something else than a storage"),
    "a tensor of a list": (tensor(STORAGE, *map(number, (0, [2], (1,)))), "something else than a storage"),
    "a tensor of too little": (tensor(STORAGE), "wrong parts"),
    "a parameter of no tensor": (
        b"\x80\x02" + old_name("torch._utils", "_rebuild_parameter") + b"K\x01\x85R.",
        "something else than a tensor",
    ),
    "a tensor beyond its storage": (plain(1), "beyond its storage"),
    "strides beyond it": (plain(0, (2, 2), (3, 1)), "beyond its storage"),
    "negative strides": (plain(3, (2, 2), (-2, -1)), "whole numbers from 0"),
    "a negative offset": (plain(-1), "whole numbers from 0"),
    "negative sizes": (plain(0, (-2, -2)), "whole numbers from 0"),
    "sizes that are not whole": (plain(0, (2.0, 2)), "whole numbers from 0"),
    "sizes that are true": (plain(0, (True, 2)), "whole numbers from 0"),
    "one stride too few": (plain(0, (2, 2), (1,)), "a stride for each"),
    "too many axes": (plain(0, (1,) * 9, (1,) * 9), "at most 8 axes"),
    "one number a thousand million times": (plain(0, (10**9,), (0,)), "more numbers than its storage"),
    "an empty tensor of huge size": (plain(0, (0, 2**40, 2**40), (1, 1, 1)), "too large"),
    "an unthinkable size": (plain(0, (2 ** (8 * 10**5), 2), (1, 1)), "whole numbers from 0"),
    "a name with a line's end": (plain().replace(b"\x01\0\0\0a", b"\x02\0\0\0a\n"), "cannot be called"),
    "safetensors' own name": (plain().replace(b"\x01\0\0\0a", b"\x0c\0\0\0__metadata__"), "cannot be called"),
    "a number as a name": (plain().replace(b"X\x01\0\0\0a", b"K\x05"), "called by a text"),
    "a text longer than the file": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.", "expected"),
    "bytes longer than the file": (b"\x80\x04\x8e" + struct.pack("<Q", 2**63 + 1) + b"x.", ""),
    "a long number": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "not enough data"),
    "a very long name": (plain().replace(b"\x01\0\0\0a", struct.pack("<I", 5000) + b"a" * 5000), "cannot be called"),
}


@pytest.mark.parametrize("what", LIMIT)
def test_what_is_damaged_or_too_much(tmp_path, what):
    opcodes, words = LIMIT[what]
    refused(archive(tmp_path / "x.pt", opcodes, [bytes(16)]), words)


def test_nested_and_endless(tmp_path, monkeypatch):
    """Nothing here goes down into what was made, so depth costs nothing; opcodes are counted, and marks too."""
    deep = {
        "lists": b"]" * 10_000 + b"a" * 9_999,
        "tuples": b")" + b"\x85" * 200_000,
        "a list in itself": b"]q\0h\0a",
        "the same again and again": b"(]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(200)) + b"t",
    }
    for opcodes in deep.values():
        kept = plain()[:-1] + b"X\x01\0\0\0b" + opcodes + b"s."
        file = archive(tmp_path / "x.pt", kept, [bytes(16)])
        assert pickles.read(file).tensors.keys() == {"a"}
        refused(archive(tmp_path / "x.pt", b"\x80\x02" + opcodes + b"."), "no dictionary of tensors")
    refused(archive(tmp_path / "x.pt", b"\x80\x02" + b"(" * 10_000 + b"."), "nested more than 100 deep")
    monkeypatch.setattr(pickles, "_MOST_OPCODES", 1000)
    refused(archive(tmp_path / "x.pt", b"\x80\x02" + b"N" * 1000 + b"."), "more than 1,000 opcodes")


def test_many_tensors_of_one_storage(tmp_path):
    """A file of 4 MB that would give 4 GB."""
    one = plain(0, (2**20,), (1,))[3:-1].replace(b"K\x04t", number(2**20) + b"t")
    many = b"".join(b"X\x04\0\0\0%04d" % i + one[6:] for i in range(1000))
    refused(archive(tmp_path / "x.pt", b"\x80\x02}" + many + b".", [bytes(4 << 20)]), "repeat each other")


def test_archives(tmp_path):
    file, data = tmp_path / "x.pt", [np.arange(4, dtype="f").tobytes()]
    bomb = plain().replace(b"K\x04t", number(2**26) + b"t")
    refused(archive(file, bomb, [bytes(2**28)], zipfile.ZIP_DEFLATED), "packed or locked")
    assert file.stat().st_size < 2**19
    refused(archive(file, plain(), data, zipfile.ZIP_BZIP2), "packed or locked")
    refused(archive(file, plain(), data, **{"constants.pkl": b""}), "TorchScript")
    refused(archive(file, plain(), data, byteorder=b"big"), "not little-endian")
    refused(archive(file, plain(), data, **{"code/data.pkl": b""}), "2 data.pkl")
    assert pickles.read(archive(file, plain(), data, byteorder=b"little")).tensors
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("other", b"")
    refused(file, "no data.pkl")
    content = archive(file, plain(), data).read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        refused(file)
    place = content.index(data[0])
    for at in (place - 44, len(content) - 12, len(content) - 6):  # a local header, and where the list starts
        file.write_bytes(content[:at] + b"\xff" * 4 + content[at + 4 :])
        refused(file)


def test_a_file_that_lacks_its_end(tmp_path):
    for kind in FORMATS:
        content = save(states(), tmp_path / "x.pt", kind).read_bytes()
        for length in {*range(0, len(content), 97), len(content) - 1}:
            (tmp_path / "x.pt").write_bytes(content[:length])
            refused(tmp_path / "x.pt", "")
    with pytest.raises(CheckpointError, match="there is no file"):
        pickles.read(tmp_path / "none.pt")
    refused(tmp_path)


def row(*values, data=b""):
    return b"".join(values) + data


def test_the_older_format(tmp_path):
    file, about = tmp_path / "x.pt", {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    start = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, about)]
    storage = STORAGE[:-2] + b"NtQ"
    body, keys = plain().replace(STORAGE, storage), pickle.dumps(["0"], 2)
    data = struct.pack("<q", 4) + np.arange(4, dtype="f").tobytes()
    file.write_bytes(row(*start, body, keys, data=data))
    expected = torch.arange(4.0).reshape(2, 2)
    assert torch.equal(torch.load(file)["a"], expected)
    assert_same(through(file), {"a": expected})
    part = STORAGE[:-2] + b"X\x01\0\0\x001K\x02K\x02\x87tQ"  # two numbers, from the third on
    file.write_bytes(row(*start, plain(0, (2,), (1,)).replace(STORAGE, part), keys, data=data))
    assert torch.equal(torch.load(file)["a"], torch.tensor([2.0, 3.0]))
    assert_same(through(file), {"a": torch.tensor([2.0, 3.0])})
    odd = {
        "unknown version": row(start[0], pickle.dumps(1002, 2)),
        "not little-endian": row(*start[:2], pickle.dumps(about | {"little_endian": False}, 2)),
        "list of its numbers": row(*start, body, pickle.dumps({"0": 1}, 2), data=data),
        "no tensor is said": row(*start, body, pickle.dumps(["0", "9"], 2), data=data),
        "cut short or damaged": row(*start, body, keys, data=data[:-1]),
        "lacks the numbers 0": row(*start, body, keys, data=struct.pack("<q", 5) + data[8:]),
        "something else than a storage": row(*start, plain(), keys, data=data),
        "impossible size": row(*start, plain().replace(STORAGE, part.replace(b"K\x02K\x02", b"K\x02K\x03")), keys),
    }
    for words, content in odd.items():
        file.write_bytes(content)
        refused(file, words)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=some.data())
def test_any_bytes(tmp_path, data):
    """A result, or one line."""
    file = tmp_path / "x.pt"
    kind = data.draw(some.sampled_from(("bytes", "opcodes", "zip", "row")))
    if kind == "bytes":
        file.write_bytes(data.draw(some.sampled_from((b"", b"PK\x03\x04", b"\x80\x02"))) + data.draw(some.binary()))
    elif kind == "opcodes":
        pieces = some.sampled_from([bytes([op]) for op in b"(N)]}aestuRQb.\x81\x85\x86\x87\x88\x93"])
        pieces |= some.sampled_from([DICT, REBUILD, STORAGE, plain()[2:-1], number((2, 2)), number(1), number("a")])
        pieces |= some.integers(0, 3).map(lambda i: bytes([*b"q", i])) | some.integers(0, 3).map(
            lambda i: bytes([*b"h", i])
        )
        archive(file, b"\x80\x02" + b"".join(data.draw(some.lists(pieces, max_size=30))) + b".", [bytes(16)])
    else:
        content = bytearray(save({"state_dict": {"a": torch.ones(2, 3), "b": torch.ones(2)}}, file, kind).read_bytes())
        for _ in range(data.draw(some.integers(1, 6))):
            content[data.draw(some.integers(0, len(content) - 1))] = data.draw(some.integers(0, 255))
        file.write_bytes(
            content[: data.draw(some.integers(0, len(content)))] if data.draw(some.booleans()) else content
        )
    try:
        read = pickles.read(file)
        read.write(tmp_path / "x.safetensors")
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert load_file(tmp_path / "x.safetensors").keys() == read.tensors.keys()


# ---------------------------------------------------------------------------------------------------------- convert.py


def convert(source, output, *flags):
    return main_convert([str(flag) for flag in ("--model", source, "--output", output, *flags)])


def told(capfd):
    """The one error."""
    err = capfd.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    return line


def latents(model, **options):
    pipe = StableDiffusion.from_pretrained(str(model), "float32", keep=False, **options)
    return pipe("a thing", steps=2, height=32, width=32, seeds=[3], cache_interval=2).latents


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A whole checkpoint in one safetensors file."""
    root = tmp_path_factory.mktemp("single")
    return originals.write("sd1", originals.build("sd1", root / "folder"), root / "whole.safetensors")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_whole_checkpoint(single, tmp_path, kind):
    """Both as a folder for MLX and as one file; nothing else is left."""
    source = save({"state_dict": load_file(single), "global_step": 7}, tmp_path / "whole.ckpt", kind)
    assert convert(source, tmp_path / "new" / "folder") == 0
    assert convert(source, tmp_path / "file.safetensors") == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"whole.ckpt", "new", "file.safetensors"}
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["folder"]
    assert_same(load_file(tmp_path / "file.safetensors"), load_file(single))
    expected = latents(single)
    assert np.array_equal(latents(tmp_path / "file.safetensors"), expected)
    assert np.array_equal(latents(tmp_path / "new" / "folder"), expected)
    half = tmp_path / "half.safetensors"
    assert convert(source, half, "--dtype", "float16", "--prediction-type", "v_prediction") == 0
    assert {tensor.dtype for tensor in load_file(half).values()} <= {torch.float16, torch.int64}


@pytest.mark.parametrize("kind", ["ddpm", "class"])
def test_models_without_a_prompt(unprompted, tmp_path, kind):
    """The original files that exist only as pickles: DDPM's plain state dict or list, and LDM's, of Lightning."""
    folder, pipe = unprompted(kind)
    single = tmp_path / "original.safetensors"
    if kind == "ddpm":
        tiny_unprompted.write_ddpm_file(folder, single)
        state = load_file(single)
        other = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
        average = {f"module.{name}": tensor for name, tensor in state.items()}
        files_of = {"plain": OrderedDict(state), "list": [other, {"state": {}, "param_groups": []}, 3, 5000, average]}
    else:
        tiny_unprompted.write_ldm_file(kind, folder, single)
        files_of = {"trainers": {"state_dict": load_file(single), "epoch": 1, "callbacks": {}}}
    options = {"steps": 2, "seeds": [3]} | ({"class_label": 5} if kind == "class" else {})
    expected = StableDiffusion.from_pretrained(str(single), "float32")(None, **options).latents
    for name, value in files_of.items():
        source = save(value, tmp_path / f"{name}.ckpt")
        assert convert(source, tmp_path / f"{name}.safetensors") == 0
        assert convert(source, tmp_path / name) == 0
        for model in (tmp_path / f"{name}.safetensors", tmp_path / name):
            latents = StableDiffusion.from_pretrained(str(model), "float32")(None, **options).latents
            assert np.array_equal(latents, expected)
    flat = tmp_path / "flat"  # as its repositories have it, all in one folder
    if kind == "ddpm":
        tiny_unprompted.flatten(folder, flat, index=True)
        pickled(flat)
        assert convert(flat, tmp_path / "from-flat") == 0
        again = StableDiffusion.from_pretrained(str(tmp_path / "from-flat"), "float32")(None, **options).latents
        assert np.array_equal(again, pipe(None, **options).latents)


def pickled(folder, shards=1, variant=""):
    """Replace the weights of a component by what older versions of diffusers and transformers wrote."""
    (file,) = folder.glob("*.safetensors")
    tensors, stem = load_file(file), "pytorch_model" if "text" in folder.name else "diffusion_pytorch_model"
    names = sorted(tensors)
    for i in range(shards):
        number = f"-{i + 1:05}-of-{shards:05}" if shards > 1 else ""
        part = OrderedDict((name, tensors[name]) for name in names[i::shards])
        save(part, folder / f"{stem}{variant}{number}.bin", "zip" if i % 2 else "row")
    file.unlink()


@pytest.mark.parametrize(("shards", "variant"), [(1, ""), (3, ""), (1, ".fp16"), (2, ".fp16")])
def test_a_folder_with_pickles_only(checkpoint, tmp_path, monkeypatch, capfd, shards, variant):
    source = shutil.copytree(checkpoint("sd15"), tmp_path / "model")
    for component in ("unet", "vae", "text_encoder"):
        pickled(source / component, shards, variant)
    before = files(source)
    monkeypatch.chdir(tmp_path)
    assert main_generate(["--model", "model", "--prompt", "a thing", "--steps", "1", "--output", "x.png"]) == 1
    command = shlex.split(told(capfd).split("what reads it safely is ")[1])
    assert command == ["python", "convert.py", "--model", "model", "--output", "model-mlx"]
    assert main_convert(command[2:]) == 0
    assert files(source) == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "model-mlx"}
    assert np.array_equal(latents(tmp_path / "model-mlx"), latents(checkpoint("sd15")))


def test_one_part_with_pickles(checkpoint, tmp_path, capfd):
    """The other parts are read as they are; and a VAE by itself may be pickled too."""
    source = shutil.copytree(checkpoint("sd15"), tmp_path / "model")
    pickled(source / "vae")
    assert convert(source, tmp_path / "out") == 0
    assert np.array_equal(latents(tmp_path / "out"), latents(checkpoint("sd15")))
    assert convert(checkpoint("sd15"), tmp_path / "again", "--vae", source / "vae") == 0
    assert files(tmp_path / "again") == files(tmp_path / "out")
    assert convert(source, source, "--force") == 2
    assert "name another folder" in told(capfd)


ADDED = {
    "--embedding": ("thing.bin", lambda: {"<thing>": torch.ones(32)}, ""),
    "--lora": (
        "thing.bin",
        lambda: {
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 48),
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(48, 2),
        },
        "",
    ),
    "--vae": ("thing.vae.pt", None, ""),
}


@pytest.mark.parametrize("flag", ADDED)
def test_the_command_that_generate_names(checkpoint, single, tmp_path, monkeypatch, capfd, flag):
    """generate.py refuses; what it says makes the file that it then draws with."""
    monkeypatch.chdir(tmp_path)
    model, size = str(checkpoint("sd15")), ["--steps", "1", "--height", "32", "--width", "32", "--dtype", "float32"]
    name, value, _ = ADDED[flag]
    if value is None:
        vae = {n: t for n, t in load_file(single).items() if n.startswith("first_stage_model.")}
        state = {"state_dict": {n.removeprefix("first_stage_model."): t for n, t in vae.items()}}
        model = str(single)
    else:
        state = value()
    save(state, tmp_path / name)
    draw = ["--model", model, "--prompt", "a thing", *size, "--output", "x.png", flag]
    assert main_generate([*draw, name]) == 1
    line = told(capfd)
    assert "which could run code when read" in line
    command = shlex.split(line.split("what reads it safely is ")[1])
    assert main_convert(command[2:]) == 0
    assert main_generate([*draw, command[-1]]) == 0, capfd.readouterr().err
    assert main_generate([*draw, name]) == 1


def test_a_pickle_by_another_name(single, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    save(load_file(single), tmp_path / "my model.safetensors")
    size = ["--prompt", "a thing", "--steps", "1", "--height", "32", "--width", "32"]
    assert main_generate(["--model", "my model.safetensors", *size]) == 1
    command = shlex.split(told(capfd).split("what reads it safely is ")[1])
    assert main_convert(command[2:]) == 0
    assert main_generate(["--model", command[-1], *size]) == 0


def test_nothing_is_half_written(single, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    lora, refuse = ADDED["--lora"][1](), {"state_dict": load_file(single), "x": Call(os.system, "touch called")}
    save(refuse, tmp_path / "bad.ckpt")
    save(lora, tmp_path / "lora.bin")
    there = {"bad.ckpt", "lora.bin"}
    for output in ("out", "new/out", "out.safetensors"):
        assert convert("bad.ckpt", output) == 1
        assert ".system, which is no part of a tensor" in told(capfd)
        assert {entry.name for entry in tmp_path.iterdir()} == there
    assert convert("lora.bin", "out") == 1  # as a whole checkpoint
    line = told(capfd)
    assert "lora.bin is a LoRA" in line
    assert line.endswith("name a .safetensors file as --output")
    assert convert("x" * 5000, "out") == 1
    assert "no model" in told(capfd)
    for output in ("out", "out.safetensors"):
        assert convert("none.ckpt", output) == 1
        assert "there is no file none.ckpt" in told(capfd)
    for flags, words in (
        (("lora.bin", "out.safetensors", "--quantize", 8), "--quantize has no meaning"),
        (("lora.bin", "out.safetensors", "--vae", "lora.bin"), "--vae has no meaning"),
        ((single, "out.safetensors"), "made of a pickle file"),
        ((single.parent / "folder", "out.safetensors"), "made of a pickle file"),
        (("lora.bin", "bad.ckpt"), "exists"),
    ):
        assert convert(*flags) == 2
        assert words in told(capfd)
    monkeypatch.setattr(pickles.Pickled, "numbers", lambda self, tensor: (_ for _ in ()).throw(OSError(28, "No space")))
    for output in ("out", "out.safetensors"):
        assert convert("lora.bin", output) == 1
        assert "No space" in told(capfd)
    assert {entry.name for entry in tmp_path.iterdir()} == there


def test_an_output_is_replaced_only_when_told(tmp_path, capfd):
    save({"a": torch.ones(2)}, tmp_path / "a.pt")
    save_file({"b": torch.ones(2)}, tmp_path / "a.safetensors")
    assert convert(tmp_path / "a.pt", tmp_path / "a.safetensors") == 2
    assert "pass --force" in told(capfd)
    assert load_file(tmp_path / "a.safetensors").keys() == {"b"}
    assert convert(tmp_path / "a.pt", tmp_path / "a.safetensors", "--force") == 0
    assert load_file(tmp_path / "a.safetensors").keys() == {"a"}


def test_only_convert_reads_pickles():
    house = Path(mlx_deepcache.__file__).parent
    take_tensors = (house / "apps" / "comfyui", house / "diffusers")  # of PyTorch's, from who calls them
    for file in house.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "torch.load" not in text, file
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            found = "pickles" in [*names, *str(getattr(node, "module", "")).split(".")]
            assert not found or file == house / "checkpoints" / "convert.py", file
            roots = {name.split(".")[0] for name in [*names, str(getattr(node, "module", ""))]}
            assert "pickle" not in roots and ("torch" not in roots or {*take_tensors} & {*file.parents}), file
