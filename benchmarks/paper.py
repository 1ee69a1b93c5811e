"""The tables of DeepCache's paper, its figures beside ours: multiply-adds, and what of the rest can be had here.

    python benchmarks/paper.py
    python benchmarks/paper.py --table cifar --measure --repeats 5
    python benchmarks/paper.py --table sd --model sd=sd15 --prompts parti.txt --clip clip-vit-g-14 --work runs/paper
    python benchmarks/paper.py --table church --model church=ddpm-church --against church=church_fid.npz \\
        --weights pt_inception-2015-12-05-6726825d.pth

Multiply-adds are counted from nets of full size without weights, as the paper counts them: convolutions and linear
layers, without attention's two products, the mean over all steps. --measure times full and cached calls of these nets
here, with random weights; quality is measured where --model names weights. What is not asked for, or cannot be had
here, is printed as not run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.quality import fid
from benchmarks.speed.models import SD15
from benchmarks.timing import header, machine, medians, write_json
from mlx_deepcache.apps.calibrate import WORK, read_lines
from mlx_deepcache.apps.command import run
from mlx_deepcache.cache.deepcache import DeepCache
from mlx_deepcache.cache.text import write
from mlx_deepcache.errors import Failure, UsageError

SOURCE = "X. Ma, G. Fang, X. Wang, DeepCache: Accelerating Diffusion Models for Free, arXiv 2312.00858"
NEAR = 0.01  # how far a count may be from the paper's without a word
CROSS, DOWN, ATTENTION = "CrossAttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"
NOT_RUN = "not run"


def _mirrored(kinds: list[str]) -> dict:
    return {"down_block_types": kinds, "up_block_types": [kind.replace("Down", "Up") for kind in kinds[::-1]]}


_DDPM = {
    "_class_name": "UNet2DModel",
    "in_channels": 3,
    "out_channels": 3,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
_BK = SD15 | {"layers_per_block": 1}
_SMALL = _BK | {"mid_block_type": None}
NETS = {  # as the published configs have them
    "sd": SD15,
    "bk-base": _BK,
    "bk-small": _SMALL,
    "bk-tiny": _SMALL | {"block_out_channels": [320, 640, 1280]} | _mirrored([CROSS] * 3),
    "ldm": {
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [192, 384, 576, 960],
        "cross_attention_dim": 512,
        "attention_head_dim": 1,
        **_mirrored([DOWN, CROSS, CROSS, CROSS]),
    },
    "cifar": _DDPM
    | {"sample_size": 32, "block_out_channels": [128, 256, 256, 256]}
    | _mirrored([DOWN, ATTENTION, DOWN, DOWN]),
    "lsun": _DDPM
    | {"sample_size": 256, "block_out_channels": [128, 128, 256, 256, 512, 512]}
    | _mirrored([DOWN, DOWN, DOWN, DOWN, ATTENTION, DOWN]),
}
TOKENS = {"sd": 77, "bk-base": 77, "bk-small": 77, "bk-tiny": 77, "ldm": 1}


@dataclass(frozen=True)
class Way:
    """One way of drawing. steps: of the sampler; caching: None runs the whole net on each of them."""

    net: str
    steps: int
    caching: DeepCache | None = None

    def full(self) -> int:
        return self.steps if self.caching is None else sum(self.caching.full_steps(self.steps))

    def mean(self, whole: float, cached: float) -> float:
        """The mean over the steps of what a full and a cached one cost."""
        full = self.full()
        return (full * whole + (self.steps - full) * cached) / self.steps

    def macs(self) -> float:
        """Multiply-adds a step, on average."""
        return self.mean(*_macs(self.net, 0 if self.caching is None else self.caching.branch))

    def seconds(self, times: dict[tuple, float]) -> float:
        """times: see `measured`."""
        branch = None if self.caching is None else self.caching.branch
        return self.steps * self.mean(times[self.net, None], times[self.net, branch])


@dataclass(frozen=True)
class Row:
    """paper: its figures by column; way: None for others' methods, which this project does not have; per: steps that
    multiply-adds are given for, where the paper spreads those of fewer over more."""

    name: str
    paper: dict[str, float]
    way: Way | None = None
    per: int | None = None
    note: str | None = None

    def gmacs(self) -> float | None:
        return None if self.way is None else self.way.macs() * self.way.steps / (self.per or self.way.steps) / 1e9


@dataclass(frozen=True)
class Table:
    """quality: what its last column is, the lower the better if it is a distance; options: of all that is drawn."""

    title: str
    rows: tuple[Row, ...]
    quality: str
    notes: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)


def _uniform(net: str, steps: int, interval: int, branch: int) -> Way:
    return Way(net, steps, DeepCache(interval=interval, branch=branch))


def _figures(macs: float | None, speed: float | None, quality: float | None) -> dict[str, float]:
    named = {"macs": macs, "speed": speed, "quality": quality}
    return {name: value for name, value in named.items() if value is not None}


_SD_NOTE = (
    "The paper's text says N = 5, ten full steps of 50 and 113.5 G with the cut that its code has by default "
    "(cache_layer_id 0, cache_block_id 0); its 130.45 G is that of 13 full steps, N = 4, which is 130.4 G. Its "
    "throughput and CLIP score are those of N = 5 (its table 13)."
)


def _sd_rows(quality: dict[str, float], speed: dict[str, float]) -> tuple[Row, ...]:
    def figures(name: str, macs: float) -> dict[str, float]:
        return _figures(macs, speed[name], quality[name])

    bk = [(f"BK-SDM-{kind.capitalize()}", f"bk-{kind}") for kind in ("base", "small", "tiny")]
    macs = dict(zip([name for name, _ in bk], (223.81, 217.78, 205.09), strict=True))
    return (
        Row("PLMS, 50 steps", figures("50", 338.83), Way("sd", 50)),
        Row("PLMS, 25 steps", figures("25", 169.42), Way("sd", 25), per=50),
        *(Row(name, figures(name, macs[name]), Way(net, 50)) for name, net in bk),
        Row("DeepCache, N = 5", figures("N", 130.45), _uniform("sd", 50, 5, 1), note=_SD_NOTE),
    )


_NAMES = ("50", "25", "BK-SDM-Base", "BK-SDM-Small", "BK-SDM-Tiny", "N")
_PLMS = {"scheduler": "pndm"}


def _by_name(*values: float) -> dict[str, float]:
    return dict(zip(_NAMES, values, strict=True))


def _ddpm(net: str, whole: float, cases: Iterable[tuple], fids: tuple[float, float], pruned: tuple) -> tuple[Row, ...]:
    return (
        Row("DDIM, 100 steps", _figures(whole, 1.0, fids[0]), Way(net, 100)),
        Row("Diff-Pruning, retrained", _figures(*pruned)),
        *(Row(f"DeepCache, N = {n}", _figures(*paper), _uniform(net, 100, n, 2)) for n, *paper in cases),
    )


_SKIPS = (  # table 12: multiply-adds, speed-up and FID of each skip branch, N = 5
    *((1.60, 3.023, 7.14), (2.24, 2.272, 5.94), (3.01, 1.850, 5.73), (3.89, 1.577, 5.69), (4.58, 1.343, 5.51)),
    *((5.31, 1.171, 4.93), (5.45, 1.151, 4.92), (5.60, 1.131, 4.76), (5.88, 1.105, 4.54), (5.95, 1.096, 4.57)),
    *((5.99, 1.089, 4.52), (6.03, 1.082, 4.48)),
)
_UPSAMPLER = (
    "0.11 G more a step than the paper has, 0.14 to 0.15 G a cached one: as if it did not count the convolution after "
    "upsampling to 16 x 16, 256 * 256 * 9 * 16 * 16 = 0.15 G, which a cached step of skip branches 7 and 8 runs."
)
_LDM_CASES = (
    *(("uniform", n, None, None) for n in (2, 3, 5, 10, 20)),
    *(("non-uniform", 10, 110, 1.2), ("non-uniform", 20, 120, 1.2)),  # tables 9 and 7
)
_LDM_FIGURES = (
    *((52.12, 1.88, 3.39), (36.48, 2.65, 3.44), (23.50, 4.12, 3.59), (13.97, 6.96, 4.41), (9.39, 10.54, 8.23)),
    *((13.97, 6.96, 4.27), (9.39, 10.54, 7.11)),
)
_BRANCHES = "--cache-branch B here is the paper's skip branch B + 1, and the pip package's cache_branch_id."
_LSUN_PRUNED = (138.8, 1.48)
TABLES = {
    "sd": Table(
        "Stable Diffusion 1.5, 512 x 512, PartiPrompts (table 3)",
        _sd_rows(_by_name(29.51, 29.33, 28.88, 27.94, 27.36, 29.46), _by_name(1.0, 2.04, 1.49, 1.75, 1.81, 2.15)),
        "CLIP score",
        (_BRANCHES, "The paper's CLIP scores are ViT-g/14's; another model's are to be compared with their own kind."),
        _PLMS,
    ),
    "sd-coco": Table(
        "Stable Diffusion 1.5, 512 x 512, MS-COCO 2017 (table 3)",
        _sd_rows(_by_name(30.30, 29.99, 29.47, 27.96, 27.41, 30.23), _by_name(1.0, 1.91, 1.45, 1.68, 1.76, 2.11)),
        "CLIP score",
        (_BRANCHES,),
        _PLMS,
    ),
    "ldm": Table(
        "LDM-4-G, ImageNet 256 x 256, 250 DDIM steps (table 1)",
        (
            Row("LDM-4-G", _figures(99.82, 1.0, 3.37), Way("ldm", 250)),
            Row("Diff-Pruning, retrained", _figures(52.71, 1.51, 9.27)),
            *(
                Row(
                    f"DeepCache, {how}, N = {n}",
                    _figures(*paper),
                    Way("ldm", 250, DeepCache(interval=n, branch=0, center=center, power=power)),
                )
                for (how, n, center, power), paper in zip(_LDM_CASES, _LDM_FIGURES, strict=True)
            ),
        ),
        "FID",
        (_BRANCHES,),
        {"guidance_scale": 1.5},
    ),
    "cifar": Table(
        "DDPM, CIFAR-10 32 x 32, 100 DDIM steps (table 2)",
        _ddpm(
            "cifar",
            6.1,
            ((2, 4.15, 1.40, 4.35), (3, 3.54, 1.61, 4.70), (5, 3.01, 1.85, 5.73), (10, 2.63, 2.07, 9.74)),
            (4.19, 4.16),
            (3.4, 1.37, 5.29),
        ),
        "FID",
        (_BRANCHES,),
        {"scheduler": "ddim", "timesteps": "quad", "clip": "off"},
    ),
    "skips": Table(
        "DDPM, CIFAR-10 32 x 32, N = 5, each skip branch (table 12)",
        tuple(
            Row(
                f"skip branch {b + 1}",
                _figures(*paper),
                _uniform("cifar", 100, 5, b),
                note=_UPSAMPLER if b in (6, 7) else None,
            )
            for b, paper in enumerate(_SKIPS)
        ),
        "FID",
        (_BRANCHES,),
        {"scheduler": "ddim", "timesteps": "quad", "clip": "off"},
    ),
    "bedroom": Table(
        "DDPM, LSUN bedrooms 256 x 256, 100 DDIM steps (table 2)",
        _ddpm(
            "lsun",
            248.7,
            ((2, 190.8, 1.29, 6.69), (3, 172.3, 1.43, 7.20), (5, 156.0, 1.48, 9.49)),
            (6.62, 6.70),
            (*_LSUN_PRUNED, 18.60),
        ),
        "FID",
        (_BRANCHES,),
        {"scheduler": "ddim", "timesteps": "uniform", "clip": "off"},
    ),
    "church": Table(
        "DDPM, LSUN churches 256 x 256, 100 DDIM steps (table 2)",
        _ddpm(
            "lsun",
            248.7,
            ((2, 190.8, 1.29, 11.31), (3, 172.3, 1.43, 11.75), (5, 156.0, 1.48, 13.68)),
            (10.58, 10.87),
            (*_LSUN_PRUNED, 13.90),
        ),
        "FID",
        (_BRANCHES,),
        {"scheduler": "ddim", "timesteps": "uniform", "clip": "off"},
    ),
}


@cache
def _net(name: str):
    """A net of full size; its weights are not computed until they are used."""
    from mlx_deepcache.nets.unet_parts import UNetConfig
    from mlx_deepcache.unet import UNet2DConditionModel

    return UNet2DConditionModel(UNetConfig.from_dict(NETS[name]))


@cache
def _macs(net: str, branch: int) -> tuple[int, int]:
    """Of a full and of a cached call, for one picture."""
    from mlx_deepcache.cache.macs import unet_macs

    side = NETS[net]["sample_size"]
    return unet_macs(_net(net), (side, side), branch, TOKENS.get(net, 0), products=False)


def measured(rows: Iterable[Row], batch: int, repeats: int) -> dict[tuple, float]:
    """Seconds of a full call, (net, None), and of a cached one of each branch, (net, branch), of the nets of a table,
    with random weights in float32 or a GPU's float16; guided nets run both halves."""
    import mlx.core as mx
    from mlx.utils import tree_map

    from mlx_deepcache.backend.ops import dtype_of
    from mlx_deepcache.nets.unet_parts import Conditioning

    dtype, times = dtype_of("auto"), {}
    ways = [row.way for row in rows if row.way is not None]
    for name in dict.fromkeys(way.net for way in ways):
        branches = sorted({way.caching.branch for way in ways if way.net == name and way.caching is not None})
        net, config = _net(name), NETS[name]
        net.update(tree_map(lambda p: p.astype(dtype), net.parameters()))
        mx.eval(net.parameters())
        pictures = batch * (2 if name in TOKENS else 1)
        side, width = config["sample_size"], config.get("cross_attention_dim", 0)
        x = mx.random.normal((pictures, side, side, config.get("in_channels", 4))).astype(dtype)
        prompt = net.prepare(Conditioning(mx.random.normal((pictures, TOKENS.get(name, 0), width)).astype(dtype)))
        temb = net.time_embed(mx.array([500]), prompt)[0]
        mx.eval(x, temb, prompt.down, prompt.mid, prompt.up)

        def call(branch, features=None, net=net, x=x, temb=temb, prompt=prompt):
            return lambda: mx.eval(net(x, temb, prompt, branch=branch, reused=features)[0])

        runs = {(name, None): call(0)}
        for branch in branches:
            _, features = net(x, temb, prompt, branch=branch)
            mx.eval(features)
            runs[name, branch] = call(branch, features)
        times |= medians(runs, repeats)
        _net.cache_clear()  # one net's weights at a time
    return times


def clip_scores(images: Iterable[np.ndarray], prompts: list[str], folder: Path) -> np.ndarray:
    """100 times the cosine between each picture and its prompt, at least 0 (Hessel et al. 2021, as the paper's code
    has it), by a CLIP model in transformers' layout; (N,)."""
    import torch
    from transformers import AutoProcessor, CLIPModel

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise Failure(f"{folder} has no CLIP model: {str(error).splitlines()[0]}") from None
    scores = []
    with torch.no_grad():
        for image, prompt in zip(images, prompts, strict=True):
            given = processor(text=[prompt], images=[image], return_tensors="pt", truncation=True)
            found = model(**given)
            cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
            scores.append(100 * max(0.0, float(cosine)))
    return np.array(scores)


def quality(key: str, args: argparse.Namespace) -> dict[str, float]:
    """The last column of a table, by row, where there are weights to draw with."""
    from mlx_deepcache import StableDiffusion

    table, found, features, theirs = TABLES[key], {}, None, None
    for row in table.rows:
        name = args.models.get(row.way.net if row.way and row.way.net.startswith("bk") else key) if row.way else None
        if name is None:
            continue
        prompts = read_lines(args.prompts) if args.prompts else []
        pipe = StableDiffusion.from_pretrained(name)
        caching = "deepcache:interval=1" if row.way.caching is None else write(row.way.caching)
        options = table.options | {"steps": row.way.steps, "cache": [caching]}
        words = "".join(c if c.isalnum() else "-" for c in row.name.lower())
        folder = args.work / f"{key}-{words}"
        count = args.count or (len(prompts) if prompts else 50_000)
        fid.draw(pipe, folder, count, options, batch=args.batch, prompts=prompts)
        if table.quality == "CLIP score":
            asked = [prompts[i % len(prompts)] for i in range(count)]
            found[row.name] = float(clip_scores(fid.pictures_of(folder, count), asked, args.clip).mean())
        else:
            features = features or fid.Inception(args.weights)
            theirs = theirs or fid.statistics(args.stats[key], features)[0]
            found[row.name] = features.compare(fid.statistics(str(folder), features, count)[0], theirs)
    return found


def lines(key: str, times: dict[tuple, float] | None, found: dict[str, float]) -> tuple[list[str], list[dict]]:
    """A table in Markdown, and its rows as data."""
    table, data = TABLES[key], []
    out = [
        f"### {table.title}",
        "",
        f"| | G multiply-adds, paper | ours | off | speed-up, paper | here | {table.quality}, paper | here |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first, notes = next(row for row in table.rows if row.way is not None), []
    base = first if first.way.caching is None else Row("", {}, Way(first.way.net, first.way.steps))
    for row in table.rows:
        ours, said = row.gmacs(), row.paper
        speed = None if times is None or row.way is None else base.way.seconds(times) / row.way.seconds(times)
        off = None if ours is None else ours / said["macs"] - 1
        mark = ""
        if off is not None and abs(off) > NEAR:
            note = row.note or f"{row.name}: {off:+.1%}, which is not explained."
            notes += [note] * (note not in notes)
            mark = f" ({notes.index(note) + 1})"
        cells = [
            f"{said['macs']:g}",
            NOT_RUN if ours is None else f"{ours:.2f}",
            "" if off is None else f"{off:+.1%}{mark}",
            f"{said['speed']:.2f}" if "speed" in said else "",
            NOT_RUN if speed is None else f"{speed:.2f}",
            f"{said['quality']:.2f}" if "quality" in said else "",
            f"{found[row.name]:.2f}" if row.name in found else NOT_RUN,
        ]
        out.append(f"| {row.name} | {' | '.join(cells)} |")
        data.append({"name": row.name, "paper": said, "gmacs": ours, "off": off, "speed": speed})
        data[-1] |= {"quality": found.get(row.name), "explained": row.note}
    out += ["", *(f"({i}) {note}" for i, note in enumerate(notes, 1)), *table.notes]
    return out, data


def _pairs(texts: list[str], flag: str, known: Iterable[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in known or not value:
            raise UsageError(f"{flag} should be TABLE=NAME, TABLE one of {', '.join(known)}; got {text!r}")
        pairs[key] = value
    return pairs


def flags(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, bk = parser.add_argument, [net for net in NETS if net.startswith("bk")]
    add("--table", nargs="+", choices=TABLES, default=list(TABLES), help="default: all")
    add("--measure", action="store_true", help="time the nets here")
    add("--repeats", type=int, default=3, help="of each call that is timed (3)")
    add("--batch", type=int, default=1, help="pictures at once (1)")
    add("--model", nargs="+", default=[], metavar="TABLE=M", help=f"weights to draw with; also of {', '.join(bk)}")
    add("--against", nargs="+", default=[], metavar="TABLE=X", help="a data set's statistics, .npz, or its pictures")
    add("--prompts", type=Path, metavar="FILE", help="one a line")
    add("--clip", type=Path, metavar="DIR", help="a CLIP model in transformers' layout")
    add("--weights", type=Path, metavar="FILE", help="InceptionV3's, see fid.py")
    add("--count", type=int, help="samples; default 50,000, or as many as there are prompts")
    add("--work", type=Path, default=WORK / "paper", help="where samples are kept")
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    args.models, args.stats = _pairs(args.model, "--model", [*TABLES, *bk]), _pairs(args.against, "--against", TABLES)
    for key in set(args.models) & set(TABLES):
        lacking = ["--prompts", "--clip"] if TABLES[key].quality == "CLIP score" else ["--weights", "--against"]
        got = {"--prompts": args.prompts, "--clip": args.clip, "--weights": args.weights}
        got["--against"] = args.stats.get(key)
        if lacking := [flag for flag in lacking if got[flag] is None]:
            raise UsageError(f"the {TABLES[key].quality} of {key} needs {' and '.join(lacking)}")
    return args


def main(args: argparse.Namespace) -> None:
    report = {"source": SOURCE, "tables": {}}
    about = machine("auto", ("mlx",))
    print(SOURCE, header(about), "", sep="\n")
    for key in args.table:
        times = measured(TABLES[key].rows, args.batch, args.repeats) if args.measure else None
        found = quality(key, args) if key in args.models else {}
        text, data = lines(key, times, found)
        print(*text, "", sep="\n", flush=True)
        report["tables"][key] = data
    write_json(args.json, about | report)


if __name__ == "__main__":
    sys.exit(run(main, flags, None, "cancelled; what is drawn is kept", "use a smaller --batch"))
