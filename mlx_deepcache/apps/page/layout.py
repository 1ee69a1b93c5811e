"""The page: what is on it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ...generation.declared import options_of
from ...generation.options import CACHE, CONTROL, HIRES, HOW, MACHINE, PICTURE, START, Control
from ..server.service import Service
from . import show
from .facts import Facts
from .form import BY_PRICE, CANVAS, DIAL, PLAIN
from .widgets import OWN, widget

STORE = "mlx_deepcache"  # of the browser, in which fields are kept
FIRST, ELSEWHERE = "red apple", "a photograph of an astronaut riding a horse"  # the first prompt, of any model
IDEAS = 8
INTERVALS = (1, 2, 3, 5, 10)
SEEDS = 4  # of a grid, at most
BY_NAME = {o.name: o for o in PLAIN}
STEERING = {o.name: o for o in options_of(Control)}


def tells(selector: str, attribute: str) -> str:
    """What makes HTML say which of its parts was clicked, or chosen by Enter."""
    return f"""
const tell = (event) => {{
  const part = event.target.closest("{selector}");
  if (part) trigger("click", {{ told: part.dataset.{attribute} }});
}};
element.addEventListener("click", tell);
element.addEventListener("keydown", (event) => {{ if (event.key === "Enter") tell(event); }});"""


def title(group: str) -> str:
    """Of a group of options."""
    return group.partition(":")[0].partition(" (")[0].capitalize()


class Layout:
    """What is on the page. ui: its parts by name; fields: those among them that a job is made of; the buttons have
    their own names.

    facts: of the default model.
    """

    def __init__(self, service: Service, facts: Facts):
        self.service, self.offers, self.facts = service, service.offers, facts
        self.ui: dict[str, gr.components.Component] = {}
        self.fields: dict[str, gr.components.Component] = {}
        gr.HTML(
            "<header><h1>mlx_deepcache</h1><p>Stable Diffusion, with DeepCache in the sampler</p>"
            '<nav><a href="docs">API</a></nav></header>',
            elem_id="head",
        )
        with gr.Row(elem_id="studio"):
            self._ask()
            self._see()
            with gr.Column(elem_id="set"):
                self._dial()
                self._size()
                self._model()
                self._start()
                self._control()
                self._hires()
                self._prices()
                self._grid()
                self._more()
                self._restore()
        assert self.fields.keys() >= BY_NAME.keys(), BY_NAME.keys() - self.fields.keys()
        self._show("last", gr.State(None))
        self.stored = gr.BrowserState(None, storage_key=STORE, secret=STORE)

    def _keep(self, name: str, made: gr.components.Component) -> None:
        self.ui[name] = self.fields[name] = made

    def _show(self, name: str, made: gr.components.Component) -> None:
        self.ui[name] = made

    def _option(self, name: str, **own: Any) -> None:
        o = BY_NAME[name]
        if name in ("upscale", "hires_net"):
            own = {"names": tuple(self.offers.upscalers.names()), "visible": bool(self.offers.upscalers.names())} | own
        if name in self.facts.most:
            own["maximum"] = self.facts.most[name]
        visible = own.pop("visible", True) and (name in self.facts.options or self.facts.problem is not None)
        self._keep(name, widget(o, value_of(o, self.facts), visible=visible, **own))

    def _options(self, *groups: str, but: tuple[str, ...] = ()) -> None:
        """All options of these groups that stand nowhere else."""
        for o in PLAIN:
            if o.group in groups and o.name not in self.fields and o.name not in but:
                self._option(o.name)

    def _ask(self) -> None:
        with gr.Column(elem_id="ask"):
            with gr.Group():
                own = {"elem_id": "prompt", "label": "Prompt", "placeholder": "what the picture should show"}
                self._keep(
                    "prompt",
                    gr.Textbox(first_prompt(self.facts), lines=2, max_lines=8, visible=self.facts.reads, **own),
                )
                self._option("negative_prompt", info=None, lines=1, max_lines=4)
            self._show("tokens", gr.HTML(elem_id="tokens"))
            self._option("long_prompt", visible=False, info=None, label="Use all of it")
            ideas = gr.HTML(
                show.ideas(ideas_of(self.facts)),
                elem_id="ideas",
                js_on_load=tells("[data-prompt]", "prompt"),
                visible=bool(self.facts.prompts),
            )
            self._show("ideas", ideas)
            with gr.Row(elem_id="go"):
                self.draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=3)
                self.stop = gr.Button("Stop", elem_id="stop", interactive=False, scale=1, min_width=80)
                self._show("stop", self.stop)

    def _see(self) -> None:
        with gr.Column(elem_id="see"):
            self._show(
                "preview",
                gr.Image(
                    elem_id="preview",
                    format="png",
                    show_label=False,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    alt_text="the picture that is drawn",
                ),
            )
            self._show(
                "slider",
                gr.ImageSlider(
                    elem_id="slider",
                    format="png",
                    show_label=False,
                    interactive=False,
                    visible=False,
                    max_height=560,
                    buttons=["download", "fullscreen"],
                ),
            )
            self._show("about", gr.HTML(elem_id="about"))
            self._show("strip", gr.HTML(elem_id="strip"))
            self._show("state", gr.HTML(show.state(_greeting(self.facts, self.service.chosen.model)), elem_id="state"))
            self._show(
                "grid",
                gr.Gallery(
                    elem_id="grid",
                    show_label=False,
                    fit_columns=False,
                    format="png",
                    visible=False,
                    columns=2,
                    height="auto",
                    object_fit="contain",
                    interactive=False,
                ),
            )
            self._show(
                "gallery",
                gr.Gallery(
                    elem_id="gallery",
                    show_label=False,
                    fit_columns=False,
                    format="png",
                    columns=8,
                    height="auto",
                    object_fit="cover",
                    visible=False,
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                ),
            )
            with gr.Accordion("Settings of this picture", open=False, elem_id="settings", visible=False) as self.about:
                self._show("settings", gr.HTML())
                with gr.Row():
                    self.use = gr.Button("Use these", size="sm", elem_id="use")
                    self.same = gr.Button("Same seed", size="sm", elem_id="same")
                    self.start = gr.Button("As start picture", size="sm", elem_id="start")
            with gr.Accordion("Numbers", open=False, elem_id="cost"):
                self._show("numbers", gr.HTML(show.numbers({}), elem_id="numbers"))

    def _dial(self) -> None:
        with gr.Column(elem_id="dial"):
            with gr.Row():
                self._option("cache_interval", info="every N-th step is full; 1: all", buttons=[])
                self._option("cache_branch", info="how much a cached step runs", buttons=[])
            self._show("plan", gr.HTML(elem_id="plan"))
            own = {"label": "Compare with no cache: draw both", "elem_id": "compare", "container": False}
            self._keep("compare", gr.Checkbox(False, **own))

    def _size(self) -> None:
        with gr.Accordion("Size, steps and seed", open=False):
            self._show("size", gr.Radio(sizes_of(self.facts), label="Size", elem_id="size"))
            with gr.Row():
                self._option("width", info=None)
                self._option("height", info=None)
            self._option("steps", info=None)
            self._option("guidance_scale", info=None)
            self._option("scheduler", info=None)
            with gr.Row(elem_classes="line"):
                own = {"precision": 0, "placeholder": "random", "label": "Seed", "elem_id": "seed"}
                self._keep("seed", gr.Number(None, scale=2, min_width=100, **own))
                self.anew = gr.Button("Random", size="sm", elem_id="random", min_width=60)
                self.again = gr.Button("Last", size="sm", elem_id="last", min_width=60)
            most = self.service.limits.images
            self._keep("pictures", gr.Slider(1, most, 1, step=1, label="Pictures", elem_id="pictures"))

    def _model(self) -> None:
        with gr.Accordion("Model and LoRAs", open=False):
            own = {"elem_id": "model", "label": "Model", "interactive": True}
            self._keep("model", gr.Dropdown(self.offers.models.names(), value=self.service.chosen.model, **own))
            self._show("loads", gr.HTML(elem_id="loads"))
            for name, shelf, what in (("vae", self.offers.vaes, "VAE"), ("refiner", self.offers.refiners, "Refiner")):
                names = shelf.names()
                own = {"label": what, "elem_id": name, "visible": bool(names), "interactive": True}
                self._keep(name, gr.Dropdown(names, value=names[0] if names else None, **own))
            self._option("refiner_start", visible=bool(self.offers.refiners.names()))
            self._keep(
                "loras",
                gr.Dataframe(
                    [[name, 0.0] for name in self.offers.loras.names()] or None,
                    headers=["LoRA", "strength, 0 is off"],
                    datatype=["str", "number"],
                    type="array",
                    static_columns=[0],
                    row_count=len(self.offers.loras.names()),
                    column_count=2,
                    interactive=True,
                    elem_id="loras",
                    label="LoRAs",
                    visible=bool(self.offers.loras.names()),
                ),
            )

    def _start(self) -> None:
        with gr.Accordion("From a picture", open=False, elem_id="from") as self.from_picture:
            self._keep(
                "editor",
                gr.ImageEditor(
                    type="pil",
                    format="png",
                    layers=False,
                    canvas_size=CANVAS,
                    transforms=(),
                    sources=("upload", "clipboard"),
                    brush=gr.Brush(default_size=20, colors=["#ffffff"], color_mode="fixed"),
                    eraser=gr.Eraser(default_size=20),
                    elem_id="editor",
                    label="Picture; paint over what should change",
                    height=420,
                ),
            )
            self._option("strength")
            self._option("fit")
            self._keep("invert", gr.Checkbox(False, label="Invert: keep what is painted", elem_id="invert"))
            with gr.Accordion("More of masks", open=False):
                own = {"type": "pil", "format": "png", "elem_id": "mask", "sources": ["upload", "clipboard"]}
                self._keep("mask", gr.Image(label="Mask from a file: white changes", height=180, **own))
                self._options(START)

    def _control(self) -> None:
        with gr.Accordion(title(CONTROL), open=False, visible=bool(self.offers.controlnets.names())):
            names = [("none", OWN), *self.offers.controlnets.names()]
            own = {"elem_id": "control", "label": "ControlNet", "interactive": True}
            self._keep("control", gr.Dropdown(names, value=OWN, **own))
            own = {"type": "pil", "format": "png", "elem_id": "control_image", "sources": ["upload", "clipboard"]}
            self._keep("control_image", gr.Image(label="Picture to follow", height=220, **own))
            with gr.Row():
                for name in ("scale", "start", "end"):
                    own = {"elem_id": f"control_{name}", "min_width": 100}
                    self._keep(f"control_{name}", widget(STEERING[name], STEERING[name].default, **own))
            self._option("control_every_step", label="Also on cached steps")

    def _hires(self) -> None:
        with gr.Accordion(title(HIRES), open=False):
            self._options(HIRES)

    def _prices(self) -> None:
        with gr.Accordion("Prices and other caches", open=False):
            self._show(
                "price",
                gr.HTML(show.prices(self.facts.front), elem_id="price", js_on_load=tells("[data-cache]", "cache")),
            )
            self._option("min_psnr", info="dB to the uncached picture, at least")
            self._option("max_macs", info="and within this share of the multiply-adds")
            self.pick = gr.Button("Pick the cheapest", size="sm", elem_id="pick")
            self._show("reason", gr.HTML(elem_id="reason"))
            self._option("cache", label="Policy", info="in place of the dial, one a line, such as taylorseer", lines=2)

    def _grid(self) -> None:
        with gr.Accordion("Grid of intervals and seeds", open=False):
            own = {"label": "Intervals", "elem_id": "intervals"}
            self.intervals = gr.CheckboxGroup([str(i) for i in INTERVALS], value=["1", "3", "5"], **own)
            self.seeds = gr.Slider(1, SEEDS, 2, step=1, label="Seeds", elem_id="seeds")
            self.tabulate = gr.Button("Draw the grid", elem_id="tabulate")

    def _more(self) -> None:
        with gr.Accordion("More of prompts and steps", open=False):
            self._options(PICTURE, HOW, MACHINE, CACHE)

    def _restore(self) -> None:
        with gr.Accordion("Restore from a picture", open=False):
            own = {"elem_id": "restore", "label": "A PNG of this program's or of A1111's"}
            self.restore = gr.File(file_types=[".png", ".webp"], height=120, **own)
            self._show("lost", gr.HTML(elem_id="lost"))


def value_of(o: Any, facts: Facts) -> Any:
    """What a widget shows before anybody touched it."""
    if o.name in BY_PRICE:
        return {"min_psnr": 30, "max_macs": None}[o.name]
    if o.name in DIAL and facts.settings.get("cache"):  # which says all of it
        return o.default if o.default is not None else 1
    return facts.settings.get(o.key, o.default)


def first_prompt(facts: Facts) -> str:
    if not facts.prompts:
        return ELSEWHERE
    return f"a {FIRST}" if FIRST in facts.prompts else facts.prompts[0]


def ideas_of(facts: Facts) -> list[str]:
    """Some of what the model draws, from all over its list."""
    step = max(1, len(facts.prompts) // IDEAS)
    return list(facts.prompts[::step])[:IDEAS]


def sizes_of(facts: Facts) -> list[tuple[str, str]]:
    return [(name, f"{width}x{height}") for name, (width, height) in facts.sizes.items()]


def _greeting(facts: Facts, model: str) -> str:
    if facts.problem is not None:
        return show.escape(facts.problem)
    said = facts.settings
    return show.escape(f"{model} · {said['width']} × {said['height']} · {said['steps']} steps")
