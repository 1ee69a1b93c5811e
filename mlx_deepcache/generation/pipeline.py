"""Text to image: what a Python user imports.

from mlx_deepcache import StableDiffusion

pipe = StableDiffusion.from_pretrained("sd15")
pipe("a photograph of an astronaut riding a horse", cache_interval=3).images[0].save("astronaut.png")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
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
from ..cache.macs import control_macs
from ..checkpoints.adapters.applied import Addons
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import read_prompts
from ..checkpoints.part import OtherVAE, find_controlnet, find_upscaler
from ..diffusion.noise import BatchNoise
from ..errors import Failure, UsageError, called
from ..fields import valued
from ..media.pictures import Given, to_uint8
from ..media.png import write_image
from ..media.video import check_format, write_video
from ..nets.controlnet import Controls
from ..nets.temporal_vae import TemporalVAEConfig, decode_frames, frames_together
from ..nets.tiling import decode_tiled, tiled
from ..nets.unet_parts import Conditioning
from ..nets.upscaler import upscaled
from ..sampler import Denoiser, Progress, sample
from .components import Components, name_of, upscaler_of
from .conditioning import at_size, encode, label, nothing, see
from .estimate import check_fits, estimate, together
from .options import ModelOptions, taken
from .preview import LatentRGB, fitted, latent_rgb
from .prompts import parse
from .report import Clock, dtype_name, stats
from .settings import Leg, Settings, settings_for
from .starts import Draw, Started, take_latents
from .tags import NamedLoras, note_only_text, note_unknown, take_loras


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
    see `limit_memory`, in GB.
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
        return estimate(settings, self.models, low_memory=self.low_memory, budget=self.budget, least=least)

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
        given = {"low_memory": self.low_memory or frugal, "budget": self.budget, "least": least}
        models = [model.frugal() for model in self.models] if frugal else self.models
        return max(estimate(settings, models, **given).values())

    def denoise(
        self,
        settings: Settings,
        latents: mx.array | None = None,
        noise: BatchNoise | None = None,
        halves: Halves | None = None,
    ) -> Generation:
        """Draw, up to the latents: iterate for its steps; stop iterating to cancel.

        latents: (N, h, w, C), or (N, F, h, w, C), standard normal, to start from in place of the seeds' own noise, also
        in a picture; noise: draws in place of the seeds' generators, with the methods of `BatchNoise`; halves: who runs
        guidance's, if not this machine alone.

        Raises:
            UsageError: `latents` have another shape, or it cannot be done in the memory there is.
            Failure: the final latents are not finite.
        """
        settings = settings if latents is None else replace(settings, noise=take_latents(latents))
        check_fits(settings, self._peak, partial(self._peak, frugal=True), self.budget)
        return Generation(self, settings, noise, halves)

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
        images = np.stack(list(self._decode(latents, vae_tiling, decode_chunk, Clock())))
        return images if given is None else given.paste(images)

    def _decode(self, latents: mx.array, vae_tiling: str, chunk: int | None, clock: Clock) -> Iterator[np.ndarray]:
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


class Generation(Iterator[Progress]):
    """One batch of pictures being drawn: iterate for its steps, then `decode` them and ask for `stats`.

    Its clock, its steps and its noise are its own. The four doors that every task goes through are `encode`,
    `prepare_latents`, `sample` and `decode`; iterating calls the first three for each leg.
    """

    def __init__(
        self,
        pipe: StableDiffusion,
        settings: Settings,
        noise: BatchNoise | None = None,
        halves: Halves | None = None,
    ):
        prompts, self._loras = take_loras(settings.prompts, pipe.options.lora_dir)
        told = (*dict.fromkeys(prompts), settings.prompt_2, settings.negative_prompt, settings.negative_prompt_2)
        note_unknown(list(dict.fromkeys(prompts)), read_prompts(pipe.checkpoint.source.path))
        note_only_text(told, weighted=not settings.plain_prompt)
        self.pipe, self.settings, self.clock = pipe, replace(settings, prompts=prompts), Clock()
        self.steps: list[Progress] = []
        self.control_macs = 0
        self._halves = halves or Halves()
        self._noise = BatchNoise(settings.rng, list(settings.seeds)) if noise is None else noise
        self._legs = self._run()

    def __next__(self) -> Progress:
        progress = next(self._legs)
        self.steps.append(progress)
        return progress

    def close(self) -> None:
        """Cancel: the caches and all else that is under way is freed."""
        self._legs.close()

    @property
    def latents(self) -> mx.array:
        """(N, h, w, C) or (N, F, h, w, C) float32, after the last step taken."""
        return self.steps[-1].latents

    def noise(self, shape: tuple[int, ...] | None = None) -> mx.array:
        """The batch's next noise, (N, h, w, C) or of another shape, from one generator a picture; drawn channels
        first."""
        return self._drawn(self._noise.normal, self.settings.shape[1:] if shape is None else shape)

    def _spread(self) -> mx.array:
        """The same for a VAE's encoder."""
        return self._drawn(self._noise.spread, self.settings.shape[1:])

    @staticmethod
    def _drawn(draw: Callable[[tuple[int, ...]], np.ndarray], shape: tuple[int, ...]) -> mx.array:
        *frames, h, w, channels = shape
        return mx.moveaxis(mx.array(draw((*frames, channels, h, w))), -3, -1)

    def prepare_latents(self) -> Started:
        """What the loop starts from."""
        settings = self.settings
        plan, spreads = settings.legs[0].plan, self.pipe.models[0].checkpoint.vae_config.spreads
        spread = self._spread if spreads else lambda: None
        started = settings.start.latents(plan, self.noise, spread, settings.noise, self._encode_picture)
        self.pipe.models[0].release("vae")
        return started

    def encode(self, number: int = 0) -> Conditioning:
        """What the U-Net of a leg reads; with guidance for twice as many pictures, first what they should not be."""
        settings, leg = self.settings, self.settings.legs[number]
        components = self.pipe.models[leg.model]
        checkpoint, names = components.checkpoint, components.checkpoint.family.encoders
        if checkpoint.family.sees is not None:
            return self._see(leg, components)
        if checkpoint.family.labelled is not None:
            return self._label(leg, components)
        if not names:
            return nothing(len(settings.seeds), self.pipe.dtype)
        with self.clock.phase("load"):
            for name in () if self.pipe.low_memory else (*names, "unet") if components.keep else names:
                components.start(name)  # files are read while the tokenizers are made
            tokenizers = [components.tokenizer(name) for name in names.values()]
        with self.clock.phase("encode"):
            cond = encode(
                tokenizers,
                [partial(self._run_encoder, components, name) for name in names],
                settings.prompts,
                None if leg.guidance_scale is None else [settings.negative_prompt] * len(settings.prompts),
                size=settings.size(leg),
                zeros_for_none=bool(checkpoint.index.get("force_zeros_for_empty_prompt", True)),
                family=checkpoint.family,
                prompt_2=settings.prompt_2,
                negative_2=settings.negative_prompt_2,
                weighted=not settings.plain_prompt,
                long=settings.long_prompt,
                clip_skip=settings.clip_skip or 0,
            )
            if leg.told is not None:
                cond = replace(cond, guidance=mx.full((len(settings.prompts),), leg.told))
            mx.eval(cond.context, cond.pooled)
        return cond

    def _see(self, leg: Leg, components: Components) -> Conditioning:
        """What the U-Net reads of a picture."""
        settings, name = self.settings, components.checkpoint.family.sees
        with self.clock.phase("load"):
            encoder = components.network(name)
        with self.clock.phase("encode"):
            cond = see(
                encoder,
                settings.start.whole,
                len(settings.seeds),
                guided=leg.guidance_scale is not None,
                fps=settings.fps,
                motion_bucket=settings.motion_bucket,
                noise_aug=settings.noise_aug,
            )
            mx.eval(cond.context)
        del encoder
        components.release(name)
        return cond

    def _label(self, leg: Leg, components: Components) -> Conditioning:
        """What the U-Net reads of a class."""
        settings, name = self.settings, components.checkpoint.family.labelled
        with self.clock.phase("load"):
            embedding = components.network(name)
        with self.clock.phase("encode"):
            guided = leg.guidance_scale is not None
            cond = label(embedding, settings.class_label, len(settings.seeds), guided=guided)
            mx.eval(cond.context)
        del embedding
        components.release(name)
        return cond

    def _draw(self, leg: Leg) -> Draw:
        """The batch's noise for a leg; of another size it is drawn from the seeds anew."""
        if leg.scale == 1:
            return self.noise
        settings = self.settings
        self._noise = BatchNoise(settings.rng, list(settings.seeds))
        return partial(self.noise, (*settings.latent_size(leg), settings.latent_shape[-1]))

    def _redraw(
        self, latents: mx.array, net: str | None, change: Callable[[np.ndarray], np.ndarray], draw: Draw
    ) -> mx.array:
        """See `starts.Redraw`."""
        settings, components = self.settings, self.pipe.models[0]
        spread, changed = draw() if components.checkpoint.vae_config.spreads else None, []
        for number, image in enumerate(self.pipe._decode(latents, settings.vae_tiling, None, self.clock)):
            pixels = mx.array(change(self._upscaled(image, net)))[None].astype(mx.float32) / 255 * 2 - 1
            changed.append(self._encoded(pixels, None if spread is None else spread[number : number + 1]))
        components.release("vae", upscaler_of(net))
        return mx.concatenate(changed)

    def sample(
        self, leg: Leg, components: Components, cond: Conditioning, started: Started, draw: Draw | None = None
    ) -> Iterator[Progress]:
        """A leg's steps; draw: the noise that some solvers add."""
        halves = self._halves if leg.guidance_scale is not None else Halves()
        with self.clock.phase("load"):
            unet, nets = components.to_run("unet"), [components.controlled(control) for control in leg.controls]
        with self.clock.phase("denoise"):
            times = [step.here.t for step in leg.plan.steps]
            controls = Controls(nets, cond, times, self.settings.control_every_step, leg.attend) if nets else None
            denoiser = Denoiser(
                unet,
                cond,
                leg.plan,
                leg.guidance_scale,
                beside=started.beside,
                controls=controls,
                inner=leg.attend,
                in_turn=self.pipe.low_memory,
                halves=halves,
            )
        with closing(sample(denoiser, started.x, self.settings.cache, draw or self.noise, started.keep)) as steps:
            while True:
                with self.clock.phase("denoise"):
                    progress = next(steps, None)
                if progress is None:
                    break
                yield progress
        if controls is not None:
            size, tokens = started.x.shape[1:-1], denoiser.tokens
            done = sum(pictures * control_macs(net, size, cut, tokens) for net, pictures, cut in controls.ran)
            self.control_macs += halves.total(done)

    def pictures(self) -> Iterator[np.ndarray]:
        """Decode: each picture once it is there, (H, W, 3) in 0-255, or video, (F, H, W, 3); outside of a mask they are
        the picture's that they started from."""
        settings = self.settings
        for image in self.pipe._decode(self.latents, settings.vae_tiling, settings.decode_chunk, self.clock):
            yield self._upscaled(settings.start.paste(image[None])[0], settings.upscale)
        self.pipe.models[0].release(upscaler_of(settings.upscale))

    def _upscaled(self, image: np.ndarray, model: str | None) -> np.ndarray:
        """(H, W, 3) uint8, enlarged by a net, if there is one."""
        if model is None:
            return image
        with self.clock.phase("load"):
            net = self.pipe.models[0].upscaler(model)
        with self.clock.phase("decode"):
            return upscaled(net, image, self.pipe.dtype)

    def decode(self) -> np.ndarray:
        """All `pictures`, (N, H, W, 3) or (N, F, H, W, 3)."""
        return np.stack(list(self.pictures()))

    def stats(self) -> dict:
        """What it cost: see `report.stats`."""
        estimated = self.pipe.estimate(self.settings)
        return stats(self.settings, self.pipe.models, self.steps, self.control_macs, self.clock, estimated)

    def _run(self) -> Iterator[Progress]:
        self.pipe.use_loras(self.pipe.checkpoint, self._loras)
        started, progress = self.prepare_latents(), None
        settings, reached, legs = self.settings, [started.x], self.settings.legs
        for number, leg in enumerate(legs):
            components, first = self.pipe.models[leg.model], len(self.steps)
            draw = self._draw(leg)
            if number:
                started = Started(leg.start(reached, draw, self._redraw))
            if not number or legs[number - 1].model != leg.model:
                cond = self.encode(number)
            elif legs[number - 1].scale != leg.scale:
                cond = at_size(cond, components.checkpoint.family, settings.size(leg), len(settings.seeds))
            for taken_step in self.sample(leg, components, cond, started, draw):
                progress = replace(taken_step, index=first + taken_step.index)
                yield progress
            reached.append(progress.latents)
            following = None if leg is legs[-1] else legs[number + 1]
            if following is None or following.model != leg.model or following.redraws:
                components.release("unet", *map(name_of, leg.controls))
        if not mx.isfinite(progress.latents).all():
            raise Failure(
                f"the final latents hold NaN or infinite values in {dtype_name(self.pipe.dtype)}; try "
                + " or ".join(self._suspects())
            )

    def _suspects(self) -> list[str]:
        """What to change if numbers get out of hand, the likeliest first."""
        settings, options = self.settings, self.pipe.options
        texts = [] if settings.plain_prompt else [*settings.prompts, settings.negative_prompt or ""]
        heavy = any(abs(weight) > 2 for text in texts for _, weight in parse(text))
        suspects = {
            "smaller weights in the prompt": heavy,
            f"a smaller scale in {called('loras')}": bool(options.loras),
            f"without {called('embeddings')}": bool(options.embeddings),
            called("dtype", "float32"): self.pipe.dtype != mx.float32,
            f"a lower {called('guidance_scale')}": settings.guidance_scale > 1,
        }
        found = [cure for cure, likely in suspects.items() if likely]
        return [*found, f"another {called('scheduler')}, and check the checkpoint"]

    def _run_encoder(self, components: Components, name: str, ids: mx.array, **options) -> tuple[mx.array, mx.array]:
        """A text encoder's output, after which it is not needed for this batch."""
        with self.clock.phase("load"):
            encoder = components.network(name)
        output = encoder(ids, **options)
        mx.eval(output)
        components.release(name)
        return output

    def _encode_picture(self, picture: mx.array, noise: mx.array | None) -> mx.array:
        """picture: (1, H, W, 3) in [-1, 1], or one for each of the batch; noise: see `AutoencoderKL.encode` -> the
        batch's latents, (N, h, w, C)."""
        latents = self._encoded(picture, noise)
        return mx.broadcast_to(latents, (len(self.settings.seeds), *latents.shape[1:]))

    def _encoded(self, picture: mx.array, noise: mx.array | None) -> mx.array:
        """The same without repeating one picture's."""
        components = self.pipe.models[0]
        with self.clock.phase("load"):
            vae, own, dtype = components.network("vae"), components.dtype_of("vae"), components.encodes_in
        with self.clock.phase("encode"):
            if dtype != own:
                vae.set_dtype(dtype)
            latents = vae.encode(picture.astype(dtype), None if noise is None else noise.astype(dtype))
            if dtype != own:  # exactly what they were
                mx.eval(latents)
                vae.set_dtype(own)
            latents = latents.astype(mx.float32)
            if not mx.isfinite(latents).all():
                raise Failure(
                    f"the VAE's latents hold NaN or infinite values in {dtype_name(dtype)}; try "
                    + called("dtype", "float32")
                )
        return latents
