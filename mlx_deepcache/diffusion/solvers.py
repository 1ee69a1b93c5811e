"""Solvers: functions that take one step between two noise levels.

Every solver works on variance-preserving latents x = alpha * x0 + sigma * eps, alpha^2 + sigma^2 = 1, whatever its
paper used: Karras et al.'s x / sqrt(1 + sigma^2) is the same thing. A solver is
`(denoise, x, step, history, noise) -> (x, history)`: denoise(x, level) gives a `Prediction`, noise() draws like x, and
history is whatever the solver wants to see again at the next step (None at first).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .levels import Level, Prediction, Step, split

if TYPE_CHECKING:  # so that names and plans cost no MLX
    import mlx.core as mx


def ddim(denoise, x, step: Step, history, noise, *, eta: float = 0.0):
    """DDIM (Song et al. 2021, equation 12); eta: of the noise that DDPM adds, from none to all of it (equation 16).
    Over these latents, Euler's method is the same formula without noise."""
    p = denoise(x, step.here)
    here, there = step.here, step.there
    if not eta:
        return there.alpha * p.x0 + there.sigma * p.eps, None
    added = eta * there.sigma / here.sigma * math.sqrt(max(1 - (here.alpha / there.alpha) ** 2, 0))
    left = math.sqrt(max(there.sigma**2 - added**2, 0))
    return there.alpha * p.x0 + left * p.eps + added * noise(), None


def euler_ancestral(denoise, x, step: Step, history, noise):
    """Euler's method to a level below, then fresh noise up to it (k-diffusion's ancestral sampling)."""
    p = denoise(x, step.here)
    here, there = step.here.ratio, step.there.ratio
    up = math.sqrt(there**2 * (here**2 - there**2) / here**2)
    down = math.sqrt(there**2 - up**2)
    return step.there.alpha * (p.x0 + down * p.eps + up * noise()), None


def heun(denoise, x, step: Step, history, noise):
    """Heun's second-order method (Karras et al. 2022, algorithm 1): two calls, one on the last step."""
    p = denoise(x, step.here)
    slope = _slope(p, step.here)
    euler = step.there.alpha * p.x0 + step.there.sigma * slope
    if step.there.sigma == 0:
        return euler, None
    slope = (slope + _slope(denoise(euler, step.there), step.there)) / 2
    return step.there.alpha * (x / step.here.alpha + (step.there.ratio - step.here.ratio) * slope), None


def _slope(p: Prediction, level: Level) -> mx.array:
    """The noise that leads from p.x to p.x0; p.eps, unless x0 was clipped."""
    return (p.x - level.alpha * p.x0) / level.sigma


def plms(denoise, x, step: Step, history, noise, *, prediction_type: str):
    """PNDM (Liu et al. 2022): linear multistep over the noise, after an optional Runge-Kutta start.

    One call a step. A stage other than "" starts from x at `step.base`, kept from an earlier call: "again" is PLMS's
    second call, which repeats the first step with the mean of both; "rk1" to "rk4" are the Runge-Kutta calls.
    """
    outputs, kept, total = history or ((), None, 0)
    output = denoise(x, step.here).output
    if step.stage == "again":
        output, x = (output + outputs[-1]) / 2, kept
    elif step.stage == "":
        kept, outputs = x, (*outputs[-3:], output)
        e = outputs[::-1]
        if len(e) == 2:
            output = (3 * e[0] - e[1]) / 2
        elif len(e) == 3:
            output = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        elif len(e) == 4:
            output = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
    elif step.stage == "rk1":
        kept, outputs, total = x, (*outputs, output), output / 6
    elif step.stage == "rk4":
        output, x = total + output / 6, kept
    else:
        total, x = total + output / 3, kept
    base = step.here if step.base is None else step.base
    x0, eps = split(prediction_type, output, x, base)
    return step.there.alpha * x0 + step.there.sigma * eps, (outputs, kept, total)


def dpm_2m(denoise, x, step: Step, history, noise, *, sde: bool = False, heun: bool = False):
    """DPM-Solver++(2M), deterministic or SDE (Lu et al. 2022, algorithm 2); history: last x0 and its level."""
    p = denoise(x, step.here)
    here, there = step.here, step.there
    h = there.snr - here.snr
    span = 2 * h if sde else h
    decay = math.exp(-span)
    out = there.sigma / here.sigma * (math.exp(-h) if sde else 1) * x + there.alpha * (1 - decay) * p.x0
    if step.order == 2:
        last, last_level = history
        slope = (p.x0 - last) * (h / (here.snr - last_level.snr))
        out = out + there.alpha * ((decay - 1) / span + 1 if heun and h else (1 - decay) / 2) * slope
    if sde:  # h is 0 but for rounding where Karras's levels and the last one both end at sigma_min
        out = out + there.sigma * math.sqrt(max(1 - decay, 0)) * noise()
    return out, (p.x0, here)


def unipc(denoise, x, step: Step, history, noise, *, bh1: bool = False):
    """UniPC of order 2 predicting x0 (Zhao et al. 2023, algorithms 5 and 6).

    history: the levels visited with their x0, latest last; the latents that the last predictor started from, its order.
    """
    visited, start, order = history or ([], None, 0)
    p = denoise(x, step.here)
    if visited:  # the corrector: the last step again, now that its end has been seen
        x = _unipc_update(start, visited[:-1][-1:], *visited[-1], step.here, order, bh1, p.x0)
    visited = [*visited[-1:], (p.x0, step.here)]
    out = _unipc_update(x, visited[:-1], p.x0, step.here, step.there, step.order, bh1)
    return out, (visited, x, step.order)


def _unipc_update(x, before, m0, here: Level, there: Level, order: int, bh1: bool, end=None):
    """From x at `here`, where x0 is m0, to `there`; `before` holds the (x0, level) before that; `end` is x0 there."""
    h = there.snr - here.snr
    growth = math.expm1(-h)
    b = -h if bh1 else growth
    x = there.sigma / here.sigma * x - there.alpha * growth * m0
    if order == 1:
        return x if end is None else x - there.alpha * b * 0.5 * (end - m0)
    phi1 = growth / -h - 1
    m1, level = before[-1]
    r = (level.snr - here.snr) / h
    correction = 0.5 / r * (m1 - m0)
    if end is not None:
        rho = np.linalg.solve([[1, 1], [r, 1]], [phi1 / b, 2 * (phi1 / -h - 0.5) / b])
        correction = float(rho[0]) / r * (m1 - m0) + float(rho[1]) * (end - m0)
    return x - there.alpha * b * correction


def lcm(denoise, x, step: Step, history, noise, *, scaling: float):
    """Latent consistency sampling (Luo et al. 2023, algorithm 3): to clean latents, then fresh noise."""
    p = denoise(x, step.here)
    q = scaling * step.here.t
    skip, out = 0.25 / (q**2 + 0.25), q / math.sqrt(q**2 + 0.25)
    clean = out * p.x0 + skip * x
    if step.there.sigma == 0:
        return clean, None
    return step.there.alpha * clean + step.there.sigma * noise(), None


def ddpm(denoise, x, step: Step, history, noise, *, fixed_large: bool):
    """Ancestral sampling (Ho et al. 2020, algorithm 2 and equation 7)."""
    p = denoise(x, step.here)
    here, there = step.here, step.there
    a = (here.alpha / there.alpha) ** 2
    mean = there.alpha * (1 - a) / here.sigma**2 * p.x0 + math.sqrt(a) * there.sigma**2 / here.sigma**2 * x
    if here.t == 0:
        return mean, None
    variance = 1 - a if fixed_large else max(there.sigma**2 / here.sigma**2 * (1 - a), 1e-20)
    return mean + math.sqrt(variance) * noise(), None
