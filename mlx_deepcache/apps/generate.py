# PYTHON_ARGCOMPLETE_OK
"""`generate.py` draws."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from ..backend.host import follows, told_rank
from ..checkpoints.names import BUNDLED_NAME, BUNDLED_NAMES, OF_TEXT
from ..errors import Failure, UsageError
from ..fields import shown
from ..generation.declared import MOST, option_of, options_of
from ..generation.options import Control, ModelOptions, Options
from ..media.files import is_stream, read_text, write_text
from ..media.video import SUFFIXES, check_format
from .command import run
from .flags import GUIDANCE, Parser, complete, generate_parser, given
from .outputs import Pictures, check, to_stdout

if TYPE_CHECKING:
    import numpy as np

    from ..generation.generation import Generation
    from ..generation.pipeline import StableDiffusion
    from ..generation.settings import Settings
    from .team import Drawn, Team
    from .watch import Watcher


def main_generate(argv: list[str] | None = None) -> int:
    """generate.py; returns its exit code."""
    cancelled = "cancelled; the picture under way was not written"
    return run(_generate, _flags, argv, cancelled, "try a smaller --height and --width or fewer images")


def _flags(argv: list[str]) -> argparse.Namespace:
    """The flags on the command line, after those that a picture's settings stand for."""
    parser = generate_parser()
    complete(parser)
    args = parser.parse_args(argv)
    if args.from_image is not None:
        args = _as_drawn(parser, args, argv)
    elif args.prompt is None and args.prompt_file is None and not args.list_prompts and _reads_text(args):
        parser.error("expected --prompt TEXT, what to draw, or --prompt-file or --from-image")
    video = hasattr(args, "frames") or (not args.prompt and args.prompt_file is None)
    if told_rank() is not None and args.prompt_file == "-":
        raise UsageError("--prompt-file - never ends under mlx.launch; name a file that is on each machine")
    if args.resume:
        _check_resumable(args)
    if follows():  # it draws for another process
        args.quiet, args.say = True, lambda text: None
        warnings.simplefilter("ignore")
        return args
    named = check(parser, args, SUFFIXES if video else ())
    check_format(args.output)
    args.files = Pictures(args, named)
    args.say = (lambda text: None) if args.quiet else partial(print, file=sys.stderr if to_stdout(named) else None)
    return args


def _check_resumable(args: argparse.Namespace) -> None:
    """Raises UsageError where it cannot be told, or is of no use, what was drawn before."""
    whole = ("grid", "compare", "save_latents")
    if (flag := next((name for name in whole if getattr(args, name)), None)) is not None:
        flag = "--" + flag.replace("_", "-")
        raise UsageError(f"{flag} is for all pictures, and --resume draws those that lack; leave out one of the two")
    if args.overwrite or args.no_metadata:
        flag = "--overwrite" if args.overwrite else "--no-metadata"
        raise UsageError(f"--resume goes by what pictures say of themselves; leave out {flag}")
    if is_stream(args.output) or args.output.suffix.lower() in ("", ".gif"):
        raise UsageError(f"--resume goes by what pictures say of themselves, and {args.output} has no place for that")
    if "random" in getattr(args, "seeds", ()):
        raise UsageError("--resume needs the same seeds as before, not --seed random")


def _reads_text(args: argparse.Namespace) -> bool:
    """Whether it is known, before the model is, that there should be a prompt."""
    model = getattr(args, "model", BUNDLED_NAME)
    return model in OF_TEXT and not hasattr(args, "image")


def _as_drawn(parser: Parser, args: argparse.Namespace, argv: list[str]) -> argparse.Namespace:
    """The flags of `--from-image`'s picture, and after them those on the command line."""
    from ..generation import record

    with warnings.catch_warnings(record=True) as notes:
        settings, unknown = record.read(args.from_image, getattr(args, "lora_dir", None))
    known = {name for name, value in vars(args).items() if value is not None}
    flags = record.as_flags(settings, args.from_image, known | ({"controls"} if "controlnet" in known else set()))
    notes = [str(note.message) for note in notes if "rng" not in known]
    notes += [f"not used: {shown(', '.join(unknown), 300)}"] if unknown else []
    for note in () if args.quiet else notes:
        print(f"note: {shown(args.from_image)}: {note}", file=sys.stderr)
    parser.origin = f"the settings in {args.from_image}"
    parser.parse_args(flags)  # so that an error tells whose it is
    parser.origin = None
    args = parser.parse_args([*flags, *argv])
    if args.prompt is None and args.prompt_file is None and _reads_text(args):
        parser.error(f"{args.from_image} has no prompt in it; expected --prompt TEXT")
    return args


def _generate(args: argparse.Namespace) -> None:
    from ..checkpoints import hub

    with hub.silence(args.quiet):
        _draw_all(args)


@dataclass
class Job:
    """What there is to draw: each prompt with each seed. Pictures are numbered prompt after prompt; together: how many
    of one prompt's are drawn at once."""

    pipe: StableDiffusion
    settings: Settings
    prompts: list[str | None]
    together: int
    model: ModelOptions

    @property
    def n(self) -> int:
        """Pictures of a prompt."""
        return len(self.settings.seeds)

    def said(self, number: int) -> dict:
        """What a picture says of itself."""
        from ..generation.record import describe
        from ..generation.report import dtype_name

        prompt, seed = self.prompts[number // self.n] or "", self.settings.seeds[number % self.n]
        return describe(self.settings, self.model, dtype_name(self.pipe.dtype), prompt, seed)


def _draw_all(args: argparse.Namespace) -> None:
    """All prompts, in batches that fit; what one prompt fails for does not stop the others."""
    from .shared_weights import SENT, share_weights
    from .team import Drawn, Team, told_by

    if args.list_prompts:
        if not follows():
            print("\n".join(_listed(getattr(args, "model", None))))
        return
    team = Team(args.split)
    _take_seeds(args, team)
    if args.share_weights and not team.alone:
        share_weights(team, args)
    job = team.prepared(partial(_job, args, team))
    if not team.alone:
        sent = SENT if args.share_weights else ()
        said = {name: value for name, value in job.said(0).items() if name not in sent}
        team.check_alike(told_by(job.settings, job.pipe.checkpoints, said, job.prompts))
    job.together = team.at_once(job.n, min(team.gathered(job.together)))
    if job.together < job.n and team.alone and not job.model.low_memory:
        args.say(f"{job.n} pictures, {job.together} at a time, as that many fit into the memory")
    batches = team.of_first(list(_batches(args, job)) if team.leads else None)
    watch = team.prepared(partial(_watcher, args, job.pipe, team))

    finished, failed = [], {}
    for first in range(0, len(batches), team.groups):
        turn = batches[first : first + team.groups]
        watch.begin(f"{first + team.group + 1}-" if len(batches) > 1 else "")
        mine = turn[team.group] if team.group < len(turn) and turn[team.group][0] not in failed else None
        for done in team.share(_draw_and_write(args, job, team, mine, watch, len(turn)), Drawn):
            if done.error is None and team.leads:
                finished.append(_finish(args, job, done, watch))
            elif done.error is not None and done.place not in failed:
                failed[done.place] = done
                if len(job.prompts) > 1 and team.leads:
                    prompt = shorten(job.prompts[done.place], 60)
                    print(f"error: prompt {done.place + 1}, {prompt!r}: {done.error}", file=sys.stderr)
        if failed and len(job.prompts) == 1:
            team.tell(failed[0].error, failed[0].usage)
    if not team.leads:
        return
    if len(failed) == len(job.prompts):
        raise Failure("none of the prompts could be drawn")
    _write_of_all(args, job, finished)
    if failed:
        raise Failure(f"{len(failed)} of {len(job.prompts)} prompts could not be drawn")


def _finish(args: argparse.Namespace, job: Job, done: Drawn, watch: Watcher) -> Drawn:
    """Write what another machine drew, and say what a batch cost; what is not needed any more goes."""
    from ..media.sheets import psnr

    if not done.written:
        done.written = [_write(args, job, number, image) for number, image in enumerate(done.images, done.first)]
    for name, image in done.steps.items():
        watch.write(watch.folder / name, image)
    done.steps = {}
    if args.compare:
        near = ", ".join(f"{psnr(*pair):.1f}" for pair in zip(done.images, done.uncached[0], strict=True))
        what = "picture" if job.settings.frames is None else "video"
        args.say(f"PSNR to the uncached {what}: {near} dB")
    elif not args.grid:
        done.images = []
    args.say(_cost(done.stats))
    return done


def _write_of_all(args: argparse.Namespace, job: Job, finished: list[Drawn]) -> None:
    """What the flags want of all pictures together."""
    import mlx.core as mx

    from ..media.latents import write_latents
    from ..media.png import write_image
    from ..media.sheets import grid
    from ..media.video import write_video
    from .compare import comparison, comparisons

    settings, images = job.settings, [image for done in finished for image in done.images]
    if args.grid:
        shown = images if settings.frames is None else [frame for frames in images for frame in frames]
        args.say(f"wrote {args.files.save_sheet('grid', partial(write_image, image=grid(shown)), '.png')}")
    if args.compare:
        seconds = sum(done.stats["seconds"]["denoise"] for done in finished)
        both = settings.cache, images, seconds, [done.uncached for done in finished]
        if settings.frames is None:
            put = partial(write_image, image=comparison(*both))
        else:
            put = partial(write_video, frames=comparisons(*both), fps=settings.fps)
        args.say(f"wrote {args.files.save_sheet('compare', put)}")
    if args.save_latents is not None:
        write_latents(args.save_latents, mx.concatenate([mx.array(done.latents) for done in finished]))
    if args.stats is not None:
        stats = [done.stats | {"pictures": done.written} for done in finished]
        write_text(args.stats, json.dumps(stats[0] if len(stats) == 1 else stats, indent=2) + "\n")


def _take_seeds(args: argparse.Namespace, team: Team) -> None:
    """Choose random ones, the same for all machines."""
    seeds = getattr(args, "seeds", ())
    if "random" in seeds:
        args.seeds = team.of_first(option_of(Options, "seeds").take(seeds))
        args.say(f"seed: {', '.join(map(str, args.seeds))}")


def _job(args: argparse.Namespace, team: Team) -> Job:
    """The model found, and all settings checked."""
    from .compare import check_comparable

    model = ModelOptions(**given(args, ModelOptions))
    if model.model is None:
        args.say(
            "model: the bundled text-to-emoji model; --model sd15 or --model sdxl draws anything, after a download"
        )
    prompts = _prompts(args)
    pipe = _pipeline(args, keep=False)
    pipe.halves = team.halves
    # of several each may fail alone, unless none is read
    first = prompts[0] if len(prompts) == 1 or not pipe.checkpoint.family.text else ""
    settings = pipe.settings(first, **_options(args, pipe))
    video = settings.frames is not None
    if not video and args.output.suffix.lower() != ".png" and not is_stream(args.output):
        raise UsageError(f"--output of a model of pictures should end in .png, got {str(args.output)!r}")
    if args.split == GUIDANCE and all(leg.guidance_scale is None for leg in settings.legs):
        raise UsageError("--split guidance has no meaning where guidance is off (guidance scale 1 or less)")
    if (note := _about_cache(args, pipe, settings)) is not None:
        args.say(note)
    n = len(settings.seeds)
    together = pipe.together(settings)
    if len(prompts) > 1 or together < n:
        pipe.hold(settings)
        together = pipe.together(settings)
    if team.leads:
        args.files.number(n * len(prompts), frames=settings.frames or 1)
    if args.compare:
        check_comparable(settings)
    for checkpoint in pipe.checkpoints:
        checkpoint.check_files()
    if team.groups > n * len(prompts):
        cure = "" if team.paired else "; with --split guidance two draw one picture"
        args.say(f"some machines wait, as there are {team.machines.size} and {n * len(prompts)} to draw{cure}")
    return Job(pipe, settings, prompts, together, model)


def _batches(args: argparse.Namespace, job: Job) -> Iterator[tuple[int, int, int]]:
    """The number of a prompt, and of which of its pictures, from the first up to the last, to draw together."""
    files, lacking = args.files, []
    for number in range(job.n * len(job.prompts)):
        if not args.resume or files.find(number, job.said(number)) is None:
            lacking.append(number)
    if args.resume:
        args.say(f"{job.n * len(job.prompts) - len(lacking)} of {job.n * len(job.prompts)} are there already")
    start = 0
    for i, number in enumerate(lacking, 1):
        place, row = divmod(number, job.n)
        last = i == len(lacking) or lacking[i] != number + 1 or row + 1 == job.n
        if last or i - start == job.together:
            yield place, row + 1 - (i - start), row + 1
            start = i


def _draw_and_write(
    args: argparse.Namespace,
    job: Job,
    team: Team,
    batch: tuple[int, int, int] | None,
    watch: Watcher,
    groups: int,
) -> Drawn | None:
    """Draw a batch, if there is one for this machine, and write each picture once it is decoded, or leave that to the
    one that writes; groups: how many are drawn at the same time."""
    import numpy as np

    from .compare import without_cache
    from .team import Drawn

    place, start, stop = batch or (0, 0, 0)
    drawn, begun = Drawn(place, place * job.n + start), False
    try:
        settings = job.settings.batch(job.prompts[place] or "", slice(start, stop))
        begin = partial(job.pipe.denoise, settings)
        run = team.begin(begin if batch is not None else lambda: None)
        if batch is None:
            return None
        begun = True
        _denoise(run, watch, args.quiet, groups)
        for number, image in enumerate(run.pictures() if team.draws else (), drawn.first):
            drawn.images.append(image)
            if team.leads:
                drawn.written.append(_write(args, job, number, image))
        if args.compare:
            drawn.uncached = without_cache(job.pipe, settings)
        drawn.steps = watch.kept
        if args.save_latents is not None:
            drawn.latents = np.array(run.latents)
        drawn.stats = run.stats() if team.alone else run.stats() | {"machine": team.machines.name}
    except (UsageError, Failure) as error:
        if begun and team.paired:  # the other one may not have failed, and waits
            raise
        drawn.error, drawn.usage = team.named(error), isinstance(error, UsageError)
    return drawn


def _write(args: argparse.Namespace, job: Job, number: int, image: np.ndarray) -> str:
    """Write the picture, or video, of this number, and return where."""
    from ..generation.record import save_png, save_video

    said = job.said(number)
    settings = None if args.no_metadata else said
    if job.settings.frames is not None:
        put = partial(save_video, frames=image, fps=job.settings.fps, settings=settings)
    else:
        put = partial(save_png, image=image, settings=settings)
    written = str(args.files.save(number, said, put))
    args.say(f"wrote {written}")
    return written


def _pipeline(args: argparse.Namespace, *, keep: bool) -> StableDiffusion:
    from ..generation.pipeline import StableDiffusion

    return StableDiffusion.from_pretrained(keep=keep, **given(args, ModelOptions))


def _options(args: argparse.Namespace, pipe: StableDiffusion) -> dict:
    """What the flags say about the pictures, for `pipe.settings`."""
    from ..generation.starts import read_latents

    options = given(args, Options) | {"controls": _controls(args)}
    seeds, n = option_of(Options, "seeds").take(options.get("seeds", [0])), args.num_images
    if n is not None and n > MOST:
        raise UsageError(f"--num-images should be at most {MOST:,}, got {n:,}; go on with another --seed")
    if len(seeds) > 1 and n is not None:
        raise UsageError("--num-images counts on from one --seed, and several are given; leave out one of the two")
    if "latents" in options:  # their number and size are the pictures'
        latents, factor = read_latents(options["latents"]), pipe.checkpoint.vae_config.factor
        n = len(latents) if n is None else n
        size = {"height": latents.shape[-3] * factor, "width": latents.shape[-2] * factor}
        frames = {"frames": latents.shape[1]} if latents.ndim == 5 else {}
        options = size | frames | options
    return options | {"seeds": seeds if len(seeds) > 1 else range(seeds[0], seeds[0] + (n or 1))}


def _about_cache(args: argparse.Namespace, pipe: StableDiffusion, settings: Settings) -> str | None:
    """What to know of the caches that were chosen for the user."""
    from ..generation.settings import FEWEST_STEPS_TO_CACHE

    if settings.cache_choice is not None:
        return settings.cache_choice
    asked = hasattr(args, "cache_interval") or hasattr(args, "cache")
    if asked or settings.cache_interval != 1:
        return None
    if (few := pipe.checkpoint.few_step) is not None:
        return f"cache: off, as this is a few-step model ({few.reason}); --cache-interval turns it on"
    return f"cache: off below {FEWEST_STEPS_TO_CACHE} steps; --cache-interval turns it on"


def _denoise(run: Generation, watch: Watcher, quiet: bool, groups: int) -> None:
    """Draw a batch up to the latents, with a bar, which counts those steps too that other machines take meanwhile."""
    from tqdm import tqdm

    steps = sum(len(leg.plan.steps) for leg in run.settings.legs)
    with tqdm(total=steps * groups, disable=quiet, unit="step") as bar:
        for progress in run:
            watch(progress)
            bar.set_postfix_str("full" if progress.full else "cached", refresh=False)
            bar.update(groups)


def _cost(stats: dict) -> str:
    """Two lines of `report.stats`."""
    phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in stats["seconds"].items())
    controls = f"{stats['controlnet_macs'] / 1e9:,.1f} G in ControlNets, " if stats["controlnet_macs"] else ""
    return (
        f"{stats['full_steps']} full and {stats['cached_steps']} cached steps, "
        f"{stats['unet_macs'] / 1e9:,.1f} of {stats['unet_macs_uncached'] / 1e9:,.1f} G multiply-adds in the U-Net, "
        f"{controls}{stats['device']}, {stats['dtype']}\n"
        f"{phases}, peak memory {stats['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )


def _listed(model: str | None) -> list[str]:
    """What a model draws, a thing a line."""
    from ..checkpoints.checkpoint import BUNDLED, Checkpoint
    from ..checkpoints.folder import read_prompts
    from ..generation.labels import names_of

    folder = BUNDLED.with_name(model or BUNDLED.name) if model in (None, *BUNDLED_NAMES) else Path(model)
    things = read_prompts(folder)
    if not things and folder.exists() and (labels := Checkpoint.open(str(folder)).labels) is not None:
        return [f"{number}: {name}" for number, name in enumerate(names_of(labels))]
    if not things:
        raise UsageError(f"--list-prompts: {model} has no list of what it draws")
    return [name if not others else f"{name} (also: {', '.join(others)})" for name, *others in things]


def _prompts(args: argparse.Namespace) -> list[str | None]:
    """The prompt, None if there is only a picture, or those of a file."""
    if args.prompt_file is None:
        return [args.prompt]
    if not (lines := [line.strip() for line in read_text(args.prompt_file).splitlines() if line.strip()]):
        raise Failure(f"{args.prompt_file} has no prompts; expected one a line")
    return lines


def _controls(args: argparse.Namespace) -> list[Control]:
    """The ControlNets that repeated flags describe; a scale, start or end given once is every net's."""
    given = {part.name: (part.flag, getattr(args, part.key, None)) for part in options_of(Control)}
    nets = given["model"][1] or []
    if not nets and (alone := next((flag for flag, values in given.values() if values is not None), None)) is not None:
        raise UsageError(f"{alone} has no meaning without a --controlnet")
    if len(given["image"][1] or []) != len(nets):
        found = len(given["image"][1] or [])
        raise UsageError(f"each --controlnet needs a --control-image, got {len(nets)} and {found}")
    columns = {}
    for name, (flag, values) in given.items():
        if values is None:
            continue
        if len(values) not in (1, len(nets)):
            raise UsageError(f"{flag} should be given once, or once a --controlnet ({len(nets)}), got {len(values)}")
        columns[name] = values * len(nets) if len(values) == 1 else values
    return [Control(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _watcher(args: argparse.Namespace, pipe: StableDiffusion, team: Team) -> Watcher:
    """What shows each step, as the flags want it; makes the folder for the pictures of single steps."""
    from ..generation.preview import through
    from .watch import Watcher

    if args.preview is None and args.save_steps is None:
        if args.preview_vae is not None:
            raise UsageError("--preview-vae is for --preview and --save-steps; --vae decodes the picture itself")
        return Watcher(None)
    if not team.draws or not (team.leads or args.save_steps is not None):
        return Watcher(None)
    decode = pipe.colours() if args.preview_vae is None else through(*pipe.other_vae(args.preview_vae))
    if not team.leads:
        return Watcher(decode, keeps=True)
    steps = None if args.save_steps is None else args.files.folder(args.save_steps)
    if steps != args.save_steps:
        args.say(f"{args.save_steps} has steps from before; these go into {steps}")
    return Watcher(decode, args.preview, steps)
