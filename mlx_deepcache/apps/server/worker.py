"""The one thread that owns every MLX object: jobs in order, and between their steps whatever else needs the models."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ...errors import Unreachable
from .crew import Cancelled, Crew
from .jobs import CANCELLED, COMPLETED, FAILED, Job
from .refused import Refused, of_error

LONGEST_WAIT = 60  # seconds that a client is told to wait
RECENT = 20  # jobs whose durations tell how long one takes


class Worker:
    """room: how many jobs may wait; idle: seconds after which the models are freed, 0 for never; say: prints."""

    def __init__(self, crew: Crew, room: int, idle: float = 0, say: Callable[[str], None] = lambda text: None):
        self.crew, self.room, self.idle, self.say = crew, room, idle, say
        self.running: Job | None = None
        self._waiting: deque[Job] = deque()
        self._errands: deque[tuple[Callable[[], Any], bool, Future]] = deque()
        self._times: deque[float] = deque([1.0], RECENT)
        self._changed, self._closing = threading.Condition(), False
        self._rested = time.monotonic()  # since when there is nothing to do
        self.lost: Unreachable | None = None  # what it ended for
        self.on_lost: Callable[[], None] = lambda: None
        self.thread = threading.Thread(target=self._work, name="mlx-worker", daemon=True)
        self.thread.start()

    def check_open(self) -> None:
        """Raises Refused if the server is about to end: by that a proxy knows that another should be asked."""
        if self._closing:
            raise Refused(503, "the server is shutting down", "shutting_down")

    def put(self, job: Job) -> None:
        """Raises Refused: too many wait already, or the server is about to end."""
        with self._changed:
            self.check_open()
            if len(self._waiting) >= self.room:
                told = f"{len(self._waiting)} jobs are waiting already; try again later"
                raise Refused(429, told, "queue_full", retry=self.wait_seconds())
            self._waiting.append(job)
            self._changed.notify()

    def call(self, errand: Callable[[], Any], urgent: bool = False) -> Future:
        """Have something done on the worker's thread: once no job runs, or, urgent, after the step under way."""
        future: Future = Future()
        with self._changed:
            self.check_open()
            self._errands.append((errand, urgent, future))
            self._changed.notify()
        return future

    def cancel(self, job: Job) -> None:
        """A waiting job ends at once, a running one after its step."""
        job.cancelled.set()
        with self._changed:
            waiting = job in self._waiting
            if waiting:
                self._waiting.remove(job)
        if waiting:
            job.end(CANCELLED)

    def position(self, job: Job) -> int | None:
        """How many are before it in the queue; None if it does not wait."""
        with self._changed:
            return self._waiting.index(job) if job in self._waiting else None

    @property
    def length(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return self.running is not None

    def wait_seconds(self) -> int:
        """How long the queue takes, about."""
        return min(max(round(statistics.median(self._times) * (len(self._waiting) + 1)), 1), LONGEST_WAIT)

    def stop(self) -> None:
        """Take nothing more, and cancel what there is."""
        with self._changed:
            self._closing = True
            jobs = [*self._waiting, *([self.running] if self.running else [])]
            self._changed.notify()
        for job in jobs:
            self.cancel(job)

    def close(self, seconds: float = 10) -> None:
        """The same, and wait for the step under way."""
        self.stop()
        self.thread.join(seconds)

    def _work(self) -> None:
        while self.lost is None:
            with self._changed:
                self._changed.wait_for(self._due, self.crew.nap or self.idle or None)
                if self._closing and not self._waiting and not self._errands:
                    break
                job = None
                if self._waiting and not self._errands:
                    job = self.running = self._waiting.popleft()
            try:
                if job is not None:
                    self._draw(job)
                elif self._errands:
                    self._run_errands()
                else:
                    self._rest()
                    continue
                self._rested = time.monotonic()
            except Unreachable as error:
                self._lose(error)
        self.crew.painter.unload() if self.lost else self.crew.leave()

    def _due(self) -> bool:
        return bool(self._waiting or self._errands or self._closing)

    def _rest(self) -> None:
        """With nothing to do; the models are freed after long."""
        if self.crew.painter.loaded is not None and self.idle and time.monotonic() - self._rested >= self.idle:
            self.crew.free()
            self.say("idle: the model was freed")
        self.crew.rest()

    def _lose(self, error: Unreachable) -> None:
        """The other machines are gone, and nothing brings them back: the server ends."""
        self.lost = error
        self.stop()
        self.on_lost()

    def _run_errands(self, urgent: bool = False) -> None:
        with self._changed:
            due = [errand for errand in self._errands if errand[1] or not urgent]
            for errand in due:
                self._errands.remove(errand)
        for errand, _, future in due:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(errand())
            except BaseException as error:
                future.set_exception(error)

    def _draw(self, job: Job) -> None:
        began = time.monotonic()
        n = len(job.wanted.seeds)
        self.say(f"{job.id}: {n} picture{'s' * (n > 1)} by {job.wanted.model}")
        job.begin()
        try:
            self.crew.draw(job, lambda: self._run_errands(urgent=True))
            status, error = COMPLETED, None
        except Cancelled:
            status, error = CANCELLED, None
        except BaseException as raised:
            status, error = FAILED, of_error(raised)
            if isinstance(raised, Unreachable):
                self._lose(raised)
        seconds = time.monotonic() - began
        self._times.append(seconds)
        self.say(f"{job.id}: {status}, {seconds:.1f} s" + (f", {error.message}" if error else ""))
        self.running = None
        job.end(status, error)
