"""Waiting for a job as long as its client does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import Request

from .jobs import CANCELLED, ENDS, Job
from .refused import Refused
from .service import Service


async def finished(service: Service, job: Job, request: Request) -> Job:
    """The job once it has ended; cancelled if the client leaves before.

    Raises:
        Refused: it failed, or was cancelled; 503 if that is as the server ends, so that a proxy has another one draw.
    """
    done, gone = asyncio.wrap_future(job.done), asyncio.create_task(left(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            service.worker.cancel(job)
            await done
    finally:
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone
        if not job.ended:
            service.worker.cancel(job)
    if job.status == CANCELLED:
        service.worker.check_open()
    return of_ended(job)


def of_ended(job: Job) -> Job:
    """Raises Refused if it failed, or was cancelled."""
    if job.error is not None:
        raise job.error
    if job.status == CANCELLED:
        raise Refused(499, "the job was cancelled", "cancelled")
    return job


async def left(request: Request) -> None:
    """Returns once the client has gone; what it sends is not read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def events(job: Job) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """A job's events until its end, first how it stands."""
    loop, heard = asyncio.get_running_loop(), asyncio.Queue()

    def hear(name: str, about: dict) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(heard.put_nowait, (name, about))

    leave = job.listen(hear)
    try:
        while True:
            name, about = await heard.get()
            yield name, about
            if name in ENDS:
                return
    finally:
        leave()
