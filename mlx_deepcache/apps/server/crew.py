"""Jobs drawn by a server's machines, perhaps one alone: rank 0 takes them, and all draw their batches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from ...cache.text import NAMES
from ...errors import Failure, Unreachable
from ...generation.options import Control
from .jobs import Drawn, Job, Wanted
from .offers import Offers
from .painter import Painter
from .refused import Refused, of_error
from .schema import NETS

if TYPE_CHECKING:
    import numpy as np

    from ...generation.generation import Generation
    from ...generation.pipeline import StableDiffusion
    from ...generation.settings import Settings
    from ..team import Team

PREVIEW_SIDE = 512  # pixels, the longest
NAP = 0.05  # seconds between asking for something to do: waiting for a message, MLX keeps a core busy
FREE, END = "free", "end"  # the models' memory; the server
GO, STOP, CANCEL = "go", "stop", "cancel"


class Cancelled(Exception):
    """The job under way was cancelled."""


@dataclass
class Batch:
    """What came of some pictures of a job: these, (H, W, 3) uint8, what they cost, None if they were stopped, and the
    same without a cache; or what it is refused for."""

    images: list[np.ndarray] = field(default_factory=list)
    stats: dict | None = None
    uncached: list[np.ndarray] | None = None
    stats_uncached: dict | None = None
    refused: list | None = None


class Pace:
    """The steps of a turn, in which every machine draws a batch of a job, or none. They are taken together, so that all
    end at the same one when rank 0 is asked to. errands: called after each step."""

    def __init__(self, team: Team, job: Job, errands: Callable[[], None]):
        self.team, self.job, self.errands, self.state, self.over = team, job, errands, GO, False

    def step(self, drawn: bool = False) -> str:
        """After each step: what rank 0 wants; drawn: whether this machine has no more to do."""
        job = self.job
        asked = CANCEL if job.cancelled.is_set() else STOP if job.stopped.is_set() or job.skipped.is_set() else GO
        told = self.team.gathered([asked, drawn])
        self.state, self.over = told[0][0], all(done for _, done in told)
        return self.state

    def rest(self) -> str:
        """Wait for the others; what rank 0 wants at last."""
        while not self.over:
            self.step(drawn=True)
        return self.state


class Crew:
    """The machines that draw, each with a painter. All of it belongs to the worker's thread.

    split: what several machines share, see `Team`.
    """

    def __init__(self, painter: Painter, split: str | None = None):
        self.painter, self.split = painter, split
        self._team: Team | None = None

    @property
    def team(self) -> Team:
        """The machines that draw."""
        self.painter.own()
        if self._team is None:
            from ..team import Team

            self._team = Team(self.split)
        return self._team

    def fetch(self) -> None:
        """See `Painter.fetch`; all machines have to have the same.

        Raises:
            Failure: something cannot be had, or is damaged; or a machine has something else.
        """
        self.team.prepared(self.painter.fetch)
        if not self.team.alone:
            self.team.check_alike(told_by(self.painter.offers, self.painter.common))

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
                self.painter.unload()
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
        self.painter.unload()

    def leave(self) -> None:
        """Free them, and let the others end."""
        if self._leads_others:
            with suppress(Unreachable):  # which have ended already
                ordered(self.team, END)
        self.painter.unload()

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
        pipe, settings = self.painter.prepare(wanted)
        pipe.halves = self.team.halves
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
        team, pace, drawn, begun = self.team, Pace(self.team, job, errands), None, False
        try:
            begin = (lambda: None) if settings is None else partial(pipe.denoise, settings)
            run = team.begin(begin)
            begun = True
            if settings is not None:
                drawn = self._batch(pipe, settings, run, pace)
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

    def _batch(self, pipe: StableDiffusion, settings: Settings, run: Generation, pace: Pace) -> Batch:
        from ..compare import no_cache

        images, stats = self._pictures(pipe, settings, run, pace)
        drawn = Batch(images, stats)
        if pace.job.wanted.compare and stats is not None:
            again = pipe.denoise(replace(settings, cache=no_cache()))
            drawn.uncached, drawn.stats_uncached = self._pictures(pipe, settings, again, pace)
        return drawn

    def _pictures(
        self, pipe: StableDiffusion, settings: Settings, run: Generation, pace: Pace
    ) -> tuple[list[np.ndarray], dict | None]:
        """A batch and what it cost, or what there is of it, and None, if it is stopped."""
        job = pace.job
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
                pace.errands()
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
            about["lora_hashes"] = {
                name: lora_hash(Path(self.painter.offers.loras.path(name))) for name, _ in wanted.loras
            }
        if other is None:
            return Drawn(seed, Image.fromarray(image), about)
        return Drawn(seed, Image.fromarray(image), about, psnr(image, other), Image.fromarray(other))


def ordered(team: Team, order: Wanted | str | None = None) -> Wanted | str | None:
    """What rank 0 orders, at every machine: a job, `FREE`, `END`, or nothing."""
    from ..messages import pack, unpack

    return unpack(team.machines.gather(pack(order))[0], [Wanted, Control, *NAMES.values()])


def told_by(offers: Offers, common: dict[str, Any]) -> dict[str, str]:
    """What a machine would serve, for `Team.check_alike`."""
    import mlx.core as mx

    told = {"mlx_deepcache": __version__, "mlx": mx.__version__}
    told |= {name: json.dumps(value, default=str) for name, value in common.items()}
    for shelf in vars(offers).values():
        for name, path in shelf.found.items():
            told |= {f"the {shelf.what} {name}{of}": said for of, said in _files(path)}
    return told


def _files(path: str) -> Iterator[tuple[str, str]]:
    """Each of a model's files, by its name in it, and what tells it."""
    from pathlib import Path

    from ...checkpoints.checkpoint import Checkpoint
    from ...checkpoints.weights import component_files
    from ..team import sampled, weight_files

    place = Path(path)
    if place.is_file():
        yield "", sampled(place)
        return
    try:
        if (place / "config.json").is_file():
            files = ((file, place / file) for file in component_files(place))
        else:
            files = weight_files(Checkpoint.open(path))
        yield from ((f", {name}", sampled(file)) for name, file in files)
    except Failure:
        yield "", "damaged"


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
