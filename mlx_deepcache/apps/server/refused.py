"""What a request is answered with if it is not done."""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import UsageError
from ...fields import suggest


class Refused(Exception):
    """status: HTTP's; code: a word that programs tell it by; param: the field that it is about; retry: seconds after
    which it may be asked again."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry: int | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry


def unknown(what: str, name: object, known: Iterable[str], code: str | None = None) -> Refused:
    """A name that is on no list."""
    return Refused(404, f"there is no {what} {str(name)[:200]!r} here{suggest(name, known)}", code or "not_found", what)


def of_error(error: BaseException) -> Refused | None:
    """How a request is answered that ended in this error; None for one that nobody expected."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UsageError):
        return Refused(422, str(error), "invalid_value")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "alloc" in str(error).lower()):
        return Refused(500, "there is not enough memory for this; ask for a smaller or for fewer pictures", MEMORY)
    return None


MEMORY = "insufficient_memory"
FAILED = "failed"
INTERNAL = "internal_error"
