"""The page on the server's app."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from ..server.service import Service
from .facts import facts_of

PREFIXES = ("/sdapi", "/controlnet", "/v1", "/api")  # below which the page is not


def mount(app: FastAPI, service: Service) -> Callable[[], None]:
    """Put the page on `/`, after all that the app answers itself. Files of the page go with the app. Returns what is
    to be called once the server is told to end: browsers that are open keep a connection, for which it would wait."""
    folder = tempfile.TemporaryDirectory(prefix="mlx_deepcache-", ignore_cleanup_errors=True)
    # Read as Gradio is imported, and as a page is made: it should ask nobody, and keep its files here
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder.name}
    import gradio as gr

    from .theme import theme
    from .visitors import Page
    from .wiring import build

    for prefix in PREFIXES:
        app.add_api_route(f"{prefix}/{{rest:path}}", _nothing, methods=["GET", "POST"], include_in_schema=False)
    facts = service.worker.call(lambda: facts_of(service, service.chosen.model)).result()
    page = Page(service, Path(folder.name))
    before = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with before(app):
            yield
        folder.cleanup()

    app.router.lifespan_context = lifespan
    gr.mount_gradio_app(
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
        css_paths=[Path(__file__).with_name("page.css")],
    )
    return app.routes[-1].app.stop_event.set


async def _nothing(rest: str) -> None:
    raise HTTPException(404)
