"""Several machines, as `mlx.launch` or MPI starts them, over MLX's own connections between them (mx.distributed)."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes.util import find_library
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import Unreachable, UsageError
from .host import told_rank, told_size


class Machines:
    """The processes that draw together, one a machine as a rule: `rank` is this one's number of `size`. All of them
    call `gather` in the same order, and two that are peers what these exchange.

    Raises:
        UsageError: what tells where they are cannot be read.
        Unreachable: see there.
    """

    def __init__(self):
        self.group, self._seal = None, _Seal()
        self.rank, self.size, self.names = 0, 1, [socket.gethostname()]
        if (told := told_rank()) is None:
            return
        _check_hosts(told)
        if (size := told_size()) is not None and (library := find_library("mpi")) is not None:
            os.environ.setdefault("MLX_MPI_LIBNAME", library)  # which has a number in its name on some systems
        with self.connected():
            self.group = mx.distributed.init()
        self.rank, self.size = self.group.rank(), self.group.size()
        if max(told + 1, size or 1) > self.size:
            raise Unreachable(
                f"this is process {told} of several that were started together, but MLX found no way to the others; "
                "start them by mlx.launch; where MPI did, let MLX_MPI_LIBNAME name its library, such as libmpi.so.40"
            )
        self.names = [name.decode() for name in self.gather(self.names[0].encode())]

    @property
    def name(self) -> str:
        """What to call this one: its number and its host's name."""
        return self.called(self.rank)

    def called(self, rank: int) -> str:
        return f"rank {rank} ({self.names[rank]})"

    def gather(self, message: bytes) -> list[bytes]:
        """Every rank's message, at every rank."""
        if self.size == 1:
            return [message]
        sizes = [int.from_bytes(told, "big") for told in self._all(len(message).to_bytes(8, "big"))]
        rows = self._all(message.ljust(max(sizes), b"\0"))
        return [row[:size] for row, size in zip(rows, sizes, strict=True)]

    def _all(self, message: bytes) -> list[bytes]:
        """The same of messages that are all as long."""
        with self.connected():
            sealed = mx.array(self._seal.close(message))[None]
            rows = np.array(mx.distributed.all_gather(sealed, group=self.group))
            return self._seal.open(rows)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Where one machine waits for others: a signal that ends it does so at once, as MLX lets no handler run."""
        main = threading.current_thread() is threading.main_thread()
        heard = [number for number in _SIGNALS if main and callable(signal.getsignal(number))]
        before = {number: signal.signal(number, signal.SIG_DFL) for number in heard}
        try:
            yield
        except RuntimeError as error:
            others = ", ".join(self.called(rank) for rank in range(len(self.names)) if rank != self.rank)
            named = f" ({others})" if others else ""
            raise Unreachable(f"no connection to the other machines{named}: {error}") from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _check_hosts(rank: int) -> None:
    """The ring's file of machines, which mlx.launch writes: some that it would not write end MLX without a word."""
    if (file := os.environ.get("MLX_HOSTFILE")) is None:
        return
    try:
        hosts = json.loads(Path(file).read_text())
    except (OSError, ValueError):
        hosts = None
    if not (isinstance(hosts, list) and hosts and all(isinstance(host, list) and host for host in hosts)):
        such = '[["10.0.0.1:5000"], ["10.0.0.2:5000"]]'
        raise UsageError(f"MLX_HOSTFILE should be a file such as {such}, addresses a machine; got {file!r}")
    if rank >= len(hosts):
        raise UsageError(f"MLX_RANK is {rank}, and {file} has {len(hosts)} machines, from 0")


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Seal:
    """Checks what arrives: when a peer goes, MLX may take what was in the memory before for its message, and tells only
    the next time. Messages are counted, so that an earlier one is not taken for the next."""

    SIZE = 4  # bytes

    def __init__(self):
        self.count = 0

    def close(self, message: bytes) -> np.ndarray:
        """The next message with its seal, bytes."""
        self.count += 1
        return np.frombuffer(message + self._of(message), dtype=np.uint8)

    def open(self, rows: np.ndarray) -> list[bytes]:
        """The messages of that number; rows: (N, bytes). Raises RuntimeError, as MLX does."""
        messages = [(row[: -self.SIZE].tobytes(), row[-self.SIZE :].tobytes()) for row in rows]
        if any(seal != self._of(message) for message, seal in messages):
            raise RuntimeError("what arrived is damaged")
        return [message for message, _ in messages]

    def _of(self, message: bytes) -> bytes:
        return zlib.crc32(message, self.count).to_bytes(self.SIZE, "big")


class Peer:
    """A machine beside this one in the ring, whose ends are beside each other; see `cache.halves.Peer`."""

    def __init__(self, machines: Machines, rank: int):
        self._machines, self._rank = machines, rank
        self._sent, self._received = _Seal(), _Seal()

    def swap(self, x: mx.array) -> mx.array:
        """Give x, and get the other's, of the same shape and type."""
        if self._machines.rank < self._rank:  # one speaks first
            self.send(x)
            return self.receive(x.shape, x.dtype)
        theirs = self.receive(x.shape, x.dtype)
        self.send(x)
        return theirs

    def send(self, x: mx.array) -> None:
        sealed = mx.array(self._sent.close(np.array(x).tobytes()))
        with self._machines.connected():
            mx.eval(mx.distributed.send(sealed, self._rank, group=self._machines.group))

    def receive(self, shape: Sequence[int], dtype: mx.Dtype = mx.float32) -> mx.array:
        size = math.prod(shape) * dtype.size + _Seal.SIZE
        self._received.count += 1
        with self._machines.connected():
            sealed = mx.distributed.recv([size], mx.uint8, self._rank, group=self._machines.group)
            (message,) = self._received.open(np.array(sealed)[None])
        return mx.array(np.frombuffer(message, dtype=np.uint8)).view(dtype).reshape(shape)
