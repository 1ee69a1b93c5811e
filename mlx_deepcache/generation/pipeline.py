"""Text to image: what a Python user imports.

from mlx_deepcache import StableDiffusion

pipe = StableDiffusion.from_pretrained("sd15")
pipe("a photograph of an astronaut riding a horse", cache_interval=3).images[0].save("astronaut.png")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from ..backend.memory import limit_memory
from ..backend.ops import dtype_of
from ..cache.halves import Halves
from ..checkpoints.adapters.applied import Addons
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.part import OtherVAE, find_controlnet, find_upscaler
from ..diffusion.noise import BatchNoise
from ..errors import Failure, UsageError, called
from ..fields import valued
from ..media.pictures import Given, to_uint8
from ..media.png import write_image
from ..media.video import check_format, write_video
from ..nets.temporal_vae import TemporalVAEConfig, decode_frames, frames_together
from ..nets.tiling import decode_tiled, tiled
from ..sampler import Progress
from .components import Components
from .declared import taken
from .estimate import check_fits, estimate, together
from .generation import Generation
from .options import ModelOptions
from .preview import LatentRGB, fitted, latent_rgb
from .report import Clock, dtype_name
from .settings import Settings, settings_for
from .starts import take_latents
from .tags import NamedLoras, take_loras


@dataclass(frozen=True)
class Result:
    """images: PIL; latents: (N, h, w, C) float32, as they went into the VAE; stats: see `report.stats`; videos: of a
    model that draws these, a list of frames each, instead of images, and latents are (N, F, h, w, C); fps: theirs."""

    images: list[Image.Image]
    latents: mx.array
    stats: dict
    videos: list[list[Image.Image]] = field(default_factory=list)
    fps: int | None = None

    def save(self, file: str | Path, number: int = 0) -> None:
        """Write one of the videos, as its file's suffix says (see `write_video`), or of the images, as PNG.

        Raises:
            UsageError: a video cannot be written in this format here.
            Failure: the file cannot be written.
        """
        file = Path(file)
        if not self.videos:
            write_image(file, np.asarray(self.images[number]))
            return
        check_format(file)
        write_video(file, [np.asarray(frame) for frame in self.videos[number]], self.fps)


class StableDiffusion:
    """A model, and perhaps its refiner, ready to draw. It holds weights only: what one generation needs, remembers and
    costs is a `Generation`'s own, and several may be open at once.

    keep: hold every component for the next call; without it each is freed once its phase is over, so that the most
    memory in use is that of the largest one. options: see `ModelOptions`; refiner: the model that draws the last steps
    (SDXL's refiner; Podell et al. 2023, section 2.5), without LoRAs and embeddings; low_memory: never more than one
    component in memory, guidance's two halves one after the other, and large pictures decoded in tiles; memory_limit:
    see `limit_memory`, in GB. Its attribute halves says who runs guidance's: this machine, unless it is told otherwise.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str = "auto",
        *,
        keep: bool = True,
        refiner: Checkpoint | None = None,
        **options,
    ):
        o: ModelOptions = taken(ModelOptions, {"dtype": dtype, **options})
        if refiner is not None and not (refiner.family.refinable and checkpoint.family.refinable):
            raise UsageError("a refiner goes with SDXL only; both models should be of that family")
        if not checkpoint.family.text and (o.embeddings or (o.loras and not checkpoint.video)):
            what = "embeddings are" if checkpoint.video else "LoRAs and embeddings are"
            raise UsageError(f"{what} for models that read a prompt, and this one reads none")
        self.options, self.dtype, self.low_memory = o, dtype_of(o.dtype), o.low_memory
        self.halves = Halves()
        self.budget = limit_memory(o.memory_limit)
        if o.lora_dir is not None and not Path(o.lora_dir).is_dir():
            raise UsageError(f"{called('lora_dir')} should be a folder, got {o.lora_dir!r}")
        self._held_as = {"keep": keep and not o.low_memory, "compile": o.compile, "bits": o.quantize}
        self.models, self._named = [], None
        self.use_loras(checkpoint, ())
        if refiner is not None:
            self.models.append(Components(refiner, self.dtype, **self._held_as))

    @classmethod
    def from_pretrained(
        cls, model: str | None = None, dtype: str = "auto", *, keep: bool = True, **options
    ) -> StableDiffusion:
        """model: a folder, a single file, a hub id, one of `hub.SHORT_NAMES`, or None for the bundled model; dtype:
        auto, float16, bfloat16 or float32; prediction_type: epsilon or v_prediction, if not what the model says;
        refiner: the same as model; vae: one in place of the model's own, a folder, file or hub id of an AutoencoderKL
        or AutoencoderTiny, or of a model that has one; options: as for the class.

        Raises:
            CheckpointError: the model cannot be found or is not supported, or a LoRA or embedding does not fit it.
            UsageError: an option has a value that cannot be.
        """
        o: ModelOptions = taken(ModelOptions, {"model": model, "dtype": dtype, **options})
        half = dtype_of(o.dtype) == mx.float16
        second = None if o.refiner is None else Checkpoint.open(o.refiner, half=half)
        first = Checkpoint.open(o.model, half=half, prediction_type=o.prediction_type, vae=o.vae)
        return cls(first, dtype, keep=keep, **options | {"refiner": second})

    def use_loras(self, checkpoint: Checkpoint, named: NamedLoras) -> None:
        """Have these LoRAs in the model beside its own; where they change, its networks are read anew."""
        if named != self._named:
            addons = Addons(checkpoint, [*self.options.loras, *named], self.options.embeddings)
            self.models[:1] = [Components(checkpoint, self.dtype, addons=addons, **self._held_as)]
            self._named = named

    def use_scheduler(self, config: dict | None) -> None:
        """Draw by this scheduler_config.json of diffusers in place of the model's own; None: by the model's own."""
        self.models[0].checkpoint = replace(self.checkpoint, other_scheduler=config)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.models[0].checkpoint

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The model, and its refiner if there is one."""
        return [components.checkpoint for components in self.models]

    def component(self, name: str) -> nn.Module:
        """A network by its name in the diffusers layout (unet, vae, text_encoder, ...), read if it was not."""
        return self.models[0].network(name)

    def settings(self, prompt: str | Sequence[str] | None = None, **options) -> Settings:
        """What to draw and how, complete and checked: see `settings_for`, which takes the same options."""
        refiner = self.checkpoints[1] if len(self.models) > 1 else None
        settings = settings_for(self.checkpoint, prompt, refiner=refiner, **options)
        take_loras(settings.prompts, self.options.lora_dir)
        unet, vae = self.checkpoint.unet_config, self.checkpoint.vae_config
        for control in settings.legs[0].controls:
            find_controlnet(control.model, unet, vae.factor, self.dtype)  # better known now than once a bar is shown
        for net in filter(None, (settings.upscale, settings.hires_net)):
            find_upscaler(net)
        return settings

    def other_vae(self, model: str) -> tuple[nn.Module, mx.Dtype]:
        """A VAE that fits the model's latents, for previews, and the type to give it (see `OtherVAE.open`)."""
        own, family = self.checkpoint.vae_config, self.checkpoint.family
        other = OtherVAE.open(model, own, half=self.dtype == mx.float16, scale=family.scaling_factor)
        upcast = family.upcasts_vae and other.config.force_upcast
        dtype = mx.float32 if upcast else self.dtype
        return other.load(dtype), dtype

    def colours(self) -> LatentRGB:
        """What shows latents in colours alone, for previews: see `latent_rgb` and `fitted`."""
        if (known := latent_rgb(self.checkpoint)) is not None:
            return known
        made = fitted(self.component("vae"))
        self.models[0].release("vae")
        return made

    def estimate(self, settings: Settings, *, least: bool = False) -> dict[str, int]:
        """Bytes that drawing these together will take at the peak of each phase: see `estimate`."""
        return estimate(settings, self.models, **self._room, least=least)

    @property
    def _room(self) -> dict:
        return {"halves": self.halves, "low_memory": self.low_memory, "budget": self.budget}

    def together(self, settings: Settings) -> int:
        """How many of these pictures to draw at once: as many as fit into the memory; with `low_memory` one."""
        return 1 if self.low_memory else together(settings, self._peak, self.budget)

    def hold(self, settings: Settings) -> None:
        """Keep every component for the next batch, if one such picture fits beside them."""
        for keep in (not self.low_memory, False):
            self._held_as["keep"] = keep
            for components in self.models:
                components.keep = keep
            if not keep or self._peak(settings.batch(settings.prompts[0], slice(1))) <= self.budget:
                break

    def _peak(self, settings: Settings, least: bool = False, frugal: bool = False) -> int:
        """frugal: as with `low_memory`."""
        given = self._room | {"low_memory": self.low_memory or frugal, "least": least}
        models = [model.frugal() for model in self.models] if frugal else self.models
        return max(estimate(settings, models, **given).values())

    def denoise(
        self,
        settings: Settings,
        latents: mx.array | None = None,
        noise: BatchNoise | None = None,
    ) -> Generation:
        """Draw, up to the latents: iterate for its steps; stop iterating to cancel.

        latents: (N, h, w, C), or (N, F, h, w, C), standard normal, to start from in place of the seeds' own noise, also
        in a picture; noise: draws in place of the seeds' generators, with the methods of `BatchNoise`.

        Raises:
            UsageError: `latents` have another shape, or it cannot be done in the memory there is.
            Failure: the final latents are not finite.
        """
        settings = settings if latents is None else replace(settings, noise=take_latents(latents))
        check_fits(settings, self._peak, partial(self._peak, frugal=True), self.budget)
        return Generation(self, settings, noise)

    def decode(
        self,
        latents: mx.array,
        vae_tiling: str = "auto",
        given: Given | None = None,
        decode_chunk: int | None = None,
    ) -> np.ndarray:
        """latents: (N, h, w, C) -> pictures (N, H, W, 3) in 0-255, decoded one by one, or (N, F, h, w, C) -> videos (N,
        F, H, W, 3); vae_tiling: see `tiled`; decode_chunk: see `decode_frames`; with a `given` picture that has a mask,
        every pixel outside the mask is its own.

        Raises:
            Failure: a picture holds values that are not finite, or is all one colour.
        """
        latents, channels = take_latents(latents), self.checkpoint.vae_config.latent_channels
        video = self.checkpoint.video
        if latents.shape[-1] != channels or (video and latents.ndim != 5):
            frames = "frames, " * video
            raise UsageError(f"latents should have shape (N, {frames}height, width, {channels}), got {latents.shape}")
        images = np.stack(list(self.decode_each(latents, vae_tiling, decode_chunk, Clock())))
        return images if given is None else given.paste(images)

    def decode_each(self, latents: mx.array, vae_tiling: str, chunk: int | None, clock: Clock) -> Iterator[np.ndarray]:
        """The pictures, (H, W, 3) in 0-255, or videos, (F, H, W, 3), one after the other."""
        components = self.models[0]
        with clock.phase("load"):
            vae, dtype = components.to_run("vae"), components.dtype_of("vae")
        tiling = "on" if self.low_memory and vae_tiling == "auto" else vae_tiling
        temporal, room = isinstance(vae.config, TemporalVAEConfig), self.budget - mx.get_active_memory()
        in_tiles = not temporal and tiled(tiling, vae.config, latents.shape[-3:-1], dtype.size, room)
        for i in range(len(latents)):
            with clock.phase("decode"):
                z = latents[i : i + 1].astype(dtype)
                if temporal:
                    together = chunk or frames_together(vae.config, z.shape[1:4], dtype.size, room)
                    image = decode_frames(vae, z[0], together)[None]
                elif z.ndim == 5:
                    image = np.stack([_decoded(vae, frame[None], in_tiles) for frame in z[0]], axis=1)
                else:
                    image = _decoded(vae, z, in_tiles)
                if not np.isfinite(image).all():
                    raise Failure(
                        f"the VAE's picture holds NaN or infinite values in {dtype_name(dtype)}; try "
                        + called("dtype", "float32")
                    )
                if (image == image[..., :1, :1, :]).all():
                    raise Failure(
                        "the VAE's picture is all one colour, which is a fault of the device or of the checkpoint; try "
                        + " or ".join([called("vae_tiling", "on"), called("dtype", "float32")])
                        + ", and check the VAE"
                    )
            yield to_uint8(image)[0]
        del vae
        components.release("vae")

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        on_step: Callable[[Progress], None] | None = None,
        **options,
    ) -> Result:
        """Draw. options: see `Options`; on_step: called after every step."""
        if on_step is not None and not callable(on_step):
            raise UsageError(f"on_step should be a function, called after every step, got {valued(on_step)}")
        run = self.denoise(self.settings(prompt, **options))
        for progress in run:
            if on_step is not None:
                on_step(progress)
        drawn = run.decode()
        if drawn.ndim == 5:
            videos = [[Image.fromarray(frame) for frame in video] for video in drawn]
            return Result([], run.latents, run.stats(), videos, run.settings.fps)
        return Result([Image.fromarray(image) for image in drawn], run.latents, run.stats())


def _decoded(vae: nn.Module, z: mx.array, in_tiles: bool) -> np.ndarray:
    return decode_tiled(vae, z) if in_tiles else np.array(vae.decode(z).astype(mx.float32))
