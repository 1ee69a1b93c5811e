"""What a generation starts from: noise, or a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.weights import read_tensors
from ..diffusion.levels import Level
from ..diffusion.schedule import Plan
from ..errors import CheckpointError, UsageError
from ..fields import valued
from ..media.pictures import Given, fit
from ..media.resample import resample

Draw = Callable[..., mx.array]
"""Standard normal noise for the batch, (N, h, w, C) or, for a video, (N, F, h, w, C), other at each call; of another
shape than one's latents, where that is given."""

Spread = Callable[[], mx.array | None]
"""The same for a VAE whose encoder says how far latents spread; None for one that gives the latents themselves."""

Encode = Callable[[mx.array, mx.array | None], mx.array]
"""A picture (1, H, W, 3) in [-1, 1], or N, and such noise -> latents (N, h, w, C), one draw a picture."""


@dataclass(frozen=True)
class Started:
    """x: (N, h, w, C) at the first step's level; keep: given latents and their level, puts back what inpainting leaves
    as it was; beside: (N, h, w, C') what an inpainting net is shown beside the latents: mask and masked picture; (2N,
    ...) where guidance's halves are shown other things."""

    x: mx.array
    keep: Callable[[mx.array, Level], mx.array] | None = None
    beside: mx.array | None = None


@dataclass(frozen=True)
class FromNoise:
    """Nothing but noise."""

    def latents(self, plan: Plan, draw: Draw, spread: Spread, given: mx.array | None, encode: Encode) -> Started:
        """given: (N, h, w, C) standard normal, in place of a draw."""
        return Started((draw() if given is None else given) * plan.init_scale)

    def paste(self, images: np.ndarray) -> np.ndarray:
        """Put the picture's own pixels back, of which there are none; (N, H, W, 3) uint8."""
        return images


@dataclass(frozen=True)
class FromPicture:
    """A picture with noise added (Meng et al. 2022, SDEdit), and perhaps a mask outside of which it stays.

    fills: the U-Net was trained to fill in, and is shown the mask and the masked picture.
    """

    picture: Given
    strength: float
    fills: bool

    def latents(self, plan: Plan, draw: Draw, spread: Spread, given: mx.array | None, encode: Encode) -> Started:
        """As `FromNoise`. Noise is drawn in the order of diffusers' pipelines: for the picture's latents, the start,
        the masked picture's."""
        level, masked = plan.steps[0].here, self.picture.mask is not None
        pixels = mx.array(self.picture.image)[None].astype(mx.float32) / 255 * 2 - 1
        from_noise = masked and self.strength == 1
        clean = None if from_noise and self.fills else encode(pixels, spread())
        added = draw() if given is None else given
        x = added * plan.init_scale if from_noise else level.alpha * clean + level.sigma * added
        if not masked:
            return Started(x)
        mask = mx.array(self.picture.mask)[None, ..., None].astype(mx.float32)
        factor = mask.shape[1] // x.shape[1]
        small = mask[:, ::factor, ::factor]
        again = spread()
        if self.fills:
            hidden = encode(pixels * (1 - mask), again)
            shown = mx.broadcast_to(small, (*hidden.shape[:3], 1))
            return Started(x, beside=mx.concatenate([shown, hidden], axis=-1))

        def keep(x: mx.array, level: Level) -> mx.array:
            return small * x + (1 - small) * (level.alpha * clean + level.sigma * added)

        return Started(x, keep)

    def paste(self, images: np.ndarray) -> np.ndarray:
        return self.picture.paste(images)


@dataclass(frozen=True)
class FirstFrame:
    """A video's picture, shown beside every frame with a little noise (Blattmann et al. 2023, appendix D), which the
    half without guidance does not see.

    picture: (H, W, 3) in 0-255, at the size that is drawn; whole: (..., ..., 3), as it was given, for the encoder of
    pictures; noise: its deviation, of pixels in [-1, 1]; scaling: what the VAE's latents are multiplied with, and these
    are not.
    """

    picture: np.ndarray
    whole: np.ndarray
    noise: float
    scaling: float

    def latents(self, plan: Plan, draw: Draw, spread: Spread, given: mx.array | None, encode: Encode) -> Started:
        """As `FromNoise`. Noise is drawn in the order of diffusers' pipeline: for the picture, then the start."""
        pixels = mx.array(self.picture)[None].astype(mx.float32) / 255 * 2 - 1
        latents = encode(pixels + self.noise * draw(self.picture.shape), None) / self.scaling
        x = (draw() if given is None else given) * plan.init_scale
        seen = mx.broadcast_to(latents[:, None], (*x.shape[:-1], latents.shape[-1]))
        return Started(x, beside=mx.concatenate([mx.zeros_like(seen), seen]))

    def paste(self, images: np.ndarray) -> np.ndarray:
        return images


@dataclass(frozen=True)
class SameNoise:
    """Frames that begin alike, for pictures that say what each becomes. shape: of a frame's latents, (h, w, C)."""

    frames: int
    shape: tuple[int, ...]

    def latents(self, plan: Plan, draw: Draw, spread: Spread, given: mx.array | None, encode: Encode) -> Started:
        """given: (N, F, h, w, C) standard normal, in place of one draw for all frames."""
        noise = mx.repeat(draw(self.shape)[:, None], self.frames, axis=1) if given is None else given
        return Started(noise * plan.init_scale)

    def paste(self, images: np.ndarray) -> np.ndarray:
        return images


Redraw = Callable[[mx.array, str | None, Callable[[np.ndarray], np.ndarray], Draw], mx.array]
"""Latents (N, h, w, C), decoded, their pictures (H, W, 3) uint8 enlarged by a network, if one is named, changed by a
function, and encoded again with draws of noise for the encoder's spread."""

MOTION_GRID = 512  # pixels along both sides of the picture that motion is measured in


def go_on(reached: Sequence[mx.array], draw: Draw, redraw: Redraw) -> mx.array:
    """A later leg's start: where the one before it ended."""
    return reached[-1]


@dataclass(frozen=True)
class Enlarged:
    """A later leg's start: where the one before it ended, at another size and with noise again, as A1111's hires fix
    has it. how: to the latents, see `media.resample`, or None for the picture, by Lanczos' filter after what `net`, a
    network that enlarges, makes of it; height, width: of the latents; factor: pixels along one side of one; level:
    where the leg begins."""

    how: str | None
    height: int
    width: int
    factor: int
    level: Level
    net: str | None = None

    def __call__(self, reached: Sequence[mx.array], draw: Draw, redraw: Redraw) -> mx.array:
        """-> (N, height, width, C)."""
        if self.how is not None:
            clean = mx.array(resample(np.array(reached[-1]), self.height, self.width, self.how))
        else:
            clean = redraw(reached[-1], self.net, self._fitted, draw)
        return self.level.alpha * clean + self.level.sigma * draw()

    def _fitted(self, picture: np.ndarray) -> np.ndarray:
        return np.asarray(fit(Image.fromarray(picture), self.height * self.factor, self.width * self.factor))


@dataclass(frozen=True)
class Moved:
    """A later leg's start: frames of a video from its first one, (N, h, w, C) (Khachatryan et al. 2023,
    Text2Video-Zero, section 3.3.1). Where the last leg ended, it is moved by the same distance from frame to frame,
    and noise is added until it is as noisy as where that leg began; the first frame is that itself.

    motion: to the left and up, in pixels of a picture of `MOTION_GRID`; kept: the share of the variance that stays.
    """

    frames: int
    motion: tuple[float, float]
    kept: float

    def __call__(self, reached: Sequence[mx.array], draw: Draw, redraw: Redraw) -> mx.array:
        """-> (N, F, h, w, C)."""
        began, ended = reached[-2:]
        moved = mx.stack([moved_by(ended, *(k * m for m in self.motion)) for k in range(1, self.frames)], axis=1)
        noise = draw(moved.shape[1:])
        noisy = math.sqrt(self.kept) * moved + math.sqrt(1 - self.kept) * noise
        return mx.concatenate([began[:, None], noisy], axis=1)


def moved_by(x: mx.array, left: float, up: float) -> mx.array:
    """(N, h, w, C) moved by whole places, mirrored at its edges; left, up: pixels of a picture of `MOTION_GRID`."""
    rows, columns = (mx.array(_moved_from(n, distance)) for n, distance in zip(x.shape[1:3], (up, left), strict=True))
    return x[:, rows][:, :, columns]


def _moved_from(n: int, distance: float) -> np.ndarray:
    """From which of n places each one's value comes: what diffusers' bilinear reading of a flow over the grid and
    nearest sampling with reflection come to. The grid's own half pixel stays, as there."""
    place = np.arange(n) + (distance - 0.5) * n / MOTION_GRID
    place = (place + 0.5) % (2 * n)
    return np.clip(np.round(np.minimum(place, 2 * n - place) - 0.5), 0, n - 1).astype(np.int32)


def take_latents(latents: object) -> mx.array:
    """(N, h, w, C), or (N, F, h, w, C), float32 from an array of any library.

    Raises:
        UsageError: it is none, has another number of dimensions, or values that are not finite.
    """
    try:
        taken = latents if isinstance(latents, mx.array) else mx.array(np.asarray(latents))
    except (TypeError, ValueError, RuntimeError):  # MLX raises the last for text
        raise UsageError(f"latents should be an array (N, height, width, channels), got {valued(latents)}") from None
    if taken.ndim not in (4, 5) or not mx.issubdtype(taken.dtype, mx.floating):
        raise UsageError(
            f"latents should be of floating point and have shape (N, height, width, channels), got {valued(latents)}"
        )
    if not mx.isfinite(taken).all():
        raise UsageError("latents hold NaN or infinite values")
    return taken.astype(mx.float32)


def read_latents(file: Path) -> mx.array:
    """`latents` from a safetensors file: (N, C, h, w), channels first as in PyTorch -> (N, h, w, C) float32; a video's
    (N, F, C, h, w) -> (N, F, h, w, C).

    Raises:
        CheckpointError: no such tensor, or it has another number of dimensions, or values that are not finite.
    """
    tensors, _ = read_tensors(file)
    if "latents" not in tensors:
        raise CheckpointError(f"{file} should hold one tensor `latents`, got {', '.join(tensors) or 'none'}")
    latents = tensors["latents"]
    if latents.ndim not in (4, 5) or 0 in latents.shape:
        raise CheckpointError(f"{file}: latents should have shape (N, C, height, width), got {latents.shape}")
    latents = mx.moveaxis(latents.astype(mx.float32), -3, -1)
    if not mx.isfinite(latents).all():
        raise CheckpointError(f"{file}: latents hold NaN or infinite values")
    return latents
