"""`generate.py` draws."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import CheckpointError, Failure, UsageError
from ..media.files import check_writable, write_text
from .command import run
from .flags import complete, generate_parser


def main_generate(argv: list[str] | None = None) -> int:
    """generate.py; returns its exit code."""
    return run(_generate, _generate_flags, argv)


def _generate_flags(argv: list[str]) -> argparse.Namespace:
    """The flags on the command line, after those that a picture's settings stand for."""
    parser = generate_parser()
    complete(parser)
    args = parser.parse_args(argv)
    if args.from_image is None:
        if args.prompt is None and args.prompt_file is None:
            parser.error("expected --prompt TEXT, what to draw, or --prompt-file or --from-image")
        return args
    from ..generation import record as metadata

    settings, unknown = metadata.read(args.from_image)
    flags = metadata.as_flags(settings, args.from_image, args)
    if unknown and not args.quiet:
        print(f"note: {args.from_image}: not used: {', '.join(unknown)}", file=sys.stderr)
    parser.origin = f"the settings in {args.from_image}"
    overridden = {flag.partition("=")[0] for flag in argv if flag.startswith("--")}
    flags = [flag for flag in flags if flag.partition("=")[0] not in overridden]
    parser.parse_args(flags)  # so that an error tells whose it is
    parser.origin = None
    model = None if args.model is not None else parser.parse_args(flags).model
    args = parser.parse_args([*flags, *argv])
    args.model_named_by = None if model is None else args.from_image
    if args.prompt is None and args.prompt_file is None:
        parser.error(f"{args.from_image} has no prompt in it; expected --prompt TEXT")
    return args


def _generate(args: argparse.Namespace) -> None:
    import mlx.core as mx

    from ..generation.options import FEWEST_STEPS_TO_CACHE
    from ..generation.pipeline import StableDiffusion
    from ..generation.starts import read_latents
    from ..media.latents import write_latents
    from ..media.png import write_image
    from ..media.sheets import grid
    from .compare import check_comparable, comparison, without_cache

    def say(text: str) -> None:
        if not args.quiet:
            print(text)

    if args.output.suffix.lower() != ".png":
        raise UsageError(f"--output should end in .png, got {str(args.output)!r}")
    written = {}
    for flag in ("--output", "--save-latents", "--stats", "--preview"):
        file = getattr(args, flag[2:].replace("-", "_"))
        if file is not None:
            check_writable(file)
            if (other := written.setdefault(file.resolve(), flag)) != flag:
                raise UsageError(f"{flag} and {other} name the same file, {file}")
    if args.model is None:
        say("model: the bundled text-to-emoji model; --model sd15 or --model sdxl draws anything, after a download")
    prompts = _prompts(args)
    if len(args.seed) > 1 and args.num_images is not None:
        raise UsageError("--num-images counts on from one --seed, and several are given; leave out one of the two")
    try:
        pipe = StableDiffusion.from_pretrained(
            args.model,
            args.dtype,
            keep=len(prompts) > 1,
            quantize=args.quantize,
            low_memory=args.low_memory,
            prediction_type=args.prediction_type,
            compile=args.compile,
            memory_limit=args.memory_limit,
            loras=args.lora,
            embeddings=args.embedding,
            refiner=args.refiner,
            vae=args.vae,
        )
    except CheckpointError as error:
        if (named_by := getattr(args, "model_named_by", None)) is None:
            raise
        raise CheckpointError(f"{error} ({named_by} was drawn with this model; --model names another)") from None

    latents, n, height, width = None, args.num_images or len(args.seed), args.height, args.width
    if args.latents is not None:
        latents = read_latents(args.latents)
        factor = pipe.checkpoint.vae_config.factor
        n = n if args.num_images or len(args.seed) > 1 else len(latents)
        if len(latents) != n:
            shape = (latents.shape[3], *latents.shape[1:3])
            raise UsageError(f"latents should have shape {(n, *shape)} for {n} pictures, got {(len(latents), *shape)}")
        height = height or latents.shape[1] * factor
        width = width or latents.shape[2] * factor
    options = {
        "negative_prompt": args.negative_prompt,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "height": height,
        "width": width,
        "prompt_2": args.prompt_2,
        "negative_prompt_2": args.negative_prompt_2,
        "prompt_weights": not args.plain_prompt,
        "long_prompt": args.long_prompt,
        "scheduler": args.scheduler,
        "rng": args.rng,
        "cache_interval": args.cache_interval,
        "cache_branch": args.cache_branch,
        "vae_tiling": args.vae_tiling,
        "image": args.image,
        "mask": args.mask,
        "strength": args.strength,
        "fit": args.fit,
        "controls": _controls(args),
        "control_every_step": args.control_every_step,
        "refiner_start": args.refiner_start,
        "cache": args.cache,
        "min_psnr": args.min_psnr,
        "max_macs": args.max_macs,
    }
    seeds = args.seed if len(args.seed) > 1 else range(args.seed[0], args.seed[0] + n)
    together = 1 if args.low_memory else n
    batches = [
        (slice(i, i + together), pipe.settings(prompt, seeds=seeds[i : i + together], **options))
        for prompt in prompts
        for i in range(0, n, together)
    ]
    settings = batches[0][1]
    if settings.cache_choice is not None:
        say(settings.cache_choice)
    if args.cache_interval is None and args.cache is None and getattr(settings.cache.when, "interval", None) == 1:
        few = pipe.checkpoint.few_step
        if few is None:
            say(f"cache: off below {FEWEST_STEPS_TO_CACHE} steps; --cache-interval turns it on")
        else:
            say(f"cache: off, as this is a few-step model ({few.reason}); --cache-interval turns it on")

    n *= len(prompts)
    names = [args.output] if n == 1 else [args.output.with_stem(f"{args.output.stem}-{i}") for i in range(1, n + 1)]
    sheets = {kind: args.output.with_stem(f"{args.output.stem}-{kind}") for kind in ("grid", "compare")}
    for file in [*names, *(file for kind, file in sheets.items() if getattr(args, kind))]:
        check_writable(file)
    if args.grid and n == 1:
        raise UsageError("--grid shows several pictures, and this draws one; see --num-images")
    if args.compare:
        check_comparable(settings)
    watch = _watcher(args, pipe)
    for checkpoint in pipe.checkpoints:
        checkpoint.check_files()

    files, finals, stats, images, uncached = iter(names), [], [], [], []
    for number, (part, settings) in enumerate(batches, 1):
        start = None if latents is None else latents[part]
        watch.begin(f"{number}-" if len(batches) > 1 else "")
        final, drawn, report = _draw(args, pipe, settings, start, files, watch, say)
        finals.append(final)
        stats.append(report)
        images.extend(drawn)
        if args.compare:
            uncached.append(without_cache(pipe, settings, start))
    if args.grid:
        write_image(sheets["grid"], grid(images))
        say(f"wrote {sheets['grid']}")
    if args.compare:
        seconds = sum(report["seconds"]["denoise"] for report in stats)
        write_image(sheets["compare"], comparison(settings.cache, images, seconds, uncached))
        say(f"wrote {sheets['compare']}")
    if args.save_latents is not None:
        write_latents(args.save_latents, mx.concatenate(finals))
    if args.stats is not None:
        write_text(args.stats, json.dumps(stats[0] if len(stats) == 1 else stats, indent=2) + "\n")


def _draw(args, pipe, settings, latents, files: Iterator[Path], watch, say: Callable[[str], None]):
    """Draw one batch and write its pictures; returns the final latents, the pictures, and what they cost."""
    from tqdm import tqdm

    from ..generation.record import describe, save_png

    steps = []
    plans = [plan for plan in (settings.plan, settings.refiner_plan) if plan is not None]
    with tqdm(total=sum(len(plan.steps) for plan in plans), disable=args.quiet, unit="step") as bar:
        for progress in pipe.denoise(settings, latents):
            steps.append(progress)
            watch(progress)
            bar.set_postfix_str("full" if progress.full else "cached", refresh=False)
            bar.update()
    final = steps[-1].latents
    images = pipe.decode(final, settings.vae_tiling, settings.source)
    for image, prompt, seed in zip(images, settings.prompts, settings.seeds, strict=True):
        file = next(files)
        save_png(file, image, None if args.no_metadata else describe(args, settings, pipe, prompt, seed))
        say(f"wrote {file}")
    stats = pipe.stats(settings, steps)
    seconds = stats["seconds"]
    say(
        f"{stats['full_steps']} full and {stats['cached_steps']} cached steps, "
        f"{stats['unet_macs'] / 1e9:,.1f} of {stats['unet_macs_uncached'] / 1e9:,.1f} G multiply-adds in the U-Net, "
        f"{stats['device']}, {stats['dtype']}"
    )
    say(
        ", ".join(f"{phase} {seconds[phase]:.2f} s" for phase in seconds)
        + f", peak memory {stats['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )
    return final, images, stats


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompt, or those of a file."""
    if args.prompt_file is None:
        return [args.prompt]
    try:
        text = sys.stdin.read() if args.prompt_file == "-" else Path(args.prompt_file).read_text(encoding="utf-8")
    except OSError as error:
        raise Failure(f"cannot read {args.prompt_file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise Failure(f"cannot read {args.prompt_file}: expected text in UTF-8") from None
    if not (lines := [line.strip() for line in text.splitlines() if line.strip()]):
        raise Failure(f"{args.prompt_file} has no prompts; expected one a line")
    return lines


def _watcher(args: argparse.Namespace, pipe):
    """What shows each step, as the flags want it; makes the folder for the pictures of single steps."""
    from ..generation.preview import latent_rgb, through
    from .watch import Watcher, make_folder

    if args.preview is None and args.save_steps is None:
        if args.preview_vae is not None:
            raise UsageError("--preview-vae is for --preview and --save-steps; --vae decodes the picture itself")
        return Watcher(None)
    if args.preview is not None and args.preview.suffix.lower() != ".png":
        raise UsageError(f"--preview should end in .png, got {str(args.preview)!r}")
    decode = latent_rgb(pipe.checkpoint) if args.preview_vae is None else through(*pipe.other_vae(args.preview_vae))
    if args.save_steps is not None:
        make_folder(args.save_steps)
        check_writable(args.save_steps / "step-001.png")
    return Watcher(decode, args.preview, args.save_steps)


def _controls(args: argparse.Namespace) -> list:
    """The ControlNets that repeated flags describe; a scale, start or end given once is every net's."""
    from ..generation.options import Control

    n = len(args.controlnet)
    if len(args.control_image) != n:
        raise UsageError(f"each --controlnet needs a --control-image, got {n} and {len(args.control_image)}")
    columns = []
    for name, default in (("scale", 1.0), ("start", 0.0), ("end", 1.0)):
        values = getattr(args, f"control_{name}") or [default]
        if len(values) > 1 and len(values) != n or not n and values != [default]:
            raise UsageError(f"--control-{name} should be given once, or once a --controlnet ({n}), got {len(values)}")
        columns.append(values * n if len(values) == 1 else values)
    return [Control(*row) for row in zip(args.controlnet, args.control_image, *columns, strict=True)]
