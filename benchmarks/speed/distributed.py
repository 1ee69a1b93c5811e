"""What several machines gain, and where it ends: python benchmarks/speed/distributed.py

Measured here: processes on this machine, each on a core of its own, draw and exchange messages.
From that, or from what other machines measured and is given by flags, a model says how a cluster would do. It knows
nothing of Macs: whoever has two runs this with --hostfile, and gets its own numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import mlx_deepcache  # noqa: F401  before mlx, to which it brings a fast BLAS

LATENTS = {"SD 1.5, 512 px": 64 * 64 * 4 * 4, "SDXL, 1024 px": 128 * 128 * 4 * 4}  # bytes of a half's output
SIZES = (1, 1 << 10, 1 << 16, 1 << 18, 1 << 20, 1 << 23)  # bytes
MOST = 64  # machines
DAY = 24 * 3600


@dataclass(frozen=True)
class Link:
    """Between two machines: seconds that any message takes, and bytes a second beyond that."""

    latency: float
    bandwidth: float

    @classmethod
    def fitted(cls, seconds: dict[int, float]) -> Link:
        """The one that messages of so many bytes took so long over: the shortest one's time, and the longest one's."""
        shortest, longest = min(seconds), max(seconds)
        latency = seconds[shortest]
        return cls(latency, (longest - shortest) / max(seconds[longest] - latency, 1e-9))

    def message(self, size: int) -> float:
        return self.latency + size / self.bandwidth

    def swap(self, size: int) -> float:
        """Two messages, one after the other, as `Peer.swap` has it."""
        return 2 * self.message(size)

    def gather(self, n: int, size: int) -> float:
        """Every machine's message at every machine, around a ring."""
        return (n - 1) * self.message(size)


@dataclass(frozen=True)
class Work:
    """A picture's: seconds of both halves' steps, how many exchanges guidance would make, of how many bytes each, and
    the bytes of the picture."""

    seconds: float
    exchanges: int
    latents: int
    picture: int


def hours(work: Work, link: Link, n: int, pictures: int, *, pairs: bool = False) -> float:
    """That n machines take for so many pictures; pairs: two draw each one, guidance's halves, which are half the work.
    A turn ends with a gather, as `Team.share` has it."""
    groups = n // 2 if pairs else n
    seconds = work.seconds / 2 + work.exchanges * link.swap(work.latents) if pairs else work.seconds
    turns = -(-pictures // groups)
    return turns * (seconds + link.gather(n, work.picture)) / 3600


def enough(work: Work, link: Link, pictures: int, seconds: float) -> int | None:
    """The fewest machines that draw so many pictures in that time; None if `MOST` do not."""
    return next((n for n in range(1, MOST + 1) if hours(work, link, n, pictures) * 3600 <= seconds), None)


def saturated(work: Work, link: Link) -> int:
    """From how many machines on the gather takes longer than the picture: then one more gains nothing."""
    return 1 + int(work.seconds / link.message(work.picture))


def table(work: Work, link: Link, pictures: int) -> str:
    lines = ["machines  pictures/hour  of ideal  latency of one, guidance split  " + f"{pictures:,} take"]
    n = 1
    while n <= MOST:
        rate = pictures / hours(work, link, n, pictures)
        ideal = rate / (n * 3600 / work.seconds)
        split = f"{hours(work, link, 2, 1, pairs=True) * 3600:.2f} s" if n == 2 else ""
        lines.append(f"{n:8}  {rate:13,.0f}  {ideal:8.1%}  {split:>30}  {pictures / rate:8,.1f} h")
        n *= 2
    need = enough(work, link, pictures, DAY)
    lines.append(f"{pictures:,} pictures a day: {f'more than {MOST}' if need is None else need} machines")
    lines.append(f"the gather is as long as the picture at {saturated(work, link):,} machines")
    return "\n".join(lines)


def measure(model: str | None, steps: int, rounds: int) -> None:
    """What one process of several measures; rank 0 prints all of it, as JSON."""
    import mlx.core as mx

    from mlx_deepcache import StableDiffusion
    from mlx_deepcache.backend.distributed import Machines, Peer
    from mlx_deepcache.cache.halves import SharedHalves

    class Timed(Peer):
        """Of which is known how long it took, waiting for the other among it."""

        seconds = 0.0

        def swap(self, x: mx.array) -> mx.array:
            mx.eval(x)
            start = time.perf_counter()
            theirs = super().swap(x)
            self.seconds += time.perf_counter() - start
            return theirs

    machines = Machines()
    if hasattr(os, "sched_setaffinity") and machines.size <= len(os.sched_getaffinity(0)):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[machines.rank]})
    pipe = StableDiffusion.from_pretrained(model, "float32")
    settings = pipe.settings("a red apple", steps=steps, cache_interval=1)

    def draw() -> float:
        machines.gather(b"")  # all begin together
        start = time.perf_counter()
        run = pipe.denoise(settings)
        for _ in run:
            pass
        run.decode()
        return time.perf_counter() - start

    draw()
    told = {"picture": statistics.median(draw() for _ in range(rounds))}
    messages = {}
    if machines.size == 2:
        peer = Timed(machines, 1 - machines.rank)
        pipe.halves = SharedHalves(machines.rank, peer)
        draw()
        peer.seconds = 0.0
        taken = [draw() for _ in range(rounds)]
        told |= {"split": statistics.median(taken), "exchanging": peer.seconds / sum(taken)}
        for size in SIZES:
            x, times = mx.zeros(size, dtype=mx.uint8), []
            for _ in range(10 * rounds):
                start = time.perf_counter()
                peer.swap(x)
                times.append(time.perf_counter() - start)
            messages[size] = statistics.median(times) / 2
    all_told = [json.loads(row) for row in machines.gather(json.dumps(told).encode())]
    if machines.rank == 0:
        print(json.dumps({name: [one[name] for one in all_told] for name in told} | {"messages": messages}))


def launched(n: int, args: argparse.Namespace) -> dict:
    """What n processes measure, on this machine or on those of a hostfile."""
    flags = ["--measure", "--steps", str(args.steps), "--rounds", str(args.rounds)]
    flags += [] if args.model is None else ["--model", args.model]
    command = [sys.executable, str(Path(__file__).resolve()), *flags]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "said"), "w+") as said:
        how = {"stdout": subprocess.PIPE, "stderr": said, "text": True}
        if args.hostfile and n > 1:
            launch = [str(Path(sys.executable).with_name("mlx.launch")), "--hostfile", args.hostfile, "--", *command]
            started = [subprocess.Popen(launch, stdin=subprocess.PIPE, **how)]  # which it wants to be open
        else:
            started = [subprocess.Popen(command, env=_environment(n, rank, folder), **how) for rank in range(n)]
        out = [process.stdout.read().strip() for process in started]  # but for rank 0 they print nothing
        for process in started:
            process.wait()
        said.seek(0)
        if not out[0]:
            sys.exit(f"error: nothing was measured: {said.read().strip()}")
    measured = json.loads(out[0].splitlines()[-1])
    return measured | {"messages": {int(size): seconds for size, seconds in measured["messages"].items()}}


def _environment(n: int, rank: int, folder: str) -> dict[str, str]:
    """As mlx.launch makes it for processes on one machine; that itself (MLX 0.32.4) keeps a core busy that is measured
    here, as it asks over and over whether their standard input takes anything."""
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if n == 1:
        return env
    file = Path(folder, "hosts.json")
    if not file.exists():
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]  # to find ports that are free
        file.write_text(json.dumps([[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]))
        for one in sockets:
            one.close()
    return env | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)}


def measured(args: argparse.Namespace) -> tuple[Link, float]:
    """The link, and a picture's seconds on one machine; prints what more there is to know."""
    one, two = launched(1, args), launched(2, args)
    alone = one["picture"][0]
    n = 2
    print(f"a picture: one process {alone:.3f} s")
    while n <= (2 if args.hostfile else os.cpu_count() or 1):
        together = max((two if n == 2 else launched(n, args))["picture"])
        print(f"{n} at once: {together:.3f} s, {n * alone / together:.2f} times as many")
        n *= 2
    split, share = max(two["split"]), statistics.mean(two["exchanging"])
    print(f"guidance split by two: {split:.3f} s, {alone / split:.2f} times as fast; {share:.1%} of it exchanging")
    for size, took in two["messages"].items():
        print(f"a message of {size:,} bytes: {took * 1e6:,.0f} us")
    return Link.fitted(two["messages"]), alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="pictures that each process draws; the median counts")
    parser.add_argument("--hostfile", help="two machines, as mlx.launch has it; default: this one twice")
    parser.add_argument("--pictures", type=int, default=1_000_000, help="of a day, for the model of a cluster")
    parser.add_argument("--pixels", type=int, default=512, help="along a picture's side, for the model")
    given = parser.add_argument_group("for the model, in place of what was measured: these go together")
    given.add_argument("--seconds", type=float, help="that a picture takes")
    given.add_argument("--latency", type=float, help="of the link, microseconds")
    given.add_argument("--bandwidth", type=float, help="of the link, gigabytes a second")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.model, args.steps, args.rounds)
        return
    told = args.seconds, args.latency, args.bandwidth
    if any(value is not None for value in told):
        if None in told:
            parser.error("--seconds, --latency and --bandwidth go together")
        link, seconds = Link(args.latency * 1e-6, args.bandwidth * 1e9), args.seconds
    else:
        link, seconds = measured(args)
    for name, size in LATENTS.items():
        print(f"guidance's exchange a step, {name}: {link.swap(size) * 1e3:.2f} ms")
    print(f"link: {link.latency * 1e6:,.0f} us, {link.bandwidth / 1e9:.2f} GB/s; a picture: {seconds:.3f} s")
    size = 3 * args.pixels**2
    print(table(Work(seconds, args.steps, (args.pixels // 8) ** 2 * 16, size), link, args.pictures))


if __name__ == "__main__":
    main()
