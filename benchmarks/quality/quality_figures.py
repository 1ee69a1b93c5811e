"""The two pictures of benchmarks/quality/quality.py: quality against multiply-adds, and a sheet of what was drawn."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

FAMILIES = {  # the first that fits names the family: its colour and marker
    "attention or guidance policies": ("tab:purple", "D", ("pab", "fastercache", "tgate", "guidance")),
    "adaptive, with a forecast": ("tab:red", "^", ("adaptive", "seer")),
    "adaptive": ("tab:orange", "^", ("adaptive",)),
    "DeepCache with a forecast": ("tab:green", "o", ("taylorseer", "spectrum")),
    "DeepCache": ("tab:blue", "s", ("deepcache",)),
}
SOLVERS = {"own": ("black", "x"), "dpm++2m": ("tab:brown", "+"), "unipc": ("tab:gray", "1")}
SIDE, GAP, LABEL = 64, 4, 290
SHOWN = (  # on the sheet, beside the best compositions, where they were drawn
    *("deepcache:interval=2", "deepcache:interval=3", "deepcache:interval=5", "deepcache:interval=10"),
    *("pab", "fastercache", "tgate:step=25", "guidance:end=0.8"),
)


def family(row: dict) -> str:
    for name, (_, _, words) in FAMILIES.items():
        found = [word in row["name"] for word in words]
        if all(found) if "seer" in words else any(found):
            return name
    return "DeepCache"


def plot(report: dict, file: Path) -> None:
    """PSNR against multiply-adds; the front is drawn through, and named at its points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["rows"]
    figure, axes = pyplot.subplots(figsize=(11.5, 6.2), dpi=100)
    for name, (colour, marker, _) in FAMILIES.items():
        some = [row for row in rows if row["kind"] == "cache" and family(row) == name]
        if some:
            x, y = zip(*((row["macs"], row["psnr"]) for row in some), strict=True)
            axes.scatter(x, y, s=38, c=colour, marker=marker, label=name, zorder=3, alpha=0.85)
    own = report["scheduler"]
    for solver in dict.fromkeys(row["scheduler"] for row in rows if row["kind"] == "fewer steps"):
        some = sorted((r for r in rows if r["kind"] == "fewer steps" and r["scheduler"] == solver), key=_macs)
        x = [row["macs"] for row in some]
        colour, marker = SOLVERS["own" if solver == own else solver]
        said = f"{solver} (its own), fewer steps" if solver == own else f"{solver}, fewer steps"
        axes.plot(x, [row["psnr"] for row in some], "--", marker=marker, color=colour, lw=1, label=said)
        if solver != own:
            told = f"{solver}, to its own {report['steps']}-step picture"
            axes.plot(x, [row["psnr_own"] for row in some], ":", marker=marker, color=colour, lw=1, label=told)
    front = sorted((row for row in rows if row.get("front")), key=_macs)
    axes.plot([r["macs"] for r in front], [r["psnr"] for r in front], color="gold", lw=5, zorder=1, label="the front")
    for row in front:  # of which nothing else is above or left of them
        at, place = (row["macs"], row["psnr"]), {"xytext": (-7, 2), "textcoords": "offset points", "ha": "right"}
        axes.annotate(_short(row["name"]), at, **place, fontsize=7, zorder=4)
    axes.set_xlabel(f"multiply-adds in the U-Net, as a share of the uncached run's {report['steps']} steps")
    axes.set_ylabel(f"mean PSNR to the uncached {own} picture, dB")
    axes.set_xlim(-0.05, 1.02)  # room for the names at the left
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    axes.set_title(f"{report['model']} model, {report['pictures']} pictures, {report['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def sheet(report: dict, images: dict[str, np.ndarray], file: Path, columns: int = 8) -> None:
    """Some of the prompts, drawn without a cache and by policies that stand for the others; one a row, by cost."""
    from PIL import Image, ImageDraw

    rows = {row["name"]: row for row in report["rows"]}
    chosen = {name: rows[name] for name in SHOWN if name in rows}
    for plain in SHOWN[1:4]:
        if plain in rows:
            near = [r for r in rows.values() if r["kind"] == "cache" and r["psnr"] >= rows[plain]["psnr"]]
            best = min(near, key=lambda r: (r["macs"], -r["psnr"]))
            chosen[best["name"]] = best
    rivals = [row for row in report["rows"] if row["kind"] == "fewer steps"]
    for solver in dict.fromkeys(row["scheduler"] for row in rivals):
        near = min((r for r in rivals if r["scheduler"] == solver), key=lambda r: abs(r["macs"] - 0.2))
        chosen[near["name"]] = near
    listed = [{"name": "uncached"}, *sorted(chosen.values(), key=_macs, reverse=True)]
    picks = np.linspace(0, len(images["uncached"]) - 1, min(columns, len(images["uncached"]))).round().astype(int)
    paper = Image.new("RGB", (LABEL + len(picks) * (SIDE + GAP), len(listed) * (SIDE + GAP) + 18), "white")
    draw = ImageDraw.Draw(paper)
    for number, row in enumerate(listed):
        top = number * (SIDE + GAP)
        said = f"{_short(row['name'])}\n"
        if "macs" in row:
            said += f"{row['macs']:.3f} of the multiply-adds\n{row['psnr']:.1f} dB, worst {row['psnr_worst']:.1f}"
        draw.multiline_text((4, top + 10), said, fill="black")
        for column, pick in enumerate(picks):
            tile = Image.fromarray(images[row["name"]][pick]).resize((SIDE, SIDE), Image.LANCZOS)
            paper.paste(tile, (LABEL + column * (SIDE + GAP), top))
    told = f"{report['steps']} steps, {report['model']} model, {report['device']}, {report['date']}"
    draw.text((4, paper.height - 15), told, fill="black")
    paper.quantize(256).save(file, optimize=True)  # of a third of the size; what is measured is not


def _macs(row: dict) -> float:
    return row["macs"]


def _short(name: str) -> str:
    name = re.sub(r"steps=[\d+-]{20,}", "steps=...", name)  # longer than there is room for
    words = {"interval=": "", "threshold=": "", "max_": "max ", "branch=": "branch ", ":": " ", ",": ", ", ",  ": ", "}
    for long, brief in words.items():
        name = name.replace(long, brief)
    return name.replace(" taylorseer", " + taylorseer").replace(" spectrum", " + spectrum")
