"""A server's machines, perhaps one alone: rank 0 takes the jobs, and all of them draw."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from ...cache.text import NAMES
from ...errors import Failure
from ...generation.options import Control
from .jobs import Job, Wanted
from .offers import Offers

if TYPE_CHECKING:
    import numpy as np

    from ..team import Team

NAP = 0.05  # seconds between asking for something to do: waiting for a message, MLX keeps a core busy
FREE, END = "free", "end"  # the models' memory; the server
GO, STOP, CANCEL = "go", "stop", "cancel"


@dataclass
class Batch:
    """What came of some pictures of a job: these, (H, W, 3) uint8, what they cost, None if they were stopped, and the
    same without a cache; or what it is refused for."""

    images: list[np.ndarray] = field(default_factory=list)
    stats: dict | None = None
    uncached: list[np.ndarray] | None = None
    stats_uncached: dict | None = None
    refused: list | None = None


class Pace:
    """The steps of a turn, in which every machine draws a batch of a job, or none. They are taken together, so that all
    end at the same one when rank 0 is asked to."""

    def __init__(self, team: Team, job: Job):
        self.team, self.job, self.state, self.over = team, job, GO, False

    def step(self, drawn: bool = False) -> str:
        """After each step: what rank 0 wants; drawn: whether this machine has no more to do."""
        job = self.job
        asked = CANCEL if job.cancelled.is_set() else STOP if job.stopped.is_set() or job.skipped.is_set() else GO
        told = self.team.gathered([asked, drawn])
        self.state, self.over = told[0][0], all(done for _, done in told)
        return self.state

    def rest(self) -> str:
        """Wait for the others; what rank 0 wants at last."""
        while not self.over:
            self.step(drawn=True)
        return self.state


def ordered(team: Team, order: Wanted | str | None = None) -> Wanted | str | None:
    """What rank 0 orders, at every machine: a job, `FREE`, `END`, or nothing."""
    from ..messages import pack, unpack

    return unpack(team.machines.gather(pack(order))[0], [Wanted, Control, *NAMES.values()])


def told_by(offers: Offers, common: dict[str, Any]) -> dict[str, str]:
    """What a machine would serve, for `Team.check_alike`."""
    import mlx.core as mx

    told = {"mlx_deepcache": __version__, "mlx": mx.__version__}
    told |= {name: json.dumps(value, default=str) for name, value in common.items()}
    for shelf in vars(offers).values():
        for name, path in shelf.found.items():
            told |= {f"the {shelf.what} {name}{of}": said for of, said in _files(path)}
    return told


def _files(path: str) -> Iterator[tuple[str, str]]:
    """Each of a model's files, by its name in it, and what tells it."""
    from pathlib import Path

    from ...checkpoints.checkpoint import Checkpoint
    from ..team import sampled, weight_files

    if Path(path).is_file():
        yield "", sampled(Path(path))
        return
    try:
        yield from ((f", {name}", sampled(file)) for name, file in weight_files(Checkpoint.open(path)))
    except Failure:
        yield "", "damaged"
