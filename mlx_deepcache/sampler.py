"""The sampling loop, with DeepCache in it, and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from .blocks import Fixed
from .cache import CacheSchedule
from .schedulers import Plan
from .solvers import Level, Prediction, split
from .unet import Conditioning, UNet2DConditionModel


class Denoiser:
    """The U-Net with guidance: noisy latents in, a `Prediction` out.

    With a guidance scale, `cond` is for twice as many pictures as are drawn: first what they should not be, then what
    they should (Ho and Salimans 2022, equation 6). With None, the U-Net is run as it is.

    What does not change from step to step is computed here, once: the prompt's keys and values, and the embeddings of
    all timesteps. predict: the U-Net's call, compiled perhaps.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        cond: Conditioning,
        plan: Plan,
        guidance_scale: float | None,
        predict: Callable | None = None,
    ):
        self.predict = unet if predict is None else predict
        self.plan, self.guidance_scale = plan, guidance_scale
        self.prompt = unet.prepare(cond)
        times = list(dict.fromkeys(step.here.t for step in plan.steps))
        self.temb = dict(zip(times, unet.time_embed(mx.array(times), self.prompt), strict=True))
        self.dtype = cond.context.dtype

    def __call__(self, x: mx.array, level: Level, branch: int, features: Fixed | None) -> tuple[Prediction, Fixed]:
        """x: (N, h, w, C) float32; features: None for a full step, else what the last one returned."""
        batch = x if self.guidance_scale is None else mx.concatenate([x, x])
        output, features = self.predict(
            batch.astype(self.dtype), self.temb[level.t], self.prompt, branch=branch, features=features
        )
        output = output.astype(mx.float32)
        if self.guidance_scale is not None:
            without, given = mx.split(output, 2)
            output = without + self.guidance_scale * (given - without)
        x0, eps = split(self.plan.prediction_type, output, x, level)
        if self.plan.clip is not None:
            x0 = mx.clip(x0, -self.plan.clip, self.plan.clip)
        return Prediction(output, x0, eps), features


@dataclass(frozen=True)
class Progress:
    """A step that has been taken: its index, whether the whole U-Net ran, in how many U-Net calls (Heun makes two), and
    the latents after it, (N, h, w, C)."""

    index: int
    full: bool
    calls: int
    latents: mx.array


def sample(denoiser: Denoiser, x: mx.array, cache: CacheSchedule, noise: Callable[[], mx.array]) -> Iterator[Progress]:
    """Draw: yields after every step, evaluated, while the next one is under way; stop iterating to cancel.

    x: (N, h, w, C) float32, standard normal; cache: says which steps are full; noise: draws like x, for the solvers
    that want fresh noise. `features`, all that DeepCache keeps, lives and dies with this loop.
    """
    plan = denoiser.plan
    full_steps = cache.full_steps(len(plan.steps))
    x, history, features, last = x * plan.init_scale, None, None, None
    for index, (step, full) in enumerate(zip(plan.steps, full_steps, strict=True)):
        calls = 0

        def denoise(x: mx.array, level: Level, full: bool = full) -> Prediction:
            nonlocal features, calls
            prediction, features = denoiser(x, level, cache.branch, None if full else features)
            calls += 1
            return prediction

        x, history = plan.solver(denoise, x, step, history, noise)
        mx.async_eval(x, features)  # the device starts on this step while the one before is reported
        if last is not None:
            mx.eval(last.latents)
            yield last
        last = Progress(index, full, calls, x)
    mx.eval(last.latents)
    yield last
