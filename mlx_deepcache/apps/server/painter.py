"""What happens on the worker's thread: models loaded, jobs drawn, memory given back."""

from __future__ import annotations

import gc
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import Unreachable, UsageError
from .crew import CANCEL, END, FREE, NAP, STOP, Batch, Pace, ordered, told_by
from .jobs import Drawn, Job, Wanted
from .offers import Offers
from .plan import plan_of
from .refused import Refused, of_error
from .schema import NETS

if TYPE_CHECKING:
    import numpy as np

    from ...cache.prices import Front
    from ...checkpoints.checkpoint import Checkpoint
    from ...checkpoints.tokenizer import CLIPTokenizer
    from ...generation.pipeline import Generation, StableDiffusion
    from ...generation.settings import Settings
    from ..team import Team

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

    common: the options of `ModelOptions` that all models share, such as dtype; most_pixels: of a picture; split: what
    several machines share, see `Team`.
    """

    def __init__(self, offers: Offers, common: dict[str, Any], most_pixels: int, split: str | None = None):
        self.offers, self.common, self.most_pixels, self.split = offers, common, most_pixels, split
        self._team: Team | None = None
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

    @property
    def team(self) -> Team:
        """The machines that draw."""
        self._own()
        if self._team is None:
            from ..team import Team

            self._team = Team(self.split)
        return self._team

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
        """Have all that was named here, as no request makes the server ask the hub; the same on all machines.

        Raises:
            Failure: something cannot be had, or is damaged; or a machine has something else.
        """
        self.team.prepared(self._fetch)
        if not self.team.alone:
            self.team.check_alike(told_by(self.offers, self.common))

    def _fetch(self) -> None:
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
            Refused: it cannot be drawn.
            Unreachable: other machines are needed, and went.
        """
        if job.cancelled.is_set():
            raise Cancelled
        if not self.team.alone:
            ordered(self.team, job.wanted)
        self._draw(job, errands)

    def follow(self) -> None:
        """Draw what rank 0 takes, until it ends.

        Raises:
            Unreachable: it went.
        """
        while (order := ordered(self.team)) != END:
            if order is None:
                time.sleep(NAP)
            elif order == FREE:
                self.unload()
            else:
                with suppress(Cancelled, Refused):  # rank 0 says so
                    self._draw(Job(replace(order, previews=False, partials=0)), lambda: None)

    @property
    def nap(self) -> float | None:
        """Seconds after which others want to be told that there is nothing to do; None if there are no others."""
        return NAP if self._leads_others else None

    def rest(self) -> None:
        """Tell them so."""
        if self._leads_others:
            ordered(self.team)

    def free(self) -> None:
        """Free the models on all machines."""
        if self._leads_others:
            ordered(self.team, FREE)
        self.unload()

    def leave(self) -> None:
        """Free them, and let the others end."""
        if self._leads_others:
            ordered(self.team, END)
        self.unload()

    @property
    def _leads_others(self) -> bool:
        return self._team is not None and self._team.leads and not self._team.alone

    def _draw(self, job: Job, errands: Callable[[], None]) -> None:
        """What all machines do with a job, each for its part of every turn."""
        team, wanted = self.team, job.wanted
        pipe, settings, fit = self._agreed(partial(self._prepare, wanted))
        n = len(settings.seeds)
        together = team.at_once(n, min(team.gathered(fit)))
        batches = [slice(i, min(i + together, n)) for i in range(0, n, together)]
        turns = [batches[i : i + team.groups] for i in range(0, len(batches), team.groups)]
        for number, turn in enumerate(turns):
            if number and team.of_first(job.stopped.is_set()):
                break
            job.skipped.clear()
            job.batch(number, len(turns), sum(len(leg.plan.steps) for leg in settings.legs) * (1 + wanted.compare))
            mine = _rows(settings, turn[team.group]) if team.group < len(turn) else None
            for rows, drawn in zip(turn, self._turn(job, pipe, mine, errands), strict=True):
                if team.leads:
                    self._add(job, pipe, _rows(settings, rows), drawn)

    def _prepare(self, wanted: Wanted) -> tuple[StableDiffusion, Settings, int]:
        """The pipeline, the settings, and how many pictures to draw at once."""
        pipe = self.load(wanted)
        settings = self._checked(pipe.settings(self._prompt(wanted), seeds=wanted.seeds, **self._paths(wanted)))
        if wanted.compare:
            from ..compare import check_comparable

            check_comparable(settings)
        return pipe, settings, min(wanted.together, pipe.together(settings))

    def _agreed(self, work: Callable[[], Any]) -> Any:
        """What this machine's work returns, if all machines' did.

        Raises:
            Refused: a machine's failed.
        """
        result = refused = None
        try:
            result = work()
        except Exception as error:
            refused = self._refused(error)
        for failed in filter(None, self.team.gathered(refused)):
            raise Refused(*failed)
        return result

    def _refused(self, error: Exception) -> list:
        """What to refuse a job with, for all machines; named, if this is another than rank 0."""
        refused = of_error(error)
        return [refused.status, self.team.named(refused.message), refused.code, refused.param]

    def _turn(
        self, job: Job, pipe: StableDiffusion, settings: Settings | None, errands: Callable[[], None]
    ) -> list[Batch]:
        """What every machine draws of a job at a time, this one with these settings, or nothing.

        Raises:
            Cancelled: on all of them.
            Unreachable: they are not in step any more.
        """
        team, pace, drawn, begun = self.team, Pace(self.team, job), None, False
        try:
            begin = (lambda: None) if settings is None else partial(pipe.denoise, settings, halves=team.halves)
            run = team.begin(begin)
            begun = True
            if settings is not None:
                drawn = self._batch(job, pipe, settings, run, pace, errands)
        except Cancelled:
            pass
        except Unreachable:
            raise
        except Exception as error:
            if begun and team.paired:  # the other half waits for this one
                raise Unreachable(f"one of two machines failed in the middle of a picture: {error}") from error
            drawn = Batch(refused=self._refused(error))
        if pace.rest() == CANCEL:
            raise Cancelled
        return team.share(drawn, Batch)

    def _batch(
        self,
        job: Job,
        pipe: StableDiffusion,
        settings: Settings,
        run: Generation,
        pace: Pace,
        errands: Callable[[], None],
    ) -> Batch:
        from ..compare import no_cache

        images, stats = self._pictures(job, pipe, settings, run, pace, errands)
        drawn = Batch(images, stats)
        if job.wanted.compare and stats is not None:
            again = pipe.denoise(replace(settings, cache=no_cache()), halves=self.team.halves)
            drawn.uncached, drawn.stats_uncached = self._pictures(job, pipe, settings, again, pace, errands)
        return drawn

    def _pictures(
        self,
        job: Job,
        pipe: StableDiffusion,
        settings: Settings,
        run: Generation,
        pace: Pace,
        errands: Callable[[], None],
    ) -> tuple[list[np.ndarray], dict | None]:
        """A batch and what it cost, or what there is of it, and None, if it is stopped."""
        try:
            colours, stopped = None, False
            job.phase("encode")
            for progress in run:
                job.phase("denoise")
                job.step(progress.full, progress.change)
                if (state := pace.step()) == CANCEL:
                    raise Cancelled
                if job.wants_preview():
                    colours = colours or pipe.colours()
                    job.show(_preview(colours(progress.denoised)[0]))
                errands()
                if stopped := state == STOP:
                    break
            job.phase("decode")
            images = []
            if self.team.draws:
                for image in self._unfinished(pipe, settings, progress) if stopped else run.pictures():
                    if job.cancelled.is_set():
                        raise Cancelled
                    images.append(image)
            return images, None if stopped else run.stats()
        finally:
            run.close()

    def _add(self, job: Job, pipe: StableDiffusion, settings: Settings, drawn: Batch) -> None:
        """A batch to its job.

        Raises:
            Refused: it failed.
        """
        if drawn.refused is not None:
            raise Refused(*drawn.refused)
        _add_stats(job.stats, drawn.stats or {})
        others = drawn.uncached
        if drawn.stats_uncached is None:
            others = [None] * len(drawn.images)
        else:
            _add_seconds(job.stats, "seconds_uncached", drawn.stats_uncached)
        job.interrupted |= drawn.stats is None or (job.wanted.compare and drawn.stats_uncached is None)
        for image, other, prompt, seed in zip(drawn.images, others, settings.prompts, settings.seeds, strict=True):
            job.images.append(self._drawn(job.wanted, pipe, settings, image, other, prompt, seed))
        job.settings = job.images[0].settings

    def _unfinished(self, pipe: StableDiffusion, settings: Settings, progress: Any) -> Iterator[np.ndarray]:
        yield from settings.start.paste(pipe.decode(progress.denoised, settings.vae_tiling))

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
