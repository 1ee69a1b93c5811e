"""Who looks at the page, and what it does for them: every handler's errors are one line there."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, get_type_hints

import gradio as gr

from ...errors import UsageError
from ..server.refused import of_error
from ..server.service import Service
from . import drawing, form
from .facts import Facts, facts_of
from .session import Session, Shot


class Page:
    """All visitors of a service. folder: in which their files lie."""

    def __init__(self, service: Service, folder: Path):
        self.service, self.folder = service, folder
        self.sessions: dict[str, Session] = {}
        self.speeds = drawing.Speeds()
        self._facts: dict[str, Facts] = {}

    def session(self, request: gr.Request) -> Session:
        name = request.session_hash or ""
        if name not in self.sessions:
            self.sessions[name] = Session(self.folder)
        return self.sessions[name]

    def leave(self, request: gr.Request) -> None:
        session = self.sessions.pop(request.session_hash or "", None)
        if session is not None:
            for job in list(session.jobs):
                self.service.worker.cancel(job)
            session.close()

    async def ask(self, question: Callable[[], Any]) -> Any:
        """Of the worker, after the step under way."""
        return await asyncio.wrap_future(self.service.worker.call(question, urgent=True))

    async def facts(self, model: str | None) -> Facts:
        model = model or self.service.chosen.model
        self.service.offers.models.path(model)
        if model not in self._facts:
            self._facts[model] = await self.ask(lambda: facts_of(self.service, model))
        return self._facts[model]

    async def wanted(self, given: Mapping[str, Any], **instead: Any) -> Any:
        facts = await self.facts(given.get("model"))
        return await asyncio.to_thread(form.wanted, self.service, facts, given, **instead)

    def shown(self, request: gr.Request) -> Shot:
        """The picture that a visitor sees. Raises UsageError if there is none."""
        shot = self.session(request).shown
        if shot is None:
            raise UsageError("there is no picture yet: draw one")
        return shot


def told(handler: Callable) -> Callable:
    """A handler of which every error is one line on the page."""
    if inspect.isasyncgenfunction(handler):

        async def steps(*values):
            try:
                async with aclosing(handler(*values)) as updates:
                    async for update in updates:
                        yield update
            except Exception as error:
                raise _line(error) from None

        return _like(handler, steps)

    async def once(*values):
        try:
            return await handler(*values)
        except Exception as error:
            raise _line(error) from None

    return _like(handler, once)


def _line(error: Exception) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    return gr.Error(of_error(error).message, duration=12, print_exception=False)


def _like(handler: Callable, made: Callable) -> Callable:
    made.__annotations__ = get_type_hints(handler)  # by which Gradio tells a request from a value
    made.__signature__ = inspect.signature(handler)
    made.__name__, made.__doc__ = handler.__name__, handler.__doc__
    return made


def taking(handler: Callable, names: list[str], first: int = 1) -> Callable:
    """A handler of which the parameters after the first ones are called by these names, as clients of the API see them;
    each may be left out."""
    given = list(inspect.signature(handler).parameters.values())[:first]
    more = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names]
    handler.__signature__ = inspect.Signature([*given, *more])
    return handler
