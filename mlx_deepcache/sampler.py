"""The sampling loop with DeepCache in it: which steps are full, and which are cached.

Every step runs the U-Net's shallow part. On a full step the deep part follows, and its features are kept; a cached step
is given those that were kept, or a forecast from several. Which step is which, and whatever else is reused, is asked of
the caches before each call: `run.call` is their answer, and `run.keep` tells them how the call went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from .backend.ops import at_once
from .cache.composition import CacheRun, Caches
from .cache.halves import Halves
from .cache.policy import Call, Work
from .diffusion.guidance import guide
from .diffusion.levels import CLEAN, Level, Prediction, split
from .diffusion.schedule import Plan
from .nets.attend import compute
from .nets.blocks import Features
from .nets.unet_parts import Conditioning, Prepared
from .unet import Residuals, UNet2DConditionModel


class Denoiser:
    """The U-Net with guidance: noisy latents in, a `Prediction` out.

    With a guidance scale, `cond` is for twice as many pictures as are drawn: first what they should not be, then what
    they should (Ho and Salimans 2022). With None, the U-Net is run as it is.

    What does not change from step to step is computed here, once: the prompt's keys and values, and the embeddings of
    all timesteps. guidance_scale: of a video perhaps one a frame. `beside`, (N, h, w, C'), is shown to the U-Net beside
    the latents: an inpainting net's mask and masked picture, a video's picture; (2N, ...) where guidance's halves are
    shown other things. controls: ControlNets, (x, t, step, cut on a cached step or None, guidance's half or None) ->
    residuals, or None if those of the last full step serve. inner: how attention layers are run, see `Attend`. in_turn:
    run guidance's halves one after the other where no cache looks at both. halves: who runs these, if not this machine
    alone.

    The first axis of all that is held here and by the caches counts pictures, in guidance twice.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        cond: Conditioning,
        plan: Plan,
        guidance_scale: float | Sequence[float] | None,
        *,
        beside: mx.array | None = None,
        controls: Callable[[mx.array, float, int, int | None, int | None], list[mx.array] | None] | None = None,
        inner: Callable[..., mx.array] = compute,
        in_turn: bool = False,
        halves: Halves | None = None,
    ):
        self.unet, self.plan, self.guidance_scale = unet, plan, guidance_scale
        if isinstance(guidance_scale, Sequence):
            self.guidance_scale = mx.array(guidance_scale).reshape(-1, 1, 1, 1)
        self.beside, self.controls, self.inner, self.in_turn, self.halves = beside, controls, inner, in_turn, halves
        self.cond = unet.prepare(cond)
        times = list(dict.fromkeys(step.here.t for step in plan.steps))
        self.temb = dict(zip(times, unet.time_embed(mx.array(times), self.cond), strict=True))
        self.dtype, self.tokens = cond.context.dtype, cond.context.shape[1]
        self._halves: dict[int, Prepared] = {}  # of the conditioning, made when first needed

    def __call__(self, x: mx.array, index: int, level: Level, run: CacheRun) -> tuple[Prediction, Work]:
        """x: (N, h, w, C) float32, on step `index` of the plan, at this level."""
        call, output, features, fresh = run.call(index, level), None, None, None
        if call.halves:
            call, output, features, fresh = self._run(x, index, level.t, self.unet.cut(run.branch), call)
        call, output = run.halves.complete(call, output, x.shape[1:])
        run.keep(call, features, output, fresh)
        if call.both:
            output = guide(*mx.split(output, 2), self.guidance_scale)
        elif call.differences:
            output = guide(sum(call.differences, output), output, self.guidance_scale)  # the half that was left out
        x0, eps = split(self.plan.prediction_type, output, x, level)
        if self.plan.clip is not None:
            x0 = mx.clip(x0, -self.plan.clip, self.plan.clip)
        attention = tuple(attend.do for attend in call.attend)
        return Prediction(output, x0, eps, x), Work(call.full, call.pictures, self.tokens, attention, call.change)

    def _run(
        self, x: mx.array, index: int, t: float, cut: int, call: Call
    ) -> tuple[Call, mx.array, Features, Residuals | None]:
        """The call as it was decided, the output, float32, and the features of those halves that are run here, and what
        a cached step reads of the ControlNets, if they ran."""
        batch, first = mx.concatenate([x] * len(call.halves)), call.halves[0] * len(x)
        if self.beside is not None:
            beside = self.beside if len(self.beside) > len(x) else mx.concatenate([self.beside, self.beside])
            batch = mx.concatenate([batch, beside[first : first + len(batch)]], axis=-1)
        batch = batch.astype(self.dtype)
        half = None if self.guidance_scale is None or len(call.halves) == 2 else call.halves[0]
        fresh = None  # residuals, if the ControlNets run in this call
        if self.controls is not None:
            cached = not call.full and call.decide is None  # if that is not known yet, all residuals may be needed
            fresh = self.controls(batch[..., : x.shape[-1]], t, index, cut if cached else None, half)
        residuals = call.residuals if fresh is None else fresh
        if self.in_turn and len(call.halves) == 2 and call.separable:
            output, features = self._in_turn(batch, t, cut, call, residuals)
        else:
            output, features, call = self._predict(batch, t, cut, call, residuals, half)
        return call, output.astype(mx.float32), features, None if fresh is None else fresh[: cut + 1]

    def _predict(
        self, x: mx.array, t: float, cut: int, call: Call, residuals: Residuals, half: int | None
    ) -> tuple[mx.array, Features, Call]:
        """The U-Net's output and features, and the call once it is decided whether it is full; half: of guidance's, or
        None for both."""
        shallow, deep, finish = call.attend
        cond, temb = self._rows(t, len(x), half)
        skips = self.unet.shallow(x, temb, cond, cut, attend=shallow)
        call = call.decided(skips[-1])
        features = call.reused
        if features is None:
            features = self.unet.deep(skips[-1], temb, cond, cut, residuals[cut + 1 :], attend=deep)
        output = self.unet.finish(skips, features, temb, cond, cut, residuals[: cut + 1], attend=finish)
        return output, features, call

    def _in_turn(self, batch: mx.array, t: float, cut: int, call: Call, residuals: Residuals):
        """Guidance's two halves one after the other, each done before the next begins: half the memory."""
        pictures, outputs, features = len(batch) // 2, [], []
        for half in (0, 1):
            rows = slice(half * pictures, (half + 1) * pictures)
            own = call if call.full else replace(call, reused=Features(*(part[rows] for part in call.reused)))
            output, its, _ = self._predict(batch[rows], t, cut, own, [r[rows] for r in residuals], half)
            mx.eval(output, its)
            outputs.append(output)
            features.append(its)
        both = Features(*map(mx.concatenate, zip(*features, strict=True))) if call.full else call.reused
        return mx.concatenate(outputs), both

    def _rows(self, t: float, pictures: int, half: int | None) -> tuple[Prepared, mx.array]:
        """The conditioning and the embedding of t for one half of guidance's batch, or for all of it."""
        temb = self.temb[t]
        if half is None:
            return self.cond, temb
        rows = slice(half * pictures, (half + 1) * pictures)
        if half not in self._halves:
            self._halves[half] = self.cond.rows(rows)
        return self._halves[half], temb[rows] if len(temb) > 1 else temb


@dataclass(frozen=True)
class Progress:
    """A step that has been taken: its number, its U-Net calls (Heun makes two), the latents (N, h, w, C) after it, the
    clean ones that the U-Net expected on the way, and what each cache remembers."""

    index: int
    work: tuple[Work, ...]
    latents: mx.array
    denoised: mx.array
    cache_bytes: dict[str, int]

    @property
    def full(self) -> bool:
        """Whether the whole U-Net ran."""
        return any(call.full for call in self.work)

    @property
    def calls(self) -> int:
        """How many times the U-Net was called."""
        return len(self.work)

    @property
    def change(self) -> float | None:
        """What an adaptive cache saw, where it decided: on the first call."""
        return self.work[0].change


def sample(
    denoiser: Denoiser,
    x: mx.array,
    cache: Caches,
    noise: Callable[[], mx.array],
    keep: Callable[[mx.array, Level], mx.array] | None = None,
) -> Iterator[Progress]:
    """Draw: yields after every step, evaluated, on a GPU while the next one is under way; stop iterating to cancel.

    x: (N, h, w, C) float32, at the first step's level, or standard normal times the plan's `init_scale`; cache: says
    what is reused, and when; noise: draws like x, for the solvers that want fresh noise; keep: given latents and their
    level, puts back what should stay as it was (inpainting): before every U-Net call but the first, and at the end.
    `run`, all that the caches keep, lives and dies with this loop.
    """
    plan = denoiser.plan
    run = CacheRun(cache, plan, len(x), denoiser.guidance_scale is not None, denoiser.inner, denoiser.halves)

    def denoise(x: mx.array, level: Level) -> Prediction:
        nonlocal denoised
        if keep is not None and work:  # Heun's second call
            x = keep(x, level)
        prediction, done = denoiser(x, index, level, run)
        denoised = prediction.x0
        work.append(done)
        return prediction

    history, last, denoised, work = None, None, None, []
    for index, step in enumerate(plan.steps):
        work.clear()
        x, history = plan.solver(denoise, x, step, history, noise)
        if keep is not None:
            x = keep(x, plan.steps[index + 1].here if index + 1 < len(plan.steps) else CLEAN)
        kept = run.arrays
        mx.async_eval(x, denoised, kept)
        sizes = {name: sum(array.nbytes for array in arrays) for name, arrays in kept.items()}
        progress = Progress(index, tuple(work), x, denoised, sizes)
        # A GPU works on this step while the one before is reported; at once, this one is done
        done, last = (progress, None) if at_once() else (last, progress)
        if done is not None:
            mx.eval(done.latents)
            yield done
    if last is not None:
        mx.eval(last.latents)
        yield last
