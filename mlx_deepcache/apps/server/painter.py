"""What happens on the worker's thread: models loaded, jobs drawn, memory given back."""

from __future__ import annotations

import gc
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from .jobs import Drawn, Job, Wanted
from .offers import Offers
from .plan import plan_of
from .schema import NETS

if TYPE_CHECKING:
    import numpy as np

    from ...cache.prices import Front
    from ...checkpoints.checkpoint import Checkpoint
    from ...checkpoints.tokenizer import CLIPTokenizer
    from ...generation.pipeline import StableDiffusion
    from ...generation.settings import Settings

PREVIEW_SIDE = 512  # pixels, the longest


class Cancelled(Exception):
    """The job under way was cancelled."""


@dataclass(frozen=True)
class Held:
    """What the loaded pipeline was made of."""

    model: str
    vae: str | None
    refiner: str | None
    loras: tuple[tuple[str, float], ...]
    embeddings: tuple[str, ...]


class Painter:
    """Draws jobs with one pipeline, which it loads and frees. All of it belongs to the thread that draws first.

    common: the options of `ModelOptions` that all models share, such as dtype; most_pixels: of a picture.
    """

    def __init__(self, offers: Offers, common: dict[str, Any], most_pixels: int):
        self.offers, self.common, self.most_pixels = offers, common, most_pixels
        self.loaded: Held | None = None
        self._pipe: StableDiffusion | None = None
        self._described: dict[str, Checkpoint] = {}
        self._tokenizers: dict[str, CLIPTokenizer] = {}
        self._thread: int | None = None

    def _own(self) -> None:
        """MLX's streams belong to one thread, so this has to be the first one that came."""
        here = threading.get_ident()
        if self._thread is None:
            self._thread = here
        assert self._thread == here, "only the worker's thread may touch MLX"

    def load(self, wanted: Wanted) -> StableDiffusion:
        """The pipeline for these, alone in memory."""
        self._own()
        held = Held(wanted.model, wanted.vae, wanted.refiner, wanted.loras, wanted.embeddings)
        if held != self.loaded:
            from ...generation.pipeline import StableDiffusion

            self.unload()
            self._pipe = StableDiffusion.from_pretrained(
                self.offers.models.path(held.model),
                vae=None if held.vae is None else self.offers.vaes.path(held.vae),
                refiner=None if held.refiner is None else self.offers.refiners.path(held.refiner),
                loras=[(self.offers.loras.path(name), scale) for name, scale in held.loras],
                embeddings=[(self.offers.embeddings.path(name), name) for name in held.embeddings],
                **self.common,
            )
            self.loaded = held
        return self._pipe

    def unload(self) -> None:
        """Free the models."""
        self._own()
        self._pipe, self.loaded = None, None
        gc.collect()
        import mlx.core as mx

        mx.clear_cache()

    def checkpoint(self, model: str) -> Checkpoint:
        """A model's description, without its weights."""
        self._own()
        path = self.offers.models.path(model)
        if path not in self._described:
            self._described[path] = self._open(path)
        return self._described[path]

    def _open(self, path: str, **about: Any) -> Checkpoint:
        import mlx.core as mx

        from ...backend.ops import dtype_of
        from ...checkpoints.checkpoint import Checkpoint

        return Checkpoint.open(path, half=dtype_of(self.common.get("dtype", "auto")) == mx.float16, **about)

    def fetch(self) -> None:
        """Have all that was named here, as no request makes the server ask the hub.

        Raises:
            Failure: something cannot be had, or is damaged.
        """
        self._own()
        vae = next(iter(self.offers.vaes.named.values()), None)
        for path in self.offers.models.named.values():
            self._open(path, vae=vae).check_files()
        for path in self.offers.refiners.named.values():
            self._open(path).check_files()

    def _reads_text(self, model: str) -> bool:
        return self.checkpoint(model).family.text

    def settings(self, wanted: Wanted) -> Settings:
        """A job's settings, with nothing loaded.

        Raises:
            UsageError: see `settings_for`; or it is no picture, or too large.
        """
        from ...generation.settings import settings_for

        self._own()
        refiner = None if wanted.refiner is None else self._open(self.offers.refiners.path(wanted.refiner))
        return self._checked(
            settings_for(
                self.checkpoint(wanted.model),
                self._prompt(wanted),
                refiner=refiner,
                seeds=wanted.seeds,
                **self._paths(wanted),
            )
        )

    def _prompt(self, wanted: Wanted) -> list[str] | None:
        """None for models that read none, which clients send an empty one."""
        return list(wanted.prompts) if any(wanted.prompts) or self._reads_text(wanted.model) else None

    def _paths(self, wanted: Wanted) -> dict[str, Any]:
        """The options, with ControlNets and upscalers by their files."""
        options = dict(wanted.options)
        options |= {name: self.offers.upscalers.path(options[name]) for name in NETS if options.get(name) is not None}
        if options.get("controls"):
            find = self.offers.controlnets.path
            options["controls"] = [replace(control, model=find(control.model)) for control in options["controls"]]
        return options

    def _checked(self, settings: Settings) -> Settings:
        if settings.frames is not None:
            raise UsageError("videos are not served; draw them with generate.py")
        height, width = settings.size(settings.legs[-1])
        if height * width > self.most_pixels:
            size = f"{width} x {height}"
            raise UsageError(f"pictures have up to {self.most_pixels:,} pixels here, got {size}; ask for a smaller one")
        return settings

    def draw(self, job: Job, errands: Callable[[], None]) -> None:
        """All of a job's pictures. errands: called after each step.

        Raises:
            Cancelled: the job was.
            UsageError, Failure: it cannot be drawn.
        """
        wanted = job.wanted
        if job.cancelled.is_set():
            raise Cancelled
        pipe = self.load(wanted)
        settings = self._checked(pipe.settings(self._prompt(wanted), seeds=wanted.seeds, **self._paths(wanted)))
        if wanted.compare:
            from ..compare import check_comparable

            check_comparable(settings)
        n = len(settings.seeds)
        together = min(wanted.together, pipe.together(settings))
        batches = [slice(i, min(i + together, n)) for i in range(0, n, together)]
        for number, rows in enumerate(batches):
            if number and job.stopped.is_set():
                break
            job.skipped.clear()
            job.batch(number, len(batches), sum(len(leg.plan.steps) for leg in settings.legs) * (1 + wanted.compare))
            self._draw_batch(job, pipe, _rows(settings, rows), errands)

    def _draw_batch(self, job: Job, pipe: StableDiffusion, settings: Settings, errands: Callable[[], None]) -> None:
        from ..compare import no_cache

        images, stats = self._pictures(job, pipe, settings, errands)
        _add_stats(job.stats, stats or {})
        others = [None] * len(images)
        if job.wanted.compare and stats is not None:
            again, complete = self._pictures(job, pipe, replace(settings, cache=no_cache()), errands)
            if complete is not None:
                others = again
                _add_seconds(job.stats, "seconds_uncached", complete)
        for image, other, prompt, seed in zip(images, others, settings.prompts, settings.seeds, strict=True):
            job.images.append(self._drawn(job.wanted, pipe, settings, image, other, prompt, seed))
        job.settings = job.images[0].settings

    def _pictures(
        self, job: Job, pipe: StableDiffusion, settings: Settings, errands: Callable[[], None]
    ) -> tuple[list[np.ndarray], dict | None]:
        """A batch and what it cost, or what there is of it, and None, if it is stopped."""
        drawn = pipe.denoise(settings)
        try:
            colours, stopped = None, False
            job.phase("encode")
            for progress in drawn:
                job.phase("denoise")
                job.step(progress.full, progress.change)
                self._check(job)
                if job.wants_preview():
                    colours = colours or pipe.colours()
                    job.show(_preview(colours(progress.denoised)[0]))
                errands()
                if stopped := job.stopped.is_set() or job.skipped.is_set():
                    break
            job.phase("decode")
            images = []
            for image in self._unfinished(pipe, settings, progress) if stopped else drawn.pictures():
                self._check(job)
                images.append(image)
            job.interrupted |= stopped
            return images, None if stopped else drawn.stats()
        finally:
            drawn.close()

    def _unfinished(self, pipe: StableDiffusion, settings: Settings, progress: Any) -> Iterator[np.ndarray]:
        yield from settings.start.paste(pipe.decode(progress.denoised, settings.vae_tiling))

    def _check(self, job: Job) -> None:
        if job.cancelled.is_set():
            raise Cancelled

    def _drawn(
        self,
        wanted: Wanted,
        pipe: StableDiffusion,
        settings: Settings,
        image: np.ndarray,
        other: np.ndarray | None,
        prompt: str,
        seed: int,
    ) -> Drawn:
        from PIL import Image

        from ...generation.record import describe, lora_hash
        from ...generation.report import dtype_name
        from ...media.sheets import psnr

        named = replace(
            pipe.options,  # by the names of what is offered, as no path is told
            model=wanted.model,
            vae=wanted.vae,
            refiner=wanted.refiner,
            loras=tuple((Path(f"{name}.safetensors"), scale) for name, scale in wanted.loras),
            embeddings=(),
        )
        about = describe(settings, named, dtype_name(pipe.dtype), prompt, seed)
        about |= {name: wanted.options.get(name) for name in NETS if name in about}
        for said, control in zip(about.get("controls") or (), wanted.options.get("controls", ()), strict=True):
            said["model"] = control.model
        if wanted.loras:
            about["lora_hashes"] = {name: lora_hash(Path(self.offers.loras.path(name))) for name, _ in wanted.loras}
        if other is None:
            return Drawn(seed, Image.fromarray(image), about)
        return Drawn(seed, Image.fromarray(image), about, psnr(image, other), Image.fromarray(other))

    def enlarge(self, image: np.ndarray, upscaler: str) -> np.ndarray:
        """(H, W, 3) uint8, enlarged by a net as often as it was made for."""
        self._own()
        import mlx.core as mx

        from ...backend.ops import dtype_of
        from ...checkpoints.part import load_upscaler
        from ...nets.upscaler import upscaled

        dtype = dtype_of(self.common.get("dtype", "auto"))
        large = upscaled(load_upscaler(self.offers.upscalers.path(upscaler), dtype), image, dtype)
        mx.clear_cache()
        return large

    def plan(self, wanted: Wanted) -> dict:
        """What drawing it would do: its settings, which steps are full, and the U-Net's share of work."""
        settings = self.settings(wanted)
        return plan_of(settings, self.checkpoint(wanted.model))

    def tokens(self, model: str, text: str, weighted: bool) -> tuple[int, int] | None:
        """How many tokens a prompt has, and how many are read of one that is not long; None if the model reads none.
        weighted: see `prompts.parse`."""
        from ...generation.prompts import parse

        checkpoint = self.checkpoint(model)
        names = list(checkpoint.family.encoders.values())
        if not names:
            return None
        if model not in self._tokenizers:
            self._tokenizers[model] = checkpoint.source.tokenizer(names[0])
        tokenizer = self._tokenizers[model]
        pieces = parse(text) if weighted else [(text, 1.0)]
        return sum(len(tokenizer.encode(piece)) for piece, _ in pieces), tokenizer.length - 2

    def front(self, model: str) -> Front | None:
        """What caches cost this model in picture, if that was measured.

        Raises:
            Failure: the file with it is damaged.
        """
        from ...cache.prices import read
        from ...checkpoints.folder import find_prices

        file = find_prices(self.checkpoint(model).source.path)
        return None if file is None else read(file)

    def memory(self) -> dict[str, int]:
        """Bytes: the machine's, the most that this process had, and MLX's."""
        self._own()
        import mlx.core as mx

        from ...backend.memory import machine_memory

        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        ours = {"active": mx.get_active_memory(), "cache": mx.get_cache_memory(), "peak": mx.get_peak_memory()}
        return {"machine": machine_memory(), "process": process} | ours


def _rows(settings: Settings, rows: slice) -> Settings:
    noise = None if settings.noise is None else settings.noise[rows]
    return replace(settings, prompts=settings.prompts[rows], seeds=settings.seeds[rows], noise=noise)


def _preview(image: np.ndarray) -> Any:
    from PIL import Image

    shown = Image.fromarray(image)
    shown.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return shown


def _add_stats(all_of_it: dict, stats: dict) -> None:
    """Steps are the first batch's; work and seconds add up, and of bytes the most counts."""
    for key in ("caches", "full_steps", "cached_steps", "steps", "device", "dtype"):
        if key in stats:
            all_of_it.setdefault(key, stats[key])
    for key in ("unet_macs", "unet_macs_uncached"):
        all_of_it[key] = all_of_it.get(key, 0) + stats.get(key, 0)
    all_of_it["peak_memory_bytes"] = max(all_of_it.get("peak_memory_bytes", 0), stats.get("peak_memory_bytes", 0))
    held = all_of_it.setdefault("cache_bytes", {})
    for name, size in stats.get("cache_bytes", {}).items():
        held[name] = max(held.get(name, 0), size)
    _add_seconds(all_of_it, "seconds", stats)


def _add_seconds(all_of_it: dict, name: str, stats: dict) -> None:
    seconds = all_of_it.setdefault(name, {})
    for phase, value in stats.get("seconds", {}).items():
        seconds[phase] = round(seconds.get(phase, 0) + value, 4)
