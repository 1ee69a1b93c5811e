"""The app: who may speak to it, how errors are told, and waiting for a job as long as the client does."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..._version import __version__
from ...errors import Failure, UsageError
from ...fields import shown
from . import a1111, api, openai
from .refused import Refused, of_error
from .service import Service

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Access:
    """host, port: that it listens on; key: what requests must carry, or None; origins: pages of other hosts that may
    ask; hosts: further names that it goes by."""

    host: str = "127.0.0.1"
    port: int = 7860
    key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


def create_app(service: Service, access: Access = Access()) -> FastAPI:  # noqa: B008 (it is frozen)
    """The server over this service, which it closes at its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.close)

    app = FastAPI(
        title="mlx_deepcache",
        version=__version__,
        summary="Stable Diffusion in MLX, with DeepCache in the sampler",
        lifespan=lifespan,
        max_body_size=service.limits.body,
    )
    app.state.service, app.state.access = service, access

    @app.get("/health", tags=["server"])
    def health() -> dict:
        """Whether it is there; needs no key."""
        worker = service.worker
        return {"status": "ok", "model": service.chosen.model, "queue": worker.length, "busy": worker.busy}

    for family in (a1111, openai, api):
        app.include_router(family.router(service))
    for kind in (Refused, UsageError, Failure, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
    app.add_middleware(Guard, access=access)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "location"],
        )
    return app


async def _answer(request: Request, error: Exception) -> JSONResponse:
    """An error in the shape that the clients of this route read."""
    path = request.scope["path"]  # its address may have a host that cannot be
    if isinstance(error, HTTPException):
        refused = Refused(error.status_code, str(error.detail), "not_found" if error.status_code == 404 else "http")
    elif isinstance(error, RequestValidationError):
        if path.startswith("/sdapi"):
            return JSONResponse({"detail": _plain(error.errors())}, 422)
        refused = _of_validation(error)
    else:
        refused = of_error(error)
    refused.message = shown(refused.message)
    family = a1111 if path.startswith(("/sdapi", "/controlnet")) else openai if path.startswith("/v1") else api
    status, body = family.told(refused)
    headers = {"retry-after": str(refused.retry)} if refused.retry is not None else {}
    if status >= 500:
        headers["x-should-retry"] = "false"
    return JSONResponse(body, status, headers)


def _plain(errors: Sequence[dict]) -> list[dict]:
    """Without what JSON may not hold, and without values, which may be long."""
    return [{key: error[key] for key in ("type", "loc", "msg")} for error in errors]


def _of_validation(error: RequestValidationError) -> Refused:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return Refused(422, f"{where}: {first['msg']}" if where else first["msg"], "invalid_value", where or None)


class Guard:
    """Host, Origin and key, before anything else is looked at; and a number for each request."""

    def __init__(self, app: Callable, access: Access):
        self.app, self.access = app, access
        self.names = {*LOOPBACK, *access.hosts, *([access.host] if access.host not in ("0.0.0.0", "::") else [])}

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":  # there is nothing for websockets
                await self.app(scope, receive, send)
            return
        number, started = secrets.token_hex(8), False

        async def numbered(message: dict) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope["path"], headers)
        error: Exception | None = refused
        if refused is None:
            try:
                await self.app(scope, receive, numbered)
                return
            except Exception as raised:
                if started:
                    raise
                error = raised
        response = await _answer(Request(scope), error)
        if response.status_code == 401:
            response.headers["www-authenticate"] = 'Basic realm="mlx_deepcache"'
        await response(scope, receive, numbered)

    def _refused(self, path: str, headers: dict[str, str]) -> Refused | None:
        host = headers.get("host", "")
        name = _hostname(f"//{host}")
        if name is None or name not in self.names:
            return Refused(403, f"this server is not called {name!r}; --allow-host names it", "host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and origin not in self.access.origins and origin.partition("://")[2] != host:
            return Refused(403, f"pages of {origin} may not ask; --cors-origin lets them", "origin_not_allowed")
        if self.access.key is None or path == "/health" or _carries(headers.get("authorization", ""), self.access.key):
            return None
        return Refused(401, "Incorrect username or password", "invalid_api_key")


def _hostname(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:  # a bracket that is not closed
        return None


def _carries(header: str, key: str) -> bool:
    """Whether it is `Bearer KEY`, or Basic with KEY as the password."""
    kind, _, given = header.partition(" ")
    if kind.lower() == "basic":
        try:
            _, _, given = base64.b64decode(given, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(given.encode(), key.encode())
