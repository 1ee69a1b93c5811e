"""Drawing for the page: a job is submitted, and what its events bring becomes what widgets show."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from html import escape
from typing import Any

import gradio as gr
import numpy as np

from ...media.sheets import psnr
from ..server.jobs import CANCELLED, COMPLETED, QUEUED, Drawn, Job, Wanted
from ..server.service import Service
from ..server.waiting import events
from . import show
from .session import Session, Shot

OFTEN = 0.1  # seconds between two updates of the page, at least
WAITING = 0.5  # seconds after which a place in the queue is looked up again
WARM = 0.02  # seconds of loading, above which a job was a model's first
PHASES = {"load": "loading the model", "encode": "reading the prompt", "decode": "decoding"}

Shown = dict[str, Any]
"""Updates by the names of widgets."""


class Speeds:
    """Seconds of denoising a multiply-add, as the last picture of each model took."""

    def __init__(self):
        self._seconds: dict[str, float] = {}

    def learn(self, job: Job) -> None:
        macs = job.stats.get("unet_macs")
        if macs and not job.interrupted:
            self._seconds[job.wanted.model] = job.stats["seconds"]["denoise"] / macs

    def expect(self, model: str, macs: int | None) -> float | None:
        seconds = self._seconds.get(model)
        return None if seconds is None or macs is None else seconds * macs


class Watch:
    """How far a job has come, as its events say."""

    def __init__(self, service: Service, job: Job):
        self.service, self.job, self.planned, self.taken = service, job, "", ""
        self.image: Any = None

    def hear(self, name: str, about: dict[str, Any]) -> None:
        if name == "step":
            if about["step"] <= len(self.taken):  # the next pictures
                self.taken = ""
            self.taken += "F" if about["full"] else "c"
        elif name == "preview":
            self.image = about["image"]

    def strip(self) -> str:
        """The steps taken, and those to come as far as they are known."""
        n, p = len(self.taken), self.job.progress
        plan = self.planned + "F" * (p.steps - len(self.planned)) if self.planned else "?" * p.steps
        return show.strip((self.taken + plan[n:])[: max(p.steps, n)], n)

    def state(self) -> str:
        job, p = self.job, self.job.progress
        if job.status == QUEUED:
            before = self.service.worker.position(job)
            busy = int(self.service.worker.busy)
            return show.state("waiting" if before is None else f"{before + busy} before you", "busy")
        of = f" · pictures {p.batch + 1} of {p.batches}" if p.batches > 1 else ""
        if p.phase in PHASES and not (p.phase == "encode" and p.step):
            return show.state(PHASES[p.phase] + of, "busy")
        left = f" · {show.duration(p.eta)} left" if p.step and p.eta >= 0.5 else ""
        return show.state(f"step <b>{p.step}</b> of {p.steps}{left}{of}", "busy")


async def draw(service: Service, session: Session, speeds: Speeds, wanted: Wanted) -> AsyncIterator[Shown]:
    """Draw one job, and show it while and after it is drawn. Closed before its end, it cancels the job.

    Raises:
        Refused: it failed, or was not taken.
    """
    job = service.submit(wanted)
    try:
        async with aclosing(watched(service, session, job)) as updates:
            async for update in updates:
                yield update
        yield ended(session, speeds, job)
    finally:
        leave(service, session, job)


def leave(service: Service, session: Session, job: Job) -> None:
    if not job.ended:
        service.worker.cancel(job)
    if job in session.jobs:
        session.jobs.remove(job)


async def watched(service: Service, session: Session, job: Job) -> AsyncIterator[Shown]:
    """What to show until the job ends.

    Raises:
        Refused: it failed.
    """
    watch, last, shown = Watch(service, job), 0.0, None
    session.jobs.append(job)
    plan = asyncio.wrap_future(service.worker.call(lambda: service.painter.plan(job.wanted), urgent=True))
    stream = events(job)
    heard = asyncio.ensure_future(anext(stream))
    # Said with every update, as Gradio's page may lose one that comes while it is busy
    stop = {"stop": gr.update(interactive=True)}
    yield stop | {"state": watch.state(), "about": ""}
    try:
        while True:
            done, _ = await asyncio.wait({heard}, timeout=WAITING)
            if done:
                try:
                    watch.hear(*heard.result())
                except StopAsyncIteration:
                    break
                heard = asyncio.ensure_future(anext(stream))
            if plan.done() and not watch.planned and plan.exception() is None:
                watch.planned = plan.result()["steps"]
            if time.monotonic() - last < OFTEN:
                continue
            update = stop | {"state": watch.state()}
            if job.progress.steps:
                update["strip"] = watch.strip()
            if watch.image is not None:
                update |= {"preview": gr.update(value=str(session.preview(watch.image)), visible=True)}
                update |= {"slider": gr.update(visible=False)}
                watch.image = None
            if update != shown:
                last, shown = time.monotonic(), update
                yield update
    finally:
        heard.cancel()
        plan.cancel()
        await asyncio.gather(heard, plan, return_exceptions=True)
        await stream.aclose()
    if job.error is not None:
        raise job.error
    if job.progress.steps:
        yield {"strip": watch.strip()}


def ended(session: Session, speeds: Speeds, job: Job) -> Shown:
    """A job's pictures, at last."""
    rest: Shown = {"stop": gr.update(interactive=False)}
    if job.status != COMPLETED or not job.images:
        told = "stopped before anything was drawn" if job.status == CANCELLED else job.status
        return rest | {"state": show.state(told), "strip": ""}
    speeds.learn(job)
    seconds = job.stats.get("seconds", {})
    if job.interrupted:
        p = job.progress
        caption, told = f"stopped at {p.step} of {p.steps}", f"stopped at step {p.step} of {p.steps}: the last estimate"
    else:
        caption = show.duration(seconds.get("denoise", 0.0) / len(job.images))
        told = f"drawn in <b>{show.duration(job.finished - job.started)}</b>"
    shots = [session.add(drawn, caption) for drawn in reversed(job.images)][::-1]
    ignored = f" · without effect: {escape(', '.join(job.wanted.ignored))}" if job.wanted.ignored else ""
    update = (
        rest
        | picture(session, shots[0])
        | {
            "state": show.state(told + ignored, "stopped" if job.interrupted else "done"),
            "gallery": gr.update(value=session.gallery(), selected_index=None, visible=True),
            "numbers": show.numbers(job.stats),
            "last": job.images[0].seed,
            "about": "",
        }
    )
    if shots[0].uncached is not None and "seconds_uncached" in job.stats:
        without = job.stats["seconds_uncached"]["denoise"]
        update["about"] = show.compared(seconds["denoise"], without, job.images[0].psnr, first=seconds["load"] > WARM)
    return update


def picture(session: Session, shot: Shot) -> Shown:
    """One of the session's, large; of a pair both."""
    session.shown = shot
    both = shot.uncached is not None
    return {
        "preview": gr.update(value=str(shot.file), visible=not both),
        "slider": gr.update(value=(str(shot.file), str(shot.uncached)) if both else None, visible=both),
    }


async def grid(
    service: Service, session: Session, speeds: Speeds, each: Sequence[tuple[int, Wanted]]
) -> AsyncIterator[Shown]:
    """Draw a job for each interval, all with the same seeds, and hold them against the first one's, which is uncached.

    Raises:
        Refused: one failed, or was not taken.
    """
    whole: list[Drawn] = []
    rows: list[list[tuple[str, str]]] = []
    yield {"grid": gr.update(value=[], columns=len(each[0][1].seeds), visible=True)}
    for interval, wanted in each:
        job = service.submit(wanted)
        try:
            async with aclosing(watched(service, session, job)) as updates:
                async for update in updates:
                    yield update
        finally:
            leave(service, session, job)
        update = ended(session, speeds, job)
        if job.status != COMPLETED or job.interrupted:
            yield update
            return
        whole = whole or job.images
        seconds = job.stats["seconds"]["denoise"] / len(job.images)
        rows.append([])
        for index, (drawn, first) in enumerate(zip(job.images, whole, strict=True)):
            near = psnr(np.asarray(drawn.pixels), np.asarray(first.pixels))
            told = "uncached" if interval == 1 else f"every {interval}: " + (f"{near:.1f} dB" if near < 100 else "same")
            rows[-1].append((str(session.shots[index].file), f"{told}, {seconds:.2f} s"))
        yield update | {"grid": [cell for row in rows for cell in row]}
