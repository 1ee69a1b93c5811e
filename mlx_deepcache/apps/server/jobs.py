"""Jobs: what is to be drawn, how far it has come, and who wants to know."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from .refused import Refused

QUEUED, GENERATING, COMPLETED, FAILED, CANCELLED = "queued", "generating", "completed", "failed", "cancelled"
ENDS = (COMPLETED, FAILED, CANCELLED)
PREVIEWS = 4  # a second, at most
KEPT = 100  # ended jobs, at most
WATCHED = 5  # seconds after which who asked for progress is taken to have gone


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, checked as far as that needs no weights. model, vae, refiner: names; prompts, seeds: one
    a picture; options: for `StableDiffusion.settings`; loras, embeddings: names, LoRAs with their scales; together:
    how many are drawn at once; compare: draw all again without a cache; format: of the pictures; partials: previews
    that are made in any case, evenly spread over the steps; ignored: what has no effect here, in words."""

    model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    vae: str | None = None
    refiner: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    embeddings: tuple[str, ...] = ()
    together: int = 1
    compare: bool = False
    previews: bool = True
    format: str = "png"
    partials: int = 0
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """A picture. pixels: PIL's, as it was drawn; settings: of `record.describe`; psnr: to the same drawn without a
    cache, which is `uncached`."""

    seed: int
    pixels: Any
    settings: dict
    psnr: float | None = None
    uncached: Any = None


@dataclass
class Progress:
    """step, steps: of the batch under way, full: whether its last step was; batch, batches: from 0; seconds, eta: gone
    by and to come."""

    phase: str | None = None
    step: int = 0
    steps: int = 0
    full: bool | None = None
    batch: int = 0
    batches: int = 1
    seconds: float = 0.0
    eta: float = 0.0


class Job:
    """One request's pictures. The worker writes it, and any thread reads it; `done` holds it once it has ended."""

    def __init__(self, wanted: Wanted, name: str | None = None):
        self.id, self.wanted = name or secrets.token_hex(8), wanted
        self.status, self.created, self.started, self.finished = QUEUED, time.time(), None, None
        self.progress, self.preview = Progress(), None
        self.images: list[Drawn] = []
        self.stats: dict = {}
        self.settings: dict = {}
        self.error: Refused | None = None
        self.cancelled, self.stopped, self.skipped = (threading.Event() for _ in range(3))
        self.interrupted = False
        self.watched = 0.0  # when its progress was last asked for
        self.done: Future[Job] = Future()
        self.done.set_running_or_notify_cancel()  # who waits for it and gives up does not cancel it
        self._listeners: list[Callable[[str, dict], None]] = []
        self._lock, self._previewed, self._began = threading.RLock(), 0.0, 0.0

    @property
    def ended(self) -> bool:
        return self.status in ENDS

    def listen(self, hear: Callable[[str, dict], None]) -> Callable[[], None]:
        """Be told of every event from here on, first of how it stands; returns what ends that."""
        with self._lock:
            for event in self._state():
                hear(*event)
            self._listeners.append(hear)

        def leave() -> None:
            with self._lock:
                self._listeners.remove(hear)

        return leave

    def _state(self) -> list[tuple[str, dict]]:
        if self.ended:
            return [(self.status, {})]
        if self.status == QUEUED:
            return [(QUEUED, {})]
        told = [("phase", {"phase": self.progress.phase})]
        return told + ([("step", self.at_step())] if self.progress.step else [])

    def tell(self, name: str, **about) -> None:
        with self._lock:
            for hear in list(self._listeners):
                hear(name, about)

    # what the worker says

    def begin(self) -> None:
        self.status, self.started = GENERATING, time.time()
        self.phase("load")

    def phase(self, name: str) -> None:
        if self.progress.phase != name:
            self.progress.phase = name
            self.tell("phase", phase=name)

    def batch(self, number: int, batches: int, steps: int) -> None:
        self.progress = Progress(self.progress.phase, 0, steps, None, number, batches)
        self._began = time.time()

    def step(self, full: bool, change: float | None) -> None:
        p = self.progress
        p.step, p.full = p.step + 1, full
        p.seconds = time.time() - self._began
        p.eta = p.seconds / p.step * (p.steps * (p.batches - p.batch) - p.step)
        self.tell("step", **self.at_step(), change=change)

    def at_step(self) -> dict:
        p = self.progress
        told = {"step": p.step, "steps": p.steps, "full": p.full}
        return told | {"seconds": round(p.seconds, 3), "eta": round(p.eta, 3)}

    def wants_preview(self) -> bool:
        """Whether one should be made now: somebody would see it, and the last one is not too new."""
        if self.partial() is not None:
            return True
        now = time.time()
        seen = self._listeners or now - self.watched < WATCHED
        if not self.wanted.previews or not seen or now - self._previewed < 1 / PREVIEWS:
            return False
        self._previewed = now
        return True

    def partial(self) -> int | None:
        """Which of the partial pictures is due after this step, from 0."""
        n, p = self.wanted.partials, self.progress
        due = sorted({max(round(p.steps * (i + 1) / (n + 1)), 1) for i in range(n)})
        return due.index(p.step) if p.step in due else None

    def show(self, image: Any) -> None:
        """image: PIL's."""
        self.preview = image
        self.tell("preview", step=self.progress.step, image=image, partial=self.partial())

    def end(self, status: str, error: Refused | None = None) -> None:
        self.error, self.finished, self.preview = error, time.time(), None
        self.wanted = replace(self.wanted, options={})  # among which are pictures
        with self._lock:
            self.status = status
            for hear in list(self._listeners):
                hear(status, {})
        self.done.set_result(self)


class Jobs:
    """All jobs, ended ones for some seconds more."""

    def __init__(self, keep: float):
        self.keep, self._jobs, self._lock = keep, OrderedDict(), threading.Lock()
        self._gone: OrderedDict[str, None] = OrderedDict()

    def add(self, job: Job) -> None:
        """Raises Refused if there is one of this id."""
        self.sweep()
        with self._lock:
            if job.id in self._jobs:
                raise Refused(409, f"there is a job {job.id} already", "duplicate", "force_task_id")
            self._jobs[job.id] = job

    def drop(self, job: Job) -> None:
        with self._lock:
            self._jobs.pop(job.id, None)

    def get(self, name: str) -> Job:
        """Raises Refused: there is none, or no more."""
        self.sweep()
        with self._lock:
            if name in self._jobs:
                return self._jobs[name]
            if name in self._gone:
                raise Refused(410, f"job {name} has ended, and is no longer kept", "expired")
        raise Refused(404, f"there is no job {name[:80]!r}", "not_found")

    def all(self) -> list[Job]:
        """The newest first."""
        self.sweep()
        with self._lock:
            return list(self._jobs.values())[::-1]

    def sweep(self) -> None:
        """Forget what has ended long ago."""
        with self._lock:
            late = time.time() - self.keep
            ended = [(name, job) for name, job in self._jobs.items() if job.ended]
            over = len(ended) - KEPT
            for name in [name for i, (name, job) in enumerate(ended) if job.finished <= late or i < over]:
                del self._jobs[name]
                self._gone[name] = None
            while len(self._gone) > 1000:
                self._gone.popitem(last=False)
