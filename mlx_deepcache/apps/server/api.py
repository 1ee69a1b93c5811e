"""`/api/v1`: jobs with events, previews and cancelling, and plans."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

from ..._version import __version__
from ...cache.text import NAMES, keys_of
from ...diffusion.noise import GENERATORS
from ...diffusion.schedulers import SCHEDULERS
from ...media.pictures import FITS
from . import pictures
from .jobs import ENDS, Job, Wanted
from .refused import Refused, mends
from .schema import SERVED, NamedLora, body, options_from
from .service import Service
from .waiting import events

if TYPE_CHECKING:
    from .painter import Painter

TAG = "jobs"


class JobRequest(BaseModel):
    """What a job asks for, beside the options."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    prompt: str | list[str] | None = Field(None, description="what to draw; one, or one a seed")
    model: str | None = Field(None, description="a name from the list of models")
    vae: str | None = Field(None, description="a name from the list of VAEs")
    refiner: str | None = Field(None, description="a name from the list of refiners")
    loras: list[NamedLora] = []
    seeds: list[int] | None = Field(None, description="one a picture")
    seed: int | None = Field(None, description="of the first of n pictures; absent or negative: random")
    n: int = Field(1, description="how many pictures")
    compare: bool = Field(False, description="draw again without a cache: pairs, and PSNR")
    previews: bool = True
    output_format: Literal["png", "jpeg", "webp"] = "png"


Asked = body("Job", JobRequest)


def told(refused: Refused) -> tuple[int, dict]:
    """An error as this family of routes says it."""
    error = {"code": refused.code, "message": refused.message, "param": refused.param}
    return mends(refused, 422), {"error": error, "detail": refused.message}


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/api/v1", tags=[TAG])
    jobs, worker = service.jobs, service.worker

    def wanted(asked: BaseModel) -> Wanted:
        values = asked.model_dump(exclude_unset=True)
        return service.wanted(
            asked.prompt,
            options_from(values),
            model=asked.model,
            vae=asked.vae,
            refiner=asked.refiner,
            seed=asked.seed,
            seeds=asked.seeds,
            n=asked.n,
            loras=[(lora.name, lora.scale) for lora in asked.loras],
            compare=asked.compare,
            previews=asked.previews,
            format=asked.output_format,
        )

    @routes.get("/capabilities")
    async def capabilities() -> dict:
        """What can be asked for: models, schedulers, caches with their settings, limits, defaults."""
        models = await asyncio.wrap_future(worker.call(lambda: described(service.painter), urgent=True))
        offers, limits = service.offers, service.limits
        return {
            "version": __version__,
            "models": models,
            "schedulers": list(SCHEDULERS),
            "rngs": list(GENERATORS),
            "caches": caches(),
            "fits": list(FITS),
            "vaes": offers.vaes.names(),
            "refiners": offers.refiners.names(),
            "loras": offers.loras.names(),
            "embeddings": offers.embeddings.names(),
            "controlnets": offers.controlnets.names(),
            "upscalers": offers.upscalers.names(),
            "limits": {"images": limits.images, "pixels": limits.pixels, "batch": limits.batch, "queue": limits.queue},
            "defaults": {"model": service.chosen.model, "vae": service.chosen.vae, **service.chosen.cache},
            "options": [{"name": o.name, "help": o.help, "group": o.group, "expects": o.words} for o in SERVED],
            "features": dict.fromkeys(("hires", "inpaint_only_masked", "outpaint", "upscale", "clip_skip"), True),
        }

    @routes.post("/jobs", status_code=202)
    async def submit(asked: Annotated[Asked, Body()], response: Response) -> dict:
        """Ask for pictures. The job outlives this request."""
        job = service.submit(await run_in_threadpool(wanted, asked))
        response.headers["location"] = f"/api/v1/jobs/{job.id}"
        return shown(service, job)

    @routes.post("/plan")
    async def plan(asked: Annotated[Asked, Body()]) -> dict:
        """What the same job would do: its settings, which steps are full, its share of the work."""
        made = await run_in_threadpool(wanted, asked)
        return await asyncio.wrap_future(worker.call(lambda: service.painter.plan(made), urgent=True))

    @routes.get("/jobs")
    def listed() -> list[dict]:
        """All jobs, the newest first."""
        return [shown(service, job) for job in jobs.all()]

    @routes.get("/jobs/{name}")
    def one(name: str) -> dict:
        return shown(service, jobs.get(name))

    @routes.get("/jobs/{name}/images/{number}", response_class=Response)
    def image(name: str, number: int, uncached: bool = False) -> Response:
        """A picture's bytes; uncached: of the pair that `compare` made."""
        job = jobs.get(name)
        if not 0 <= number < len(job.images):
            raise Refused(404, f"job {name} has {len(job.images)} pictures, and no number {number}", "not_found")
        drawn = job.images[number]
        if uncached and drawn.uncached is None:
            raise Refused(404, f"job {name} was not drawn again without a cache", "not_found")
        pixels = drawn.uncached if uncached else drawn.pixels
        data = pictures.packed(pixels, job.wanted.format, settings=None if uncached else drawn.settings)
        return Response(data, media_type=pictures.FORMATS[job.wanted.format])

    @routes.post("/jobs/{name}/cancel")
    def cancel(name: str) -> dict:
        """End it: at once where it waits, after its step where it is drawn."""
        job = jobs.get(name)
        if job.ended:
            raise Refused(409, f"job {name} has ended already: {job.status}", "ended")
        worker.cancel(job)
        return shown(service, job)

    # A name that is none is refused before the stream, which begins with 200
    @routes.get("/jobs/{name}/events", response_class=EventSourceResponse, dependencies=[Depends(jobs.get)])
    async def stream(name: str) -> AsyncIterator[ServerSentEvent]:
        """Events as they come, first how it stands; leaving does not cancel."""
        job = jobs.get(name)
        async for event, about in events(job):
            if event == "queued":
                about = {"position": worker.position(job)}
            elif event == "preview":
                image = await run_in_threadpool(pictures.preview, about["image"])
                about = {"step": about["step"], "image": image}
            elif event in ENDS:
                about = {"job": shown(service, job)}
            yield ServerSentEvent(data=about, event=event)

    @routes.post("/models/load")
    async def load(model: Annotated[str, Body(embed=True)]) -> dict:
        """Have a model in memory before it is needed; it is the default then."""
        service.offers.models.path(model)
        made = service.wanted("", {}, model=model, seed=0)
        await asyncio.wrap_future(worker.call(lambda: service.painter.load(made) and None))
        service.chosen = replace(service.chosen, model=model)
        return {"model": model, "loaded": True}

    @routes.post("/models/unload")
    async def unload() -> dict:
        """Free the model's memory, after the running job."""
        await asyncio.wrap_future(worker.call(service.crew.free))
        return {"loaded": False}

    return routes


def shown(service: Service, job: Job) -> dict:
    """A job as JSON."""
    p = job.at_step() | {"phase": job.progress.phase, "batch": job.progress.batch, "batches": job.progress.batches}
    here = f"/api/v1/jobs/{job.id}"
    return {
        "id": job.id,
        "status": job.status,
        "queue_position": service.worker.position(job),
        "created": _time(job.created),
        "started": _time(job.started),
        "finished": _time(job.finished),
        "model": job.wanted.model,
        "seeds": list(job.wanted.seeds),
        "settings": job.settings,
        "progress": p,
        "images": [_image(here, index, drawn) for index, drawn in enumerate(job.images)],
        "stats": job.stats,
        "interrupted": job.interrupted,
        "ignored": list(job.wanted.ignored),
        "error": None if job.error is None else told(job.error)[1]["error"],
    }


def _image(here: str, index: int, drawn: Any) -> dict:
    about = {"index": index, "seed": drawn.seed, "url": f"{here}/images/{index}"}
    if drawn.uncached is not None:
        psnr = drawn.psnr if drawn.psnr != float("inf") else None
        about |= {"psnr": psnr, "uncached_url": f"{here}/images/{index}?uncached=true"}
    return about


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def caches() -> list[dict]:
    """Each caching method with its settings and their defaults."""
    return [
        {
            "name": name,
            "about": kind.about,
            "fields": [
                {"name": key, "type": item.type, "default": item.default}
                for key, item in zip(keys_of(name), fields(kind), strict=True)
            ],
        }
        for name, kind in NAMES.items()
    ]


def described(painter: Painter) -> list[dict]:
    """All offered models; of one that cannot be opened, why."""
    return [_described(painter, name) for name in painter.offers.models.names()]


def _described(painter: Painter, name: str) -> dict:
    from ...errors import Failure

    loaded = painter.loaded is not None and painter.loaded.model == name
    try:
        checkpoint = painter.checkpoint(name)
        return {
            "id": name,
            "kind": checkpoint.family.name,
            "native_size": list(checkpoint.native_size),
            "steps": checkpoint.steps,
            "guidance_scale": checkpoint.guidance_scale,
            "scheduler": checkpoint.schedule(None).name,
            "few_step": checkpoint.few_step is not None,
            "loaded": loaded,
        }
    except Failure as error:
        return {"id": name, "error": str(error), "loaded": False}
