"""The page: what is on it, and what happens when somebody touches it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr

from ...cache.prices import AUTO
from ...errors import UsageError
from ...generation.options import CACHE, CONTROL, HIRES, HOW, MACHINE, PICTURE, START, Control, options_of
from ..server.refused import of_error
from ..server.service import Service
from . import drawing, form, show
from .facts import Facts, facts_of
from .form import BY_PRICE, CANVAS, DIAL, PLAIN
from .session import Session
from .widgets import OWN, choices, filled, label, widget

HERE = Path(__file__).parent
STORE = "mlx_deepcache"  # of the browser, in which fields are kept
FIRST, ELSEWHERE = "red apple", "a photograph of an astronaut riding a horse"  # the first prompt, of any model
IDEAS = 8
INTERVALS = (1, 2, 3, 5, 10)
SEEDS = 4  # of a grid, at most
UNKEPT = ("editor", "mask", "control_image", "loras")  # fields that a browser does not keep
BY_NAME = {o.name: o for o in PLAIN}
STEERING = {o.name: o for o in options_of(Control)}
MAIN = ("negative_prompt", "long_prompt", "steps", "guidance_scale", "scheduler", "width", "height", "strength", "fit")

USE_KEYS = """() => document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    document.activeElement?.dispatchEvent(new Event("change", { bubbles: true }));
    setTimeout(() => document.querySelector("#draw")?.click(), 50);
  }
})"""

# An editor that is given a picture before it is all there shows none, and fails from then on
WHEN_IT_CAN_PAINT = """() => new Promise((ready) => {
  const look = () => document.querySelector("#editor canvas") ? setTimeout(ready, 600) : setTimeout(look, 50);
  look();
})"""


def tells(selector: str, attribute: str) -> str:
    """What makes HTML say which of its parts was clicked, or chosen by Enter."""
    return f"""
const tell = (event) => {{
  const part = event.target.closest("{selector}");
  if (part) trigger("click", {{ told: part.dataset.{attribute} }});
}};
element.addEventListener("click", tell);
element.addEventListener("keydown", (event) => {{ if (event.key === "Enter") tell(event); }});"""


class Blocks(gr.Blocks):
    """Gradio's, which would fetch a file that a request names by its address."""

    async def preprocess_data(self, block_fn, inputs, state, explicit_call=False):
        _refuse_addresses(inputs)
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def _refuse_addresses(value: Any) -> None:
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and "://" in path:
            raise gr.Error("files are uploaded; an address is not asked", print_exception=False)
        for item in value.values():
            _refuse_addresses(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_addresses(item)


class Page:
    """All visitors of a service. folder: in which their files lie."""

    def __init__(self, service: Service, folder: Path):
        self.service, self.folder = service, folder
        self.sessions: dict[str, Session] = {}
        self.speeds = drawing.Speeds()
        self._facts: dict[str, Facts] = {}

    def session(self, request: gr.Request) -> Session:
        name = request.session_hash or ""
        if name not in self.sessions:
            self.sessions[name] = Session(self.folder)
        return self.sessions[name]

    def leave(self, request: gr.Request) -> None:
        session = self.sessions.pop(request.session_hash or "", None)
        if session is not None:
            for job in list(session.jobs):
                self.service.worker.cancel(job)
            session.close()

    async def ask(self, question: Callable[[], Any]) -> Any:
        """Of the worker, after the step under way."""
        return await asyncio.wrap_future(self.service.worker.call(question, urgent=True))

    async def facts(self, model: str | None) -> Facts:
        model = model or self.service.chosen.model
        self.service.offers.models.path(model)
        if model not in self._facts:
            self._facts[model] = await self.ask(lambda: facts_of(self.service, model))
        return self._facts[model]

    async def wanted(self, given: Mapping[str, Any], **instead: Any) -> Any:
        facts = await self.facts(given.get("model"))
        return await asyncio.to_thread(form.wanted, self.service, facts, given, **instead)


def told(handler: Callable) -> Callable:
    """A handler of which every error is one line on the page."""
    if inspect.isasyncgenfunction(handler):

        async def steps(*values):
            try:
                async with aclosing(handler(*values)) as updates:
                    async for update in updates:
                        yield update
            except Exception as error:
                raise _line(error) from None

        return _like(handler, steps)

    async def once(*values):
        try:
            return await handler(*values)
        except Exception as error:
            raise _line(error) from None

    return _like(handler, once)


def _line(error: Exception) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    return gr.Error(of_error(error).message, duration=12, print_exception=False)


def _like(handler: Callable, made: Callable) -> Callable:
    made.__annotations__ = handler.__annotations__
    made.__signature__ = inspect.signature(handler)
    made.__name__, made.__doc__ = handler.__name__, handler.__doc__
    return made


def taking(handler: Callable, names: list[str], first: int = 1) -> Callable:
    """A handler of which the parameters after the first ones are called by these names, as clients of the API see them;
    each may be left out."""
    given = list(inspect.signature(handler).parameters.values())[:first]
    more = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names]
    handler.__signature__ = inspect.Signature([*given, *more])
    return handler


def title(group: str) -> str:
    """Of a group of options."""
    return group.partition(":")[0].partition(" (")[0].capitalize()


def build(page: Page, facts: Facts) -> gr.Blocks:
    """facts: of the default model."""
    service, offers = page.service, page.service.offers
    ui: dict[str, gr.components.Component] = {}
    fields: dict[str, gr.components.Component] = {}

    def keep(name: str, made: gr.components.Component) -> gr.components.Component:
        ui[name] = fields[name] = made
        return made

    def show_only(name: str, made: gr.components.Component) -> gr.components.Component:
        ui[name] = made
        return made

    def option(name: str, **own: Any) -> None:
        o = BY_NAME[name]
        if name in ("upscale", "hires_net"):
            own = {"names": tuple(offers.upscalers.names()), "visible": bool(offers.upscalers.names())} | own
        if name in facts.most:
            own["maximum"] = facts.most[name]
        visible = own.pop("visible", True) and (name in facts.options or facts.problem is not None)
        keep(name, widget(o, _value(o, facts), visible=visible, **own))

    def options_in(*groups: str, but: tuple[str, ...] = ()) -> None:
        """All options of these groups that stand nowhere else."""
        for o in PLAIN:
            if o.group in groups and o.name not in fields and o.name not in but:
                option(o.name)

    with Blocks(title="mlx_deepcache", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as demo:
        gr.HTML(
            "<header><h1>mlx_deepcache</h1><p>Stable Diffusion, with DeepCache in the sampler</p>"
            '<nav><a href="docs">API</a></nav></header>',
            elem_id="head",
        )
        with gr.Row(elem_id="studio"):
            with gr.Column(elem_id="ask"):
                with gr.Group():
                    own = {"elem_id": "prompt", "label": "Prompt", "placeholder": "what the picture should show"}
                    keep("prompt", gr.Textbox(_first(facts), lines=2, max_lines=8, visible=facts.reads, **own))
                    option("negative_prompt", info=None, lines=1, max_lines=4)
                show_only("tokens", gr.HTML(elem_id="tokens"))
                option("long_prompt", visible=False, info=None, label="Use all of it")
                ideas = gr.HTML(
                    show.ideas(_ideas(facts)),
                    elem_id="ideas",
                    js_on_load=tells("[data-prompt]", "prompt"),
                    visible=bool(facts.prompts),
                )
                show_only("ideas", ideas)
                with gr.Row(elem_id="go"):
                    draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=3)
                    stop = gr.Button("Stop", elem_id="stop", interactive=False, scale=1, min_width=80)
                    show_only("stop", stop)
            with gr.Column(elem_id="see"):
                show_only(
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
                show_only(
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
                show_only("about", gr.HTML(elem_id="about"))
                show_only("strip", gr.HTML(elem_id="strip"))
                show_only("state", gr.HTML(show.state(_greeting(facts, service.chosen.model)), elem_id="state"))
                show_only(
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
                show_only(
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
                with gr.Accordion("Settings of this picture", open=False, elem_id="settings", visible=False) as about:
                    show_only("settings", gr.HTML())
                    with gr.Row():
                        use = gr.Button("Use these", size="sm", elem_id="use")
                        same = gr.Button("Same seed", size="sm", elem_id="same")
                        start = gr.Button("As start picture", size="sm", elem_id="start")
                with gr.Accordion("Numbers", open=False, elem_id="cost"):
                    show_only("numbers", gr.HTML(show.numbers({}), elem_id="numbers"))
            with gr.Column(elem_id="set"):
                with gr.Column(elem_id="dial"):
                    with gr.Row():
                        option("cache_interval", info="every N-th step is full; 1: all", buttons=[])
                        option("cache_branch", info="how much a cached step runs", buttons=[])
                    show_only("plan", gr.HTML(elem_id="plan"))
                    own = {"label": "Compare with no cache: draw both", "elem_id": "compare", "container": False}
                    keep("compare", gr.Checkbox(False, **own))
                with gr.Accordion("Size, steps and seed", open=False):
                    show_only("size", gr.Radio(_sizes(facts), label="Size", elem_id="size"))
                    with gr.Row():
                        option("width", info=None)
                        option("height", info=None)
                    option("steps", info=None)
                    option("guidance_scale", info=None)
                    option("scheduler", info=None)
                    with gr.Row(elem_classes="line"):
                        own = {"precision": 0, "placeholder": "random", "label": "Seed", "elem_id": "seed"}
                        keep("seed", gr.Number(None, scale=2, min_width=100, **own))
                        anew = gr.Button("Random", size="sm", elem_id="random", min_width=60)
                        again = gr.Button("Last", size="sm", elem_id="last", min_width=60)
                    most = service.limits.images
                    keep("pictures", gr.Slider(1, most, 1, step=1, label="Pictures", elem_id="pictures"))
                with gr.Accordion("Model and LoRAs", open=False):
                    own = {"elem_id": "model", "interactive": True}
                    keep("model", gr.Dropdown(offers.models.names(), value=service.chosen.model, label="Model", **own))
                    show_only("loads", gr.HTML(elem_id="loads"))
                    for name, shelf, what in (("vae", offers.vaes, "VAE"), ("refiner", offers.refiners, "Refiner")):
                        names = shelf.names()
                        own = {"label": what, "elem_id": name, "visible": bool(names), "interactive": True}
                        keep(name, gr.Dropdown(names, value=names[0] if names else None, **own))
                    option("refiner_start", visible=bool(offers.refiners.names()))
                    keep(
                        "loras",
                        gr.Dataframe(
                            [[name, 0.0] for name in offers.loras.names()] or None,
                            headers=["LoRA", "strength, 0 is off"],
                            datatype=["str", "number"],
                            type="array",
                            static_columns=[0],
                            row_count=len(offers.loras.names()),
                            column_count=2,
                            interactive=True,
                            elem_id="loras",
                            label="LoRAs",
                            visible=bool(offers.loras.names()),
                        ),
                    )
                with gr.Accordion("From a picture", open=False, elem_id="from") as from_picture:
                    keep(
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
                    option("strength")
                    option("fit")
                    keep("invert", gr.Checkbox(False, label="Invert: keep what is painted", elem_id="invert"))
                    with gr.Accordion("More of masks", open=False):
                        own = {"type": "pil", "format": "png", "elem_id": "mask", "sources": ["upload", "clipboard"]}
                        keep("mask", gr.Image(label="Mask from a file: white changes", height=180, **own))
                        options_in(START)
                with gr.Accordion(title(CONTROL), open=False, visible=bool(offers.controlnets.names())):
                    names = [("none", OWN), *offers.controlnets.names()]
                    own = {"elem_id": "control", "label": "ControlNet", "interactive": True}
                    keep("control", gr.Dropdown(names, value=OWN, **own))
                    own = {
                        "type": "pil",
                        "format": "png",
                        "elem_id": "control_image",
                        "sources": ["upload", "clipboard"],
                    }
                    keep("control_image", gr.Image(label="Picture to follow", height=220, **own))
                    with gr.Row():
                        for name in ("scale", "start", "end"):
                            own = {"elem_id": f"control_{name}", "min_width": 100}
                            keep(f"control_{name}", widget(STEERING[name], STEERING[name].default, **own))
                    option("control_every_step", label="Also on cached steps")
                with gr.Accordion(title(HIRES), open=False):
                    options_in(HIRES)
                with gr.Accordion("Prices and other caches", open=False):
                    show_only(
                        "price",
                        gr.HTML(show.prices(facts.front), elem_id="price", js_on_load=tells("[data-cache]", "cache")),
                    )
                    option("min_psnr", info="dB to the uncached picture, at least")
                    option("max_macs", info="and within this share of the multiply-adds")
                    pick = gr.Button("Pick the cheapest", size="sm", elem_id="pick")
                    show_only("reason", gr.HTML(elem_id="reason"))
                    option(
                        "cache", label="Policy", info="in place of the dial, one a line, such as taylorseer", lines=2
                    )
                with gr.Accordion("Grid of intervals and seeds", open=False):
                    own = {"label": "Intervals", "elem_id": "intervals"}
                    intervals = gr.CheckboxGroup([str(i) for i in INTERVALS], value=["1", "3", "5"], **own)
                    seeds = gr.Slider(1, SEEDS, 2, step=1, label="Seeds", elem_id="seeds")
                    tabulate = gr.Button("Draw the grid", elem_id="tabulate")
                with gr.Accordion("More of prompts and steps", open=False):
                    options_in(PICTURE, HOW, MACHINE, CACHE)
                with gr.Accordion("Restore from a picture", open=False):
                    own = {"elem_id": "restore", "label": "A PNG of this program's or of A1111's"}
                    restore = gr.File(file_types=[".png", ".webp"], height=120, **own)
                    show_only("lost", gr.HTML(elem_id="lost"))

        assert fields.keys() >= BY_NAME.keys(), BY_NAME.keys() - fields.keys()
        show_only("last", gr.State(None))
        stored = gr.BrowserState(None, storage_key=STORE, secret=STORE)
        names, inputs = list(fields), list(fields.values())

        def updates(changed: Mapping[str, Any], among: Mapping[str, Any] = ui) -> dict:
            return {among[name]: value for name, value in changed.items()}

        def values_of(values: tuple) -> dict[str, Any]:
            return dict(zip(names, values, strict=False))

        # what a job would do

        async def run_plan(*values) -> tuple[str, dict, dict]:
            """What a job would do: which steps are full, its share of the work, and how long it may take."""
            given = values_of(values)
            wanted = await page.wanted(given)
            planned = await page.ask(lambda: service.painter.plan(wanted))
            seconds = page.speeds.expect(wanted.model, planned["unet_macs"])
            free = not (given.get("cache") or "").strip()
            return show.plan(planned, seconds), gr.update(interactive=free), gr.update(interactive=free)

        async def live_plan(*values) -> tuple[str, dict, dict]:
            """The same while something is being typed: what can't be is said where the plan stands."""
            try:
                return await run_plan(*values)
            except Exception as error:
                return show.state(of_error(error).message, "over"), gr.skip(), gr.skip()

        shown_plan = [ui["plan"], fields["cache_interval"], fields["cache_branch"]]

        # drawing

        drawn = ("preview", "gallery", "state", "strip", "slider", "about", "numbers", "stop", "last")

        async def run_draw(request: gr.Request, *values) -> AsyncIterator[dict]:
            """Draw; the pictures are the second output, and `state` says how far it is."""
            wanted = await page.wanted(values_of(values))
            async with aclosing(drawing.draw(service, page.session(request), page.speeds, wanted)) as steps:
                async for update in steps:
                    yield updates(update)

        async def run_grid(request: gr.Request, chosen: list[str], n: float, *values) -> AsyncIterator[dict]:
            """Draw with several cache intervals, each with as many seeds."""
            if not chosen:
                raise UsageError("a grid needs an interval, or several")
            given = values_of(values) | {"compare": False, "cache": None, "pictures": n}
            first = await page.wanted(given, cache_interval=1)
            given["seed"] = first.seeds[0]
            intervals = sorted({1, *map(int, chosen)})
            each = [(interval, await page.wanted(given, cache_interval=interval)) for interval in intervals]
            async with aclosing(drawing.grid(service, page.session(request), page.speeds, each)) as steps:
                async for update in steps:
                    yield updates(update)

        async def run_stop(request: gr.Request) -> str:
            """End what this visitor draws: what waits goes, and of what is drawn the last estimate stays."""
            jobs = page.session(request).jobs
            for job in list(jobs):
                job.stopped.set()
                if service.worker.position(job) is not None:
                    service.worker.cancel(job)
            return show.state("stopping" if jobs else "nothing is drawn", "busy" if jobs else "")

        quiet = {"show_progress": "hidden", "concurrency_limit": None}
        outputs = [ui[name] for name in drawn]
        gr.on(
            [draw.click],
            told(taking(run_draw, names)),
            inputs,
            outputs,
            api_name="draw",
            trigger_mode="once",
            **quiet,
        ).then(_described(page), None, [ui["settings"], about], api_visibility="private", **quiet)
        tabulate.click(
            told(taking(run_grid, ["intervals", "seeds", *names])),
            [intervals, seeds, *inputs],
            [*outputs, ui["grid"]],
            api_name="grid",
            **quiet,
        )
        stop.click(told(run_stop), None, ui["state"], api_name="stop", queue=False, show_progress="hidden")

        # the dial, as it is turned

        planning = [fields[name] for name in form_matters(fields)]
        gr.on(
            [demo.load, ui["last"].change, *(field.change for field in planning)],
            live_plan,
            inputs,
            shown_plan,
            api_visibility="private",
            trigger_mode="always_last",
            **quiet,
        )
        asked = gr.Button(visible=False)  # for programs
        asked.click(told(taking(run_plan, names, 0)), inputs, shown_plan, api_name="plan", **quiet)

        # what the model says

        async def count(prompt: str, plain: bool, model: str) -> tuple[str, dict]:
            facts = await page.facts(model)
            if not facts.reads:
                return "", gr.update(visible=False)
            counted = await page.ask(lambda: service.painter.tokens(model, prompt or "", not plain))
            return show.tokens(counted), gr.update(visible=counted is not None and counted[0] > counted[1])

        gr.on(
            [demo.load, fields["prompt"].change, fields["plain_prompt"].change, fields["model"].change],
            told(count),
            [fields["prompt"], fields["plain_prompt"], fields["model"]],
            [ui["tokens"], fields["long_prompt"]],
            api_visibility="private",
            trigger_mode="always_last",
            **quiet,
        )

        async def choose(model: str) -> dict:
            facts = await page.facts(model)
            if facts.problem is not None:
                raise UsageError(facts.problem)
            loaded = service.painter.loaded
            fresh = loaded is None or loaded.model != model
            changed = {
                "loads": '<p class="quiet">It is loaded at the next Draw.</p>' if fresh else "",
                "size": gr.update(choices=_sizes(facts), value=None),
                "price": show.prices(facts.front),
                "ideas": gr.update(value=show.ideas(_ideas(facts)), visible=bool(facts.prompts)),
                "prompt": gr.update(visible=facts.reads),
            }
            for o in PLAIN:
                seen = o.name in facts.options and o.name not in (
                    "upscale",
                    "hires_net",
                    "refiner_start",
                    "long_prompt",
                )
                own = {"visible": seen} if seen or o.name not in facts.options else {}
                if o.choices is not None:
                    own["choices"] = choices(o, _value(o, facts))
                elif o.model is not None or o.name in (*DIAL, "strength"):
                    own |= {k: v for k, v in filled(o, fields[o.name], _value(o, facts)).items() if k != "__type__"}
                if o.name in facts.most:
                    own["maximum"] = facts.most[o.name]
                if own:
                    changed[o.name] = gr.update(**own)
            return updates(changed)

        fields["model"].input(
            told(choose),
            fields["model"],
            [*(ui[name] for name in ("loads", "size", "price", "ideas", "prompt")), *(fields[n] for n in BY_NAME)],
            api_visibility="private",
            **quiet,
        )
        ui["size"].input(
            lambda size: [int(side) for side in size.split("x")],
            ui["size"],
            [fields["width"], fields["height"]],
            api_visibility="private",
            **quiet,
        )

        # prices

        async def run_pick(*values) -> tuple[str, str]:
            """The cache that `auto` takes for this promise, as a policy, and why."""
            given = values_of(values)
            wanted = await page.wanted(given | {"cache": AUTO, "seed": given.get("seed") or 0})
            planned = await page.ask(lambda: service.painter.plan(wanted))
            return "\n".join(planned["settings"]["cache"]), show.state(planned["cache_choice"])

        async def take(model: str, event: gr.EventData) -> tuple[str, str, str]:
            policy = str(event._data["told"])
            front = (await page.facts(model)).front
            price = next(p for p in front.policies if "\n".join(p.cache) == policy)
            reason = f"{price.macs:.0%} of the work, {price.psnr_worst:.1f} dB at worst, {price.psnr:.1f} dB on average"
            return policy, show.state(reason), show.prices(front, price.cache)

        async def mark(policy: str, model: str) -> str:
            return show.prices((await page.facts(model)).front, tuple((policy or "").split("\n")))

        shown_pick = [fields["cache"], ui["reason"]]
        gr.on(
            [pick.click, fields["min_psnr"].release],
            told(taking(run_pick, names, 0)),
            inputs,
            shown_pick,
            api_name="pick",
            **quiet,
        ).success(mark, [fields["cache"], fields["model"]], ui["price"], api_visibility="private", **quiet)
        ui["price"].click(told(take), fields["model"], [*shown_pick, ui["price"]], api_visibility="private", **quiet)

        # pictures that were drawn

        async def look(request: gr.Request, event: gr.SelectData) -> dict:
            session = page.session(request)
            shot = session.shots[event.index]
            return updates(drawing.picture(session, shot) | {"about": ""})

        chosen = [ui["preview"], ui["slider"], ui["about"]]
        ui["gallery"].select(told(look), None, chosen, api_visibility="private", **quiet).then(
            _described(page), None, [ui["settings"], about], api_visibility="private", **quiet
        )

        def fill(values: Mapping[str, Any]) -> dict:
            """Updates of fields."""
            changed = {}
            for name, value in values.items():
                if name == "loras":
                    changed[name] = [[lora, value.get(lora, 0.0)] for lora in offers.loras.names()] or None
                elif name in BY_NAME:
                    changed[name] = filled(BY_NAME[name], fields[name], value)
                elif value is not None or name == "seed":
                    changed[name] = value
            return updates(changed, fields)

        async def run_restore(file: str | None) -> dict:
            """Fill the fields from a picture's settings; the first output says what had no meaning here."""
            if file is None:
                return {ui["lost"]: ""}
            values, lost = await asyncio.to_thread(form.restored, Path(file), service)
            told_lost = f"; without meaning here: {', '.join(lost)}" if lost else ""
            return {ui["lost"]: show.state(show.escape(f"the fields are as in the picture{told_lost}"))} | fill(values)

        async def use_these(request: gr.Request) -> dict:
            shot = _shown(page, request)
            values, _ = form.fields_of(shot.settings, service)
            return fill(values)

        async def same_seed(request: gr.Request) -> int:
            return _shown(page, request).settings["seed"]

        async def as_start(request: gr.Request) -> dict:
            file = str(_shown(page, request).file)
            return {"background": file, "layers": [], "composite": file}

        settable = [fields[name] for name in names if name not in ("editor", "mask", "control_image", "compare")]
        restore.change(told(run_restore), restore, [ui["lost"], *settable], api_name="restore", **quiet)
        use.click(told(use_these), None, settable, api_visibility="private", **quiet)
        same.click(told(same_seed), None, fields["seed"], api_visibility="private", **quiet)
        start.click(lambda: gr.update(open=True), None, from_picture, api_visibility="private", **quiet).then(
            None, None, None, js=WHEN_IT_CAN_PAINT, api_visibility="private"
        ).then(told(as_start), None, fields["editor"], api_visibility="private", **quiet)
        anew.click(lambda: None, None, fields["seed"], api_visibility="private", **quiet)
        again.click(lambda seed: seed, ui["last"], fields["seed"], api_visibility="private", **quiet)
        ui["ideas"].click(_idea, None, fields["prompt"], api_visibility="private", **quiet)

        # the browser's memory

        kept = [name for name in names if name not in UNKEPT]
        draw.click(
            lambda *values: dict(zip(kept, values, strict=True)),
            [fields[name] for name in kept],
            stored,
            api_visibility="private",
            **quiet,
        )

        async def welcome(values: Any) -> list:
            """What the browser kept, where that is still possible; else the fields as they are."""
            found = form.kept(values, service) if isinstance(values, dict) else {}
            # Gradio's page shows 0 in a number that has no value, until it is told so
            empty = {name for name in kept if isinstance(fields[name], gr.Number) and fields[name].value is None}
            return [found.get(name, None if name in empty else gr.skip()) for name in kept]

        demo.load(told(welcome), stored, [fields[name] for name in kept], api_visibility="private", **quiet)
        demo.load(None, None, None, js=USE_KEYS, api_visibility="private")
        demo.unload(page.leave)
    return demo


def form_matters(fields: Mapping[str, Any]) -> list[str]:
    """Those fields that change the plan."""
    words = {"prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "loras", "compare", "seed", "mask", "invert"}
    return [name for name in fields if name not in words and name not in BY_PRICE]


def _value(o: Any, facts: Facts) -> Any:
    """What a widget shows before anybody touched it."""
    if o.name in BY_PRICE:
        return {"min_psnr": 30, "max_macs": None}[o.name]
    if o.name in DIAL and facts.settings.get("cache"):  # which says all of it
        return o.default if o.default is not None else 1
    return facts.settings.get(o.key, o.default)


def _first(facts: Facts) -> str:
    if not facts.prompts:
        return ELSEWHERE
    return f"a {FIRST}" if FIRST in facts.prompts else facts.prompts[0]


def _ideas(facts: Facts) -> list[str]:
    """Some of what the model draws, from all over its list."""
    step = max(1, len(facts.prompts) // IDEAS)
    return list(facts.prompts[::step])[:IDEAS]


def _sizes(facts: Facts) -> list[tuple[str, str]]:
    return [(name, f"{width}x{height}") for name, (width, height) in facts.sizes.items()]


def _greeting(facts: Facts, model: str) -> str:
    if facts.problem is not None:
        return show.escape(facts.problem)
    said = facts.settings
    return show.escape(f"{model} · {said['width']} × {said['height']} · {said['steps']} steps")


def _shown(page: Page, request: gr.Request) -> Any:
    shot = page.session(request).shown
    if shot is None:
        raise UsageError("there is no picture yet: draw one")
    return shot


def _idea(event: gr.EventData) -> str:
    return str(event._data["told"])


def _described(page: Page) -> Callable:
    """The settings of the picture that is shown."""

    async def describe(request: gr.Request) -> tuple[str, dict]:
        shot = page.session(request).shown
        if shot is None:
            return "", gr.update(visible=False)
        return show.settings(shot.settings, label), gr.update(visible=True)

    return describe
