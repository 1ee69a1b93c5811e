"""Weights that one of several machines has, on the disks of all."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..backend.distributed import Peer
from ..backend.ops import dtype_of
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hub import find, find_file
from ..errors import CheckpointError
from ..media.files import whole
from .team import Team, digest, sampled, weight_files

CHUNK = 1 << 24  # bytes that are sent at a time
# What a picture says of weights that are sent: where they are differs
SENT = ("model", "refiner", "vae", "lora", "lora_hashes", "embedding", "controls", "upscale", "hires_net")

Found = tuple[Path, list[Path]]
"""A file, or a folder, and what is read of it."""


def share_weights(team: Team, args: Namespace) -> None:
    """Have all weights that generate.py's flags name on this machine as rank 0 has them, and the flags name them here.

    Raises:
        UsageError, Failure: rank 0 does not find them.
    """
    half = dtype_of(getattr(args, "dtype", "auto")) == mx.float16

    def here(find: Callable[[Any], Found], name: Any) -> Any:
        place = _share(team, partial(find, name))
        return name if team.leads else type(name)(place)

    for flag in ("model", "refiner"):
        if hasattr(args, flag):
            setattr(args, flag, here(partial(_model, half), getattr(args, flag)))
    for flag in ("vae", "upscale", "hires_net"):
        if hasattr(args, flag):
            setattr(args, flag, here(partial(_network, half), getattr(args, flag)))
    if hasattr(args, "controlnet"):
        args.controlnet = [here(partial(_network, half), net) for net in args.controlnet]
    for flag in ("loras", "embeddings"):
        if hasattr(args, flag):
            setattr(args, flag, [(here(_addon, file), with_it) for file, with_it in getattr(args, flag)])


def _model(half: bool, name: str) -> Found:
    checkpoint = Checkpoint.open(name, half=half)
    return checkpoint.source.path, list(_files(checkpoint))


def _network(half: bool, name: str) -> Found:
    path = find(name, half=half, alone=True)
    return path, [path] if path.is_file() else [*_in(path), *_in(path / "vae")]


def _addon(name: Path) -> Found:
    path = find_file(str(name))
    if not path.exists():
        raise CheckpointError(f"there is no file {path}")
    return path, _in(path) if path.is_dir() else [path]


def _in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.suffix in (".json", ".safetensors"))


def _share(team: Team, find: Callable[[], Found]) -> Path:
    """Where this machine has what rank 0 finds: there itself, elsewhere in the user's cache folder, to which rank 0's
    files are copied once, from machine to machine."""

    def look() -> tuple[Path, list]:
        source, own = find()
        root = source.parent if source.is_file() else source
        files = {str(file.relative_to(root)): _told(file) for file in own}
        return root, [_called(root), source.name if source.is_file() else None, files]

    root, found = team.prepared(look if team.leads else lambda: (None, None))
    called, single, files = team.of_first(found)
    if not team.leads:
        room = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_deepcache" / "shared"
        root = room.joinpath(digest(files), *called)
    lacking = [name for name, told in files.items() if not ((root / name).is_file() and _told(root / name) == told)]
    wanted = {name for names in team.gathered(lacking) for name in names}
    for name in files:
        if name in wanted:
            _pass_on(team, root / name, files[name][0], name in lacking)
    return root if single is None else root / single


def _called(folder: Path) -> list[str]:
    """What a folder is called, on the hub too: some models are known by that for what they are."""
    parts = folder.absolute().parts
    return [*(part for part in parts[:-1] if part.startswith("models--")), *parts[-1:]]


def _told(file: Path) -> list:
    """What a file is told by, for JSON."""
    return [file.stat().st_size, sampled(file)]


def _files(checkpoint: Checkpoint) -> Iterator[Path]:
    """All that a model is read from: its weights, configs and tokenizers."""
    path = checkpoint.source.path
    yield from dict.fromkeys(file for _, file in weight_files(checkpoint) if path in (file, *file.parents))
    for pattern in ("*", "*/*") if path.is_dir() else ():
        yield from (file for file in sorted(path.glob(pattern)) if file.suffix in (".json", ".txt"))


def _pass_on(team: Team, file: Path, size: int, lacks: bool) -> None:
    """Send a file of so many bytes from rank 0 along the line, to be written where it lacks."""
    rank, last = team.machines.rank, team.machines.size - 1
    before, after = Peer(team.machines, rank - 1), Peer(team.machines, rank + 1)

    def chunks() -> Iterator[bytes]:
        with open(file if team.leads else os.devnull, "rb") as source:
            for start in range(0, size, CHUNK):
                many = min(CHUNK, size - start)
                chunk = mx.array(np.frombuffer(source.read(many), np.uint8)) if team.leads else None
                chunk = before.receive([many], mx.uint8) if chunk is None else chunk
                if rank < last:
                    after.send(chunk)
                yield np.array(chunk).tobytes()

    if not lacks:
        for _ in chunks():
            pass
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as part, part.open("wb") as out:
        out.writelines(chunks())
