"""What the page shows in HTML: steps, numbers, settings, and the prices of caches as a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...cache.prices import Front

KINDS = {"F": ("full", "full"), "c": ("cached", "cached"), "?": ("open", "decided on the way")}
MOST_CELLS = 400  # a step each; of more steps, each cell is the first of several


def strip(letters: str, done: int | None = None) -> str:
    """A cell a step, of the kinds in `KINDS`; done: how many have been taken, if they are being taken."""
    if not letters:
        return ""
    counts = [f"{letters.count(letter)} {words}" for letter, (_, words) in KINDS.items() if letter in letters]
    told = f"{len(letters)} steps: {', '.join(counts)}" + ("" if done is None else f"; {done} are done")
    every = math.ceil(len(letters) / MOST_CELLS)
    cells = "".join(
        f'<i class="{KINDS[letter][0]}{" todo" if done is not None and index * every >= done else ""}"></i>'
        for index, letter in enumerate(letters[::every])
    )
    return f'<div class="strip" role="img" aria-label="{told}" title="{escape(letters)}">{cells}</div>'


def plan(planned: Mapping[str, Any], seconds: float | None) -> str:
    """What a job would do; seconds: that it is expected to take."""
    letters, share = planned["steps"], planned["unet_macs_share"]
    full, steps = planned["full_steps"], len(letters)
    if "?" in letters:
        told = [f"<b>{full}</b> of {steps} steps full at least", "the rest is decided on the way"]
    else:
        told = [f"<b>{full}</b> of {steps} steps full"]
    told += [f"<b>{share:.0%}</b> of the work"] if share is not None else []
    told += [f"about <b>{duration(seconds)}</b>"] if seconds is not None else []
    return strip(letters) + f'<p class="told">{" · ".join(told)}</p>{KEY}'


KEY = '<p class="key"><span><i class="full"></i>full</span><span><i class="cached"></i>cached</span></p>'


def tokens(count: tuple[int, int] | None) -> str:
    if count is None:
        return ""
    used, room = count
    if used <= room:
        return f'<p class="quiet">{used} of {room} tokens</p>'
    return f'<p class="over">{used} of {room} tokens: the last {used - room} are not read, unless all of it is used</p>'


def state(text: str, kind: str = "") -> str:
    return f'<p role="status" aria-live="polite" class="{kind}">{text}</p>'


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def numbers(stats: Mapping[str, Any]) -> str:
    """What a job cost."""
    if not stats:
        return '<p class="quiet">There are numbers once a picture was drawn.</p>'
    rows = [(f"Seconds, {phase}", f"{value:.2f}") for phase, value in stats.get("seconds", {}).items()]
    full, cached = stats.get("full_steps", 0), stats.get("cached_steps", 0)
    rows.append(("Steps", f"{full} full, {cached} cached"))
    if stats.get("unet_macs_uncached"):
        share = stats["unet_macs"] / stats["unet_macs_uncached"]
        rows.append(("Multiply-adds in the U-Net", f"{stats['unet_macs'] / 1e9:,.1f} G, {share:.1%} of uncached"))
    rows.append(("Caches", ", ".join(stats.get("caches", ())) or "none"))
    rows += [(f"Remembered by {name}", size(held)) for name, held in stats.get("cache_bytes", {}).items() if held]
    rows.append(("Peak memory", size(stats.get("peak_memory_bytes", 0))))
    rows.append(("Device", f"{stats.get('device', '')}, {stats.get('dtype', '')}"))
    return table(rows)


def settings(said: Mapping[str, Any], label: Any) -> str:
    """A picture's settings, those that are not the default."""
    rows = [(label(name), _valued(value)) for name, value in said.items() if value not in (None, [], "", False)]
    return table(rows)


def _valued(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts">{body}</table>'


def compared(with_cache: float, without: float, psnr: float | None, first: bool) -> str:
    """The seconds of denoising with and without a cache, and how near the pictures are, in dB. first: whether it was
    the model's first job, which is slower."""
    near = "the same picture" if psnr is None or math.isinf(psnr) else f"PSNR <b>{psnr:.1f} dB</b>"
    note = '<p class="quiet">The model had to be loaded first; draw again for fair times.</p>' if first else ""
    return (
        f'<p class="told sides"><span>with: <b>{duration(with_cache)}</b></span>'
        f"<span><b>{without / max(with_cache, 1e-9):.2f}×</b> as fast, {near}</span>"
        f"<span>without: <b>{duration(without)}</b></span></p>{note}"
    )


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 250, 40, 12, 12, 40


def prices(front: Front | None, chosen: Sequence[str] = ()) -> str:
    """Each calibrated cache by its share of multiply-adds and its worst PSNR; a click on one picks it. chosen: the one
    that is picked."""
    if front is None:
        return (
            '<p class="quiet">What caches cost this model was not measured yet. '
            "<code>mlx-deepcache-calibrate --model …</code> does it, once.</p>"
        )
    shares, dbs = [p.macs for p in front.policies], [p.psnr_worst for p in front.policies]
    low, high = 5 * math.floor(min(dbs) / 5), 5 * math.ceil(max(dbs) / 5)
    most = 0.1 * math.ceil(max(shares) * 10)

    def x(share: float) -> float:
        return LEFT + share / most * (WIDTH - LEFT - RIGHT)

    def y(db: float) -> float:
        return HEIGHT - BOTTOM - (db - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    lines = []
    for db in range(low, high + 1, 10 if high - low > 25 else 5):
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(db):.1f}" y2="{y(db):.1f}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y(db) + 4:.1f}" text-anchor="end">{db}</text>')
    for tenth in range(0, round(most * 10) + 1, 2):
        lines.append(
            f'<text x="{x(tenth / 10):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tenth * 10}%</text>'
        )
    lines.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">of the multiply-adds</text>')
    lines.append(f'<text x="{LEFT + 4}" y="{TOP + 4}">dB at worst</text>')
    points = []
    for price in sorted(front.policies, key=lambda p: p.macs):
        told = escape(f"{price}: {price.macs:.0%} of the work, {price.psnr_worst:.1f} dB at worst")
        picked = tuple(chosen) == price.cache
        points.append(
            f'<circle cx="{x(price.macs):.1f}" cy="{y(price.psnr_worst):.1f}" r="{7 if picked else 5}" tabindex="0" '
            f'role="button" aria-label="{told}"{" class=picked" if picked else ""} '
            f'data-cache="{escape(chr(10).join(price.cache))}"><title>{told}</title></circle>'
        )
    return (
        f'<svg class="prices" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="prices of caches">'
        f"{''.join(lines)}{''.join(points)}</svg>"
        f'<p class="quiet">{len(front.policies)} caches, measured over {front.pictures} pictures '
        f"in {front.steps} steps. A click takes one.</p>"
    )


def ideas(prompts: Sequence[str]) -> str:
    """Prompts to click."""
    return "".join(f'<button type="button" data-prompt="{escape(p)}">{escape(p)}</button>' for p in prompts)
