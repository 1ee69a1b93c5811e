"""Widgets, derived from the options as they are declared."""

from __future__ import annotations

import re
from typing import Any

import gradio as gr

from ...generation.declared import Option, options_of
from ...generation.kinds import KINDS
from ...generation.options import Control, ModelOptions, Options

OWN = ""  # of a choice: the model's own, or none
FEW = 3  # choices that are shown side by side
_CAPITALS = {"vae": "VAE", "psnr": "PSNR", "rng": "RNG", "macs": "multiply-adds"}
_IDS = {"negative_prompt": "negative", "cache_interval": "interval", "cache_branch": "branch", "cache": "policy"}


def label(name: str) -> str:
    """What a page calls an option."""
    words = " ".join(_CAPITALS.get(word, word) for word in name.split("_"))
    return words[0].upper() + words[1:]


_FLAGS = {o.flag: label(o.name) for cls in (ModelOptions, Options, Control) for o in options_of(cls)}


def about(o: Option) -> str | None:
    """Its help, which names others by their labels."""
    text = re.sub(r"--[a-z][a-z0-9-]*", lambda flag: _FLAGS.get(flag[0], flag[0]), o.help).replace("`", "")
    return None if text == "likewise" else text[0].upper() + text[1:]


def widget(o: Option, value: Any = None, names: tuple[str, ...] = (), **own: Any) -> gr.components.Component:
    """value: what the model has where a request says nothing; names: what may be named, of an option that names a file
    of the server's; own: for Gradio, in place of what follows from the option."""
    own = {"label": label(o.name), "info": about(o), "elem_id": _IDS.get(o.name, o.name), "interactive": True} | own
    if o.kind is KINDS["Model"]:
        return gr.Dropdown([("none", OWN), *names], value=OWN, **own)
    if o.choices is not None:
        kind = gr.Radio if len(o.choices) <= FEW else gr.Dropdown
        known = [choice for _, choice in choices(o, value)]
        return kind(choices(o, value), value=OWN if OWN in known else value, **own)
    if o.kind is KINDS["bool"]:
        return gr.Checkbox(value=bool(value), **own)
    if o.span is not None and value is not None:
        return gr.Slider(value=value, step=o.span[2], **(_range(o, value) | own))
    if o.kind in (KINDS["int"], KINDS["float"]) and not o.many:
        whole = {"precision": 0} if o.kind is KINDS["int"] else {}
        return gr.Number(value=value, placeholder="default" if o.optional else "", **whole, **own)
    return gr.Textbox(value=written(o, value), **own)


def choices(o: Option, value: Any) -> list[tuple[str, str]]:
    """An option's, first what the model has of its own where that can be left to it."""
    named = [(str(choice), choice) for choice in o.choices]
    if o.default is not None or (value is not None and len(named) <= FEW):
        return named
    return [("default" if value is None else f"the model's own: {value}", OWN), *named]


def filled(o: Option, kind: gr.components.Component, value: Any) -> dict:
    """The update that shows a value, or that there is none."""
    if isinstance(kind, gr.Slider):
        if value is None:
            return gr.skip()
        return gr.update(value=value, **_range(o, value))
    if isinstance(kind, (gr.Dropdown, gr.Radio)):
        if value is None and OWN not in (choice for _, choice in kind.choices):
            return gr.skip() if o.default is None else gr.update(value=o.default)
        return gr.update(value=OWN if value is None else value)
    if isinstance(kind, gr.Checkbox):
        return gr.update(value=bool(value))
    return gr.update(value=written(o, value) if isinstance(kind, gr.Textbox) else value)


def written(o: Option, value: Any) -> str:
    """As a textbox shows it."""
    if value is None:
        return ""
    return "\n".join(value) if o.many else str(value)


def read(o: Option, value: Any) -> Any:
    """An option's value from its widget, or None if it says nothing."""
    if value is None or value is False or (isinstance(value, str) and not value.strip()):
        return None
    if o.many:
        return [line.strip() for line in value.splitlines() if line.strip()]
    return value


def _range(o: Option, value: float) -> dict:
    low, high, _ = o.span
    return {"minimum": min(low, value), "maximum": max(high, value)}
