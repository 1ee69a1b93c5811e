"""Text to image: what a Python user imports.

from mlx_deepcache import StableDiffusion

pipe = StableDiffusion.from_pretrained("sd15")
pipe("a photograph of an astronaut riding a horse", cache_interval=3).images[0].save("astronaut.png")
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from .._version import __version__
from ..backend.memory import limit_memory
from ..backend.ops import dtype_of, on_gpu
from ..cache.macs import unet_macs, work_macs
from ..cache.text import write
from ..checkpoints.adapters.applied import Addons
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.part import OtherVAE, find_controlnet, load_controlnet
from ..checkpoints.weights import quantize
from ..diffusion.levels import Level
from ..diffusion.noise import BatchNoise
from ..diffusion.schedule import Plan
from ..errors import Failure, UsageError
from ..media.pictures import Given, to_uint8
from ..nets.controlnet import Controlled, Controls
from ..nets.tiling import decode_tiled, tiled
from ..nets.unet_parts import Conditioning
from ..sampler import Denoiser, Progress, sample
from ..unet import UNet2DConditionModel
from .conditioning import encode
from .options import Control
from .report import device_name, dtype_name
from .settings import Settings, settings_for

COMPILE = ("auto", "on", "off")


@dataclass(frozen=True)
class Result:
    """images: PIL; latents: (N, h, w, C) float32, as they went into the VAE; stats: see `StableDiffusion.stats`."""

    images: list[Image.Image]
    latents: mx.array
    stats: dict


class StableDiffusion:
    """A model and the loop that draws with it. Components are read when first needed.

    keep: hold every component for the next call; without it each is freed once its phase is over, so that the most
    memory in use is that of the largest one. compile: run the U-Net through `mx.compile`; auto does on a GPU, as on the
    CPU it gains nothing. memory_limit: see `limit_memory`, in GB. loras: files, each by itself or with its
    scale; embeddings: files of textual inversion, each by itself or with the word that calls it. refiner: the model
    that draws the last steps (SDXL's refiner; Podell et al. 2023, section 2.5), without LoRAs and embeddings. quantize:
    4 or 8, bits of the U-Net's and text encoders' linear layers, after LoRAs; low_memory: never more than one component
    in memory, guidance's two halves one after the other, and large pictures decoded in tiles.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str = "auto",
        *,
        keep: bool = True,
        compile: str = "auto",
        memory_limit: float | None = None,
        loras: Sequence[str | Path | tuple[str | Path, float]] = (),
        embeddings: Sequence[str | Path | tuple[str | Path, str]] = (),
        refiner: Checkpoint | None = None,
        quantize: int | None = None,
        low_memory: bool = False,
    ):
        if compile not in COMPILE:
            raise UsageError(f"compile should be one of {', '.join(COMPILE)}, got {compile!r}")
        if quantize not in (None, 4, 8):
            raise UsageError(f"quantize should be 4 or 8 bits, got {quantize}")
        if refiner is not None and not (refiner.xl and checkpoint.xl):
            raise UsageError("a refiner goes with SDXL only; both models should be of that family")
        self.checkpoint = checkpoint
        self.dtype = dtype_of(dtype)
        self.keep = keep and not low_memory
        self.quantize, self.low_memory = quantize, low_memory
        self.compile = on_gpu() if compile == "auto" else compile == "on"
        self.budget = limit_memory(memory_limit)
        self.addons = Addons(checkpoint, loras, embeddings)
        shared = {"keep": keep, "compile": compile, "quantize": quantize, "low_memory": low_memory}
        self.refiner = None if refiner is None else StableDiffusion(refiner, dtype, **shared)
        self._peak: dict[str, int] = {}
        self._parts: dict = {}
        self._started: set[str] = set()  # parts whose weights are still being read
        self._seconds: dict[str, float] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | None = None,
        dtype: str = "auto",
        *,
        prediction_type: str | None = None,
        refiner: str | None = None,
        vae: str | None = None,
        **options,
    ) -> StableDiffusion:
        """model: a folder, a single file, a hub id, one of `hub.SHORT_NAMES`, or None for the bundled model; dtype:
        auto, float16, bfloat16 or float32; prediction_type: epsilon or v_prediction, if not what the model says;
        refiner: the same as model; vae: one in place of the model's own, a folder or hub id of an AutoencoderKL or
        AutoencoderTiny, or of a model that has one; options: as for the class.

        Raises:
            CheckpointError: the model cannot be found or is not supported, or a LoRA or embedding does not fit it.
            UsageError: no such dtype, prediction type or option.
        """
        half = dtype_of(dtype) == mx.float16
        second = None if refiner is None else Checkpoint.open(refiner, half=half)
        first = Checkpoint.open(model, half=half, prediction_type=prediction_type, vae=vae)
        return cls(first, dtype, refiner=second, **options)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The model, and its refiner if there is one."""
        return [self.checkpoint] if self.refiner is None else [self.checkpoint, self.refiner.checkpoint]

    def settings(self, prompt: str | Sequence[str], **options) -> Settings:
        """What to draw and how, complete and checked: see `settings_for`, which takes the same options."""
        refiner = None if self.refiner is None else self.refiner.checkpoint
        settings = settings_for(self.checkpoint, prompt, refiner=refiner, **options)
        for control in settings.controls:
            find_controlnet(control.model, self.checkpoint, self.dtype)  # better known now than once a bar is shown
        return settings

    def other_vae(self, model: str) -> tuple[nn.Module, mx.Dtype]:
        """A VAE that fits the model's latents, for previews, and the type to give it (see `OtherVAE.open`)."""
        other = OtherVAE.open(model, self.checkpoint.vae_config, half=self.dtype == mx.float16)
        dtype = mx.float32 if self.checkpoint.xl and other.config.force_upcast else self.dtype
        return other.load(dtype), dtype

    def denoise(self, settings: Settings, latents: mx.array | None = None) -> Iterator[Progress]:
        """Draw, up to the latents: yields after every step; stop iterating to cancel.

        latents: (N, h, w, C) standard normal, to start from in place of the seeds' own noise, also in a picture.

        Raises:
            UsageError: `latents` have another shape.
            Failure: the final latents are not finite.
        """
        self._seconds = {"load": 0.0, "encode": 0.0, "denoise": 0.0, "decode": 0.0}
        self._peak = dict.fromkeys(self._seconds, 0)  # a phase may have nothing to do
        noise, shape = self._noise(settings)
        if latents is not None and latents.shape != shape:
            raise UsageError(
                f"latents should have shape {_channels_first(shape)} for {len(settings.seeds)} pictures of "
                f"{settings.width} x {settings.height}, got {_channels_first(latents.shape)}"
            )
        x, keep, beside = self._first_latents(settings, latents, noise)
        for progress in self._loop(settings, settings.plan, x, noise, keep, beside):
            yield progress
        if self.refiner is not None:
            self.refiner._seconds, self.refiner._peak = self._seconds, self._peak
            given = replace(settings, controls=())  # a ControlNet is for the base model
            for refined in self.refiner._loop(given, settings.refiner_plan, progress.latents, noise, None, None):
                yield replace(refined, index=len(settings.plan.steps) + refined.index)
            progress = refined
        if not mx.isfinite(progress.latents).all():
            raise Failure(
                f"the final latents hold NaN or infinite values in {dtype_name(self.dtype)}; try --dtype float32, a "
                "lower --guidance-scale or another --scheduler, and check the checkpoint"
            )

    def _loop(self, settings: Settings, plan: Plan, x: mx.array, noise, keep, beside) -> Iterator[Progress]:
        """This model's share of the steps, with its own text encoders."""
        cond, guidance_scale = self._encode(settings)
        unet: UNet2DConditionModel = self._part("unet")
        controlled = [self._controlled(control) for control in settings.controls]
        with self._clock("denoise"):
            if self.compile and "compiled" not in self._parts:
                self._parts["compiled"] = unet.compiled()
            times, every_step = [step.here.t for step in plan.steps], settings.control_every_step
            denoiser = Denoiser(
                self._parts.get("compiled", unet),
                cond,
                plan,
                guidance_scale,
                beside=beside,
                controls=Controls(controlled, cond, times, every_step) if controlled else None,
                in_turn=self.low_memory,
            )
        steps = sample(denoiser, x, settings.cache, noise, keep)
        while True:
            with self._clock("denoise"):
                progress = next(steps, None)
            if progress is None:
                break
            yield progress
        del denoiser, steps, unet, controlled
        self._release("unet", "compiled", *(_key(control) for control in settings.controls))

    def decode(self, latents: mx.array, vae_tiling: str = "auto", source: Given | None = None) -> np.ndarray:
        """latents: (N, h, w, C) -> pictures (N, H, W, 3) in 0-255, decoded one by one; vae_tiling: see `tiled`; with a
        `source` that has a mask, every pixel outside the mask is the source's own.

        Raises:
            Failure: a picture holds values that are not finite.
        """
        vae, dtype = self._part("vae"), self._dtype_of_part("vae")
        tiling = "on" if self.low_memory and vae_tiling == "auto" else vae_tiling
        in_tiles = tiled(tiling, vae.config, latents.shape[1:3], dtype.size, self.budget)
        images = []
        with self._clock("decode"):
            for i in range(len(latents)):
                z = latents[i : i + 1].astype(dtype)
                image = decode_tiled(vae, z) if in_tiles else np.array(vae.decode(z).astype(mx.float32))
                if not np.isfinite(image).all():
                    raise Failure(
                        f"the VAE's picture holds NaN or infinite values in {dtype_name(dtype)}; try --dtype float32"
                    )
                images.append(image)
        del vae
        self._release("vae")
        drawn = to_uint8(np.concatenate(images))
        return drawn if source is None else source.paste(drawn)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        latents: mx.array | None = None,
        on_step: Callable[[Progress], None] | None = None,
        **options,
    ) -> Result:
        """Draw. options: those of `settings_for`; latents: see `denoise`; on_step: called after every step."""
        settings = self.settings(prompt, **options)
        steps = []
        for progress in self.denoise(settings, latents):
            steps.append(progress)
            if on_step is not None:
                on_step(progress)
        images = self.decode(steps[-1].latents, settings.vae_tiling, settings.source)
        return Result([Image.fromarray(image) for image in images], steps[-1].latents, self.stats(settings, steps))

    def stats(self, settings: Settings, steps: Sequence[Progress]) -> dict:
        """What the last picture cost: seconds by phase, each step's kind, U-Net multiply-adds against an uncached run,
        the most bytes that each cache remembered, what an adaptive cache decided and from which relative change, peak
        memory, and where it ran."""
        first = len(settings.plan.steps)
        macs, macs_uncached = self._macs(settings, steps[:first])
        if self.refiner is not None:
            more, more_uncached = self.refiner._macs(settings, steps[first:])
            macs, macs_uncached = macs + more, macs_uncached + more_uncached
        return {
            "seconds": {phase: round(seconds, 4) for phase, seconds in self._seconds.items()},
            "steps": ["full" if step.full else "cached" for step in steps],
            "full_steps": sum(step.full for step in steps),
            "cached_steps": sum(not step.full for step in steps),
            "unet_macs": macs,
            "unet_macs_uncached": macs_uncached,
            "caches": [write(policy) for policy in settings.cache.policies],
            "cache_bytes": {name: max(step.cache_bytes[name] for step in steps) for name in steps[-1].cache_bytes},
            "decisions": [
                {"step": step.index, "change": step.change, "full": step.full}
                for step in steps
                if step.change is not None
            ],
            "peak_memory_bytes": max(self._peak.values()),
            "peak_memory_bytes_by_phase": dict(self._peak),
            "device": device_name(),
            "dtype": dtype_name(self.dtype),
            "versions": {
                "mlx_deepcache": __version__,
                "mlx": version("mlx"),
                "python": platform.python_version(),
                "system": platform.platform(),
            },
        }

    def _macs(self, settings: Settings, steps: Sequence[Progress]) -> tuple[int, int]:
        """This model's multiply-adds in these steps, and those of an uncached run."""
        factor = self.checkpoint.vae_config.factor
        size = (settings.height // factor, settings.width // factor)
        batch = len(settings.seeds) * (2 if self._guided(settings) else 1)
        unet, branch = self.checkpoint.module("unet"), settings.cache.branch
        work = [call for step in steps for call in step.work]
        full, _ = unet_macs(unet, size, branch, work[0].tokens)
        return work_macs(unet, size, branch, work), batch * len(work) * full

    # Parts and phases

    def _noise(self, settings: Settings) -> tuple[Callable[[], mx.array], tuple[int, ...]]:
        """A source of noise for the batch, channels-last, and its shape."""
        config = self.checkpoint.vae_config
        shape = (config.latent_channels, settings.height // config.factor, settings.width // config.factor)
        source = BatchNoise(settings.rng, list(settings.seeds))
        channels_last = (len(settings.seeds), *shape[1:], shape[0])
        return lambda: mx.array(source.normal(shape)).transpose(0, 2, 3, 1), channels_last

    def _first_latents(self, settings: Settings, latents: mx.array | None, noise: Callable[[], mx.array]):
        """What the loop starts from: latents at the first step's level; for inpainting also the function that puts back
        what is not masked, or, for a net made for it, what it is shown beside the latents.

        Noise is drawn in the order of diffusers' pipelines: for the picture's latents, the start, the masked picture's.
        """
        source, plan = settings.source, settings.plan
        if source is None:
            return (noise() if latents is None else latents) * plan.init_scale, None, None
        level, keep, beside = plan.steps[0].here, None, None
        picture = mx.array(source.image)[None].astype(mx.float32) / 255 * 2 - 1
        filling = self.checkpoint.inpainting
        from_noise = source.mask is not None and settings.strength == 1
        clean = None if from_noise and filling else self._encode_picture(picture, noise())
        added = noise() if latents is None else latents
        x = added * plan.init_scale if from_noise else level.alpha * clean + level.sigma * added
        if source.mask is not None:
            mask = mx.array(source.mask)[None, ..., None].astype(mx.float32)
            factor = self.checkpoint.vae_config.factor
            small = mask[:, ::factor, ::factor]
            again = noise()
            if filling:
                hidden = self._encode_picture(picture * (1 - mask), again)
                beside = mx.concatenate([mx.broadcast_to(small, (*hidden.shape[:3], 1)), hidden], axis=-1)
            else:

                def keep(x: mx.array, level: Level) -> mx.array:
                    return small * x + (1 - small) * (level.alpha * clean + level.sigma * added)

        self._release("vae")
        return x, keep, beside

    def _encode_picture(self, picture: mx.array, noise: mx.array) -> mx.array:
        """picture: (1, H, W, 3) in [-1, 1], noise: (N, h, w, C) -> latents like the noise, one draw a picture."""
        vae, dtype = self._part("vae"), self._dtype_of_part("vae")
        with self._clock("encode"):
            latents = vae.encode(picture.astype(dtype), noise.astype(dtype)).astype(mx.float32)
            if not mx.isfinite(latents).all():
                raise Failure(
                    f"the VAE's latents hold NaN or infinite values in {dtype_name(dtype)}; try --dtype float32"
                )
        return latents

    def _guided(self, settings: Settings) -> bool:
        """Whether the U-Net also runs without the prompt: not if it is told the guidance scale (LCM)."""
        return settings.guidance_scale > 1 and self.checkpoint.unet_config.time_cond_proj_dim is None

    def _encode(self, settings: Settings) -> tuple[Conditioning, float | None]:
        """The U-Net's inputs, and the guidance scale to apply to its outputs."""
        names = self.checkpoint.text_encoders
        for name in () if self.low_memory else (*names, "unet") if self.keep else names:
            self._start(name)  # files are read while transformers, slow to import, makes the tokenizers
        tokenizers = [self._tokenizer(name.replace("text_encoder", "tokenizer")) for name in names]
        encoders = [partial(self._run_encoder, name) for name in names]
        guided = self._guided(settings)
        with self._clock("encode"):
            cond = encode(
                tokenizers,
                encoders,
                settings.prompts,
                [settings.negative_prompt] * len(settings.prompts) if guided else None,
                size=(settings.height, settings.width),
                zeros_for_none=bool(self.checkpoint.index.get("force_zeros_for_empty_prompt", True)),
                refiner=self.checkpoint.refiner,
                prompt_2=settings.prompt_2,
                negative_2=settings.negative_prompt_2,
                weighted=settings.prompt_weights,
                long=settings.long_prompt,
            )
            if self.checkpoint.unet_config.time_cond_proj_dim is not None:
                scale = mx.full((len(settings.prompts),), settings.guidance_scale)
                cond = Conditioning(cond.context, cond.pooled, cond.time_ids, scale)
            mx.eval(cond.context, cond.pooled)
        return cond, settings.guidance_scale if guided else None

    def _run_encoder(self, name: str, ids: mx.array, **options) -> tuple[mx.array, mx.array]:
        """A text encoder's output, after which it is not needed for this picture."""
        output = self._part(name)(ids, **options)
        mx.eval(output)
        self._release(name)
        return output

    def _controlled(self, control: Control) -> Controlled:
        key = _key(control)
        if key not in self._parts:
            with self._clock("load"):
                net = load_controlnet(control.model, self.checkpoint, self.dtype)
                mx.eval(net.parameters())
                self._parts[key] = net
        picture = mx.array(control.image)[None].astype(mx.float32) / 255
        return Controlled(self._parts[key], picture, control.scale, control.start, control.end)

    def _part(self, name: str):
        """A component, ready to be used."""
        if name not in self._parts or name in self._started:
            self._start(name)
            with self._clock("load"):
                mx.eval(self._parts[name].parameters())
            self._started.discard(name)
        return self._parts[name]

    def _start(self, name: str) -> None:
        """Begin to read a component's weights, without waiting for them."""
        if name not in self._parts:
            with self._clock("load"):
                self._parts[name] = self.checkpoint.load(name, self._dtype_of_part(name))
                self.addons.apply(self._parts[name], name)
                if self.quantize is not None and name != "vae":
                    self._quantize(name)
                mx.async_eval(self._parts[name].parameters())
            self._started.add(name)

    def _quantize(self, name: str) -> None:
        module = self._parts[name]
        if any(isinstance(layer, nn.QuantizedLinear) for layer in module.modules()):
            raise UsageError(f"{self.checkpoint.source.where(name)} is quantized already; leave out --quantize")
        quantize(module, self.quantize)

    def _tokenizer(self, name: str):
        if name not in self._parts:
            with self._clock("load"):
                self._parts[name] = self.addons.tokenizer(name)
        return self._parts[name]

    def _dtype_of_part(self, name: str) -> mx.Dtype:
        """SDXL's VAE overflows in float16, and says so in its config."""
        upcast = name == "vae" and self.checkpoint.xl and self.checkpoint.vae_config.force_upcast
        return mx.float32 if upcast else self.dtype

    def _release(self, *names: str) -> None:
        if not self.keep:
            for name in names:
                self._parts.pop(name, None)
            mx.clear_cache()

    @contextmanager
    def _clock(self, phase: str):
        mx.reset_peak_memory()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._peak[phase] = max(self._peak.get(phase, 0), mx.get_peak_memory())
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start


def _key(control: Control) -> str:
    return f"controlnet {control.model}"


def _channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    n, h, w, c = shape
    return (n, c, h, w)
