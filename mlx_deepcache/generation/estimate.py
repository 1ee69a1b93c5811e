"""How much memory a generation will take, phase by phase, before any of it is done."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..backend.footprint import ENDLESS, INDICES, Footprint, footprint
from ..cache.halves import Halves
from ..checkpoints.part import find_controlnet, find_upscaler, upscaler_module, vae_module
from ..checkpoints.weights import quantize
from ..errors import UsageError, called
from ..media.pictures import MOST_SLENDER
from ..nets.autoencoder import VAEConfig
from ..nets.clip import CLIPConfig, CLIPTextModel, CLIPVisionConfig
from ..nets.clip_vision import CLIPVisionModelWithProjection
from ..nets.controlnet import ControlNetConfig, ControlNetModel
from ..nets.labels import LabelConfig, LabelEmbedding
from ..nets.temporal_vae import TemporalVAEConfig, frames_together
from ..nets.tiling import TILE, tiled
from ..nets.tiny import TinyVAEConfig
from ..nets.unet_parts import Conditioning, Encoder, Prepared, UNetConfig
from ..nets.upscaler import CompactConfig, RRDBConfig, seen
from ..unet import UNet2DConditionModel
from .components import Components, upscaler_of
from .settings import Settings

TOKENS = 77  # of a prompt in one chunk
SPARE = 0.75  # the share of the memory to plan with, as an estimate may be a quarter off

Peak = Callable[..., int]
"""Bytes, of settings and whether the least is asked for: see `estimate`."""


def together(settings: Settings, peak: Peak, budget: int) -> int:
    """How many of the pictures to draw at once: as many as fit into `budget` bytes."""
    n, room = len(settings.seeds), SPARE * budget
    if peak(settings) <= room:
        return n
    two, four = (peak(_first(settings, count)) for count in (2, 4))
    return int(min(max((room - four) // max((four - two) / 2, 1) + 4, 1), n))


def check_fits(settings: Settings, peak: Peak, frugal: Peak, budget: int) -> None:
    """frugal: the peak with `low_memory`.

    Raises:
        UsageError: it cannot be drawn in `budget` bytes; says what can.
    """
    n = len(settings.seeds)
    if (needed := peak(settings, least=True)) <= budget:
        return
    one = _first(settings, 1)
    what = f"{settings.width} x {settings.height} pixels" + (f", {n} pictures at once" if n > 1 else "")
    if settings.frames is not None:
        what = f"{settings.frames} frames of {what}"
    amount = "more memory than can be counted" if needed >= ENDLESS else f"about {needed / 1e9:.1f} GB of memory"
    cures = []
    if settings.decode_chunk is not None:
        freely = replace(settings, options=replace(settings.options, decode_chunk=None))
        if peak(freely, least=True) <= budget:
            cures.append(f"without {called('decode_chunk', settings.decode_chunk)} it fits")
    if n > 1 and peak(one, least=True) <= budget:
        fit = bisect(range(2, n), False, key=lambda k: peak(_first(settings, k), least=True) > budget) + 1
        cures.append(f"{fit} at once would fit" if fit > 1 else "one at a time would fit")
    elif (size := _largest(one, peak, budget)) is not None:
        sides = (called(name, side) for name, side in zip(("width", "height"), size, strict=True))
        cures.append(f"the largest size that fits is {' '.join(sides)}")
    if frugal(one, least=True) <= budget:
        cures.append(f"with {called('low_memory')} it fits")
    if not cures:
        cures.append(f"try {called('low_memory')}, {called('quantize', 4)} or a smaller model")
    raise UsageError(f"{what} would take {amount}, and there are {budget / 1e9:.1f} GB; {', and '.join(cures)}")


def _first(settings: Settings, n: int) -> Settings:
    return settings.batch(settings.prompts[0], slice(n))


def _largest(settings: Settings, peak: Peak, budget: int) -> tuple[int, int] | None:
    """The largest (width, height) in pixels that fits, of the same proportions unless they are extreme."""
    h, w, channels = settings.latent_shape
    h, w = min(h, MOST_SLENDER * w), min(w, MOST_SLENDER * h)
    step, factor = 8, settings.height // settings.latent_shape[0]

    def size(scale: float) -> tuple[int, int]:
        return tuple(max(int(side * scale) // step * step, 1) for side in (h, w))

    fits, fails = 0.0, 1.0
    while (fails - fits) * max(h, w) > step:
        scale = (fits + fails) / 2
        shape = (*size(scale), channels)
        inside = peak(replace(settings, latent_shape=shape, noise=None), least=True) <= budget
        fits, fails = (scale, fails) if inside else (fits, scale)
    height, width = size(fits)
    return (width * factor, height * factor) if fits else None


def estimate(
    settings: Settings,
    models: Sequence[Components],
    *,
    halves: Halves,
    low_memory: bool,
    budget: int,
    least: bool = False,
) -> dict[str, int]:
    """Bytes at the peak of each phase, of MLX's arrays alone.

    halves, low_memory, budget: as the pipeline has them; least: how little it can be if each operation waits for the
    one before, which they do when the memory's limit is near; else as fast as can be. On the CPU this is within 25% of
    what was measured, see docs/measured.md; on a GPU it was never measured.
    """
    if (n := len(settings.seeds)) > 4:  # from here on, each takes as much as the one before
        given = {"halves": halves, "low_memory": low_memory, "budget": budget, "least": least}
        two, four = (estimate(_first(settings, count), models, **given) for count in (2, 4))
        return {phase: four[phase] + (n - 4) * (four[phase] - two[phase]) // 2 for phase in four}
    peaks = dict.fromkeys(("load", "encode", "denoise", "decode"), 0)
    held: dict[tuple, int] = {}  # weights that stay, by leg and part
    as_read: dict[tuple, int] = {}  # weights that are quantized once they are read

    def phase(name: str, parts: dict[tuple, Footprint], keep: bool) -> None:
        """One that loads these parts and then uses them in turn."""
        inside = held | {part: f.weights for part, f in parts.items()}
        read = held | {part: as_read.get(part, f.weights) for part, f in parts.items()}
        beside = max(f.least if least else f.most for f in parts.values()) + sum(f.output for f in parts.values())
        peaks["load"] = max(peaks["load"], sum(read.values()))
        peaks[name] = max(peaks[name], sum(inside.values()) + beside)
        held.update(inside if keep else {})

    def enlarge(net: str | None, h: int, w: int) -> None:
        if net is not None:
            config = find_upscaler(net)[1]
            sides = seen(config, h * checkpoint.vae_config.factor, w * checkpoint.vae_config.factor)
            phase("decode", {(0, upscaler_of(net)): _upscaler(config, models[0].dtype, *sides)}, keep)

    h, w = settings.latent_size(settings.legs[-1])
    checkpoint, keep = models[0].checkpoint, models[0].keep
    if 2 * n * h * w * checkpoint.vae_config.factor**2 >= INDICES:
        return dict.fromkeys(peaks, ENDLESS)
    vae, vae_dtype = checkpoint.vae_config, models[0].dtype_of("vae")
    if settings.image is not None:
        phase("encode", {(0, "vae"): _vae_encoder(vae, models[0].encodes_in, h, w)}, keep)
    for drawn in settings.legs:
        leg, model = drawn.model, models[drawn.model]
        config, dtype = model.checkpoint.unet_config, model.dtype
        size = settings.latent_size(drawn)
        if drawn.redraws:
            phase("decode", {(0, "vae"): _vae_decoder(vae, vae_dtype, settings.latent_shape[:2])}, keep)
            enlarge(settings.hires_net, *settings.latent_shape[:2])
            phase("encode", {(0, "vae"): _vae_encoder(vae, models[0].encodes_in, *size)}, keep)
        in_turn = low_memory or (halves.at_once == 1 and settings.cache.splits(drawn.plan))
        x = (n if in_turn or drawn.guidance_scale is None else 2 * n, *drawn.frames, *size)
        tokens = 1 if model.checkpoint.family.labelled is not None else TOKENS
        unet = {(leg, "unet"): _unet(config, dtype, model.bits_of("unet"), x, settings.cache.branch, tokens)}
        encoders = {name: model.checkpoint.module(name).config for name in model.checkpoint.family.encoders}
        texts = {(leg, name): _text_layers(encoder, dtype, model.bits_of(name)) for name, encoder in encoders.items()}
        if (seeing := model.checkpoint.family.sees) is not None:
            encoder = model.checkpoint.module(seeing).config
            texts[leg, seeing] = _picture_encoder(encoder, dtype, model.bits_of(seeing))
        if (labels := model.checkpoint.labels) is not None:
            texts[leg, model.checkpoint.family.labelled] = _labels(labels, dtype)
        nets = [find_controlnet(control.model, config, vae.factor, dtype)[1] for control in drawn.controls]
        controls = {(leg, i): _controlnet(net, dtype, x, vae.factor) for i, net in enumerate(nets)}
        if model.bits is not None:
            for _, name in (*texts, (leg, "unet")):
                as_read[leg, name] = _weights(model.checkpoint.module(name), dtype)
        if keep:  # it is read along with the text encoders
            held[leg, "unet"] = unet[leg, "unet"].weights
        if texts:
            phase("encode", texts, keep)
        phase("denoise", unet | controls, keep)
    tiling = "on" if low_memory and settings.vae_tiling == "auto" else settings.vae_tiling
    frames = drawn.frames if isinstance(vae, TemporalVAEConfig) else ()  # that are decoded together, and not in tiles
    room = budget - sum(held.values())
    if not frames and isinstance(vae, VAEConfig) and tiled(tiling, vae, (h, w), vae_dtype.size, room):
        h, w = min(h, TILE), min(w, TILE)
    if frames:
        chunk = settings.decode_chunk or frames_together(vae, (*frames, h, w), vae_dtype.size, room)
        frames = [min(chunk, *frames)]
    if checkpoint.family.decodes:
        phase("decode", {(0, "vae"): _vae_decoder(vae, vae_dtype, (*frames, h, w))}, keep)
    enlarge(settings.upscale, *settings.latent_size(settings.legs[-1]))
    return peaks


@lru_cache(16)
def _unet(
    config: UNetConfig, dtype: mx.Dtype, bits: int | None, x: tuple[int, ...], branch: int, tokens: int
) -> Footprint:
    """A full step; x: how many latents, perhaps frames, height and width."""
    unet = UNet2DConditionModel(config)
    if bits is not None:
        quantize(unet, bits)

    def call(latents: mx.array, *texts: mx.array):
        temb, cond = _conditioning(unet, texts or [mx.zeros((x[0], 0, 0), dtype)])
        return unet(latents, temb, cond, branch=branch), cond  # which serves for all steps

    latents = mx.zeros((*x, config.in_channels), dtype)
    return footprint(_typed(unet, dtype), call, latents, *_texts(config, dtype, x[0], tokens))


@lru_cache(16)
def _controlnet(config: ControlNetConfig, dtype: mx.Dtype, x: tuple[int, ...], factor: int) -> Footprint:
    """A full step, with its picture, or one a frame."""
    net = ControlNetModel(config)

    def call(latents: mx.array, picture: mx.array, *texts: mx.array):
        temb, cond = _conditioning(net, texts)
        return net(latents, temb, cond, net.embed_picture(picture)), cond

    latents = mx.zeros((*x, config.in_channels), dtype)
    count = x[1] if len(x) == 4 else 1
    picture = mx.zeros((count, x[-2] * factor, x[-1] * factor, config.conditioning_channels), dtype)
    return footprint(_typed(net, dtype), call, latents, picture, *_texts(config, dtype, x[0], TOKENS))


def _texts(config: UNetConfig, dtype: mx.Dtype, n: int, tokens: int) -> list[mx.array]:
    """What a family's encoders would have given: see `Conditioning`."""
    if config.cross_attention_dim is None:
        return []
    if config.video:
        return [mx.zeros((n, 1, config.cross_attention_dim), dtype), mx.zeros((n, 3))]
    texts = [mx.zeros((n, tokens, config.cross_attention_dim), dtype)]
    if config.addition_embed_type is not None:
        ids = 6 * config.addition_time_embed_dim
        texts.append(mx.zeros((n, config.projection_class_embeddings_input_dim - ids), dtype))
        texts.append(mx.zeros((n, 6)))
    return texts


def _conditioning(net: Encoder, texts: Sequence[mx.array]) -> tuple[mx.array, Prepared]:
    """A row of time embeddings, and what the net makes of the prompt."""
    context, *numbers = texts
    pooled, ids = (None, *numbers) if net.config.video else (*numbers, None, None)[:2]
    told = None if net.config.time_cond_proj_dim is None else mx.zeros(len(context))
    cond = net.prepare(Conditioning(context, pooled, ids, told))
    return net.time_embed(mx.zeros(1), cond)[0], cond


@lru_cache(16)
def _text_layers(config: CLIPConfig, dtype: mx.Dtype, bits: int | None) -> Footprint:
    """A prompt and a negative prompt."""
    net = CLIPTextModel(config)
    if bits is not None:
        quantize(net, bits)

    def call(x: mx.array) -> mx.array:
        for layer in net.encoder.layers:
            x = layer(x)
        return x

    return footprint(_typed(net, dtype), call, mx.zeros((2, TOKENS, config.hidden_size), dtype))


@lru_cache(16)
def _picture_encoder(config: CLIPVisionConfig, dtype: mx.Dtype, bits: int | None) -> Footprint:
    net = CLIPVisionModelWithProjection(config)
    if bits is not None:
        quantize(net, bits)
    pixels = mx.zeros((1, config.image_size, config.image_size, config.num_channels), dtype)
    return footprint(_typed(net, dtype), net, pixels)


@lru_cache(16)
def _labels(config: LabelConfig, dtype: mx.Dtype) -> Footprint:
    net = LabelEmbedding(config)
    return footprint(_typed(net, dtype), net, mx.zeros((2,), mx.int32))


@lru_cache(16)
def _vae_encoder(config: VAEConfig | TinyVAEConfig, dtype: mx.Dtype, h: int, w: int) -> Footprint:
    vae = vae_module(config)
    picture = mx.zeros((1, h * config.factor, w * config.factor, config.in_channels), dtype)
    return footprint(_typed(vae, dtype), vae.encode, picture)


@lru_cache(16)
def _vae_decoder(config: VAEConfig | TinyVAEConfig, dtype: mx.Dtype, size: tuple[int, ...]) -> Footprint:
    """size: of the latents, height and width, of a video's after the frames that are decoded together."""
    vae = vae_module(config)
    return footprint(_typed(vae, dtype), vae.decode, mx.zeros((1, *size, config.latent_channels), dtype))


@lru_cache(16)
def _upscaler(config: RRDBConfig | CompactConfig, dtype: mx.Dtype, height: int, width: int) -> Footprint:
    net = upscaler_module(config)
    return footprint(_typed(net, dtype), net, mx.zeros((1, height, width, 3), dtype))


def _weights(module: nn.Module, dtype: mx.Dtype) -> int:
    return sum(weight.size * dtype.size for _, weight in tree_flatten(module.parameters()))


def _typed(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The same with weights of this type, but for packed ones."""
    module.set_dtype(dtype)
    return module
