"""What can be asked for: every option, declared once.

A field of `ModelOptions` or `Options` is the keyword in Python and, by its declaration, the flag with its help and
group, the check with its message, the default that a model has for it, what a picture records of it and how that is
read back, and its name in A1111's text. Whoever shows options asks `options_of`.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..diffusion.noise import GENERATORS
from ..diffusion.schedulers import SCHEDULERS, TIMESTEPS
from ..errors import UsageError
from ..media.pictures import FITS
from .declared import option, option_of, options_of
from .kinds import BETWEEN, DECIBELS, PART, SHARE, Check, Kind, at_least, that

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np
    from PIL.Image import Image

    from ..cache.composition import Policy as CachingPolicy
    from ..checkpoints.checkpoint import Checkpoint

    File = Path | str
    Model = File
    Seed = int | str
    Picture = File | Image | np.ndarray | bytes
    Pictures = Picture | list[Picture]
    Latents = File | mx.array | np.ndarray
    Lora = File | tuple[File, float]
    Embedding = File | tuple[File, str | None]
    Motion = tuple[float, float]
    Label = int | str
    Sides = tuple[int, int, int, int]
    Policy = CachingPolicy | str

PICTURE, MODEL, HOW = "what to draw", "which model draws it", "how it is drawn"
VIDEO = "videos (of a picture: --model svd --image FILE; of a prompt: --frames N)"
START, CONTROL, REFINER = "from a picture", "ControlNet (repeat the flags for several)", "SDXL refiner"
HIRES = "hires fix: draw small, enlarge, and draw over it"
MACHINE, CACHE, FILES = "precision, speed and memory", "caches: the same picture, nearly, in less time", "files"
GROUPS = (PICTURE, MODEL, START, HIRES, VIDEO, CONTROL, REFINER, HOW, MACHINE, CACHE)

PICTURES, VIDEOS, CLIPS = "pictures", "videos", "videos of a prompt"  # that are drawn
LABELLED, FREE = "pictures of a class", "pictures without a prompt"

SWITCH = ("auto", "on", "off")
DTYPES = ("float16", "bfloat16", "float32")
# What A1111 calls them
A1111_SAMPLERS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler-a": "Euler a",
    "heun": "Heun",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-karras": "DPM++ 2M Karras",
    "dpm++2m-sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
    "ddpm": "DDPM",
}
A1111_RNGS = {"torch": "CPU", "torch-cuda": "NV", "mlx": "MLX"}
A1111_UPSCALERS = {
    "latent": "Latent",
    "latent-antialias": "Latent (antialiased)",
    "latent-bicubic": "Latent (bicubic)",
    "latent-bicubic-antialias": "Latent (bicubic antialiased)",
    "latent-nearest": "Latent (nearest)",
    "latent-nearest-exact": "Latent (nearest-exact)",
    "lanczos": "Lanczos",
}
MOST_LAYERS = 32  # of the largest text encoder
A1111_SKIPS = {layers: str(layers + 1) for layers in range(MOST_LAYERS)}  # counts the last layer too


@dataclass(frozen=True)
class Control:
    """A ControlNet and what it is to do. model: a folder or hub id; image: what it follows (a file or Pillow's, for a
    video a folder, an animation or a list; in complete settings (F, H, W, 3) uint8, F = 1 for a picture); scale: the
    factor on what it adds; start, end: the share of the steps that it takes part in."""

    model: Model = option(
        MISSING,
        "a ControlNet: a folder, a .safetensors file, or a hub id, owner/name[:file]",
        CONTROL,
        flag="--controlnet",
    )
    image: Pictures = option(
        MISSING,
        "the edges, pose, ... to follow; with --frames one a frame, a folder of pictures or an animation",
        CONTROL,
        flag="--control-image",
    )
    scale: float = option(1.0, "how strictly it is followed (1)", CONTROL, flag="--control-scale", span=(0, 2, 0.05))
    start: float = option(
        0.0,
        "the share of the steps before it starts (0)",
        CONTROL,
        flag="--control-start",
        check=PART,
        span=(0, 1, 0.05),
    )
    end: float = option(
        1.0, "the share after which it stops (1)", CONTROL, flag="--control-end", check=PART, span=(0, 1, 0.05)
    )

    def __post_init__(self):
        for o in options_of(Control):
            object.__setattr__(self, o.name, o.take(getattr(self, o.name)))
        if not self.start < self.end:
            raise UsageError(f"a ControlNet should start before it ends, got {self.start} and {self.end}")


A_CONTROL = Kind(
    "a Control",
    None,
    str,
    that(lambda value: isinstance(value, Control)),
    lambda control: {o.name: o.record(control) for o in options_of(Control)},
)


@dataclass(frozen=True)
class ModelOptions:
    """What a pipeline is made of: see `StableDiffusion.from_pretrained`."""

    model: Model | None = option(
        None,
        "a folder from convert.py or in the diffusers layout, a single .safetensors file in the original layout, a hub "
        "id (owner/name[@revision][:file]), or sd15, sd21, sdxl, sdxl-refiner, sdxl-turbo, sd-turbo, svd, svd-xt, "
        "ddpm-cifar10, ddpm-church, ddpm-bedroom, ddpm-celebahq, ldm-celebahq, emoji-ddpm; default: the small "
        "text-to-image model that comes with the package",
        MODEL,
        a1111="Model",
    )
    vae: Model | None = option(
        None,
        "decode with another VAE: a folder, .safetensors file or hub id (owner/name[:file]) of one (AutoencoderKL or "
        "AutoencoderTiny, that is TAESD), or of a model that has one",
        MODEL,
    )
    loras: tuple[Lora, ...] = option(
        (),
        "change the model by a LoRA (safetensors, or a hub id, owner/name[:file]), SCALE times as strongly as it was "
        "trained; repeatable",
        MODEL,
        flag="--lora",
    )
    lora_dir: Model | None = option(
        None,
        "a folder of LoRAs, for prompts that name them: <lora:name:0.8>",
        MODEL,
        metavar="FOLDER",
        recorded=False,
    )
    embeddings: tuple[Embedding, ...] = option(
        (),
        "a textual inversion (safetensors, or a hub id, owner/name[:file]), and the word that calls it in prompts; "
        "repeatable",
        MODEL,
        flag="--embedding",
    )
    prediction_type: str | None = option(
        None,
        "what the U-Net predicts; default: what the model says (a single file of SD 2.x often does not)",
        MODEL,
        choices=("epsilon", "v_prediction"),
    )
    refiner: Model | None = option(None, "the model that draws the last steps, such as sdxl-refiner", REFINER)
    dtype: str = option("auto", "auto: float16 on a GPU, else float32", MACHINE, choices=("auto", *DTYPES))
    compile: str = option(
        "auto", "fuse the operations of U-Net and VAE; auto: on a GPU", MACHINE, choices=SWITCH, recorded=False
    )
    quantize: int | None = option(None, "bits of the linear layers, to save memory", MACHINE, choices=(4, 8))
    low_memory: bool = option(False, "one thing at a time: slower, in less memory", MACHINE, recorded=False)
    memory_limit: float | None = option(
        None, "memory to stay within, where possible", MACHINE, metavar="GB", recorded=False
    )


@dataclass(frozen=True)
class Options:
    """What to draw and how. None leaves a choice to the model, or means that there is no such thing."""

    steps: int | None = option(
        None,
        "default 50, of videos 25, of a DDPM with its own scheduler 1000; few-step models such as sdxl-turbo: 4",
        HOW,
        check=at_least(1),
        model="steps",
        a1111="Steps",
        span=(1, 100, 1),
    )
    scheduler: str | None = option(
        None,
        "default: the model's own; one of " + ", ".join(SCHEDULERS),
        HOW,
        metavar="NAME",
        choices=tuple(SCHEDULERS),
        a1111="Sampler",
        a1111_values=A1111_SAMPLERS,
    )
    timesteps: str | None = option(
        None,
        "how the steps are spread, with ddim (then the default) or ddpm: uniform, or quad, denser towards the picture, "
        "both as in DDIM's own code; default: as the model's scheduler says",
        HOW,
        choices=TIMESTEPS,
    )
    eta: float = option(
        0.0,
        "with ddim (then the default): the share of DDPM's noise that is added in each step, from 0 (none) to 1",
        HOW,
        check=Check("a number from 0 to 1", lambda value: 0 <= value <= 1, 0, 1),
        span=(0, 1, 0.05),
    )
    clip: str = option(
        "auto",
        "with ddim, ddpm, heun, lcm: clip what each step takes for the clean picture to [-1, 1]; auto: as the model's "
        "scheduler says; the flag alone: on",
        HOW,
        alone="on",
        choices=SWITCH,
    )
    guidance_scale: float | None = option(
        None,
        "default 7.5 for SD, 5 for SDXL, 3 for classes; 1 turns it off (few-step models). Of a video the last frame's, "
        "default 3",
        HOW,
        metavar="G",
        model="guidance_scale",
        only=(PICTURES, VIDEOS, CLIPS, LABELLED),
        a1111="CFG scale",
        span=(1, 20, 0.5),
    )
    rng: str = option(
        "torch",
        "whose random numbers: PyTorch's on a CPU (the default) or on CUDA (not yet verified on one), or MLX's",
        HOW,
        choices=tuple(GENERATORS),
        a1111="RNG",
        a1111_values=A1111_RNGS,
    )
    class_label: Label | None = option(
        None,
        "of a model that draws classes: which, by its number or its name in ImageNet, such as 207 or 'golden "
        "retriever'; 1000: none of them",
        PICTURE,
        only=(LABELLED,),
    )
    negative_prompt: str | None = option(None, "what it should not show", PICTURE, only=(PICTURES, CLIPS))
    prompt_2: str | None = option(None, "for SDXL's second text encoder", PICTURE, only=(PICTURES, CLIPS))
    negative_prompt_2: str | None = option(None, "likewise", PICTURE, only=(PICTURES, CLIPS))
    plain_prompt: bool = option(False, "brackets are only brackets", PICTURE, only=(PICTURES, CLIPS))
    long_prompt: bool = option(False, "use all of a prompt of more than 75 tokens", PICTURE, only=(PICTURES, CLIPS))
    clip_skip: int | None = option(
        None,
        "leave out the text encoder's last N layers, counted as diffusers does: A1111's 'Clip skip: 2' is 1 here. "
        "Default 0",
        PICTURE,
        check=Check(
            f"a whole number from 0 to {MOST_LAYERS - 1}", lambda value: 0 <= value < MOST_LAYERS, 0, MOST_LAYERS - 1
        ),
        only=(PICTURES, CLIPS),
        a1111="Clip skip",
        a1111_values=A1111_SKIPS,
    )
    seeds: tuple[Seed, ...] = option(
        (0,),
        "one or several, or random; default 0",
        PICTURE,
        flag="--seed",
        nargs="+",
        a1111="Seed",
    )
    height: int | None = option(
        None, "default: the model's native size", PICTURE, metavar="PX", check=at_least(1), model="native_height"
    )
    width: int | None = option(
        None, "default: the model's native size", PICTURE, metavar="PX", check=at_least(1), model="native_width"
    )
    image: Picture | None = option(
        None, "start from this picture, drawn in its proportions; of a video the first frame", START
    )
    mask: Picture | None = option(
        None, "change it only where this one is white", START, needs=("image",), only=(PICTURES, LABELLED, FREE)
    )
    outpaint: Sides | None = option(
        None,
        "make the picture larger by so many of its pixels on each side, and draw what is there",
        START,
        needs=("image",),
        only=(PICTURES, LABELLED, FREE),
    )
    mask_blur: float = option(
        0.0,
        "soften the mask's edge over about so many pixels (0)",
        START,
        metavar="PX",
        check=Check("a number of pixels from 0 to 256", lambda value: 0 <= value <= 256, 0, 256),
        only=(PICTURES, LABELLED, FREE),
        needs=("mask", "outpaint"),
        a1111="Mask blur",
        span=(0, 64, 1),
    )
    mask_padding: int | None = option(
        None,
        "draw only the mask's surroundings, its box and so many pixels around it, at --height and --width, and put "
        "them back into the picture at its own size: A1111's 'only masked' (with 32), diffusers' padding_mask_crop",
        START,
        metavar="PX",
        check=at_least(0),
        only=(PICTURES, LABELLED, FREE),
        needs=("mask", "outpaint"),
        a1111="Masked area padding",
    )
    strength: float | None = option(
        None,
        "how much to change, in (0, 1]: the share of the steps that is run. Default 0.8, SDXL 0.3; with a mask 1",
        START,
        check=SHARE,
        needs=("image",),
        only=(PICTURES, LABELLED, FREE),
        a1111="Denoising strength",
        span=(0.05, 1, 0.05),
    )
    fit: str | None = option(
        None,
        "a picture of other proportions than --height and --width: stretch (the default)",
        START,
        choices=FITS,
        needs=("image", "controls"),
    )
    hires_scale: float | None = option(
        None,
        "draw at --height and --width, make that so many times larger, such as 2, and draw over it",
        HIRES,
        check=Check("a number above 1", lambda value: value > 1, 1),
        only=(PICTURES,),
        a1111="Hires upscale",
    )
    hires_steps: int | None = option(
        None,
        "how many are run then, A1111's 'Hires steps'; default: as many as --steps",
        HIRES,
        check=at_least(1),
        needs=("hires_scale",),
        only=(PICTURES,),
        a1111="Hires steps",
    )
    hires_strength: float | None = option(
        None,
        "how much they change, in (0, 1], A1111's 'Denoising strength'; default 0.7",
        HIRES,
        check=SHARE,
        needs=("hires_scale",),
        only=(PICTURES,),
        a1111="Denoising strength",
        span=(0.05, 1, 0.05),
    )
    hires_upscaler: str | None = option(
        None,
        "what is enlarged, and how: latents (default: latent, that is bilinear), or the picture; one of "
        + ", ".join(A1111_UPSCALERS),
        HIRES,
        metavar="NAME",
        choices=tuple(A1111_UPSCALERS),
        needs=("hires_scale",),
        only=(PICTURES,),
        a1111="Hires upscaler",
        a1111_values=A1111_UPSCALERS,
    )
    hires_net: Model | None = option(
        None,
        "enlarge the picture by a net as --upscale has it, and by lanczos to the size that is asked for",
        HIRES,
        needs=("hires_scale",),
        only=(PICTURES,),
    )
    frames: int | None = option(
        None,
        "how many; default: as many as the model was trained for, 14 (svd) or 25 (svd-xt); of a prompt 8 are usual",
        VIDEO,
        check=at_least(1),
        model="frames",
        only=(VIDEOS, CLIPS),
    )
    fps: int | None = option(
        None,
        "frames a second, which svd is told too; default 7, of a prompt 4",
        VIDEO,
        check=at_least(1),
        model="fps",
        only=(VIDEOS, CLIPS),
    )
    motion_bucket: int | None = option(
        None,
        "how much should move, in the model's own numbers, about 1 to 255; default 127",
        VIDEO,
        check=at_least(0),
        model="motion_bucket",
        only=(VIDEOS,),
    )
    noise_aug: float | None = option(
        None,
        "deviation of the noise that is added to the picture: more of it lets more move away from it; default 0.02",
        VIDEO,
        check=Check("a number, 0 or more", lambda value: value >= 0, 0),
        model="noise_aug",
        only=(VIDEOS,),
    )
    min_guidance_scale: float | None = option(
        None,
        "the first frame's guidance scale, which rises from frame to frame; default 1",
        VIDEO,
        metavar="G",
        model="min_guidance_scale",
        only=(VIDEOS,),
    )
    decode_chunk: int | None = option(
        None,
        "decode so many frames together, which see each other; default: all, or as many as the memory is for",
        VIDEO,
        check=at_least(1),
        only=(VIDEOS,),
    )
    motion: Motion | None = option(
        None,
        "of a prompt: how far what is seen moves left and up from frame to frame, in pixels of 512; default 12,12",
        VIDEO,
        only=(CLIPS,),
    )
    t0: int | None = option(
        None,
        "of a prompt: the first frame is moved so many steps before its last one; default 44 of 50 steps",
        VIDEO,
        check=at_least(0),
        only=(CLIPS,),
    )
    t1: int | None = option(
        None,
        "of a prompt: and gets noise back for so many, from where all frames are drawn; default 47 of 50",
        VIDEO,
        check=at_least(1),
        only=(CLIPS,),
    )
    controls: tuple[Control, ...] = option((), "ControlNets", CONTROL, kind=A_CONTROL, only=(PICTURES, CLIPS))
    control_every_step: bool = option(
        False,
        "run it on cached steps too; else these use what it said on the last full one",
        CONTROL,
        only=(PICTURES, CLIPS),
        needs=("controls",),
    )
    refiner_start: float | None = option(
        None,
        "the share of the way from noise where it takes over (0.8)",
        REFINER,
        check=BETWEEN,
        needs=("refiner",),
        only=(PICTURES,),
        span=(0.05, 0.95, 0.05),
    )
    upscale: Model | None = option(
        None,
        "enlarge the picture at last by this net of Real-ESRGAN's family: a .safetensors file, or owner/name:file",
        HOW,
        only=(PICTURES, LABELLED, FREE),
    )
    vae_tiling: str = option(
        "auto",
        "decode large pictures in overlapping parts; auto: when memory is short",
        MACHINE,
        choices=SWITCH,
        recorded=False,
    )
    cache_interval: int | None = option(
        None,
        "run the deep part of the U-Net every N-th step; 1: always. Default 3; few steps or few-step models: 1",
        CACHE,
        check=at_least(1),
        a1111="DeepCache interval",
        span=(1, 20, 1),
    )
    cache_branch: int = option(
        0,
        "how much of the U-Net a cached step runs: 0 (the default) is least, up to 11 for SD and 8 for SDXL",
        CACHE,
        check=at_least(0),
        a1111="DeepCache branch",
        span=(0, 11, 1),
    )
    cache: tuple[Policy, ...] | None = option(
        None,
        "a caching policy in place of the default one; give the flag again to combine several, and --cache-interval "
        "for plain DeepCache beside them; `--cache list` explains each, `--cache auto` picks by price",
        CACHE,
        a1111="Caches",
    )
    min_psnr: float | None = option(
        None,
        "with --cache auto: the cheapest cache that keeps pictures this near to the uncached ones, such as 30",
        CACHE,
        metavar="DB",
        check=DECIBELS,
        recorded=False,
        span=(15, 60, 1),
    )
    max_macs: float | None = option(
        None,
        "with --cache auto: the nearest pictures within this share of the multiply-adds, such as 0.4",
        CACHE,
        check=Check("a share of the multiply-adds, above 0 and at most 1", SHARE.holds, 0, 1),
        recorded=False,
        span=(0.1, 1, 0.05),
    )
    latents: Latents | None = option(None, "start from this noise: safetensors, `latents`", FILES)


def filled(asked: Options, checkpoint: Checkpoint, name: str) -> Any:
    """An option's value, or the model's own."""
    value = getattr(asked, name)
    return getattr(checkpoint, option_of(Options, name).model) if value is None else value
