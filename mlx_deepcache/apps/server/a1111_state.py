"""A1111's state: progress, what stops it, settings, and which model is in memory.

Source: AUTOMATIC1111/stable-diffusion-webui, modules/api/api.py and modules/shared_state.py.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse

from ...generation.options import A1111_RNGS
from . import pictures
from .a1111_fields import changed
from .jobs import GENERATING, QUEUED, Job
from .refused import Refused
from .service import Service


def add(routes: APIRouter, service: Service) -> None:
    _add_progress(routes, service)
    _add_settings(routes, service)


def _add_progress(routes: APIRouter, service: Service) -> None:
    worker = service.worker

    @routes.get("/progress")
    def progress(skip_current_image: bool = False, task_id: str | None = None) -> dict:
        """How far the running job is, or the one of this name."""
        job = worker.running if task_id is None else service.jobs.get(task_id)
        told = _progress(job if job is not None and job.status == GENERATING else None, not skip_current_image)
        told["queue_size"] = worker.length
        if task_id is not None:
            told |= {"queued": job.status == QUEUED, "active": job.status == GENERATING, "completed": job.ended}
        return told

    @routes.post("/interrupt")
    def interrupt() -> dict:
        """End the running job with what there is of it."""
        if (job := worker.running) is not None:
            job.stopped.set()
        return {}

    @routes.post("/skip")
    def skip() -> None:
        """End the batch under way with what there is of it, and go on with the next."""
        if (job := worker.running) is not None:
            job.skipped.set()

    @routes.get("/memory")
    async def memory() -> dict:
        mlx = await asyncio.wrap_future(worker.call(service.painter.memory, urgent=True))
        total, used = mlx.pop("machine"), mlx.pop("process")
        ram = {"free": max(total - used, 0), "used": used, "total": total}
        return {"ram": ram, "cuda": {"error": "unavailable"}, "mlx": mlx}


def _progress(job: Job | None, with_image: bool) -> dict:
    if job is None:
        state = _job_state("", 0, "0", 0, 0, 0, False)
        return {
            "progress": 0.0,
            "eta_relative": 0.0,
            "state": state,
            "current_image": None,
            "textinfo": None,
            "current_task": None,
        }
    job.watched = time.time()
    p, shown = job.progress, job.preview
    share = p.batch / p.batches + p.step / max(p.steps, 1) / p.batches
    kind = "full" if p.full else "cached"
    phase = f"step {p.step} of {p.steps} ({kind})" if p.phase == "denoise" else f"{p.phase} {job.wanted.model}"
    return {
        "progress": min(0.01 + share, 0.99),
        "eta_relative": p.eta,
        "state": _job_state(job.id, p.batches, timestamp(job), p.batch, p.step, p.steps, job.stopped.is_set()),
        "current_image": pictures.preview(shown, "png") if with_image and shown is not None else None,
        "textinfo": phase,
        "current_task": job.id,
    }


def _job_state(job: str, count: int, when: str, number: int, step: int, steps: int, stopped: bool) -> dict:
    return {
        "skipped": False,
        "interrupted": stopped,
        "stopping_generation": stopped,
        "job": job,
        "job_count": count,
        "job_timestamp": when,
        "job_no": number,
        "sampling_step": step,
        "sampling_steps": steps,
    }


def timestamp(job: Job) -> str:
    """When it was asked for, as upstream writes it."""
    return time.strftime("%Y%m%d%H%M%S", time.localtime(job.created))


def _add_settings(routes: APIRouter, service: Service) -> None:
    worker, painter = service.worker, service.painter

    @routes.get("/options")
    def options() -> dict:
        chosen = service.chosen
        return {
            "sd_model_checkpoint": chosen.model,
            "sd_checkpoint_hash": None,
            "sd_vae": chosen.vae or "Automatic",
            "CLIP_stop_at_last_layers": (chosen.clip_skip or 0) + 1,
            "samples_format": "png",
            "samples_save": service.outputs is not None,
            "randn_source": A1111_RNGS.get(chosen.rng or "torch"),
            "eta_noise_seed_delta": 0,
            "live_previews_enable": True,
            "show_progress_every_n_steps": 1,
            "deep_cache_interval": chosen.cache.get("cache_interval"),
            "deep_cache_branch": chosen.cache.get("cache_branch"),
            "deep_cache_policy": list(chosen.cache["cache"]) if chosen.cache.get("cache") else None,
        }

    @routes.post("/options")
    def set_options(settings: Annotated[dict[str, Any], Body()]) -> None:
        """Take effect with the next job, until the server ends."""
        service.chosen, _ = changed(service, service.chosen, settings)

    @routes.get("/cmd-flags")
    def flags(request: Request) -> dict:
        access = request.app.state.access
        low = bool(painter.common.get("low_memory"))
        told = {"api": True, "listen": access.host not in ("127.0.0.1", "localhost", "::1"), "port": access.port}
        return told | {"api_auth": None, "ckpt": None, "medvram": False, "lowvram": low}

    for name in ("checkpoints", "vae", "loras", "embeddings"):
        routes.add_api_route(f"/refresh-{name}", service.offers.look, methods=["POST"])

    @routes.post("/unload-checkpoint")
    async def unload() -> dict:
        await asyncio.wrap_future(worker.call(service.crew.free))
        return {}

    @routes.post("/reload-checkpoint")
    async def reload() -> dict:
        made = service.wanted("", {}, seed=0)
        await asyncio.wrap_future(worker.call(lambda: painter.load(made) and None))
        return {}

    @routes.post("/interrogate")
    def interrogate() -> JSONResponse:
        raise Refused(404, "Model not found", "not_found", "model")
