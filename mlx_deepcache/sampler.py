"""The sampling loop, with DeepCache in it, and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from .cache.composition import CacheRun, Caches, Call
from .diffusion.levels import CLEAN, Level, Prediction, split
from .diffusion.schedule import Plan
from .nets.blocks import Attention, Fixed
from .nets.controlnet import Controlled, Controls
from .nets.unet_parts import Conditioning
from .unet import UNet2DConditionModel


class Denoiser:
    """The U-Net with guidance: noisy latents in, a `Prediction` out.

    With a guidance scale, `cond` is for twice as many pictures as are drawn: first what they should not be, then what
    they should (Ho and Salimans 2022, equation 6). With None, the U-Net is run as it is.

    What does not change from step to step is computed here, once: the prompt's keys and values, and the embeddings of
    all timesteps. predict: the U-Net's call, compiled perhaps. `beside`, (N, h, w, C'), is shown to the U-Net beside
    the latents: an inpainting net's mask and masked picture. in_turn: run guidance's halves one after the other where
    no cache looks at both.
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
        in_turn: bool = False,
    ):
        self.unet, self.predict, self.in_turn = unet, unet if predict is None else predict, in_turn
        self.plan, self.guidance_scale, self.beside = plan, guidance_scale, beside
        self.prompt = unet.prepare(cond)
        times = list(dict.fromkeys(step.here.t for step in plan.steps))
        self.temb = dict(zip(times, unet.time_embed(mx.array(times), self.prompt), strict=True))
        self.dtype = cond.context.dtype
        self.controls = Controls(controlled, cond, times, control_every_step)
        self._halves: dict[int, tuple] = {}  # prompt and temb of one half, made when first needed

    def __call__(self, x: mx.array, level: Level, run: CacheRun) -> Prediction:
        """x: (N, h, w, C) float32; run: knows what to reuse, and whether both halves of guidance are wanted."""
        both = run.begin_call(level.t)
        prompt, temb = self.prompt, self.temb
        if self.guidance_scale is not None and not both:
            prompt, temb = self._half(len(x), 1)
        shown = x if self.beside is None else mx.concatenate([x, self.beside], axis=-1)
        batch = (mx.concatenate([shown, shown]) if both else shown).astype(self.dtype)
        features = run.reuse()
        residuals = self._residuals(batch[..., : x.shape[-1]], level.t, run, features)
        if self.in_turn and both and run.attend is Attention.__call__ and not callable(features):
            output, features = self._in_turn(batch, level.t, run, features, residuals)
        else:
            output, features = self.predict(
                batch,
                temb[level.t],
                prompt,
                branch=run.branch,
                features=features,
                residuals=residuals,
                attend=run.attend,
            )
        run.finish(features)
        output = output.astype(mx.float32)
        if run.guidance is not None:
            output = run.guidance(output)
        x0, eps = split(self.plan.prediction_type, output, x, level)
        if self.plan.clip is not None:
            x0 = mx.clip(x0, -self.plan.clip, self.plan.clip)
        return Prediction(output, x0, eps, x)

    def _residuals(self, x: mx.array, t: float, run: CacheRun, features) -> list[mx.array]:
        """What the ControlNets say: anew on a full step, and on one of which it is not known yet whether it is full."""
        if not self.controls.controlled:
            return []
        known = features is not None and not callable(features)
        skip = self.unet.skip_of(run.branch)
        if known and not self.controls.every_step:
            return [r[-len(x) :] for r in run.residuals]
        residuals = self.controls(x, t, run.index, len(self.plan.steps), skip if known else None)
        run.residuals = residuals[: skip + 1]  # all that a cached step reads
        return residuals

    def _in_turn(self, batch: mx.array, t: float, run: CacheRun, features: Fixed | None, residuals: list[mx.array]):
        """Guidance's two halves one after the other, each done before the next begins: half the memory."""
        pictures, outputs = len(batch) // 2, []
        for half in (0, 1):
            rows = slice(half * pictures, (half + 1) * pictures)
            prompt, temb = self._half(pictures, half)
            own = None if features is None else Fixed(*(part[rows] for part in features))
            outputs.append(
                self.predict(
                    batch[rows],
                    temb[t],
                    prompt,
                    branch=run.branch,
                    features=own,
                    residuals=[r[rows] for r in residuals],
                )
            )
            mx.eval(outputs[-1])
        (first, its_features), (second, other_features) = outputs
        kept = (mx.concatenate(parts) for parts in zip(its_features, other_features, strict=True))
        return mx.concatenate([first, second]), Fixed(*kept) if features is None else features

    def _half(self, pictures: int, half: int) -> tuple:
        """Prompt and time embeddings of guidance's first or second half of the batch."""
        if half not in self._halves:
            rows = slice(half * pictures, (half + 1) * pictures)
            temb = {t: row[rows] if len(row) > 1 else row for t, row in self.temb.items()}
            self._halves[half] = self.prompt.rows(rows), temb
        return self._halves[half]


@dataclass(frozen=True)
class Progress:
    """A step that has been taken.

    index: its number; full: whether the whole U-Net ran; work: its U-Net calls (Heun makes two); latents: (N, h, w, C)
    after it; denoised: the clean latents that the U-Net expected on the way; cache_bytes: what each cache remembers;
    change: that an adaptive cache saw, where it decided.
    """

    index: int
    full: bool
    work: tuple[Call, ...]
    latents: mx.array
    denoised: mx.array
    cache_bytes: dict[str, int]
    change: float | None = None

    @property
    def calls(self) -> int:
        """How many times the U-Net was called."""
        return len(self.work)


def sample(
    denoiser: Denoiser,
    x: mx.array,
    cache: Caches,
    noise: Callable[[], mx.array],
    keep: Callable[[mx.array, Level], mx.array] | None = None,
) -> Iterator[Progress]:
    """Draw: yields after every step, evaluated, while the next one is under way; stop iterating to cancel.

    x: (N, h, w, C) float32, at the first step's level, or standard normal times the plan's `init_scale`; cache: says
    what is reused, and when; noise: draws like x, for the solvers that want fresh noise; keep: given latents and their
    level, puts back what should stay as it was (inpainting): before every U-Net call but the first, and at the end.
    `run`, all that the caches keep, lives and dies with this loop.
    """
    plan = denoiser.plan
    run = CacheRun(cache, plan, len(x), denoiser.guidance_scale)

    def denoise(x: mx.array, level: Level) -> Prediction:
        nonlocal denoised
        if keep is not None and run.calls:  # Heun's second call
            x = keep(x, level)
        prediction = denoiser(x, level, run)
        denoised = prediction.x0
        return prediction

    history, last, denoised = None, None, None
    for index, step in enumerate(plan.steps):
        run.begin_step(index)
        x, history = plan.solver(denoise, x, step, history, noise)
        if keep is not None:
            x = keep(x, plan.steps[index + 1].here if index + 1 < len(plan.steps) else CLEAN)
        kept = run.arrays
        mx.async_eval(x, denoised, kept)  # the device starts on this step while the one before is reported
        if last is not None:
            mx.eval(last.latents)
            yield last
        sizes = {name: sum(array.nbytes for array in arrays) for name, arrays in kept.items()}
        full = any(call.full for call in run.calls)
        last = Progress(index, full, tuple(run.calls), x, denoised, sizes, run.change)
    mx.eval(last.latents)
    yield last
