"""`/v1`: OpenAI's images, with what can be said beyond them as further keys.

Source: openai/openai-python, src/openai/types/image_generate_params.py, image_edit_params.py, images_response.py,
image_gen_partial_image_event.py, image_gen_completed_event.py.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from . import pictures
from .a1111_fields import samplers
from .files import Files
from .jobs import COMPLETED, ENDS, Drawn, Job, Wanted
from .refused import Refused, mends
from .schema import CACHING, NamedLora, body, options_from
from .service import Service
from .waiting import events, finished, of_ended

TAG = "OpenAI"
THEIR_MODELS = re.compile(r"(dall-e|gpt-image)-.*")  # the current one is drawn with
MOST = 10
LOW_INTERVAL = 5
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_GENERATION, _EDIT = "image_generation", "image_edit"


class _Generation(BaseModel):
    """What OpenAI's clients say; further keys are not looked at, but for the options of this package."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), allow_inf_nan=False)
    prompt: str = Field(max_length=32_000)
    model: str | None = None
    n: int | None = Field(1, ge=1, le=MOST)
    size: str | None = None
    quality: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    background: str | None = None
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=3)
    seed: int | None = None
    vae: str | None = None
    refiner: str | None = None
    loras: list[NamedLora] | None = []


Generation = body("Generation", _Generation)


def told(refused: Refused) -> tuple[int, dict]:
    """An error as OpenAI's clients read it."""
    status = mends(refused, 400)
    status = 400 if status == 422 else status
    kinds = {401: "invalid_request_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}
    return status, {"error": error}


def router(service: Service) -> APIRouter:
    routes, files = APIRouter(prefix="/v1", tags=[TAG]), Files()
    made = int(time.time())

    def model(name: str) -> dict:
        return {"id": name, "object": "model", "created": made, "owned_by": "mlx_deepcache"}

    @routes.get("/models")
    def models() -> dict:
        return {"object": "list", "data": [model(name) for name in service.offers.models.names()]}

    @routes.get("/models/{name:path}")
    def one(name: str) -> dict:
        service.offers.models.path(name)
        return model(name)

    async def draw(asked: _Generation, start: dict, request: Request, kind: str) -> Any:
        job = service.submit(await run_in_threadpool(_wanted, service, asked, start))
        if asked.stream:
            return StreamingResponse(_stream(service, job, asked, kind), media_type="text/event-stream")
        try:
            await finished(service, job, request)
            return await run_in_threadpool(_answer, job, asked, files, str(request.base_url))
        finally:
            job.images.clear()  # which nobody asks for again

    @routes.post("/images/generations")
    async def generate(asked: Annotated[Generation, Body()], request: Request) -> Any:
        """Draw from text."""
        return await draw(asked, {}, request, _GENERATION)

    @routes.post("/images/edits")
    async def edit(request: Request) -> Any:
        """Draw from a picture: a form with `image`, perhaps `mask`, and the keys of a generation as text."""
        asked, image, mask = await _form(request)
        return await draw(asked, await run_in_threadpool(_start, asked, image, mask), request, _EDIT)

    @routes.get("/images/files/{name}", response_class=Response)
    def file(name: str) -> Response:
        """A picture that an answer named, for an hour."""
        data, kind = files.get(name)
        return Response(data, media_type=pictures.FORMATS[kind])

    return routes


def _wanted(service: Service, asked: _Generation, start: dict[str, Any]) -> Wanted:
    if asked.background == "transparent":
        raise Refused(400, "pictures have no transparent background here", "unsupported", "background")
    if asked.stream and (asked.n or 1) != 1:
        raise Refused(400, "streaming is for one picture: n should be 1", "invalid_value", "n")
    said = asked.model_dump(exclude_unset=True)
    if isinstance(name := said.get("scheduler"), str):
        said["scheduler"] = samplers().get(name.strip().lower(), name)
    options = start | options_from(_size(asked.size) | said)
    if not any(name in options for name in CACHING):
        options |= {"low": {"cache_interval": LOW_INTERVAL}}.get(asked.quality) or {}
        options |= {"cache_interval": 1} if asked.quality in ("high", "hd") else {}
    return service.wanted(
        asked.prompt,
        options,
        model=None if asked.model is None or THEIR_MODELS.fullmatch(asked.model) else asked.model,
        vae=asked.vae,
        refiner=asked.refiner,
        seed=asked.seed,
        n=asked.n or 1,
        loras=[(lora.name, lora.scale) for lora in asked.loras or ()],
        format=asked.output_format or "png",
        partials=asked.partial_images or 0 if asked.stream else 0,
    )


def _size(text: str | None) -> dict[str, int]:
    if text in (None, "", "auto"):
        return {}
    if (found := _SIZE.fullmatch(text)) is None:
        raise Refused(400, f"size should be WIDTHxHEIGHT or auto, got {text[:40]!r}", "invalid_value", "size")
    return {"width": int(found[1]), "height": int(found[2])}


# Edits


async def _form(request: Request) -> tuple[_Generation, bytes, bytes | None]:
    """A form's fields, all of which are text, its picture and its mask."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(400, "expected a form, multipart/form-data, with an image", "invalid_value", "image")
    async with request.form() as form:
        given = [*form.getlist("image"), *form.getlist("image[]")]
        if len(given) != 1 or not isinstance(given[0], UploadFile):
            raise Refused(400, f"expected one picture as image, got {len(given)}", "invalid_value", "image")
        image, mask = await given[0].read(), form.get("mask")
        mask = await mask.read() if isinstance(mask, UploadFile) else None
        values = {name: _value(value) for name, value in form.items() if isinstance(value, str)}
    for name in ("image", "image[]", "mask"):
        values.pop(name, None)
    try:
        return Generation(**values), image, mask
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _value(text: str) -> Any:
    """A list or an object that was written as JSON, or text as it is."""
    try:
        return json.loads(text) if text.lstrip()[:1] in ("[", "{") else text
    except (ValueError, RecursionError):
        return text


def _start(asked: _Generation, data: bytes, mask: bytes | None) -> dict[str, Any]:
    """What an edit starts from: transparent is what is drawn anew."""
    picture = pictures.read(data)
    start: dict[str, Any] = {"image": picture}
    if asked.size in (None, "", "auto"):
        start |= {"width": picture.width // 8 * 8, "height": picture.height // 8 * 8}
    if mask is not None:
        pictures.read(mask, "mask")
        alpha = _alpha(mask)
        if alpha is None:
            raise Refused(400, "the mask has no transparency, which says where to draw", "invalid_mask", "mask")
        if alpha.size != picture.size:
            sizes = f"{alpha.width} x {alpha.height} and {picture.width} x {picture.height}"
            raise Refused(400, f"the mask should have the image's size, got {sizes}", "invalid_mask", "mask")
    else:
        alpha = _alpha(data)
    return start if alpha is None else start | {"mask": ImageOps.invert(alpha)}


def _alpha(data: bytes) -> Image.Image | None:
    """How opaque a picture is, or None if it has no transparency."""
    with Image.open(BytesIO(data)) as image:
        if not image.has_transparency_data:
            return None
        return ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")


# Answers


def _about(asked: _Generation, drawn: Drawn, kind: str) -> dict:
    return {
        "background": "opaque",
        "output_format": kind,
        "quality": asked.quality or "auto",
        "size": f"{drawn.pixels.width}x{drawn.pixels.height}",
    }


def _usage() -> dict:
    nothing = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": nothing}


def _packed(asked: _Generation, drawn: Drawn, kind: str) -> bytes:
    quality = 100 if asked.output_compression is None else asked.output_compression
    return pictures.packed(drawn.pixels, kind, quality, drawn.settings)


def _answer(job: Job, asked: _Generation, files: Files, here: str) -> dict:
    kind, data = job.wanted.format, []
    for drawn in job.images:
        packed = _packed(asked, drawn, kind)
        named = asked.response_format == "url"
        where = {"url": f"{here}v1/images/files/{files.put(packed, kind)}"} if named else {}
        data.append({"b64_json": None if named else pictures.text(packed), "revised_prompt": None} | where)
    ours = {name: job.stats.get(name) for name in ("steps", "full_steps", "seconds", "caches")}
    return {
        "created": int(job.created),
        "data": data,
        **_about(asked, job.images[0], kind),
        "usage": _usage(),
        "mlx_deepcache": {"seeds": [drawn.seed for drawn in job.images], **ours, "ignored": list(job.wanted.ignored)},
    }


async def _stream(service: Service, job: Job, asked: _Generation, kind: str) -> AsyncIterator[bytes]:
    """Partial pictures, and the complete one; ends the job if the client leaves."""
    try:
        async for event, about in events(job):
            if event == "preview" and about["partial"] is not None:
                image, name = about["image"], job.wanted.format
                data = await run_in_threadpool(pictures.preview, image, name)
                yield _event(f"{kind}.partial_image", job, asked, Drawn(0, image, {}), data, about["partial"])
            elif event == COMPLETED:
                drawn = job.images[0]
                data = pictures.text(await run_in_threadpool(_packed, asked, drawn, job.wanted.format))
                yield _event(f"{kind}.completed", job, asked, drawn, data)
            elif event in ENDS:
                try:
                    of_ended(job)
                except Refused as refused:
                    _, error = told(refused)
                    yield format_sse_event(data_str=json.dumps({"type": "error"} | error), event="error")
    finally:
        if not job.ended:
            service.worker.cancel(job)
        job.images.clear()


def _event(name: str, job: Job, asked: _Generation, drawn: Drawn, data: str, partial: int | None = None) -> bytes:
    about = {"type": name, "b64_json": data, "created_at": int(job.created)} | _about(asked, drawn, job.wanted.format)
    about |= {"usage": _usage()} if partial is None else {"partial_image_index": partial}
    return format_sse_event(data_str=json.dumps(about), event=name)
