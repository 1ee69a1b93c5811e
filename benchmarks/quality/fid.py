"""Draw many samples of a model, and measure how far their distribution is from a data set's, or another run's.

    python benchmarks/quality/fid.py runs/church-3 --model ddpm-church --count 50000 --steps 100 --cache-interval 3 \\
        --cache-branch 1 --against church_fid.npz --weights pt_inception-2015-12-05-6726825d.pth
    python benchmarks/quality/fid.py runs/emoji-3 --model emoji-ddpm --count 2000 --steps 100 --against emoji

Samples are PNG files in a folder, number i from seed S + i: a run may be cut, started again, and made larger; a folder
that was drawn with other settings is refused. They are compared with a folder of pictures, the statistics in an .npz
(mu and sigma, as pytorch-fid writes them), another run, or "emoji", the drawings of the bundled models. With --weights
that is the FID, and of a model of classes the Inception score beside it (see `features.Inception`); without them it is
a distance by a small classifier, which is no FID.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

import benchmarks  # noqa: F401  (before MLX)
from benchmarks.quality.features import Classifier, Inception, Statistics, emoji_drawings
from benchmarks.timing import machine, write_json
from mlx_deepcache import __version__
from mlx_deepcache.apps.calibrate import WORK, fingerprint, read_lines
from mlx_deepcache.apps.command import run
from mlx_deepcache.apps.flags import add_option, given, reader
from mlx_deepcache.errors import Failure, UsageError
from mlx_deepcache.fields import parse_json, positive
from mlx_deepcache.generation.declared import option_of
from mlx_deepcache.generation.options import ModelOptions, Options
from mlx_deepcache.media.files import whole, write_text

EMOJI = "emoji"
SETTINGS, LOG = "settings.json", "log.jsonl"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_MODEL = ("model", "dtype", "quantize", "vae")
_HOW = (
    *("steps", "scheduler", "timesteps", "eta", "clip", "guidance_scale", "rng", "height", "width", "negative_prompt"),
    *("class_label", "cache_interval", "cache_branch", "cache"),
)


def draw(
    pipe, folder: Path, count: int, options: dict, *, seed: int = 0, batch: int = 16, prompts: Sequence[str] = ()
) -> dict:
    """Draw the samples that lack in a folder; what each is drawn with follows from its number alone.

    options: for `StableDiffusion.__call__`; prompts: in turn, for models that read one. Of a model of classes each one
    is drawn equally often, unless `class_label` names one.

    Returns: the run's settings, and multiply-adds and seconds of denoising a picture, `macs` and `seconds`.

    Raises:
        UsageError: the folder has samples of other settings.
        Failure: it cannot be written.
    """
    labels = getattr(pipe.checkpoint, "labels", None)
    every = labels is not None and "class_label" not in options
    said = _settings(pipe, options | ({"class_label": 0} if every else {}), seed, batch, prompts)
    if every:
        said |= {"classes": labels.without, "count": count}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"cannot make the folder {folder}: {error.strerror or error}") from None
    known = settings_of(folder)
    if known is None and any(folder.iterdir()):
        raise UsageError(f"{folder} has files, but no {SETTINGS}: it is no folder of samples; name another one")
    if known is not None and known != said:
        odd = sorted(key for key in {*known, *said} if known.get(key) != said.get(key))
        raise UsageError(
            f"{folder} has samples that were drawn otherwise ({', '.join(odd)}); name another folder, or remove it"
        )
    write_text(folder / SETTINGS, json.dumps(said, indent=2, sort_keys=True) + "\n")
    lacking = [i for i in range(count) if not (folder / f"{i:06}.png").exists()]
    for numbers in _batches(lacking, batch, lambda i: i * said["classes"] // count if every else 0):
        own = {"seeds": [seed + i for i in numbers]} | options
        if every:
            own["class_label"] = numbers[0] * said["classes"] // count
        start = time.perf_counter()
        result = pipe([prompts[i % len(prompts)] for i in numbers] if prompts else None, **own)
        for i, image in zip(numbers, result.images, strict=True):
            with whole(folder / f"{i:06}.png", ".png") as part:
                image.save(part)
        line = {"pictures": len(numbers), "macs": result.stats["unet_macs"]}
        line["seconds"] = round(result.stats["seconds"]["denoise"], 4)
        with (folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        left = sum(i > numbers[-1] for i in lacking)
        print(f"{folder.name}: {len(numbers)} in {time.perf_counter() - start:.1f} s, {left:,} left", flush=True)
    lines = [parse_json(line) for line in (folder / LOG).read_text().splitlines()] if (folder / LOG).exists() else []
    pictures = sum(line["pictures"] for line in lines)
    return said | {what: sum(line[what] for line in lines) / pictures for what in ("macs", "seconds") if pictures}


def _settings(pipe, options: dict, seed: int, batch: int, prompts: Sequence[str]) -> dict:
    """What decides how the samples look, defaults filled in."""
    settings = pipe.settings([prompts[0]] if prompts else None, **options)
    filled = {name: getattr(settings, name) for name in ("steps", "scheduler", "guidance_scale", "height", "width")}
    from mlx_deepcache.cache.text import write

    said = {name: value for name, value in options.items() if name != "cache"} | filled
    said["cache"] = [write(policy) for policy in settings.cache.policies]
    if any("adaptive" in policy for policy in said["cache"]):
        said["batch"] = batch  # for all of which it decides
    if prompts:
        said["prompts"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
    said |= {"weights": fingerprint(pipe), "dtype": str(pipe.dtype).removeprefix("mlx.core."), "seed": seed}
    return parse_json(json.dumps(said))


def _batches(numbers: list[int], batch: int, group) -> Iterable[list[int]]:
    """At most `batch` of them at once, all of one group."""
    part: list[int] = []
    for number in numbers:
        if part and (len(part) == batch or group(part[0]) != group(number)):
            yield part
            part = []
        part.append(number)
    if part:
        yield part


def settings_of(folder: Path) -> dict | None:
    """What a folder of samples was drawn with; None if it is no such folder."""
    if not (folder / SETTINGS).is_file():
        return None
    try:
        return parse_json((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Failure(f"{folder / SETTINGS} is damaged: {error}") from None


def pictures_of(folder: Path, count: int | None = None) -> Iterable[np.ndarray]:
    """The pictures in a folder, (H, W, 3) uint8, by name, the first `count` of them.

    Raises:
        Failure: there is no such folder, or not so many pictures, or one that cannot be read.
    """
    if not folder.is_dir():
        raise Failure(f"there is no folder {folder}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not files or len(files) < (count or 0):
        raise Failure(f"{folder} has {len(files)} pictures, and {count or 'some'} are wanted")
    for file in files[:count]:
        try:
            with Image.open(file) as image:
                yield np.asarray(image.convert("RGB"))
        except OSError as error:
            raise Failure(f"cannot read {file}: {error}") from None


def statistics(name: str, features, count: int | None = None) -> tuple[Statistics, np.ndarray | None]:
    """Of a folder of pictures, an .npz, or "emoji"; and the logits, where there are any."""
    if name.endswith(".npz"):
        return Statistics.read(Path(name)), None
    pictures = emoji_drawings() if name == EMOJI else pictures_of(Path(name), count)
    rows, logits = features(pictures)
    return Statistics.of(rows, features.name), logits


def flags(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("samples", help="the folder of the samples; without --count any folder of pictures, or an .npz")
    add("--count", type=reader(positive), metavar="N", help="draw until there are so many")
    add("--against", metavar="X", help=f"a folder of pictures, an .npz with mu and sigma, a run's folder, or {EMOJI}")
    add("--weights", type=Path, metavar="FILE", help="InceptionV3's, for FID; without them a small classifier")
    add("--classifier", default=EMOJI, metavar="DIR", help=f"what it is trained on, a folder of pictures; or {EMOJI}")
    add("--work", type=Path, default=WORK, help=f"where the classifier is kept; default {WORK}")
    add("--save-stats", type=Path, metavar="FILE.npz", help="of the samples, as mu and sigma")
    add("--json", type=Path, metavar="FILE")
    add("--seed", type=int, default=0, help="of the first sample; the next has the next one")
    add("--batch", type=reader(positive), default=16, help="samples at once (16)")
    add("--prompts", type=Path, metavar="FILE", help="one a line, in turn")
    for options, names in ((ModelOptions, _MODEL), (Options, _HOW)):
        for name in names:
            add_option(parser, option_of(options, name))
    args = parser.parse_args(argv)
    if not (args.count or args.against or args.save_stats):
        raise UsageError("nothing to do: give --count to draw, --against to compare, or --save-stats")
    return args


def load_features(weights: Path | None, classifier: str = EMOJI, work: Path = WORK) -> Inception | Classifier:
    """What pictures are compared by."""
    if weights is not None:
        return Inception(weights)
    print("no --weights: training a small classifier, whose distance is no FID", flush=True)
    pictures = emoji_drawings(all_of_them=True) if classifier == EMOJI else list(pictures_of(Path(classifier)))
    return Classifier(pictures, work)


def main(args: argparse.Namespace) -> None:
    report = {"samples": args.samples, "mlx_deepcache": __version__}
    if args.count:
        from mlx_deepcache import StableDiffusion

        pipe = StableDiffusion.from_pretrained(**given(args, ModelOptions))
        prompts = read_lines(args.prompts) if args.prompts else ()
        options = given(args, Options)
        report |= draw(pipe, Path(args.samples), args.count, options, seed=args.seed, batch=args.batch, prompts=prompts)
        report |= {"model": args.__dict__.get("model", "bundled"), "pictures": args.count}
    if args.against or args.save_stats:
        features = load_features(args.weights, args.classifier, args.work)
        ours, logits = statistics(args.samples, features, args.count)
        report |= {"features": features.made_by, "pictures": ours.count}
        if args.save_stats:
            ours.write(args.save_stats)
        known = None if args.samples.endswith(".npz") else settings_of(Path(args.samples))
        if logits is not None and known is not None and ("classes" in known or "class_label" in known):
            mean, deviation = features.score(logits)
            report["inception_score"] = [round(mean, 3), round(deviation, 3)]
            print(f"Inception score {mean:.2f} +- {deviation:.2f}")
        if args.against:
            theirs, _ = statistics(args.against, features)
            apart = features.compare(ours, theirs)
            report |= {"against": args.against, "measure": features.says, "distance": round(apart, 4)}
            print(f"{features.distance_name} {apart:.4g}: {ours.count:,} pictures against {args.against}")
            print(f"({features.says}; {features.made_by})")
    write_json(args.json, machine(report.get("dtype", "float32"), ("mlx", "torch", "torch-fidelity")) | report)


if __name__ == "__main__":
    sys.exit(run(main, flags, None, "cancelled; what is drawn is kept", "use a smaller --batch"))
