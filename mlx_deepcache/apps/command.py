"""What all commands share: exit codes, and errors that take one line."""

from __future__ import annotations

import argparse
import io
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable

from .. import SLOW
from ..backend.host import follows, hold_standard_streams, told_rank
from ..errors import Failure, UsageError, gpu_failed, named_as, out_of_memory
from ..fields import shown
from ..generation.declared import options_of
from ..generation.options import ModelOptions, Options
from . import leave


def run(
    command: Callable[[argparse.Namespace], None],
    flags: Callable[[list[str]], argparse.Namespace],
    argv: list[str] | None,
    cancelled: str,
    memory: str,
) -> int:
    """A command's exit code: 0, 1 for a failure, 2 for a usage error, 130 for Ctrl-C, and 128 + N for another signal N
    that ends a program; errors take one line.

    cancelled: what to say when it is told to end; memory: what to do if that is not enough."""
    hold_standard_streams()
    sys.stdout, sys.stderr = (stream or io.StringIO() for stream in (sys.stdout, sys.stderr))
    if follows():  # the first process speaks for all
        sys.stdout = io.StringIO()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a file's name need not be text
    warnings.showwarning = lambda message, *rest, **kw: print(f"warning: {shown(message)}", file=sys.stderr)
    who = f"rank {told_rank()} ({socket.gethostname()}): " if follows() else ""
    if SLOW is not None and not follows():
        print(f"note: {SLOW}", file=sys.stderr)
    before = _clean_up_when_told_to_end()
    try:
        with named_as(
            {o.name: o.flag for kind in (ModelOptions, Options) for o in options_of(kind)}
            | {"controls": "--controlnet", "preview_vae": "--preview-vae", "compare": "--compare"}
        ):
            command(flags(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {who}{shown(error)}", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"error: {who}{shown(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\n{cancelled}", file=sys.stderr)
        return 128 + (stop.args[0] if isinstance(stop, _Ended) else signal.SIGINT)
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            told = f"there is not enough memory; {memory}"
        elif gpu_failed(error):
            told = f"the GPU failed ({shown(error, 200)}); try again, or {memory}"
        else:
            raise
        print(f"error: {who}{told}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # what no one expected, such as a full disk behind stdout
        print(f"error: {who}{shown(error)}", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


class _Ended(KeyboardInterrupt):
    """Another signal that ends a program, which should leave as little behind as after Ctrl-C."""


def _clean_up_when_told_to_end() -> dict:
    """Make `kill`, a system that shuts down and a closed terminal end a command as Ctrl-C does; returns what they did
    before."""

    def end(number, frame):
        raise _Ended(number)

    if threading.current_thread() is not threading.main_thread():  # where no signals come
        return {}
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    heard = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # not under nohup
    return {number: signal.signal(number, end) for number in heard}
