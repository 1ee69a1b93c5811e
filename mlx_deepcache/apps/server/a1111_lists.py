"""A1111's lists: what there is to choose from, for ControlNets too.

Sources: AUTOMATIC1111/stable-diffusion-webui, modules/api/api.py; Mikubill/sd-webui-controlnet, scripts/api.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body

from ...checkpoints.weights import read_header
from ...errors import Failure
from ...generation.options import A1111_SAMPLERS, A1111_UPSCALERS
from .a1111_fields import ALIASES, SPACINGS
from .a1111_start import MOST_UNITS
from .offers import Offers, Shelf
from .refused import Refused

EMPTY = ("hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "extensions")


def add(routes: APIRouter, offers: Offers) -> None:
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

    @routes.get("/latent-upscale-modes")
    def modes() -> list[dict]:
        return [{"name": name} for our, name in A1111_UPSCALERS.items() if our.startswith("latent")]

    for name in EMPTY:
        routes.add_api_route(f"/{name}", lambda: [], methods=["GET"])


def _metadata(path: str) -> dict:
    """What a file says of itself."""
    try:
        return read_header(Path(path))[2]
    except Failure:
        return {}


def controlnet(nets: Shelf) -> APIRouter:
    routes = APIRouter(prefix="/controlnet")

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
