"""A batch of pictures being drawn: what its four doors do, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..cache.halves import Halves
from ..cache.macs import control_macs
from ..checkpoints.folder import read_prompts
from ..diffusion.noise import BatchNoise
from ..errors import Failure, called
from ..nets.controlnet import Controls
from ..nets.unet_parts import Conditioning
from ..nets.upscaler import upscaled
from ..sampler import Denoiser, Progress, sample
from .components import Components, name_of, upscaler_of
from .conditioning import at_size, encode, label, nothing, see
from .prompts import parse
from .report import Clock, dtype_name, stats
from .settings import Leg, Settings
from .starts import Draw, Started
from .tags import note_only_text, note_unknown, take_loras

if TYPE_CHECKING:
    from .pipeline import StableDiffusion


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
    ):
        prompts, self._loras = take_loras(settings.prompts, pipe.options.lora_dir)
        told = (*dict.fromkeys(prompts), settings.prompt_2, settings.negative_prompt, settings.negative_prompt_2)
        note_unknown(list(dict.fromkeys(prompts)), read_prompts(pipe.checkpoint.source.path))
        note_only_text(told, weighted=not settings.plain_prompt)
        self.pipe, self.settings, self.clock = pipe, replace(settings, prompts=prompts), Clock()
        self.steps: list[Progress] = []
        self.control_macs = 0
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
        for number, image in enumerate(self.pipe.decode_each(latents, settings.vae_tiling, None, self.clock)):
            pixels = mx.array(change(self._upscaled(image, net)))[None].astype(mx.float32) / 255 * 2 - 1
            changed.append(self._encoded(pixels, None if spread is None else spread[number : number + 1]))
        components.release("vae", upscaler_of(net))
        return mx.concatenate(changed)

    def sample(
        self, leg: Leg, components: Components, cond: Conditioning, started: Started, draw: Draw | None = None
    ) -> Iterator[Progress]:
        """A leg's steps; draw: the noise that some solvers add."""
        halves = self.pipe.halves if leg.guidance_scale is not None else Halves()
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
        for image in self.pipe.decode_each(self.latents, settings.vae_tiling, settings.decode_chunk, self.clock):
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
