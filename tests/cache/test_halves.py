"""Guidance's halves on two machines against both on one, to the bit: two threads here, with queues between them."""

import copy
import threading
from queue import Queue

import mlx.core as mx
import numpy as np
import pytest
import tiny
from helpers import MASK, PICTURE, error, same

from mlx_deepcache import Control
from mlx_deepcache.cache.adaptive import Adaptive
from mlx_deepcache.cache.deepcache import DeepCache
from mlx_deepcache.cache.fastercache import FasterCache
from mlx_deepcache.cache.forecast import Spectrum, TaylorSeer
from mlx_deepcache.cache.guidance_interval import GuidanceInterval
from mlx_deepcache.cache.halves import SharedHalves
from mlx_deepcache.cache.pab import PyramidAttentionBroadcast
from mlx_deepcache.cache.tgate import TGate

pytestmark = pytest.mark.filterwarnings("ignore:.*machines waits")
ALWAYS = (-1, 1000)
SMALL = {"steps": 8, "height": 64, "width": 64, "seeds": [5, 6], "scheduler": "ddim"}


class Wire:
    """A `Peer` of another thread. What is sent goes over as numbers. One of them runs at a time, as each is written for
    a process of its own: whoever waits lets the other go on."""

    def __init__(self, to: Queue, come: Queue, turn: threading.Lock):
        self.to, self.come, self.turn = to, come, turn

    def send(self, x):
        self.to.put(np.array(x))

    def receive(self, shape, dtype=mx.float32):
        self.turn.release()
        try:
            x = self.come.get(timeout=60)
        finally:
            self.turn.acquire()
        x = mx.array(x)
        assert x.shape == tuple(shape) and x.dtype == dtype
        return x

    def swap(self, x):
        self.send(x)
        return self.receive(x.shape, x.dtype)


def drawn_by_two(pipe, prompt="a cat", **options):
    """Each machine's steps, latents and stats: that of the unconditional half, and that of the conditional one."""
    queues, turn, done = (Queue(), Queue()), threading.Lock(), [None, None]

    def draw(half):
        with turn:
            mine = copy.copy(pipe)
            mine.halves = SharedHalves(half, Wire(queues[half], queues[1 - half], turn))
            run = mine.denoise(settings)
            steps = list(run)
            done[half] = steps, run.latents, run.stats()

    settings = pipe.settings(prompt, **SMALL | options)
    threads = [threading.Thread(target=draw, args=(half,)) for half in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(queue.empty() for queue in queues)
    return done


def drawn_by_one(pipe, prompt="a cat", **options):
    run = pipe.denoise(pipe.settings(prompt, **SMALL | options))
    steps = list(run)
    return steps, run.latents, run.stats()


CACHES = [
    [DeepCache(1)],
    [DeepCache(3)],
    [DeepCache(3, branch=1), TaylorSeer(2)],
    [DeepCache(2), Spectrum(history=3)],
    [Adaptive(threshold=0.2)],
    [Adaptive(threshold=0.2), GuidanceInterval(0.2, 0.7)],
    [DeepCache(3), TGate(step=4, sp_interval=2, warm_up=1), TaylorSeer(1)],
    [DeepCache(2), FasterCache(2, ALWAYS, 3, ALWAYS, ALWAYS, ALWAYS)],
    [PyramidAttentionBroadcast(2, 3, ALWAYS, ALWAYS), GuidanceInterval(0.3, 0.8)],
    [DeepCache(2), PyramidAttentionBroadcast(2, 3, ALWAYS, ALWAYS)],
]


@pytest.mark.parametrize("cache", CACHES)
def test_two_machines_draw_what_one_does(pipeline, cache):
    pipe = pipeline("sdxl")
    (first, latents, its), (second, theirs, other) = drawn_by_two(pipe, cache=cache)
    steps, alone, stats = drawn_by_one(pipe, cache=cache)
    assert mx.array_equal(latents, theirs)
    assert same(latents, alone)
    assert [s.work for s in first] == [s.work for s in second]
    for ours, step in zip(first, steps, strict=True):
        assert [work[:-1] for work in ours.work] == [work[:-1] for work in step.work]
        assert ours.change == (None if step.change is None else pytest.approx(step.change, rel=1e-3))
    assert its["unet_macs"] == other["unet_macs"] == stats["unet_macs"] < stats["unet_macs_uncached"] + (len(cache) < 2)


@pytest.mark.parametrize(
    "options",
    [
        {"image": PICTURE, "strength": 0.7},
        {"image": PICTURE, "mask": MASK, "scheduler": "heun"},
        {"guidance_scale": 1.0},
        {"hires_scale": 2, "hires_steps": 3, "steps": 4},
    ],
)
def test_other_starts(pipeline, options):
    pipe = pipeline("sd15")
    (_, latents, _), (_, theirs, _) = drawn_by_two(pipe, cache=[DeepCache(2)], **options)
    assert mx.array_equal(latents, theirs)
    assert same(latents, drawn_by_one(pipe, cache=[DeepCache(2)], **options)[1])


def test_inpainting_nets(pipeline):
    """Which are shown mask and picture beside the latents."""
    pipe = pipeline("inpaint")
    (_, latents, _), _ = drawn_by_two(pipe, image=PICTURE, mask=MASK, cache=[DeepCache(2), GuidanceInterval(0, 0.5)])
    alone = drawn_by_one(pipe, image=PICTURE, mask=MASK, cache=[DeepCache(2), GuidanceInterval(0, 0.5)])
    assert same(latents, alone[1])


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("every_step", [False, True])
def test_controlnets(pipeline, tmp_path, kind, every_step):
    net = tiny.write_controlnet(kind, tmp_path / "net")
    options = {"controls": [Control(net, PICTURE, end=0.8)], "control_every_step": every_step}
    options["cache"] = [DeepCache(3), GuidanceInterval(0.2, 0.7)]
    (_, latents, its), (_, _, other) = drawn_by_two(pipeline(kind), **options)
    _, alone, stats = drawn_by_one(pipeline(kind), **options)
    assert same(latents, alone)
    assert its["controlnet_macs"] == other["controlnet_macs"] == stats["controlnet_macs"] > 0


def test_videos(video_pipeline):
    options = {"image": PICTURE, "frames": 3, "steps": 4, "scheduler": None, "seeds": [3]}
    options["cache"] = [DeepCache(2), GuidanceInterval(0, 0.8)]
    (_, latents, _), (_, theirs, _) = drawn_by_two(video_pipeline, None, **options)
    assert mx.array_equal(latents, theirs)
    assert error(latents, drawn_by_one(video_pipeline, None, **options)[1]) < 1e-4  # layers over frames see all places


def test_it_says_once_that_one_machine_waits(pipeline):
    with pytest.warns(UserWarning, match="one of two machines waits") as said:
        drawn_by_two(pipeline("sd15"), cache=[GuidanceInterval(0, 0.3)])
    assert len(said) == 1
