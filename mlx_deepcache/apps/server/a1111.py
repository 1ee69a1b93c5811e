"""`/sdapi/v1`: AUTOMATIC1111's API, for the clients that there are for it: what draws.

Source: AUTOMATIC1111/stable-diffusion-webui, modules/api/api.py.
"""

from __future__ import annotations

import json
from typing import Annotated

from fastapi import APIRouter, Body, Request
from fastapi.concurrency import run_in_threadpool

from ..._version import __version__
from ...generation.options import A1111_SAMPLERS
from ...generation.record import parameters_text
from . import a1111_extras, a1111_lists, a1111_state, pictures
from .a1111_fields import Common, ImageToImage, TextToImage
from .a1111_state import timestamp
from .a1111_wanted import task, wanted
from .jobs import Job
from .refused import Refused
from .service import Service
from .waiting import finished

TAG = "AUTOMATIC1111"


def told(refused: Refused) -> tuple[int, dict]:
    """An error as upstream's clients read it."""
    return refused.status, {"error": refused.code or "error", "detail": refused.message, "body": "", "errors": ""}


def router(service: Service) -> APIRouter:
    routes, sd = APIRouter(tags=[TAG]), APIRouter(prefix="/sdapi/v1")
    _add(sd, service)
    a1111_state.add(sd, service)
    a1111_lists.add(sd, service.offers)
    a1111_extras.add(sd, service)
    routes.include_router(sd)
    routes.include_router(a1111_lists.controlnet(service.offers.controlnets))
    return routes


def _add(routes: APIRouter, service: Service) -> None:
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
        "width": drawn[0].pixels.width,
        "height": drawn[0].pixels.height,
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
        "denoising_strength": said.get("strength") or said.get("hires_strength"),
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [parameters_text(image.settings) for image in drawn],
        "styles": [],
        "job_timestamp": timestamp(job),
        "clip_skip": (said.get("clip_skip") or 0) + 1,
        "is_using_inpainting_conditioning": False,
        "version": f"mlx_deepcache {__version__}",
        "ignored": list(job.wanted.ignored),
        "interrupted": job.interrupted,
        "deepcache": job.stats,
    }
