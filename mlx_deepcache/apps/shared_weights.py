"""A model that one of several machines has, on the disks of all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..backend.distributed import Peer
from ..checkpoints.checkpoint import Checkpoint
from ..media.files import whole
from .team import Team, digest, sampled, weight_files

CHUNK = 1 << 24  # bytes that are sent at a time


def share_model(team: Team, find: Callable[[], Checkpoint]) -> Path:
    """Where this machine has the model that rank 0 finds: there itself, elsewhere in the user's cache folder, to which
    rank 0's files are copied once, from machine to machine.

    Raises:
        UsageError, Failure: rank 0 does not find it.
    """
    own = team.prepared(lambda: find() if team.leads else None)
    source = own.source.path if team.leads else None
    root = source.parent if team.leads and source.is_file() else source
    files = {} if source is None else {str(file.relative_to(root)): _told(file) for file in _files(own)}
    single, files = team.of_first([None if source is None or source.is_dir() else source.name, files])
    if not team.leads:
        room = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_deepcache" / "shared"
        root = room / digest(files)
    lacking = [name for name, told in files.items() if not ((root / name).is_file() and _told(root / name) == told)]
    wanted = {name for names in team.gathered(lacking) for name in names}
    for name in files:
        if name in wanted:
            _pass_on(team, root / name, files[name][0], name in lacking)
    return root if single is None else root / single


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
