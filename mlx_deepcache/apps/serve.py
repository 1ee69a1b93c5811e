# PYTHON_ARGCOMPLETE_OK
"""`serve.py` answers other programs: AUTOMATIC1111's API, OpenAI's, and one of its own; and shows a page to people."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import webbrowser
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..backend.host import follows
from ..errors import Failure, UsageError, named_as
from ..fields import positive
from ..generation.declared import option_of, options_of
from ..generation.kinds import KINDS
from ..generation.options import CACHE, MACHINE, ModelOptions, Options
from .command import run
from .flags import Parser, add_option, add_split, complete, given, reader

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from .server.service import Service

KEY = "MLX_DEEPCACHE_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PAGE_NEEDS = "the page needs Python 3.11 or newer and the extra `ui`: pip install 'mlx_deepcache[ui]'"
NEEDS = "serving needs Python 3.11 or newer and the extra `server`: pip install 'mlx_deepcache[server]'"
LIMITS = {
    "images": ("--max-images", "pictures of a job (16)"),
    "pixels": ("--max-pixels", "pixels of a picture (4194304)"),
    "batch": ("--max-batch", "pictures that are drawn together (4); larger jobs are split"),
    "queue": ("--queue", "jobs that may wait (16)"),
    "body": ("--max-body", "bytes of a request (64 MiB)"),
}


def main_serve(argv: list[str] | None = None) -> int:
    """serve.py; returns its exit code."""
    return _run(_serve, _flags, argv)


def main_ui(argv: list[str] | None = None) -> int:
    """The same, with the page for certain, which a browser opens where there is a terminal; returns its exit code."""
    names = "python -m mlx_deepcache.apps.page", "mlx-deepcache-ui"
    return _run(partial(_serve, page=True), partial(_flags, names=names), argv)


def _run(command: Callable, flags: Callable, argv: list[str] | None) -> int:
    return run(command, flags, argv, "stopped", "try a smaller --max-batch, --low-memory or --quantize 8")


NAMES = "serve.py", "mlx-deepcache-serve"


def _parser(names: tuple[str, str] = NAMES) -> Parser:
    parser = Parser(
        *names,
        usage="%(prog)s [--model [ID=]M ...] [--host H] [--port P] [more, all optional]",
        description="Draw for other programs, which speak AUTOMATIC1111's API (/sdapi/v1), OpenAI's (/v1) or this "
        "server's own (/api/v1), which /docs describes; and for people, by a page on /.",
    )
    what = parser.add_argument_group("what is offered, by name: nothing else can be asked for")
    what.add_argument(
        "--model",
        action="append",
        metavar="[ID=]M",
        help="a model, as generate.py knows it; repeatable, the first is the default; default: the bundled one",
    )
    for kind in ("model", "lora", "embedding", "controlnet", "upscaler"):
        what.add_argument(
            f"--{kind}-dir", action="append", type=Path, default=[], metavar="DIR", help=f"a folder of {kind}s"
        )
    what.add_argument("--vae", metavar="[ID=]M", help="decode all models' latents with another VAE")
    what.add_argument("--refiner", metavar="[ID=]M", help="the model that draws the last steps, of all models")
    who = parser.add_argument_group("who may ask")
    who.add_argument("--host", default="127.0.0.1", help="what to listen on; default 127.0.0.1: this machine only")
    who.add_argument("--port", type=reader(positive), default=7860, help="default 7860, A1111's")
    who.add_argument(
        "--api-key", metavar="KEY", help=f"what requests must carry, Bearer or as Basic's password; or {KEY}"
    )
    who.add_argument("--no-key", action="store_true", help="serve other machines without a key, knowingly")
    who.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="a page's origin that may ask; repeatable"
    )
    who.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a further name of this server; repeatable"
    )
    caches = parser.add_argument_group("caches, where a request names none")
    for o in options_of(Options):
        if o.group == CACHE:
            add_option(caches, o)
    machine = parser.add_argument_group(MACHINE)
    for o in options_of(ModelOptions):
        if o.group == MACHINE:
            add_option(machine, o)
    add_split(machine)
    limits = parser.add_argument_group("limits")
    for name, (flag, about) in LIMITS.items():
        limits.add_argument(flag, dest=f"most_{name}", type=reader(positive), metavar="N", help=f"most {about}")
    seconds = KINDS["float"].read
    idle = "free the model after so many idle seconds (300); 0: never"
    limits.add_argument("--idle-unload", type=reader(seconds), default=300.0, metavar="S", help=idle)
    limits.add_argument(
        "--keep-jobs", type=reader(seconds), default=600.0, metavar="S", help="how long a job can be fetched (600)"
    )
    if names == NAMES:
        parser.add_argument("--api-only", action="store_true", help="no page for people on /")
    parser.add_argument("--outputs", type=Path, metavar="DIR", help="keep pictures there; without it none is written")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def _flags(argv: list[str], names: tuple[str, str] = NAMES) -> argparse.Namespace:
    parser = _parser(names)
    complete(parser)
    args = parser.parse_args(argv)
    args.api_key = args.api_key or os.environ.get(KEY)
    if args.host not in LOOPBACK and not args.api_key and not args.no_key:
        raise UsageError(
            f"--host {args.host} lets other machines ask: give --api-key KEY or {KEY}, or --no-key if anyone may"
        )
    if args.idle_unload < 0 or args.keep_jobs < 0:
        raise UsageError("--idle-unload and --keep-jobs are seconds, 0 or more")
    if args.outputs is not None and not args.outputs.is_dir():
        raise UsageError(f"--outputs should be a folder that is there, got {str(args.outputs)!r}")
    return args


def _serve(args: argparse.Namespace, page: bool = False) -> None:
    """page: whether there has to be one."""
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn

        from .server.http import Access, create_app
    except ImportError as error:
        raise Failure(f"{NEEDS} ({error})") from None

    say: Callable[[str], None] = (lambda text: None) if args.quiet else (lambda text: print(text, flush=True))
    access = Access(args.host, args.port, args.api_key, tuple(args.cors_origin), tuple(args.allow_host))
    # Programs know options by their keywords; another machine's server listens to rank 0 only
    with named_as({}), nullcontext() if follows() else _listen(args.host, args.port) as listening:
        service = service_of(args, say)
        try:
            service.worker.call(service.crew.fetch).result()
            if follows():
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for rank 0 too, which then ends all
                service.worker.call(service.crew.follow).result()
                return
            app = create_app(service, access)
            hang_up = _add_page(app, service, page, say) if page or not args.api_only else None
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10)
            address = _address(args.host, args.port)
            say(f"models: {', '.join(service.offers.models.names())}")
            say(f"the page: {address}" if hang_up is not None else "no page")
            say(f"the API: {address}docs; Ctrl-C ends all of it")
            if page and sys.stdout.isatty():
                webbrowser.open(address)
            _server(config, service, hang_up).run(sockets=[listening])
        finally:
            service.worker.close()
        if service.worker.lost is not None:
            raise service.worker.lost


def _add_page(app: FastAPI, service: Service, needed: bool, say: Callable[[str], None]) -> Callable[[], None] | None:
    """What ends the page's connections, or None if there is no page.

    Raises:
        Failure: it is needed and cannot be.
    """
    try:
        from .page.mount import mount

        return mount(app, service)
    except ImportError as error:
        if needed:
            raise Failure(f"{PAGE_NEEDS} ({error})") from None
        if find_spec("gradio") is not None:
            say(f"no page: {error}")
        return None


def _address(host: str, port: int) -> str:
    """What a browser on this machine goes to."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _listen(host: str, port: int) -> socket.socket:
    """Raises Failure: somebody else does already, or there is no such host."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # localhost is ::1 first on a Mac, where clients of 127.0.0.1 would find nobody; those of localhost try both
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        raise Failure(f"cannot listen on {host}, port {port}: {error.strerror}; --port names another") from None
    return listening


def service_of(args: argparse.Namespace, say: Callable[[str], None]) -> Service:
    """What the flags describe.

    Raises:
        UsageError: a folder, a name or a value that cannot be.
    """
    from .server.offers import Offers
    from .server.service import Limits, Service

    offers = Offers(
        args.model or (),
        args.model_dir,
        args.lora_dir,
        args.embedding_dir,
        args.controlnet_dir,
        args.upscaler_dir,
        args.vae,
        args.refiner,
    )
    said = {f.name: getattr(args, f"most_{f.name}") for f in fields(Limits)}
    common = {name: value for name, value in given(args, ModelOptions).items() if name not in _NAMED}
    return Service(
        offers,
        Limits(**{name: value for name, value in said.items() if value is not None}),
        common,
        {name: value for name, value in given(args, Options).items() if option_of(Options, name).group == CACHE},
        args.idle_unload,
        args.keep_jobs,
        say,
        args.outputs,
        args.split,
    )


_NAMED = ("model", "vae", "refiner", "lora_dir")  # which are offered


def _server(config: uvicorn.Config, service: Service, hang_up: Callable[[], None] | None) -> uvicorn.Server:
    """uvicorn's, which cancels what is drawn as soon as it is told to end, and hangs up."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame):
            service.worker.stop()
            if hang_up is not None:
                hang_up()
            super().handle_exit(sig, frame)

        def end(self):
            if hang_up is not None:
                hang_up()
            self.should_exit = True

    server = Server(config)
    service.worker.on_lost = server.end
    return server
