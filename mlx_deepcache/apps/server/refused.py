"""What a request is answered with if it is not done."""

from __future__ import annotations

import traceback
from collections.abc import Iterable

from ...errors import Failure, Unreachable, UsageError, gpu_failed, out_of_memory
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


def of_error(error: BaseException) -> Refused:
    """How a request is answered that ended in this error; one that nobody expected goes to standard error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UsageError):
        return Refused(422, str(error), "invalid_value")
    if isinstance(error, Unreachable):  # after which the server ends
        return Refused(503, str(error), "shutting_down")
    if isinstance(error, Failure):
        return Refused(500, str(error), "failed")
    if out_of_memory(error):
        told = "there is not enough memory for this; ask for a smaller or for fewer pictures"
        return Refused(500, told, "insufficient_memory")
    if gpu_failed(error):
        return Refused(500, f"the GPU failed: {error}", "failed")
    traceback.print_exception(error)
    return Refused(500, "an error that nobody expected; the server's log has it", "internal_error")


def mends(refused: Refused, status: int) -> int:
    """The status of an error; of a bad picture, for which upstream's is 500, this one."""
    return status if refused.code in (BAD_PICTURE, ADDRESS) else refused.status


BAD_PICTURE, ADDRESS = "invalid_image", "address_not_allowed"
