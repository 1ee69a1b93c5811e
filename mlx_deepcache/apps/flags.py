"""The commands' flags: those of the options, as they are declared, and those of the commands themselves."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._version import __version__
from ..backend.host import follows
from ..fields import positive, shown, suggest, unicode_text
from ..generation.declared import Option, options_of
from ..generation.kinds import KINDS
from ..generation.options import FILES, GROUPS, MACHINE, PICTURE, Control, ModelOptions, Options

IMAGES, GUIDANCE = SPLITS = "images", "guidance"  # what several machines share


class Parser(argparse.ArgumentParser):
    """Errors take one line and name the nearest flag or value; exit code 2. A flag that is not given is no attribute of
    the result, unless it has a default of its own.

    origin: where the arguments come from, if not from the command line.
    """

    origin: str | None = None

    def __init__(self, script: str, command: str, **options):
        """script, command: what it is called from a clone, and once it is installed."""
        installed = Path(sys.argv[0]).stem == command
        super().__init__(prog=command if installed else script, allow_abbrev=False, **options)
        self._negative_number_matcher = re.compile(r"-\.?\d[-+.,\deE]*$")  # two of them with a comma are no flag either
        self.add_argument("--version", action="version", version=f"mlx_deepcache {__version__}")

    def parse_args(self, args=None, namespace=None):
        args, rest = self.parse_known_args(args, namespace)
        if rest:
            flag = next((arg for arg in rest if arg.startswith("-")), None)
            nearest = "" if flag is None else suggest(flag.split("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(rest)}{nearest}")
        return args

    def _get_values(self, action, arg_strings):
        if arg_strings == ["--"] and action.nargs in (None, "+"):  # `--prompt=--`, which argparse empties
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value if action.nargs is None else [value]
        return super()._get_values(action, arg_strings)

    def _check_value(self, action, value):
        choices = action.choices
        if choices is not None and value not in choices:
            known = ", ".join(map(str, choices))
            raise argparse.ArgumentError(action, f"expected one of {known}, got {value!r}{suggest(value, choices)}")

    def error(self, message):
        if follows():  # the first process says it
            self.exit(0)
        said = message if self.origin is None else f"{self.origin}: {message}"
        self.exit(2, f"{self.prog}: error: {shown(said)}\n")


@dataclass(frozen=True)
class Named:
    """The `type` of a flag that names a file or folder, by which `outputs.check` knows it. read: makes the flag's
    value; file: finds the path in that; written: whether it is an output; suffix: a file's, none for a folder."""

    read: Callable[[str], Any] = Path
    file: Callable[[Any], Any] = lambda value: value
    written: bool = False
    suffix: str = ""

    def __call__(self, text: str) -> Any:
        return reader(self.read)(text)


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks what could come next, if argcomplete is installed."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(parser)


def _models(prefix: str, **_) -> list[str]:
    """What `--model` may be: a short name, or a folder or file here."""
    from argcomplete.completers import FilesCompleter

    from ..checkpoints.names import BUNDLED_NAMES, SHORT_NAMES

    return [*BUNDLED_NAMES, *SHORT_NAMES, *FilesCompleter(["safetensors"])(prefix)]


def _caches(prefix: str, **_) -> list[str]:
    """What `--cache` may be: a policy's name, or one with a setting's after the last colon or comma."""
    from ..cache.text import NAMES, keys_of

    name, colon, rest = prefix.partition(":")
    if not colon:
        return ["auto", "list", *NAMES]
    done = prefix[: len(prefix) - len(rest.rpartition(",")[2])]
    return [f"{done}{key}=" for key in keys_of(name)]


_COMPLETED = {"--model": _models, "--refiner": _models, "--cache": _caches}


def reader(read: Callable[[str], object]) -> Callable[[str], object]:
    """A flag's `type`, of which argparse shows the message."""

    def typed(text: str) -> object:
        try:
            return read(text)
        except UnicodeError:
            raise argparse.ArgumentTypeError("expected text in UTF-8") from None
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def add_option(group, option: Option) -> None:
    """The flag of an option; its attribute has the option's name, and lacks if the flag is not given."""
    about = {"dest": option.name, "help": option.help, "default": argparse.SUPPRESS}
    if option.kind is KINDS["bool"]:
        group.add_argument(option.flag, action="store_true", **about)
        return
    if option.many and option.nargs is None:
        about["action"] = _Cache if option.flag == "--cache" else "append"
    action = group.add_argument(
        option.flag,
        type=reader(option.read) if option.kind.file is None else Named(option.read, option.kind.file),
        choices=option.choices,
        metavar=option.metavar,
        nargs=option.nargs if option.alone is None else "?",
        const=option.alone,
        **about,
    )
    if option.flag in _COMPLETED:
        action.completer = _COMPLETED[option.flag]


def given(args: argparse.Namespace, cls: type) -> dict:
    """Those of the options in `cls` that flags set, by their names."""
    return {o.name: getattr(args, o.name) for o in options_of(cls) if hasattr(args, o.name)}


class _Cache(argparse.Action):
    """Collects policies; `list` explains them and exits, before anything else is asked for."""

    def __call__(self, parser, namespace, value, option_string=None):
        if value == "list":
            from ..cache.text import explain

            print("\n".join(explain()))
            parser.exit()
        namespace.cache = [*getattr(namespace, "cache", ()), value]


def add_split(group: argparse._ArgumentGroup) -> None:
    """The flag for what several machines share."""
    group.add_argument(
        "--split",
        choices=SPLITS,
        help="what the machines share that mlx.launch starts: pictures, each drawn by one of them (the default), or "
        "guidance's two halves, by pairs of them",
    )


def generate_parser() -> Parser:
    parser = Parser(
        "generate.py",
        "mlx-deepcache-generate",
        usage="%(prog)s --prompt TEXT [--model M] [--output FILE.png] [more, all optional]",
        description="Draw pictures and videos with Stable Diffusion on Apple Silicon, with DeepCache.",
    )
    groups = {title: parser.add_argument_group(title) for title in (*GROUPS, "see it happen", FILES)}
    what = groups[PICTURE]
    prompts = what.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt",
        type=reader(unicode_text),
        help="what the picture should show; (word:1.3) counts more, (word) 1.1 times, [word] less",
    )
    prompts.add_argument(
        "--prompt-file", type=Named(str), metavar="FILE", help="draw every line of a text file; -: of standard input"
    )
    what.add_argument(
        "--list-prompts", action="store_true", help="say what the model draws, if that is a list, as of the bundled one"
    )
    what.add_argument(
        "--from-image",
        type=Named(),
        metavar="FILE.png",
        help="draw a picture again from the settings in it, A1111's too, or a video (.mp4, .webp, .png); other flags "
        "override them",
    )
    what.add_argument(
        "--num-images",
        type=reader(positive),
        metavar="N",
        help="pictures, with seeds S, S+1, ... (1)",
    )
    for option in (*options_of(ModelOptions), *options_of(Options)):
        if option.name != "controls":
            add_option(groups[option.group], option)
        else:
            for part in options_of(Control):  # given once a ControlNet
                add_option(groups[part.group], replace(part, name=part.key, many=True))

    add_split(groups[MACHINE])
    groups[MACHINE].add_argument(
        "--share-weights",
        action="store_true",
        help="send the weights that flags name from the first machine to those that lack them, which keep them",
    )

    picture, folder = Named(written=True, suffix=".png"), Named(written=True)
    watch = groups["see it happen"]
    watch.add_argument(
        "--preview",
        type=picture,
        metavar="FILE.png",
        help="rewrite this picture after every step; a video's middle frame",
    )
    watch.add_argument(
        "--save-steps",
        type=folder,
        metavar="DIR",
        help="one picture a step: step-001.png, ...; a folder that has some from before is left, for DIR-2",
    )
    watch.add_argument(
        "--preview-vae",
        type=Named(str),
        metavar="M",
        help="a small VAE such as madebyollin/taesd for both; default: colours only",
    )
    watch.add_argument("--grid", action="store_true", help="also all pictures in one, OUTPUT-grid.png")
    watch.add_argument(
        "--compare",
        action="store_true",
        help="draw everything again without the cache: both side by side, PSNR and times, OUTPUT-compare.png",
    )

    files = groups[FILES]
    files.add_argument(
        "--output",
        type=picture,
        default=Path("out.png"),
        metavar="FILE",
        help="default out.png; if there is one already, out-2.png and so on. Settings by name, {n}, {date} and {time} "
        "are filled in: '{prompt}-{seed}.png'. A video's may end in .mp4 (with PyAV), .gif, .webp or .png, or be a "
        "folder",
    )
    files.add_argument("--overwrite", action="store_true", help="replace pictures of the same name")
    files.add_argument(
        "--resume",
        action="store_true",
        help="draw only what is not there yet: no picture of the same name that says the same settings of itself",
    )
    files.add_argument("--no-metadata", action="store_true", help="leave prompt and settings out of the PNG")
    files.add_argument(
        "--save-latents",
        type=Named(written=True, suffix=".safetensors"),
        metavar="FILE.safetensors",
        help="write the final latents",
    )
    files.add_argument(
        "--stats",
        type=Named(written=True, suffix=".json"),
        metavar="FILE.json",
        help="write times, steps, multiply-adds and memory",
    )
    files.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser
