"""Drawing on several machines: that all of them would draw the same, which draws what, and how it comes together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .._version import __version__
from ..backend.distributed import Machines, Peer
from ..cache.halves import Halves, SharedHalves
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.weights import component_files
from ..errors import Failure, UsageError
from ..generation.settings import Settings
from .compare import Uncached
from .flags import GUIDANCE
from .messages import pack, unpack

_BLOCKS, _BLOCK = 256, 1 << 12  # bytes that a file is told by: so many blocks, spread over it


@dataclass
class Drawn:
    """What came of one batch: its prompt's number, and its pictures (H, W, 3) or videos (F, H, W, 3), uint8, the first
    of this number among all; steps: pictures of single steps, by their files' names; or what it failed for, and whether
    that is a `UsageError`."""

    place: int
    first: int
    images: list[np.ndarray] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    latents: np.ndarray | None = None
    stats: dict = field(default_factory=dict)
    uncached: Uncached | None = None
    steps: dict[str, np.ndarray] = field(default_factory=dict)
    error: str | None = None
    usage: bool = False


class Team:
    """Machines that draw together, perhaps one alone. Batches are dealt out in turn; by `split` each is drawn by one
    machine, or guidance's halves by two.

    groups: how many batches are drawn at a time; group: which of them this machine draws; leads: whether it is the one
    that speaks and writes; draws: whether it is the one of its group whose pictures are taken; halves: of guidance, who
    runs them.

    Raises:
        UsageError: guidance cannot be split among so many.
        Failure: the others cannot be reached.
    """

    def __init__(self, split: str | None):
        self.machines = Machines()
        rank, size = self.machines.rank, self.machines.size
        self.leads = rank == 0
        if split == GUIDANCE and size % 2:
            told = f"--split guidance is for pairs of machines, started by such as 'mlx.launch -n 2 ...'; got {size}"
            self.tell(told, usage=True)
        each = 2 if split == GUIDANCE else 1
        self.groups, self.group = size // each, rank // each
        self.draws = rank % each == 0
        self.halves: Halves = Halves() if each == 1 else SharedHalves(rank % 2, Peer(self.machines, rank ^ 1))

    @property
    def alone(self) -> bool:
        return self.machines.size == 1

    @property
    def paired(self) -> bool:
        """Whether two draw each batch."""
        return self.groups < self.machines.size

    def gathered(self, value: Any) -> list:
        """Every rank's value, as JSON has it, at every rank."""
        return [json.loads(told) for told in self.machines.gather(json.dumps(value).encode())]

    def of_first(self, value: Any) -> Any:
        """Rank 0's, as JSON has it, at every rank."""
        return self.gathered(value)[0]

    def each(self, work: Callable[[], Any]) -> tuple[Any, list[tuple[str, bool] | None]]:
        """What this machine's work returns, None if it failed, and for each rank what it failed for, and whether that
        is a `UsageError`; or None."""
        result = failed = None
        try:
            result = work()
        except (UsageError, Failure) as error:
            failed = str(error), isinstance(error, UsageError)
        return result, self.gathered(failed)

    def prepared(self, work: Callable[[], Any]) -> Any:
        """What this machine's work returns, if all ranks' did; else rank 0 tells why, and the others end.

        Raises:
            UsageError, Failure: a machine's work raised it; named, if it is another than rank 0.
        """
        result, failures = self.each(work)
        for rank, failed in enumerate(failures):
            if failed is not None:
                self.tell(*failed, rank)
        return result

    def tell(self, error: str, usage: bool = False, rank: int = 0) -> None:
        """Raise it at rank 0, which says it; the others end, without a failure of their own, for which they would be
        ended before it is said."""
        if not self.leads:
            raise SystemExit(0)
        raise (UsageError if usage else Failure)(f"{self.machines.called(rank)}: {error}" if rank else error)

    def check_alike(self, told: dict[str, str]) -> None:
        """That all machines would draw the same, before any does; told: what matters by its name, and its value.

        Raises:
            Failure: one would not; says which, and what differs.
        """
        ours, *others = self.gathered(told)
        for rank, theirs in enumerate(others, 1):
            if different := [name for name in ours | theirs if ours.get(name) != theirs.get(name)]:
                name, more = different[0], f", and in {len(different) - 1} more" if len(different) > 1 else ""
                values = f"{theirs.get(name, 'none')} for {ours.get(name, 'none')}"
                self.tell(f"it would draw something else: it differs from rank 0 in {name} ({values}){more}", rank=rank)

    def begin(self, work: Callable[[], Any]) -> Any:
        """What this machine's work returns. Two that draw together both fail where one does.

        Raises:
            UsageError, Failure: see above.
        """
        if not self.paired:
            return work()
        result, failures = self.each(work)
        for rank in (2 * self.group, 2 * self.group + 1):
            if failures[rank] is not None:
                error, usage = failures[rank]
                who = "" if rank == self.machines.rank else f"{self.machines.called(rank)}: "
                raise (UsageError if usage else Failure)(who + error)
        return result

    def share(self, drawn: Any, kind: type) -> list:
        """What all machines have drawn, at each of them, in the order in which it was dealt out; kind: a dataclass, of
        which `drawn` is one, None where nothing was dealt out."""
        if self.alone:
            return [drawn] if drawn is not None else []
        packed = self.machines.gather(pack(drawn) if drawn is not None and self.draws else b"")
        own = self.machines.rank
        return [drawn if rank == own else unpack(message, [kind]) for rank, message in enumerate(packed) if message]

    def named(self, error: object) -> str:
        """A failure of this machine, for all of them."""
        return str(error) if self.leads else f"{self.machines.name}: {error}"

    def at_once(self, n: int, fit: int) -> int:
        """How many of a prompt's n pictures to draw at once, if so many fit: so that no machine has more to do than it
        must."""
        turns = -(-n // (self.groups * fit))
        return fit if self.alone else -(-n // (self.groups * turns))


def told_by(settings: Settings, checkpoints: list[Checkpoint], said: dict, prompts: list[str | None]) -> dict[str, str]:
    """What a machine would draw, for `Team.check_alike`; said: what its pictures would say of themselves."""
    told = {"mlx_deepcache": __version__, "mlx": mx.__version__}
    told |= {name: json.dumps(value) for name, value in said.items() if name != "version"}
    told |= {"prompts": digest(prompts), "seeds": digest(settings.seeds), "noise": digest(settings.noise)}
    told |= {"the picture to start from": digest(settings.start)}
    told |= {"ControlNets' pictures": digest([control.image for leg in settings.legs for control in leg.controls])}
    for number, checkpoint in enumerate(checkpoints):
        told |= {"the refiner's " * number + name: sampled(file) for name, file in weight_files(checkpoint)}
    return told


def weight_files(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """A model's files of weights, each with what to call it."""
    for name in checkpoint.components:
        place = Path(checkpoint.part(name).where)
        if place.is_dir():
            yield from ((f"{name}/{file}", place / file) for file in component_files(place))
        elif place.is_file():
            yield f"the file of the {name}", place
    if checkpoint.source.path.is_file():
        yield "the model's file", checkpoint.source.path


def sampled(file: Path) -> str:
    """A digest of a file's size and of blocks from all over it: weights of a fine-tune differ in most of them."""
    digest, size = hashlib.sha256(), file.stat().st_size
    digest.update(str(size).encode())
    with file.open("rb") as opened:
        for block in range(_BLOCKS):
            opened.seek(block * max(size - _BLOCK, 0) // (_BLOCKS - 1))
            digest.update(opened.read(_BLOCK))
    return digest.hexdigest()[:12]


def digest(value: object) -> str:
    """What values are told by: arrays, dataclasses, and what JSON has."""
    made = hashlib.sha256()
    _feed(made, value)
    return made.hexdigest()[:12]


def _feed(digest: Any, value: object) -> None:
    if isinstance(value, (mx.array, np.ndarray)):
        array = np.ascontiguousarray(np.array(value))
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.data)
    elif is_dataclass(value):
        _feed(digest, asdict(value))
    elif isinstance(value, dict):
        _feed(digest, list(value.items()))
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)},".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(repr(value).encode() + b"\0")
