"""The page on the server's app."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from ..server.service import Service
from .facts import facts_of

PREFIXES = ("/sdapi", "/controlnet", "/v1", "/api")  # below which the page is not


def mount(app: FastAPI, service: Service) -> FastAPI:
    """The app with the page on `/`, after all that it answers itself. Files of the page go with it."""
    folder = Path(tempfile.mkdtemp(prefix="mlx_deepcache-"))
    # Read as Gradio is imported, and as a page is made: it should ask nobody, and keep its files here
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
    import gradio as gr

    from .layout import HERE, Page, build
    from .theme import theme

    for prefix in PREFIXES:
        app.add_api_route(f"{prefix}/{{rest:path}}", _nothing, methods=["GET", "POST"], include_in_schema=False)
    facts = service.worker.call(lambda: facts_of(service, service.chosen.model)).result()
    page = Page(service, folder)
    before = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with before(app):
            yield
        shutil.rmtree(folder, ignore_errors=True)

    app.router.lifespan_context = lifespan
    return gr.mount_gradio_app(
        app,
        build(page, facts),
        path="/",
        show_error=True,
        max_file_size=service.limits.body,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css_paths=[HERE / "page.css"],
    )


async def _nothing(rest: str) -> None:
    raise HTTPException(404)
