"""`/sdapi/v1`: AUTOMATIC1111's API, for the clients that there are for it.

Source: AUTOMATIC1111/stable-diffusion-webui, modules/api/api.py; Mikubill/sd-webui-controlnet, scripts/api.py.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from ..._version import __version__
from ...checkpoints.weights import read_header
from ...errors import Failure
from ...generation.options import A1111_RNGS, A1111_SAMPLERS
from ...generation.record import parameters_text
from . import a1111_extras, pictures
from .a1111_fields import ALIASES, SPACINGS, Common, ImageToImage, TextToImage, changed
from .a1111_start import MOST_UNITS
from .a1111_wanted import task, wanted
from .jobs import GENERATING, QUEUED, Job
from .refused import Refused
from .service import Service
from .waiting import finished

TAG = "AUTOMATIC1111"
EMPTY = ("latent-upscale-modes", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "extensions")


def told(refused: Refused) -> tuple[int, dict]:
    """An error as upstream's clients read it."""
    return refused.status, {"error": refused.code or "error", "detail": refused.message, "body": "", "errors": ""}


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=[TAG])
    sd = APIRouter(prefix="/sdapi/v1", tags=[TAG])
    _draws(sd, service)
    _state(sd, service)
    _lists(sd, service)
    _models(sd, service)
    a1111_extras.add(sd)
    routes.include_router(sd)
    routes.include_router(_controlnet(service))
    return routes


def _draws(routes: APIRouter, service: Service) -> None:
    async def draw(asked: Common, request: Request) -> dict:
        name = task(asked)
        job = service.submit(await run_in_threadpool(wanted, service, asked), name)
        try:
            await finished(service, job, request)
            return await run_in_threadpool(_answer, asked, job)
        finally:
            job.images.clear()  # which nobody asks for again

    @routes.post("/txt2img")
    async def txt2img(asked: Annotated[TextToImage, Body()], request: Request) -> dict:
        return await draw(asked, request)

    @routes.post("/img2img")
    async def img2img(asked: Annotated[ImageToImage, Body()], request: Request) -> dict:
        return await draw(asked, request)


def _answer(asked: Common, job: Job) -> dict:
    images = [pictures.text(pictures.png(drawn)) for drawn in job.images] if asked.send_images else []
    parameters = asked.model_dump(mode="json")
    if not getattr(asked, "include_init_images", True):
        parameters |= {"init_images": None, "mask": None}
    return {"images": images, "parameters": parameters, "info": json.dumps(_info(asked, job), ensure_ascii=False)}


def _info(asked: Common, job: Job) -> dict:
    drawn, n, said = job.images, len(job.images), job.settings
    prompts, seeds = [image.settings["prompt"] for image in drawn], [image.seed for image in drawn]
    negative = said.get("negative_prompt") or ""
    return {
        "prompt": prompts[0],
        "all_prompts": prompts,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * n,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * n,
        "subseed_strength": 0,
        "width": said["width"],
        "height": said["height"],
        "sampler_name": A1111_SAMPLERS.get(said["scheduler"], said["scheduler"]),
        "cfg_scale": said["guidance_scale"],
        "steps": said["steps"],
        "batch_size": asked.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": job.wanted.model,
        "sd_model_hash": None,
        "sd_vae_name": job.wanted.vae,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": said.get("strength"),
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [parameters_text(image.settings) for image in drawn],
        "styles": [],
        "job_timestamp": _timestamp(job),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"mlx_deepcache {__version__}",
        "ignored": list(job.wanted.ignored),
        "interrupted": job.interrupted,
        "deepcache": job.stats,
    }


def _timestamp(job: Job) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(job.created))


def _state(routes: APIRouter, service: Service) -> None:
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
        "state": _job_state(job.id, p.batches, _timestamp(job), p.batch, p.step, p.steps, job.stopped.is_set()),
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


def _lists(routes: APIRouter, service: Service) -> None:
    offers = service.offers

    @routes.get("/samplers")
    def samplers() -> list[dict]:
        return [{"name": name, "aliases": ALIASES.get(our, []), "options": {}} for our, name in A1111_SAMPLERS.items()]

    @routes.get("/schedulers")
    def schedulers() -> list[dict]:
        rho = {"karras": 7.0}
        return [
            {
                "name": name,
                "label": name.capitalize(),
                "aliases": None,
                "default_rho": rho.get(name, -1.0),
                "need_inner_model": False,
            }
            for name in SPACINGS
        ]

    @routes.get("/sd-models")
    def models() -> list[dict]:
        nothing = {"hash": None, "sha256": None, "config": None}
        return [{"title": name, "model_name": name, "filename": name} | nothing for name in offers.models.names()]

    @routes.get("/sd-vae")
    def vaes() -> list[dict]:
        return [{"model_name": name, "filename": name} for name in offers.vaes.names()]

    @routes.get("/loras")
    def loras() -> list[dict]:
        return [
            {"name": name, "alias": name, "path": name, "metadata": _metadata(path)}
            for name, path in offers.loras.found.items()
        ]

    @routes.get("/embeddings")
    def embeddings() -> dict:
        unknown = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name", "shape", "vectors"))
        return {"loaded": dict.fromkeys(offers.embeddings.names(), unknown), "skipped": {}}

    @routes.get("/scripts")
    def scripts() -> dict:
        return {"txt2img": ["controlnet"], "img2img": ["controlnet"]}

    @routes.get("/script-info")
    def script_info() -> list[dict]:
        return [{"name": "controlnet", "is_alwayson": True, "is_img2img": of, "args": []} for of in (False, True)]

    for name in EMPTY:
        routes.add_api_route(f"/{name}", lambda: [], methods=["GET"])


def _metadata(path: str) -> dict:
    """What a file says of itself."""
    try:
        return read_header(Path(path))[2]
    except Failure:
        return {}


def _models(routes: APIRouter, service: Service) -> None:
    worker, painter = service.worker, service.painter

    @routes.get("/options")
    def options() -> dict:
        chosen = service.chosen
        return {
            "sd_model_checkpoint": chosen.model,
            "sd_checkpoint_hash": None,
            "sd_vae": chosen.vae or "Automatic",
            "CLIP_stop_at_last_layers": 1,
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
        await asyncio.wrap_future(worker.call(painter.unload))
        return {}

    @routes.post("/reload-checkpoint")
    async def reload() -> dict:
        made = service.wanted("", {}, seed=0)
        await asyncio.wrap_future(worker.call(lambda: painter.load(made) and None))
        return {}

    @routes.post("/interrogate")
    def interrogate() -> JSONResponse:
        raise Refused(404, "Model not found", "not_found", "model")


def _controlnet(service: Service) -> APIRouter:
    routes, nets = APIRouter(prefix="/controlnet", tags=[TAG]), service.offers.controlnets

    @routes.get("/version")
    def version() -> dict:
        return {"version": 3}

    @routes.get("/model_list")
    def models() -> dict:
        return {"model_list": nets.names()}

    @routes.get("/module_list")
    def modules() -> dict:
        return {"module_list": ["none"], "module_detail": {}}

    @routes.get("/control_types")
    def types() -> dict:
        names = nets.names()
        every = {
            "module_list": ["none"],
            "model_list": ["None", *names],
            "default_option": "none",
            "default_model": names[0] if names else "None",
        }
        return {"control_types": {"All": every}}

    @routes.get("/settings")
    def settings() -> dict:
        return {"control_net_unit_count": MOST_UNITS}

    @routes.post("/detect")
    def detect(asked: Annotated[dict[str, Any], Body()]) -> dict:
        module = str(asked.get("controlnet_module") or "none")
        if module.lower() != "none":
            raise Refused(422, f"the preprocessor {module[:60]!r} is not supported here", "unsupported", "module")
        return {"images": asked.get("controlnet_input_images") or [], "info": "Success"}

    return routes
