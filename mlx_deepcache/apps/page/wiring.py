"""What happens when somebody touches the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr

from ...cache.prices import AUTO
from ...errors import UsageError
from ..server.refused import of_error
from . import drawing, form, show
from .facts import Facts
from .form import BY_PRICE, DIAL, PLAIN
from .layout import BY_NAME, Layout, ideas_of, sizes_of, value_of
from .visitors import Page, taking, told
from .widgets import choices, filled, label

UNKEPT = ("editor", "mask", "control_image", "loras")  # fields that a browser does not keep
QUEUED = {"show_progress": "hidden", "concurrency_limit": None}
# Gradio's queue answers on one stream, which it closes when nothing waits: an answer to what is asked at that moment is
# lost, and a button that waits for its answer is dead. So only what takes long, or is there for programs, is queued
QUICK = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}

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


def build(page: Page, facts: Facts) -> gr.Blocks:
    """facts: of the default model."""
    with Blocks(title="mlx_deepcache", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as demo:
        wiring = Wiring(page, Layout(page.service, facts), demo)
        wiring.plans()
        wiring.draws()
        wiring.chooses()
        wiring.prices()
        wiring.shows()
        wiring.remembers()
        demo.load(None, None, None, js=USE_KEYS, api_visibility="private")
        demo.unload(page.leave)
    return demo


class Wiring:
    """Handlers, each by the parts that it reads and changes; those with a name are there for programs too."""

    def __init__(self, page: Page, at: Layout, demo: gr.Blocks):
        self.page, self.at, self.demo = page, at, demo
        self.names, self.inputs = list(at.fields), list(at.fields.values())

    def _updates(self, changed: Mapping[str, Any]) -> dict:
        return {self.at.ui[name]: value for name, value in changed.items()}

    def _values(self, values: tuple) -> dict[str, Any]:
        return dict(zip(self.names, values, strict=False))

    def plans(self) -> None:
        """What a job would do, as the dial is turned."""
        page, ui, fields = self.page, self.at.ui, self.at.fields

        async def run_plan(*values) -> tuple[str, dict, dict]:
            """What a job would do: which steps are full, its share of the work, and how long it may take."""
            given = self._values(values)
            wanted = await page.wanted(given)
            planned = await page.ask(lambda: page.service.painter.plan(wanted))
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

        planning = [fields[name] for name in form_matters(fields)]
        gr.on(
            [self.demo.load, ui["last"].change, *(field.change for field in planning)],
            live_plan,
            self.inputs,
            shown_plan,
            trigger_mode="always_last",
            **QUICK,
        )
        asked = gr.Button(visible=False)  # for programs
        asked.click(told(taking(run_plan, self.names, 0)), self.inputs, shown_plan, api_name="plan", **QUEUED)

    def draws(self) -> None:
        """Drawing, a grid of intervals, and ending it."""
        page, at, ui = self.page, self.at, self.at.ui
        drawn = ("preview", "gallery", "state", "strip", "slider", "about", "numbers", "stop", "last")

        async def run_draw(request: gr.Request, *values) -> AsyncIterator[dict]:
            """Draw; the pictures are the second output, and `state` says how far it is."""
            wanted = await page.wanted(self._values(values))
            async with aclosing(drawing.draw(page.service, page.session(request), page.speeds, wanted)) as steps:
                async for update in steps:
                    yield self._updates(update)

        async def run_grid(request: gr.Request, chosen: list[str], n: float, *values) -> AsyncIterator[dict]:
            """Draw with several cache intervals, each with as many seeds."""
            if not chosen:
                raise UsageError("a grid needs an interval, or several")
            given = self._values(values) | {"compare": False, "cache": None, "pictures": n}
            first = await page.wanted(given, cache_interval=1)
            given["seed"] = first.seeds[0]
            intervals = sorted({1, *map(int, chosen)})
            each = [(interval, await page.wanted(given, cache_interval=interval)) for interval in intervals]
            async with aclosing(drawing.grid(page.service, page.session(request), page.speeds, each)) as steps:
                async for update in steps:
                    yield self._updates(update)

        async def run_stop(request: gr.Request) -> str:
            """End what this visitor draws: what waits goes, and of what is drawn the last estimate stays."""
            jobs = page.session(request).jobs
            for job in list(jobs):
                job.stopped.set()
                if page.service.worker.position(job) is not None:
                    page.service.worker.cancel(job)
            return show.state("stopping" if jobs else "nothing is drawn", "busy" if jobs else "")

        outputs = [ui[name] for name in drawn]
        gr.on(
            [at.draw.click],
            told(taking(run_draw, self.names)),
            self.inputs,
            outputs,
            api_name="draw",
            trigger_mode="once",
            **QUEUED,
        ).then(_described(page), None, [ui["settings"], at.about], **QUICK)
        at.tabulate.click(
            told(taking(run_grid, ["intervals", "seeds", *self.names])),
            [at.intervals, at.seeds, *self.inputs],
            [*outputs, ui["grid"]],
            api_name="grid",
            **QUEUED,
        )
        at.stop.click(told(run_stop), None, ui["state"], api_name="stop", queue=False, show_progress="hidden")

    def chooses(self) -> None:
        """What the model says."""
        page, ui, fields = self.page, self.at.ui, self.at.fields

        async def count(prompt: str, plain: bool, model: str) -> tuple[str, dict]:
            facts = await page.facts(model)
            if not facts.reads:
                return "", gr.update(visible=False)
            counted = await page.ask(lambda: page.service.painter.tokens(model, prompt or "", not plain))
            return show.tokens(counted), gr.update(visible=counted is not None and counted[0] > counted[1])

        gr.on(
            [self.demo.load, fields["prompt"].change, fields["plain_prompt"].change, fields["model"].change],
            told(count),
            [fields["prompt"], fields["plain_prompt"], fields["model"]],
            [ui["tokens"], fields["long_prompt"]],
            trigger_mode="always_last",
            **QUICK,
        )

        async def choose(model: str) -> dict:
            facts = await page.facts(model)
            if facts.problem is not None:
                raise UsageError(facts.problem)
            loaded = page.service.painter.loaded
            fresh = loaded is None or loaded.model != model
            changed = {
                "loads": '<p class="quiet">It is loaded at the next Draw.</p>' if fresh else "",
                "size": gr.update(choices=sizes_of(facts), value=None),
                "price": show.prices(facts.front),
                "ideas": gr.update(value=show.ideas(ideas_of(facts)), visible=bool(facts.prompts)),
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
                    own["choices"] = choices(o, value_of(o, facts))
                elif o.model is not None or o.name in (*DIAL, "strength"):
                    own |= {k: v for k, v in filled(o, fields[o.name], value_of(o, facts)).items() if k != "__type__"}
                if o.name in facts.most:
                    own["maximum"] = facts.most[o.name]
                if own:
                    changed[o.name] = gr.update(**own)
            return self._updates(changed)

        fields["model"].input(
            told(choose),
            fields["model"],
            [*(ui[name] for name in ("loads", "size", "price", "ideas", "prompt")), *(fields[n] for n in BY_NAME)],
            **QUICK,
        )
        ui["size"].input(
            lambda size: [int(side) for side in size.split("x")],
            ui["size"],
            [fields["width"], fields["height"]],
            **QUICK,
        )

    def prices(self) -> None:
        """What caches cost in picture."""
        page, at, ui, fields = self.page, self.at, self.at.ui, self.at.fields

        async def run_pick(*values) -> tuple[str, str]:
            """The cache that `auto` takes for this promise, as a policy, and why."""
            given = self._values(values)
            wanted = await page.wanted(given | {"cache": AUTO, "seed": given.get("seed") or 0})
            planned = await page.ask(lambda: page.service.painter.plan(wanted))
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
            [at.pick.click, fields["min_psnr"].release],
            told(taking(run_pick, self.names, 0)),
            self.inputs,
            shown_pick,
            api_name="pick",
            **QUEUED,
        ).success(mark, [fields["cache"], fields["model"]], ui["price"], **QUICK)
        ui["price"].click(told(take), fields["model"], [*shown_pick, ui["price"]], **QUICK)

    def shows(self) -> None:
        """Pictures that were drawn, or restored from."""
        page, at, ui, fields = self.page, self.at, self.at.ui, self.at.fields

        async def look(request: gr.Request, event: gr.SelectData) -> dict:
            session = page.session(request)
            shot = session.shots[event.index]
            return self._updates(drawing.picture(session, shot) | {"about": ""})

        chosen = [ui["preview"], ui["slider"], ui["about"]]
        ui["gallery"].select(told(look), None, chosen, **QUICK).then(
            _described(page), None, [ui["settings"], at.about], **QUICK
        )

        def fill(values: Mapping[str, Any]) -> dict:
            """Updates of fields."""
            changed = {}
            for name, value in values.items():
                if name == "loras":
                    changed[name] = [[lora, value.get(lora, 0.0)] for lora in page.service.offers.loras.names()] or None
                elif name in BY_NAME:
                    changed[name] = filled(BY_NAME[name], fields[name], value)
                elif value is not None or name == "seed":
                    changed[name] = value
            return self._updates(changed)

        async def run_restore(file: str | None) -> dict:
            """Fill the fields from a picture's settings; the first output says what had no meaning here."""
            if file is None:
                return {ui["lost"]: ""}
            values, lost = await asyncio.to_thread(form.restored, Path(file), page.service)
            told_lost = f"; without meaning here: {', '.join(lost)}" if lost else ""
            return {ui["lost"]: show.state(show.escape(f"the fields are as in the picture{told_lost}"))} | fill(values)

        async def use_these(request: gr.Request) -> dict:
            shot = page.shown(request)
            values, _ = form.fields_of(shot.settings, page.service)
            return fill(values)

        async def same_seed(request: gr.Request) -> int:
            return page.shown(request).settings["seed"]

        async def as_start(request: gr.Request) -> dict:
            file = str(page.shown(request).file)
            return {"background": file, "layers": [], "composite": file}

        settable = [fields[name] for name in self.names if name not in ("editor", "mask", "control_image", "compare")]
        at.restore.change(told(run_restore), at.restore, [ui["lost"], *settable], api_name="restore", **QUEUED)
        at.use.click(told(use_these), None, settable, **QUICK)
        at.same.click(told(same_seed), None, fields["seed"], **QUICK)
        at.start.click(lambda: gr.update(open=True), None, at.from_picture, **QUICK).then(
            None, None, None, js=WHEN_IT_CAN_PAINT, api_visibility="private"
        ).then(told(as_start), None, fields["editor"], **QUICK)
        at.anew.click(lambda: None, None, fields["seed"], **QUICK)
        at.again.click(lambda seed: seed, ui["last"], fields["seed"], **QUICK)
        ui["ideas"].click(_idea, None, fields["prompt"], **QUICK)

    def remembers(self) -> None:
        """The browser's memory."""
        page, at, fields = self.page, self.at, self.at.fields
        kept = [name for name in self.names if name not in UNKEPT]
        at.draw.click(
            lambda *values: dict(zip(kept, values, strict=True)),
            [fields[name] for name in kept],
            at.stored,
            **QUICK,
        )

        async def welcome(values: Any) -> list:
            """What the browser kept, where that is still possible; else the fields as they are."""
            found = form.kept(values, page.service) if isinstance(values, dict) else {}
            # Gradio's page shows 0 in a number that has no value, until it is told so
            empty = {name for name in kept if isinstance(fields[name], gr.Number) and fields[name].value is None}
            return [found.get(name, None if name in empty else gr.skip()) for name in kept]

        self.demo.load(told(welcome), at.stored, [fields[name] for name in kept], **QUICK)


def form_matters(fields: Mapping[str, Any]) -> list[str]:
    """Those fields that change the plan."""
    words = {"prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "loras", "compare", "seed", "mask", "invert"}
    return [name for name in fields if name not in words and name not in BY_PRICE]


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
