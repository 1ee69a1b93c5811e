"""The sampling loop, with DeepCache in it, and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from .blocks import Fixed
from .cache import CacheSchedule
from .controlnet import Controlled, Controls, Residuals
from .schedulers import Plan
from .solvers import CLEAN, Level, Prediction, split
from .unet import Conditioning, UNet2DConditionModel

Features = tuple[Fixed, Residuals]  # what a cached step reuses, of the U-Net and of its ControlNets


class Denoiser:
    """The U-Net with guidance: noisy latents in, a `Prediction` out.

    With a guidance scale, `cond` is for twice as many pictures as are drawn: first what they should not be, then what
    they should (Ho and Salimans 2022, equation 6). With None, the U-Net is run as it is.

    What does not change from step to step is computed here, once: the prompt's keys and values, and the embeddings of
    all timesteps. predict: the U-Net's call, compiled perhaps. `beside`, (N, h, w, C'), is shown to the U-Net beside
    the latents: an inpainting net's mask and masked picture.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        cond: Conditioning,
        plan: Plan,
        guidance_scale: float | None,
        predict: Callable | None = None,
        *,
        beside: mx.array | None = None,
        controlled: Sequence[Controlled] = (),
        control_every_step: bool = False,
    ):
        self.unet, self.predict = unet, unet if predict is None else predict
        self.plan, self.guidance_scale, self.beside = plan, guidance_scale, beside
        self.prompt = unet.prepare(cond)
        times = list(dict.fromkeys(step.here.t for step in plan.steps))
        self.temb = dict(zip(times, unet.time_embed(mx.array(times), self.prompt), strict=True))
        self.dtype = cond.context.dtype
        self.controls = Controls(controlled, cond, times, control_every_step)

    def __call__(
        self, x: mx.array, level: Level, branch: int, features: Features | None, step: int = 0
    ) -> tuple[Prediction, Features]:
        """x: (N, h, w, C) float32; features: None for a full step, else what the last one returned; step: its index,
        for ControlNets that take part in some."""
        shown = x if self.beside is None else mx.concatenate([x, self.beside], axis=-1)
        batch = (shown if self.guidance_scale is None else mx.concatenate([shown, shown])).astype(self.dtype)
        fixed, residuals = (None, []) if features is None else features
        if features is None or self.controls.every_step:
            skip = None if features is None else self.unet.skip_of(branch)
            steps = len(self.plan.steps)
            residuals = self.controls(batch[..., : x.shape[-1]], level.t, step, steps, skip)
        output, fixed = self.predict(
            batch, self.temb[level.t], self.prompt, branch=branch, features=fixed, residuals=residuals
        )
        features = fixed, residuals[: self.unet.skip_of(branch) + 1]  # all that a cached step reads
        output = output.astype(mx.float32)
        if self.guidance_scale is not None:
            without, given = mx.split(output, 2)
            output = without + self.guidance_scale * (given - without)
        x0, eps = split(self.plan.prediction_type, output, x, level)
        if self.plan.clip is not None:
            x0 = mx.clip(x0, -self.plan.clip, self.plan.clip)
        return Prediction(output, x0, eps, x), features


@dataclass(frozen=True)
class Progress:
    """A step that has been taken: its index, whether the whole U-Net ran, in how many U-Net calls (Heun makes two), and
    the latents after it, (N, h, w, C)."""

    index: int
    full: bool
    calls: int
    latents: mx.array


def sample(
    denoiser: Denoiser,
    x: mx.array,
    cache: CacheSchedule,
    noise: Callable[[], mx.array],
    keep: Callable[[mx.array, Level], mx.array] | None = None,
) -> Iterator[Progress]:
    """Draw: yields after every step, evaluated, while the next one is under way; stop iterating to cancel.

    x: (N, h, w, C) float32, at the first step's level, or standard normal times the plan's `init_scale`; cache: says
    which steps are full; noise: draws like x, for the solvers that want fresh noise; keep: given latents and their
    level, puts back what should stay as it was (inpainting): before every U-Net call but the first, and at the end.
    `features`, all that DeepCache keeps, lives and dies with this loop.
    """
    plan = denoiser.plan
    full_steps = cache.full_steps(len(plan.steps))
    history, features, last = None, None, None
    for index, (step, full) in enumerate(zip(plan.steps, full_steps, strict=True)):
        calls = 0

        def denoise(x: mx.array, level: Level, full: bool = full, index: int = index) -> Prediction:
            nonlocal features, calls
            if keep is not None and calls:  # Heun's second call
                x = keep(x, level)
            prediction, features = denoiser(x, level, cache.branch, None if full else features, index)
            calls += 1
            return prediction

        x, history = plan.solver(denoise, x, step, history, noise)
        if keep is not None:
            x = keep(x, plan.steps[index + 1].here if index + 1 < len(plan.steps) else CLEAN)
        mx.async_eval(x, features)  # the device starts on this step while the one before is reported
        if last is not None:
            mx.eval(last.latents)
            yield last
        last = Progress(index, full, calls, x)
    mx.eval(last.latents)
    yield last
