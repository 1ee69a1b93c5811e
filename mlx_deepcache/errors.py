"""The errors that a user can cause or mend; the command line prints each as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_flags: dict[str, str] = {}


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was short. MLX tells it by words only: of an allocation, or from Metal and CUDA, which find out
    while they compute."""
    said = str(error).lower()
    told = "alloc" in said or "insufficient memory" in said or "out of memory" in said
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and told)


def gpu_failed(error: BaseException) -> bool:
    """Whether Metal or CUDA gave up otherwise, such as on work that took too long while the screen waited for it."""
    return isinstance(error, RuntimeError) and str(error).lower().startswith(("[metal", "cuda"))


@contextmanager
def named_as(flags: dict[str, str]) -> Iterator[None]:
    """While a command runs, messages name options by these flags, and not as Python's keywords."""
    global _flags
    before, _flags = _flags, flags
    try:
        yield
    finally:
        _flags = before


def called(option: str, value: object = None) -> str:
    """What the one who reads a message calls an option, perhaps with a value: `seeds=3`, or `--seed 3`."""
    flag = _flags.get(option)
    if value is None:
        return flag or option
    return f"{option}={value!r}" if flag is None else f"{flag} {value}"


class UsageError(ValueError):
    """A setting that cannot work, whatever the files hold (exit code 2)."""


class UnknownOption(UsageError, TypeError):
    """A keyword that no option has."""


class Failure(RuntimeError):
    """Something that could not be done (exit code 1)."""


class CheckpointError(Failure):
    """A file or folder that is missing, damaged or not what it should be."""


class Unreachable(Failure):
    """Another machine that draws with this one cannot be reached, or no longer."""
