"""Whether a picture should be cut into strips, one a machine: python benchmarks/speed/patches.py --seconds 2

A study on paper: no network is run. Each of two machines computes one half of every layer's rows (of one half of
guidance, as `--split guidance` shares those first). What a layer needs from the other strip is counted from SDXL's
architecture, and sent over a link of so many microseconds and gigabytes a second:

- a 3 x 3 convolution: one row of its input, each way;
- a group normalisation: the sums of its 32 groups;
- a self-attention: the other half's positions, of which keys and values are then computed here too.

At once: a layer waits for what it needs (as DistriFusion's first steps). Displaced: it takes what the other strip had a
step before (Li et al. 2024, DistriFusion), and messages go beside the work; what it costs in picture is not known
here. A full step takes --seconds on one machine, a cached one the share --cached of that; --wait is what a message
costs beside the link, as the device has to end what it is at and be started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

CHANNELS, BLOCKS, MIDDLE = (320, 640, 1280), (0, 2, 10), 10  # of SDXL: by level, and its transformers' depths
RESNETS = 2  # of an encoder level; a decoder level has one more
GROUPS = 32
HALF = 2  # bytes of a number in float16
# Of a transformer's products a position, in squares of its width: attention to itself 4, to the prompt 2, feed-forward
# 12. Keys and values of the other half's positions are 2 of them, done again: 1 in 9 of a strip's
TRANSFORMERS = 0.7  # about their share of SDXL's work
TWICE = TRANSFORMERS / 9
LINKS = {  # microseconds, gigabytes a second: nominal, not measured
    "Thunderbolt 5, RDMA": (10, 8.0),
    "Thunderbolt 5, TCP": (50, 6.0),
    "Thunderbolt 4, TCP": (50, 3.0),
    "10 Gb Ethernet": (50, 1.2),
    "1 Gb Ethernet": (200, 0.12),
}
WINS = 1.3


@dataclass(frozen=True)
class Strip:
    """Messages of one picture, cut into two strips: `side` latents wide at the outermost level."""

    side: int

    def halo(self, channels: int, level: int) -> int:
        return (self.side >> level) * channels * HALF

    def norm(self) -> int:
        return GROUPS * 2 * 4  # sums and sums of squares, float32

    def resnet(self, channels: int, out: int, level: int) -> Iterator[int]:
        yield from (self.norm(), self.halo(channels, level), self.norm(), self.halo(out, level))

    def transformer(self, channels: int, level: int, blocks: int) -> Iterator[int]:
        if blocks:
            yield self.norm()
        for _ in range(blocks):
            yield (self.side >> level) ** 2 // 2 * channels * HALF

    def full(self) -> Iterator[int]:
        """Bytes of each message of a full step, each way, in the order of the layers."""
        last, skips = len(CHANNELS) - 1, [(CHANNELS[0], 0)]
        yield self.halo(4, 0)
        here = CHANNELS[0]
        for level, (channels, blocks) in enumerate(zip(CHANNELS, BLOCKS, strict=True)):
            for _ in range(RESNETS):
                yield from self.resnet(here, channels, level)
                yield from self.transformer(channels, level, blocks)
                here = channels
                skips.append((channels, level))
            if level < last:
                yield self.halo(channels, level)
                skips.append((channels, level + 1))
        yield from self.resnet(here, here, last)
        yield from self.transformer(here, last, MIDDLE)
        yield from self.resnet(here, here, last)
        for level in reversed(range(len(CHANNELS))):
            for _ in range(RESNETS + 1):
                skip, _ = skips.pop()
                yield from self.resnet(here + skip, CHANNELS[level], level)
                yield from self.transformer(CHANNELS[level], level, BLOCKS[level])
                here = CHANNELS[level]
            if level:
                yield self.halo(here, level - 1)
        yield from (self.norm(), self.halo(here, 0))

    def cached(self) -> Iterator[int]:
        """Of a cached step at branch 0: the first convolution, the last resnet, the last convolution."""
        yield self.halo(4, 0)
        yield from self.resnet(2 * CHANNELS[0], CHANNELS[0], 0)
        yield from (self.norm(), self.halo(CHANNELS[0], 0))


def over(messages: list[int], latency: float, bandwidth: float) -> float:
    """Seconds, both ways at the same time; microseconds, gigabytes a second."""
    return sum(latency * 1e-6 + size / (bandwidth * 1e9) for size in messages)


def gain(seconds: float, share: float, interval: int, costs: tuple[float, float], displaced: bool) -> float:
    """How many times as fast two machines are as one, over `interval` steps of which one is full; costs: of the
    messages of a full and of a cached step, in seconds."""
    steps = [(seconds, costs[0])] + [(seconds * share, costs[1])] * (interval - 1)
    halves = [(work * (1 + TWICE) / 2, cost) for work, cost in steps]
    two = sum(max(half) if displaced else sum(half) for half in halves)
    return sum(work for work, _ in steps) / two


def wins_from(share: float, interval: int, costs: tuple[float, float]) -> float:
    """The seconds of a full step from which on two machines are `WINS` times as fast, messages at once."""
    work = 1 + share * (interval - 1)
    return (costs[0] + (interval - 1) * costs[1]) / (work * (1 / WINS - (1 + TWICE) / 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a full step on one machine, without guidance")
    parser.add_argument("--cached", type=float, default=0.1, help="a cached step's share of that")
    parser.add_argument("--wait", type=float, default=100, metavar="US", help="of a message, beside the link")
    parser.add_argument("--size", type=int, default=1024, metavar="PX")
    args = parser.parse_args()
    strip = Strip(args.size // 8)
    full, cached = list(strip.full()), list(strip.cached())
    for name, messages in (("full", full), ("cached", cached)):
        print(f"a {name} step: {len(messages)} messages each way, {sum(messages) / 1e6:.2f} MB")
    print(f"gains at {args.seconds:g} s a full step; and from how many seconds on it is {WINS}")
    print(f"{'link':22}" + "".join(f"  interval {n}: at once  displaced  from" for n in (1, 3)))
    for name, (latency, bandwidth) in LINKS.items():
        costs = tuple(over(messages, args.wait + latency, bandwidth) for messages in (full, cached))
        row = f"{name:22}"
        for interval in (1, 3):
            told = [gain(args.seconds, args.cached, interval, costs, displaced) for displaced in (False, True)]
            row += f"  {told[0]:19.2f}  {told[1]:9.2f}  {wins_from(args.cached, interval, costs):4.2f}"
        print(row)


if __name__ == "__main__":
    main()
