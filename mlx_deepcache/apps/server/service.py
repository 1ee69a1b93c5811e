"""What all routes share: a request is checked here, becomes a job, and is watched until it ends."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import Failure, UsageError
from ...fields import valued
from ...generation.declared import taken
from ...generation.options import ModelOptions, Options
from ...generation.tags import named_loras
from .crew import Crew
from .jobs import Job, Jobs, Wanted
from .offers import Offers
from .painter import Painter
from .refused import Refused
from .schema import CACHING, NETS
from .worker import Worker


@dataclass(frozen=True)
class Limits:
    """images: of a job; pixels: of a picture; batch: drawn together; queue: jobs that may wait; body: bytes."""

    images: int = 16
    pixels: int = 4_194_304
    batch: int = 4
    queue: int = 16
    body: int = 64 * 2**20


@dataclass
class Chosen:
    """What is used where a request names none; clients may change it while the server runs."""

    model: str
    vae: str | None = None
    refiner: str | None = None
    rng: str | None = None
    clip_skip: int | None = None
    cache: dict[str, Any] = field(default_factory=dict)


class Service:
    """common: options of `ModelOptions` for all models; cache: of `Options`, where a request says nothing of caches;
    idle, keep: seconds, see `Worker` and `Jobs`; outputs: a folder in which pictures are kept; split: see `Crew`."""

    def __init__(
        self,
        offers: Offers,
        limits: Limits | None = None,
        common: dict[str, Any] | None = None,
        cache: dict[str, Any] | None = None,
        idle: float = 300,
        keep: float = 600,
        say: Callable[[str], None] = lambda text: None,
        outputs: Path | None = None,
        split: str | None = None,
    ):
        self.offers, self.limits, self.say, self.outputs = offers, limits or Limits(), say, outputs
        vae, refiner = (next(iter(shelf.names()), None) for shelf in (offers.vaes, offers.refiners))
        self.chosen = Chosen(offers.default, vae, refiner, cache=dict(cache or {}))
        taken(ModelOptions, dict(common or {}))
        taken(Options, self.chosen.cache)
        self.jobs = Jobs(keep)
        self.painter = Painter(offers, dict(common or {}), self.limits.pixels)
        self.crew = Crew(self.painter, split)
        self.worker = Worker(self.crew, self.limits.queue, idle, say)

    def wanted(
        self,
        prompt: str | Sequence[str] | None,
        options: dict[str, Any],
        *,
        model: str | None = None,
        vae: str | None = None,
        refiner: str | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        n: int = 1,
        loras: Sequence[tuple[str, float]] = (),
        tags: bool = True,
        together: int | None = None,
        chosen: Chosen | None = None,
        ignored: Sequence[str] = (),
        **rest: Any,
    ) -> Wanted:
        """A request's pictures, checked as far as no weights are needed.

        seed: of the first of n pictures, random if it is None or negative; seeds: one a picture; tags: whether prompts
        name LoRAs; together: at most so many at once; rest: of `Wanted`.

        Raises:
            UsageError: a value that cannot be.
            Refused: a name that is not offered, or more than is allowed.
        """
        chosen = chosen or self.chosen
        prompts = [prompt or ""] if prompt is None or isinstance(prompt, str) else list(prompt)
        for text in prompts:
            if not _is_unicode(text):
                raise UsageError(f"a prompt should be text in UTF-8, got {valued(text)}")
        seeds = self._seeds(seed, seeds, max(n, len(prompts)))
        if len(prompts) == 1:
            prompts *= len(seeds)
        if len(prompts) != len(seeds):
            raise UsageError(f"there should be one prompt, or one a seed ({len(seeds)}), got {len(prompts)}")
        if tags and self.offers.loras.places:
            read = [named_loras(text) for text in prompts]
            if len({found for _, found in read}) > 1:
                raise UsageError("prompts of pictures that are drawn together should name the same LoRAs")
            prompts, loras = [text for text, _ in read], [*loras, *read[0][1]]
        options = dict(options)
        if chosen.cache and not any(name in options for name in CACHING):
            options |= chosen.cache
        own = {"rng": chosen.rng, "clip_skip": chosen.clip_skip}
        options = {name: value for name, value in own.items() if value is not None} | options
        model = chosen.model if model is None else model
        vae, refiner = vae or chosen.vae, refiner or chosen.refiner
        self._check_names(model, vae, refiner, loras, options)
        taken(Options, options)
        texts = [*prompts, options.get("negative_prompt") or ""]
        embeddings = tuple(name for name in self.offers.embeddings.names() if any(_names(text, name) for text in texts))
        height, width = options.get("height"), options.get("width")
        if height and width and height * width > self.limits.pixels:
            most = f"pictures have up to {self.limits.pixels:,} pixels here"
            raise UsageError(f"{most}, got {width} x {height}; ask for a smaller one")
        most = self.limits.batch if together is None else min(together, self.limits.batch)
        return Wanted(
            model,
            tuple(prompts),
            tuple(seeds),
            options,
            vae,
            refiner,
            tuple((name, float(scale)) for name, scale in loras),
            embeddings,
            most,
            ignored=tuple(ignored),
            **rest,
        )

    def submit(self, wanted: Wanted, name: str | None = None) -> Job:
        """Raises Refused: the queue is full, or there is a job of this name."""
        job = Job(wanted, name)
        self.jobs.add(job)
        if self.outputs is not None:
            job.done.add_done_callback(lambda done: self._keep(done.result()))
        try:
            self.worker.put(job)
        except Refused:
            self.jobs.drop(job)
            raise
        return job

    def _keep(self, job: Job) -> None:
        """Write a job's pictures into the folder for them."""
        from ...generation.record import save_png

        when = time.strftime("%Y%m%d-%H%M%S", time.localtime(job.created))
        for index, drawn in enumerate(job.images):
            file = self.outputs / f"{when}-{job.id}-{index}.png"
            try:
                save_png(file, np.asarray(drawn.pixels), drawn.settings, replace=False)
            except (Failure, FileExistsError) as error:
                self.say(f"{file} was not written: {error}")

    def _seeds(self, seed: int | None, seeds: Sequence[int] | None, n: int) -> list[int]:
        if seeds is not None and seed is not None:
            raise UsageError("seed and seeds are the same; give one of them")
        n = n if seeds is None else len(seeds)
        if not 1 <= n <= self.limits.images:
            raise UsageError(f"a job has 1 to {self.limits.images} pictures here, got {n}")
        if seeds is not None:
            return list(seeds)
        first = secrets.randbelow(2**32) if seed is None or seed < 0 else seed
        return list(range(first, first + n))

    def _check_names(self, model: str, vae: str | None, refiner: str | None, loras: Sequence, options: dict) -> None:
        self.offers.models.path(model)
        if vae is not None:
            self.offers.vaes.path(vae)
        if refiner is not None:
            self.offers.refiners.path(refiner)
        for name, _ in loras:
            self.offers.loras.path(name)
        for name in NETS:
            if options.get(name) is not None:
                self.offers.upscalers.path(options[name])
        for control in options.get("controls", ()):
            self.offers.controlnets.path(control.model)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


def _names(text: str, word: str) -> bool:
    """Whether a prompt names an embedding by its word."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None
