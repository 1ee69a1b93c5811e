"""A server's models: one is loaded, asked, and freed."""

from __future__ import annotations

import gc
import resource
import sys
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from .jobs import Wanted
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


@dataclass(frozen=True)
class Held:
    """What the loaded pipeline was made of."""

    model: str
    vae: str | None
    refiner: str | None
    loras: tuple[tuple[str, float], ...]
    embeddings: tuple[str, ...]


class Painter:
    """Has one pipeline at a time, which it loads and frees. All of it belongs to the thread that draws first.

    common: the options of `ModelOptions` that all models share, such as dtype; most_pixels: of a picture.
    """

    def __init__(self, offers: Offers, common: dict[str, Any], most_pixels: int):
        self.offers, self.common, self.most_pixels = offers, common, most_pixels
        self.loaded: Held | None = None
        self._pipe: StableDiffusion | None = None
        self._described: dict[str, Checkpoint] = {}
        self._tokenizers: dict[str, CLIPTokenizer] = {}
        self._thread: int | None = None

    def own(self) -> None:
        """MLX's streams belong to one thread, so this has to be the first one that came."""
        here = threading.get_ident()
        if self._thread is None:
            self._thread = here
        assert self._thread == here, "only the worker's thread may touch MLX"

    def load(self, wanted: Wanted) -> StableDiffusion:
        """The pipeline for these, alone in memory."""
        self.own()
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

    def prepare(self, wanted: Wanted) -> tuple[StableDiffusion, Settings]:
        """The pipeline, and a job's settings.

        Raises:
            UsageError, Failure: see `settings`; or it cannot be loaded.
        """
        pipe = self.load(wanted)
        return pipe, self._checked(pipe.settings(self._prompt(wanted), seeds=wanted.seeds, **self._paths(wanted)))

    def unload(self) -> None:
        """Free the models."""
        self.own()
        self._pipe, self.loaded = None, None
        gc.collect()
        import mlx.core as mx

        mx.clear_cache()

    def checkpoint(self, model: str) -> Checkpoint:
        """A model's description, without its weights."""
        self.own()
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

        self.own()
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

    def enlarge(self, image: np.ndarray, upscaler: str) -> np.ndarray:
        """(H, W, 3) uint8, enlarged by a net as often as it was made for."""
        self.own()
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
        self.own()
        import mlx.core as mx

        from ...backend.memory import machine_memory

        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        ours = {"active": mx.get_active_memory(), "cache": mx.get_cache_memory(), "peak": mx.get_peak_memory()}
        return {"machine": machine_memory(), "process": process} | ours
