"""The six nodes. Their ids and inputs stay as they are once published, since workflows name them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from comfy_api.latest import ComfyExtension, io

from mlx_deepcache.checkpoints.names import BUNDLED_NAME
from mlx_deepcache.generation.declared import option_of
from mlx_deepcache.generation.options import Control, ModelOptions, Options
from mlx_deepcache.media.sheets import psnr

from .drawing import LOADED, Bar, all_settings, draw, pixels, running, steps_of, tensor
from .inputs import Asked, told, values
from .shelves import CONTROLNETS, LORAS, MODELS, UPSCALERS, VAES

CATEGORY = "MLX DeepCache"
OWN = "the model's own"
MOST_SIDE, MOST_STEPS, MOST_SCALE = 16_384, 10_000, 100  # ComfyUI's own ends
PIPE, CACHE, CONTROL = (io.Custom(f"MLX_DEEPCACHE_{name}") for name in ("PIPE", "CACHE", "CONTROL"))


def _model(id: str, **about) -> Asked:
    return Asked(id, option_of(ModelOptions, id), **about)


def _asked(name: str, id: str | None = None, **about) -> Asked:
    return Asked(id or name, option_of(Options, name), **about)


def _advanced(name: str, **about) -> Asked:
    return _asked(name, optional=True, advanced=True, **about)


LOAD = (
    _model("model", none=BUNDLED_NAME, shelf=MODELS),
    _model("dtype"),
    _model("quantize", none="off"),
    _model("low_memory"),
    _model("vae", none=OWN, shelf=VAES, optional=True),
    _model("refiner", none="none", shelf=MODELS, optional=True),
)
POLICIES = (
    _asked("cache_interval", "interval", default=3, most=50),
    _asked("cache_branch", "branch", most=11),
    _asked("cache", "policy", lines=True, optional=True, also="here one a line, and instead of interval and branch"),
    _asked("min_psnr", most=MOST_SCALE, step=0.5, optional=True),
    _asked("max_macs", step=0.01, optional=True),
)
STEERING = tuple(
    Asked(name, option_of(Control, name), step=0.01, **about)
    for name, about in {"scale": {"least": 0, "most": 10}, "start": {}, "end": {}}.items()
)
DRAW = (
    _asked("steps", most=MOST_STEPS),
    _asked("guidance_scale", "guidance", most=MOST_SCALE, step=0.1),
    _asked("scheduler", "sampler", none=OWN),
    _asked("width", most=MOST_SIDE, step=8),
    _asked("height", most=MOST_SIDE, step=8),
    _asked("strength", step=0.01),
)
NEGATIVE = _asked("negative_prompt", "negative", lines=True)
MORE = (
    _asked("fit", none="default", optional=True),
    _asked("long_prompt", optional=True),
    _advanced("clip_skip"),
    _advanced("mask_blur", step=0.5),
    _advanced("mask_padding", most=MOST_SIDE),
    _advanced("outpaint"),
    _advanced("hires_scale", most=8, step=0.05),
    _advanced("hires_steps", most=MOST_STEPS),
    _advanced("hires_strength", step=0.01),
    _advanced("hires_upscaler", none="default"),
    _advanced("hires_net", none="none", shelf=UPSCALERS),
    _advanced("upscale", none="none", shelf=UPSCALERS),
)
SHOWN = ("image", "mask")
NAMES = {one.option.name: one.id for one in (*LOAD, *POLICIES, *DRAW, NEGATIVE, *MORE)} | {
    "prompt": "positive",
    "seeds": "seed",
    "controls": "control",
    "loras": "MLXDeepCacheLora",
    "compare": "this node",
}


def _inputs(asked: tuple[Asked, ...]) -> list[io.Input]:
    return [one.input() for one in asked]


def _help(cls: type, name: str) -> str:
    return told(option_of(cls, name))


class Load(io.ComfyNode):
    """PIPE is the model's options: a description that the drawing nodes load."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MLXDeepCacheLoad",
            display_name="MLX DeepCache: model",
            category=CATEGORY,
            description="A model for MLX: Stable Diffusion 1.x, 2.x, XL. It is loaded when something is drawn with it.",
            inputs=[
                LOAD[0].input(),
                io.String.Input("model_id", optional=True, default="", tooltip=_help(ModelOptions, "model")),
                *_inputs(LOAD[1:]),
            ],
            outputs=[PIPE.Output(display_name="pipe")],
        )

    @classmethod
    def execute(cls, model_id="", **given):
        with running(NAMES):
            if model_id.strip():
                given["model"] = BUNDLED_NAME  # which need not be there any more
            options = values(LOAD, given)
            if model_id.strip():
                options["model"] = option_of(ModelOptions, "model").take(model_id.strip())
            return io.NodeOutput(ModelOptions(**options))


class Lora(io.ComfyNode):
    """The same description with one LoRA more."""

    @classmethod
    def define_schema(cls):
        about = _help(ModelOptions, "loras")
        return io.Schema(
            node_id="MLXDeepCacheLora",
            display_name="MLX DeepCache: LoRA",
            category=CATEGORY,
            description="The model with a LoRA. Several in a row are loaded together, once.",
            inputs=[
                PIPE.Input("pipe"),
                io.Combo.Input("lora", options=LORAS.names(), tooltip=about),
                io.Float.Input("scale", default=1.0, min=-4.0, max=4.0, step=0.05, tooltip=about),
            ],
            outputs=[PIPE.Output(display_name="pipe")],
        )

    @classmethod
    def execute(cls, pipe, lora, scale=1.0):
        with running(NAMES):
            added = option_of(ModelOptions, "loras").take([(LORAS.path(lora), scale)])
            return io.NodeOutput(replace(pipe, loras=(*pipe.loras, *added)))


class Cache(io.ComfyNode):
    """CACHE is a dictionary of options."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MLXDeepCacheCache",
            display_name="MLX DeepCache: cache",
            category=CATEGORY,
            description="Which steps run the whole U-Net: every interval-th; or policies, one a line, instead; or, by "
            "min_psnr or max_macs, whichever a calibrated model is best drawn with. Without this node: the default.",
            inputs=_inputs(POLICIES),
            outputs=[CACHE.Output(display_name="cache")],
        )

    @classmethod
    def execute(cls, **given):
        with running(NAMES):
            asked = values(POLICIES, given | {"policy": given.get("policy", "").strip()})
            promised = asked.keys() & {"min_psnr", "max_macs"}
            if promised:
                asked.setdefault("cache", ("auto",))
            if asked.get("cache"):
                asked = {name: asked[name] for name in ("cache", *promised)}
            return io.NodeOutput(asked)


class Steer(io.ComfyNode):
    """CONTROL is a sequence of `Control`, with all pictures of a batch."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MLXDeepCacheControl",
            display_name="MLX DeepCache: ControlNet",
            category=CATEGORY,
            description="A picture of edges, poses, ... that is followed; several in a row are followed together.",
            inputs=[
                io.Combo.Input("model", options=CONTROLNETS.names(), tooltip=_help(Control, "model")),
                io.Image.Input("image", tooltip=_help(Control, "image")),
                *_inputs(STEERING),
                CONTROL.Input("previous", optional=True),
            ],
            outputs=[CONTROL.Output(display_name="control")],
        )

    @classmethod
    def execute(cls, model, image, previous=(), **given):
        with running(NAMES):
            made = Control(CONTROLNETS.path(model), pixels(image), **values(STEERING, given))
            return io.NodeOutput((*(previous or ()), made))


def _drawing_inputs() -> list[io.Input]:
    """Of both nodes that draw."""
    return [
        PIPE.Input("pipe"),
        io.String.Input("positive", multiline=True, default="", tooltip="what to draw"),
        NEGATIVE.input(),
        io.Int.Input(
            "seed",
            default=option_of(Options, "seeds").default[0],
            min=0,
            max=2**64 - 1,
            control_after_generate=True,
            tooltip="the first picture's; the others count on from it",
        ),
        io.Int.Input("batch", default=1, min=1, max=16, tooltip="how many pictures"),
        *_inputs(DRAW),
        CACHE.Input("cache", optional=True),
        CONTROL.Input("control", optional=True),
        io.Image.Input("image", optional=True, tooltip=_help(Options, "image")),
        io.Mask.Input("mask", optional=True, tooltip=_help(Options, "mask")),
        *_inputs(MORE),
        io.Boolean.Input(
            "keep_loaded",
            optional=True,
            default=True,
            tooltip="hold the model in memory for the next picture; off frees it once this one is drawn",
        ),
    ]


def _drawn(pipe, positive, seed, batch, given, compare=False):
    """Batches of pictures and what each cost, drawn as asked; and, to compare, again without a cache, or else none."""
    options = values((NEGATIVE, *DRAW, *MORE), given) | (given.get("cache") or {})
    if given.get("control"):
        options["controls"] = given["control"]
    shown = {name: pixels(given[name]) for name in SHOWN if given.get(name) is not None}
    loaded = LOADED.get(pipe)
    asked = all_settings(loaded, positive, seed, batch, options, shown)
    loaded.hold(asked[0])
    if compare:
        from mlx_deepcache.apps.compare import check_comparable, no_cache

        for settings in asked:
            check_comparable(settings)
        asked += [replace(settings, cache=no_cache()) for settings in asked]
    bar = Bar(sum(steps_of(loaded, settings) for settings in asked))
    drawn = [list(draw(loaded, settings, bar)) for settings in asked]
    half = len(drawn) // 2 if compare else len(drawn)
    return [sum(batches, []) for batches in (drawn[:half], drawn[half:])]


def _pictures(batches):
    return [picture for pictures, _ in batches for picture in pictures]


def _costs(batches):
    """One batch's, or a list of several."""
    costs = [cost for _, cost in batches]
    return costs[0] if len(costs) == 1 else costs


class Draw(io.ComfyNode):
    """Pictures, and what they cost."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MLXDeepCacheDraw",
            display_name="MLX DeepCache: draw",
            category=CATEGORY,
            description="Draws pictures. stats: seconds, full and cached steps, multiply-adds and memory, as JSON.",
            inputs=_drawing_inputs(),
            outputs=[io.Image.Output(display_name="image"), io.String.Output(display_name="stats")],
        )

    @classmethod
    def execute(cls, pipe, positive, seed, batch, keep_loaded=True, **given):
        with running(NAMES), LOADED.kept(keep_loaded):
            drawn, _ = _drawn(pipe, positive, seed, batch, given)
            return io.NodeOutput(tensor(_pictures(drawn)), json.dumps(_costs(drawn), indent=2))


class Compare(io.ComfyNode):
    """Pictures with and without the cache, and how near they are."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MLXDeepCacheCompare",
            display_name="MLX DeepCache: with and without cache",
            category=CATEGORY,
            description="Draws the same pictures twice. stats: each one's PSNR to the uncached one in dB (null: no "
            "difference), the seconds of both, and what both cost, as JSON.",
            inputs=_drawing_inputs(),
            outputs=[
                io.Image.Output(display_name="cached"),
                io.Image.Output(display_name="uncached"),
                io.String.Output(display_name="stats"),
            ],
        )

    @classmethod
    def execute(cls, pipe, positive, seed, batch, keep_loaded=True, **given):
        with running(NAMES), LOADED.kept(keep_loaded):
            with_it, without = _drawn(pipe, positive, seed, batch, given, compare=True)
            both = {"cached": with_it, "uncached": without}
            pairs = zip(*map(_pictures, both.values()), strict=True)
            near = [psnr(*pair) for pair in pairs]
            seconds = {name: sum(cost["seconds"]["denoise"] for _, cost in drawn) for name, drawn in both.items()}
            stats = {"psnr": [round(db, 2) if math.isfinite(db) else None for db in near], "seconds": seconds}
            stats |= {name: _costs(drawn) for name, drawn in both.items()}
            return io.NodeOutput(*(tensor(_pictures(drawn)) for drawn in both.values()), json.dumps(stats, indent=2))


class Pack(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self):
        return [Load, Lora, Cache, Steer, Draw, Compare]
