"""What happens when nodes run: the one pipeline that is loaded, and pictures drawn with a bar, previews and a stop."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image

from mlx_deepcache.errors import CheckpointError, Failure, UsageError, named_as
from mlx_deepcache.generation.declared import options_of
from mlx_deepcache.generation.options import Control, ModelOptions

if TYPE_CHECKING:
    from mlx_deepcache.generation.pipeline import StableDiffusion
    from mlx_deepcache.generation.settings import Settings

PREVIEW_SIDE = 512  # pixels, the longest


@contextmanager
def running(names: dict[str, str]) -> Iterator[None]:
    """While a node runs, messages call options by these names, which are those of its inputs.

    Raises:
        Failure: there is no MLX here.
    """
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise Failure(
            f"MLX cannot be imported ({error}): these nodes draw on Macs with Apple Silicon, and on Linux, after "
            "`pip install mlx` with ComfyUI's Python"
        ) from None
    with named_as(names):
        yield


class Loaded:
    """The one pipeline that is held, for the thread that loaded it, as MLX's streams belong to one. It is freed when
    another is wanted, or once ComfyUI lets go of the description that it was loaded for: when it frees its memory, or
    runs a workflow that has no such thing."""

    def __init__(self):
        self.pipe: StableDiffusion | None = None
        self._wanted: ModelOptions | None = None
        self._thread: int | None = None
        self._let_go: weakref.finalize | None = None

    def get(self, wanted: ModelOptions) -> StableDiffusion:
        """The pipeline for these options.

        Raises:
            CheckpointError: see `StableDiffusion.from_pretrained`.
        """
        here = threading.get_ident()
        if self.pipe is None or (self._wanted, self._thread) != (wanted, here):
            from mlx_deepcache import StableDiffusion

            self.free()
            options = {o.name: getattr(wanted, o.name) for o in options_of(ModelOptions)}
            self.pipe = StableDiffusion.from_pretrained(keep=False, **options)
            self._wanted, self._thread = replace(wanted), here  # a copy, that the description itself can go
            self._let_go = weakref.finalize(wanted, self.free)
            self._let_go.atexit = False
        return self.pipe

    def free(self) -> None:
        """Give the memory back."""
        if self.pipe is None:
            return
        import mlx.core as mx

        self._let_go.detach()
        self.pipe = self._wanted = self._thread = self._let_go = None
        gc.collect()
        mx.clear_cache()

    @contextmanager
    def kept(self, keep: bool) -> Iterator[None]:
        """Whether the pipeline is held afterwards."""
        try:
            yield
        finally:
            if not keep:
                self.free()


LOADED = Loaded()


def pixels(image: torch.Tensor) -> list[np.ndarray]:
    """IMAGE (B, H, W, C) or MASK (B, H, W), in 0..1 -> B arrays (H, W, C) or (H, W) float32."""
    whole = image[None] if image.ndim == 2 else image
    return list(np.clip(whole.detach().cpu().float().numpy(), 0, 1))


def tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """(H, W, 3) uint8 each -> IMAGE (B, H, W, 3) float32 in 0..1."""
    return torch.from_numpy(np.stack(pictures).astype(np.float32) / 255)


def all_settings(
    pipe: StableDiffusion, prompt: str, seed: int, batch: int, options: dict[str, Any], shown: dict[str, list]
) -> list[Settings]:
    """Settings for so many pictures: for all together or, where the inputs hold several, for one after the other.

    shown: the pictures of `image` and `mask`; ControlNets among the options have theirs as lists.

    Raises:
        UsageError: an input has neither one picture nor as many as are drawn; or see `settings_for`.
    """
    controls: tuple[Control, ...] = options.pop("controls", ())
    counts = {name: len(pictures) for name, pictures in shown.items()}
    counts |= {f"{number}. control": len(control.image) for number, control in enumerate(controls, 1)}
    for name, n in counts.items():
        if n not in (1, batch):
            raise UsageError(f"{name} has {n} pictures and batch is {batch}: give it one, or as many as are drawn")
    together = all(n == 1 for n in counts.values())
    read = pipe.checkpoint.family.text or prompt != ""
    made = []
    for first in range(1 if together else batch):
        seeds = range(seed, seed + batch) if together else [seed + first]
        own = {name: pictures[first % len(pictures)] for name, pictures in shown.items()}
        steering = [replace(control, image=control.image[first % len(control.image)]) for control in controls]
        made.append(pipe.settings(prompt if read else None, seeds=seeds, controls=steering, **own, **options))
        if made[-1].frames is not None:
            raise UsageError("this model draws videos, and these nodes pictures; draw videos with generate.py")
    return made


class Bar:
    """ComfyUI's, over all steps of a node's run."""

    def __init__(self, total: int):
        self.done, self._bar = 0, comfy.utils.ProgressBar(total)

    def step(self, picture: np.ndarray | None) -> None:
        """One more is done; picture: (H, W, 3) uint8, what it looks like."""
        self.done += 1
        shown = None if picture is None else ("JPEG", Image.fromarray(picture), PREVIEW_SIDE)
        self._bar.update_absolute(self.done, preview=shown)


def steps_of(pipe: StableDiffusion, settings: Settings) -> int:
    """All that `draw` takes."""
    batches = math.ceil(len(settings.seeds) / pipe.together(settings))
    return batches * sum(len(leg.plan.steps) for leg in settings.legs)


def draw(pipe: StableDiffusion, settings: Settings, bar: Bar) -> Iterator[tuple[list[np.ndarray], dict]]:
    """Pictures, (H, W, 3) uint8, as many together as fit into the memory; and what each of these batches cost.

    Raises:
        comfy.model_management.InterruptProcessingException: it was stopped.
    """
    together = pipe.together(settings)
    for first in range(0, len(settings.seeds), together):
        some = settings.batch(settings.prompts[0], slice(first, first + together))
        with closing(pipe.denoise(some)) as drawn:
            _stop_if_told()
            look = _colours(pipe)
            for progress in drawn:
                bar.step(None if look is None else look(progress.denoised)[0])
                _stop_if_told()
            yield list(drawn.pictures()), drawn.stats()


def _stop_if_told() -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def _colours(pipe: StableDiffusion):
    """What shows latents, or None for those of which no colours are known."""
    try:
        return pipe.colours()
    except CheckpointError:
        return None
