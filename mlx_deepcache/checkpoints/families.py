"""The families of models, a row each: parts, defaults, and what files in the original layout call them.

Nothing else asks of which family a model is: what depends on it is a value here, or a small function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from ..errors import CheckpointError
from .tokenizer import END

CLIP, OPEN_CLIP = "clip", "open_clip"  # whose names and layout a text encoder's tensors have in a single file
EPSILON, V = "epsilon", "v_prediction"


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a family, and what a single file does not say of it.

    tokenizer: its folder; width: of the hidden states; prefixes: what the tensors' names may start with in a single
    file -> whose names follow; pad: the tokenizer's padding token; hidden_act: the activation, where the names are
    CLIP's; layers: how many are used at most; projects: whether the pooled text goes through a projection.
    """

    tokenizer: str
    width: int
    prefixes: dict[str, str]
    pad: str = "!"  # OpenCLIP's, token 0
    hidden_act: str = "gelu"
    layers: int | None = None
    projects: bool = False


@dataclass(frozen=True)
class Family:
    """What the checkpoints of a family have in common.

    text: the text encoders by folder; variants: what the U-Net predicts -> the pixels along a side that it was trained
    for, and the scheduler of its own repository; the first is what a file that says nothing is taken for. pipeline: how
    the names of diffusers' classes start; tasks: and how they go on; index: what model_index.json says beside the
    parts. sees: the folder of an encoder of pictures, where it is a picture that is read and not a prompt, and videos
    are drawn; labelled: the folder of the embedding of classes, where one of these is read; decodes: whether a VAE
    makes the picture, else the latents are it; told: the defaults of what else is said of a video; size: (height,
    width) to draw at, where that is not the U-Net's `sample_size`. head_size: of the U-Net's attention, or None where
    there are as many `heads` everywhere; linear: whether its transformers are entered by a linear layer, and not by a
    convolution; penultimate: whether it reads the text encoders' hidden states before the last layer, unnormalised;
    time_ids: what it is told beside the pooled text, by the picture's height and width in pixels and whether the prompt
    is wanted (or is the negative one); None: the prompt is all. strength, inpainting_strength: how much of a picture is
    changed by default; second_prompt: whether the last text encoder may read a text of its own; refines: whether it
    needs a picture; refinable: whether two models of this kind may share a picture's steps; upcasts_vae,
    upcasts_encoder: whether the `force_upcast` of the VAE counts, or that of its encoder alone; corrections: what
    diffusers' pipelines change in a scheduler's config as they load it; schedule: what it says beside what all others
    say; colours: red, green and blue in [-1, 1] as a linear function of the latents, as ComfyUI publishes them
    (comfy/latent_formats.py).
    """

    name: str
    text: dict[str, TextEncoder]
    variants: dict[str, tuple[int, str]]
    pipeline: str = "StableDiffusion"
    index: dict = field(default_factory=dict)
    tasks: tuple[str, ...] = ("", "Img2Img", "Inpaint")
    sees: str | None = None
    labelled: str | None = None
    decodes: bool = True
    size: tuple[int, int] | None = None
    head_size: int | None = 64
    heads: int = 8
    linear: bool = True
    penultimate: bool = False
    time_ids: Callable[[int, int, bool], tuple[float, ...]] | None = None
    scaling_factor: float = 0.18215
    steps: int = 50
    guidance_scale: float = 7.5
    told: dict[str, float] = field(default_factory=dict)
    strength: float = 0.8
    inpainting_strength: float = 1.0
    second_prompt: bool = False
    refines: bool = False
    refinable: bool = False
    upcasts_vae: bool = False
    upcasts_encoder: bool = False
    corrections: dict = field(default_factory=dict)
    schedule: dict = field(default_factory=dict)
    colours: dict[str, tuple] = field(default_factory=dict)

    @property
    def encoders(self) -> dict[str, str]:
        """Folder of each text encoder -> folder of its tokenizer."""
        return {name: encoder.tokenizer for name, encoder in self.text.items()}

    @property
    def networks(self) -> tuple[str, ...]:
        """Folders of all that encode, the U-Net's and the VAE's."""
        encoders = (*self.text, self.sees, self.labelled)
        return (*filter(None, encoders), "unet", *["vae"] * self.decodes)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the text encoders' hidden states; side by side they are the context that the U-Net reads."""
        return tuple(encoder.width for encoder in self.text.values())


def _sizes(height: int, width: int, wanted: bool) -> tuple[float, ...]:
    """Original size, crop and target size (Podell et al. 2023, section 2.2)."""
    return height, width, 0, 0, height, width


def _score(height: int, width: int, wanted: bool) -> tuple[float, ...]:
    """Original size, crop, and the one of LAION's aesthetic scores (1-10) that diffusers asks for, or not for."""
    return height, width, 0, 0, 6.0 if wanted else 2.5


_CONDITIONER = {"cond_stage_model.transformer.": CLIP, "cond_stage_model.model.": OPEN_CLIP}

SD1 = Family(
    "Stable Diffusion 1.x",
    {"text_encoder": TextEncoder("tokenizer", 768, _CONDITIONER, END, "quick_gelu")},
    {EPSILON: (512, "PNDMScheduler")},
    head_size=None,
    linear=False,
    corrections={"steps_offset": 1, "clip_sample": False},  # mistakes in SD's published configs
    colours={
        "factors": (
            (0.3512, 0.2297, 0.3227),
            (0.3250, 0.4974, 0.2350),
            (-0.2829, 0.1762, 0.2721),
            (-0.2120, -0.2616, -0.7177),
        )
    },
)

SD2 = replace(
    SD1,
    name="Stable Diffusion 2.x",
    # the last but one layer's output of 24 is used, so the last is not loaded
    text={"text_encoder": TextEncoder("tokenizer", 1024, _CONDITIONER, layers=23)},
    variants={V: (768, "DDIMScheduler"), EPSILON: (512, "PNDMScheduler")},
    head_size=64,
    linear=True,
)

_BIG_G = TextEncoder("tokenizer_2", 1280, {"conditioner.embedders.1.model.": OPEN_CLIP}, projects=True)

SDXL = Family(
    "SDXL",
    {
        "text_encoder": TextEncoder(
            "tokenizer", 768, {"conditioner.embedders.0.transformer.": CLIP}, END, "quick_gelu"
        ),
        "text_encoder_2": _BIG_G,
    },
    {EPSILON: (1024, "EulerDiscreteScheduler")},
    "StableDiffusionXL",
    {"force_zeros_for_empty_prompt": True},
    penultimate=True,
    time_ids=_sizes,
    scaling_factor=0.13025,
    guidance_scale=5.0,
    strength=0.3,
    inpainting_strength=0.9999,
    second_prompt=True,
    refinable=True,
    upcasts_vae=True,
    colours={
        "factors": (
            (0.3651, 0.4232, 0.4341),
            (-0.2533, -0.0042, 0.1068),
            (0.1076, 0.1111, -0.0362),
            (-0.3165, -0.2492, -0.2188),
        ),
        "bias": (0.1084, -0.0175, -0.0011),
    },
)

REFINER = replace(
    SDXL,
    name="the SDXL refiner",
    text={"text_encoder_2": replace(_BIG_G, prefixes={"conditioner.embedders.0.model.": OPEN_CLIP})},
    index={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
    | {"text_encoder": [None, None], "tokenizer": [None, None]},
    time_ids=_score,
    refines=True,
)

SVD = Family(
    "Stable Video Diffusion",
    {},
    {V: (768, "EulerDiscreteScheduler")},
    "StableVideoDiffusion",
    tasks=("",),
    sees="image_encoder",
    size=(576, 1024),
    steps=25,
    guidance_scale=3.0,
    told={"fps": 7, "motion_bucket": 127, "noise_aug": 0.02, "min_guidance_scale": 1.0},
    upcasts_encoder=True,
    schedule={
        "interpolation_type": "linear",
        "sigma_max": 700.0,
        "sigma_min": 0.002,
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
    },
    colours=SD1.colours,
)

DDPM = Family(
    "DDPM",
    {},
    {EPSILON: (32, "DDPMScheduler")},
    "DDPM",
    tasks=("",),
    decodes=False,
    steps=1000,
    guidance_scale=1.0,
    colours={"factors": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))},
)

# The same nets with the sampler of another pipeline, which takes any scheduler's config for its own
DDIM = replace(DDPM, name="DDPM with DDIM", pipeline="DDIM", steps=50, corrections={"_class_name": "DDIMScheduler"})

LDM = Family(
    "LDM",
    {},
    {EPSILON: (256, "DDIMScheduler")},
    "LDM",
    tasks=("",),
    head_size=32,
    scaling_factor=1.0,
    guidance_scale=1.0,
    schedule={"beta_start": 0.0015, "beta_end": 0.0195},
)

LDM_CLASS = replace(
    LDM,
    name="LDM-4-G",
    labelled="class_embedding",
    head_size=None,
    heads=1,
    linear=False,
    guidance_scale=3.0,  # its authors' example; their figures are at 1.5
)

FAMILIES = (SD1, SD2, SDXL, REFINER, SVD, DDPM, DDIM, LDM, LDM_CLASS)
ENCODERS = {name: tokenizer for family in FAMILIES for name, tokenizer in family.encoders.items()}
VQVAE = "vqvae"  # the VAE's folder in some repositories
COMPONENTS = (*dict.fromkeys(name for family in FAMILIES for name in family.networks), VQVAE)

PIPELINES = (  # diffusers' classes that draw with these; the last draws with a few-step model of SD 1.x
    *dict.fromkeys(f"{family.pipeline}{task}Pipeline" for family in FAMILIES for task in family.tasks),
    "LatentConsistencyModelPipeline",
)


def check_pipeline(index: dict, where: object) -> None:
    """Raises CheckpointError for a model_index.json of another kind of model; where: what to call its place."""
    if (kind := index.get("_class_name", PIPELINES[0])) not in PIPELINES:
        raise CheckpointError(f"{where} holds a {kind}, which is not supported, only {', '.join(PIPELINES)}")


def family_of(adds: bool, linear: bool, fits: Callable[[Family], bool]) -> Family:
    """adds, linear: whether the U-Net reads more than the prompt, and the family's `linear`; fits: tells those apart
    that have these in common, of which the first is taken if none fits. For the families that read a prompt."""
    read = [family for family in FAMILIES if family.text]
    alike = [family for family in read if (family.time_ids is not None, family.linear) == (adds, adds or linear)]
    return next(filter(fits, alike), alike[0])


def of_pixels(index: dict) -> Family | None:
    """The family that model_index.json tells of a model without a VAE."""
    if any(any(index.get(name) or ()) for name in ("vae", VQVAE)):
        return None
    return next((f for f in (DDPM, DDIM) if index.get("_class_name") == f"{f.pipeline}Pipeline"), None)


def family_by(context: int) -> Family | None:
    """The family whose U-Nets read a context of this width."""
    return next((family for family in FAMILIES if family.text and sum(family.widths) == context), None)


FEW_STEPS = 4
LCM_GUIDANCE = 8.5  # diffusers' default for a U-Net that is told the scale
_FEW_STEP = re.compile(r"(?<![a-z])(turbo|lightning|hyper[-_ ]?sd|lcm)(?![a-z])")
_COUNT = re.compile(r"(?<!\d)([1-9]|1\d)[-_ ]?steps?(?![a-z])")


@dataclass(frozen=True)
class FewStep:
    """The defaults of a model made to draw in a few steps, and by what it was known.

    Distilled models (Turbo, Lightning, Hyper-SD, latent consistency) need other defaults than the ones they were made
    of: few steps, no guidance beside what is built in, and no cache, as neighbouring steps have little in common.
    """

    steps: int
    guidance_scale: float
    reason: str


def few_step(names: Iterable[str], scheduler: dict, told_guidance: bool) -> FewStep | None:
    """What a checkpoint says, or None if it is no such model.

    names: what it is called, by its user, in its folder's name and as `_name_or_path` in its files; scheduler: its
    scheduler_config.json; told_guidance: the U-Net reads the guidance scale (time_cond_proj_dim).

    Signs, the first that is there counts: a U-Net that is told the guidance scale; a name with turbo, lightning,
    hyper-sd or lcm in it; LCMScheduler; Euler's method from the very last timestep (timestep_spacing
    "trailing"), as Turbo has it, unless the schedule has zero terminal SNR or predicts v, which is why ordinary models
    start there.
    A name that also says for how many steps ("4step", "8-steps") decides that.
    """
    names = [name.lower() for name in names if name]
    counts = [int(match[1]) for name in names if (match := _COUNT.search(name))]
    steps = counts[0] if counts else FEW_STEPS
    if told_guidance:
        return FewStep(steps, LCM_GUIDANCE, "its U-Net is told the guidance scale")
    for name in names:
        if match := _FEW_STEP.search(name):
            return FewStep(steps, 1.0, f"its name says {match[1]}")
    kind = str(scheduler.get("_class_name", ""))
    if kind == "LCMScheduler":
        return FewStep(steps, 1.0, "its scheduler is LCMScheduler")
    if (
        kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
        and scheduler.get("timestep_spacing") == "trailing"
        and not scheduler.get("rescale_betas_zero_snr")
        and scheduler.get("prediction_type", EPSILON) != V
    ):
        return FewStep(steps, 1.0, "its scheduler starts at the last timestep")
    return None
