"""What all commands share: exit codes, and errors that take one line."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable

from .. import SLOW
from ..backend.host import hold_standard_streams
from ..errors import Failure, UsageError, named_as
from ..generation.options import ModelOptions, Options, options_of


def run(
    command: Callable[[argparse.Namespace], None],
    flags: Callable[[list[str]], argparse.Namespace],
    argv: list[str] | None,
    cancelled: str,
) -> int:
    """A command's exit code: 0, 1 for a failure, 2 for a usage error, 130 for Ctrl-C; errors take one line.

    cancelled: what to say after Ctrl-C."""
    hold_standard_streams()
    sys.stdout, sys.stderr = (stream or io.StringIO() for stream in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a file's name need not be text
    warnings.showwarning = lambda message, *rest, **kw: print(f"warning: {message}", file=sys.stderr)
    if SLOW is not None:
        print(f"note: {SLOW}", file=sys.stderr)
    try:
        with named_as(
            {o.name: o.flag for kind in (ModelOptions, Options) for o in options_of(kind)}
            | {"controls": "--controlnet", "preview_vae": "--preview-vae"}
        ):
            command(flags(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{cancelled}", file=sys.stderr)
        return 130
    except MemoryError:
        print("error: there is not enough memory; try a smaller --height and --width or fewer images", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # what no one expected, such as a full disk behind stdout
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
