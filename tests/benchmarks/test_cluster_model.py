"""The model of a cluster against one played through, message by message."""

import pytest

from benchmarks.speed.distributed import Link, Work, enough, hours, saturated

LINK = Link(latency=1e-3, bandwidth=1e8)
WORK = Work(seconds=2.0, exchanges=20, latents=65_536, picture=786_432)


def played(n, pictures, pairs):
    """Seconds until all pictures are at the first machine: each turn every group draws one, then around the ring every
    machine passes on what it got last, until it has had all."""
    clock, left = 0.0, pictures
    while left > 0:
        for _ in range(n // 2 if pairs else n):
            left -= 1
        ready = [clock + WORK.seconds / (2 if pairs else 1)] * n
        if pairs:
            for _ in range(WORK.exchanges):
                for first in range(0, n, 2):
                    told = ready[first] + LINK.latency + WORK.latents / LINK.bandwidth
                    answered = told + LINK.latency + WORK.latents / LINK.bandwidth
                    ready[first] = ready[first + 1] = answered
        for _ in range(n - 1):
            sent = [time + LINK.latency + WORK.picture / LINK.bandwidth for time in ready]
            ready = [max(sent[i], sent[i - 1]) for i in range(n)]
        clock = max(ready)
    return clock


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("n", "pictures"), [(2, 1), (2, 5), (4, 10), (8, 64)])
def test_hours(n, pictures, pairs):
    assert hours(WORK, LINK, n, pictures, pairs=pairs) * 3600 == pytest.approx(played(n, pictures, pairs))


def test_where_it_ends():
    """One machine more than that adds more to the gather than it draws."""
    most = saturated(WORK, LINK)
    assert LINK.gather(most, WORK.picture) <= WORK.seconds < LINK.gather(most + 1, WORK.picture)
    need = enough(WORK, LINK, 10_000, 3600)
    assert hours(WORK, LINK, need, 10_000) <= 1 < hours(WORK, LINK, need - 1, 10_000)
    assert enough(WORK, LINK, 10_000, 1) is None


def test_a_link_is_fitted_to_what_was_measured():
    measured = {size: LINK.message(size) for size in (0, 1000, 1_000_000)}
    assert Link.fitted(measured).bandwidth == pytest.approx(LINK.bandwidth)
    assert Link.fitted(measured).latency == pytest.approx(LINK.latency)
