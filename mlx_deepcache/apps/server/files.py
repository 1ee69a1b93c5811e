"""Pictures that an answer names instead of carrying them: in memory, for a while."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict

from .refused import Refused

MOST = 64
SECONDS = 3600


class Files:
    def __init__(self):
        self._files: OrderedDict[str, tuple[bytes, str, float]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, data: bytes, kind: str) -> str:
        """The name of a file with these bytes."""
        name = f"{secrets.token_urlsafe(16)}.{kind}"
        with self._lock:
            self._sweep()
            self._files[name] = data, kind, time.monotonic() + SECONDS
            while len(self._files) > MOST:
                self._files.popitem(last=False)
        return name

    def get(self, name: str) -> tuple[bytes, str]:
        """Its bytes and kind. Raises Refused if there is none."""
        with self._lock:
            self._sweep()
            if name not in self._files:
                raise Refused(404, "there is no such picture, or no more", "not_found")
            return self._files[name][:2]

    def _sweep(self) -> None:
        now = time.monotonic()
        for name in [name for name, (_, _, until) in self._files.items() if until < now]:
            del self._files[name]
