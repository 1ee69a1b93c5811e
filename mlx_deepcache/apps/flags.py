"""The two commands' flags, in groups, and a parser whose errors suggest what may have been meant."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .._version import __version__
from ..cache.text import explain
from ..diffusion.noise import GENERATORS
from ..fields import file_and_scale, file_and_word, natural, number, positive, suggest, unicode_text
from ..media.pictures import FITS

DTYPES = ("float16", "bfloat16", "float32")


_PREDICTION_TYPE = {
    "choices": ("epsilon", "v_prediction"),
    "help": "what the U-Net predicts; default: what the model says (a single file of SD 2.x often does not)",
}


def generate_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "generate.py",
        "mlx-deepcache-generate",
        usage="%(prog)s --prompt TEXT [--model M] [--output FILE.png] [more, all optional]",
        description="Draw pictures with Stable Diffusion on Apple Silicon, with DeepCache.",
    )
    add = parser.add_argument
    what = parser.add_argument_group("what to draw")
    model = parser.add_argument_group("which model draws it")
    how = parser.add_argument_group("how it is drawn")
    prompts = what.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt",
        type=unicode_text,
        help="what the picture should show; (word:1.3) counts more, (word) 1.1 times, [word] less",
    )
    prompts.add_argument("--prompt-file", metavar="FILE", help="draw every line of a text file; -: of standard input")
    what.add_argument(
        "--from-image",
        type=Path,
        metavar="FILE.png",
        help="draw a picture again from the settings in it, A1111's too; other flags override them",
    )
    what.add_argument("--negative-prompt", type=unicode_text, metavar="TEXT", help="what it should not show")
    what.add_argument("--prompt-2", type=unicode_text, metavar="TEXT", help="for SDXL's second text encoder")
    what.add_argument("--negative-prompt-2", type=unicode_text, metavar="TEXT", help="likewise")
    what.add_argument("--plain-prompt", action="store_true", help="brackets are only brackets")
    what.add_argument("--long-prompt", action="store_true", help="use all of a prompt of more than 75 tokens")
    model.add_argument(
        "--model",
        metavar="M",
        help="a folder from convert.py or in the diffusers layout, a single .safetensors file in the original layout, "
        "a hub id (owner/name[@revision]), or sd15, sd21, sdxl, sdxl-refiner, sdxl-turbo, sd-turbo; default: the small "
        "model that comes with the package",
    )
    model.add_argument(
        "--vae",
        metavar="M",
        help="decode with another VAE: a folder or hub id of one (AutoencoderKL or AutoencoderTiny, that is TAESD), or "
        "of a model that has one",
    )
    model.add_argument(
        "--lora",
        action="append",
        type=file_and_scale,
        default=[],
        metavar="FILE[:SCALE]",
        help="change the model by a LoRA (safetensors), SCALE times as strongly as it was trained; repeatable",
    )
    model.add_argument(
        "--embedding",
        action="append",
        type=file_and_word,
        default=[],
        metavar="FILE[:WORD]",
        help="a textual inversion (safetensors), and the word that calls it in prompts; repeatable",
    )
    what.add_argument("--num-images", type=positive, metavar="N", help="pictures, with seeds S, S+1, ... (1)")
    what.add_argument("--seed", type=int, nargs="+", default=[0], metavar="S", help="one or several; default 0")
    what.add_argument("--height", type=positive, metavar="PX", help="default: the model's native size")
    what.add_argument("--width", type=positive, metavar="PX", help="likewise")

    source = parser.add_argument_group("from a picture")
    source.add_argument("--image", type=Path, metavar="FILE", help="start from this picture; its size is the default")
    source.add_argument("--mask", type=Path, metavar="FILE", help="change it only where this one is white")
    source.add_argument(
        "--strength",
        type=number,
        metavar="X",
        help="how much to change, in (0, 1]: the share of the steps that is run. Default 0.8, SDXL 0.3; with a mask 1",
    )
    source.add_argument(
        "--fit", choices=FITS, help="a picture of other proportions than --height and --width: stretch (the default)"
    )

    control = parser.add_argument_group("ControlNet (repeat the flags for several)")
    control.add_argument(
        "--controlnet",
        action="append",
        default=[],
        metavar="M",
        help="a ControlNet in the diffusers layout: a folder or a hub id",
    )
    control.add_argument(
        "--control-image", action="append", default=[], type=Path, metavar="FILE", help="the edges, pose, ... to follow"
    )
    control.add_argument(
        "--control-scale", action="append", type=number, metavar="X", help="how strictly it is followed (1)"
    )
    control.add_argument(
        "--control-start", action="append", type=number, metavar="X", help="the share of the steps before it starts (0)"
    )
    control.add_argument(
        "--control-end",
        action="append",
        type=number,
        metavar="X",
        help="the share after which it stops (1)",
    )
    control.add_argument(
        "--control-every-step",
        action="store_true",
        help="run it on cached steps too; else these use what it said on the last full one",
    )

    refiner = parser.add_argument_group("SDXL refiner")
    refiner.add_argument("--refiner", metavar="M", help="the model that draws the last steps, such as sdxl-refiner")
    refiner.add_argument(
        "--refiner-start", type=number, metavar="X", help="the share of the way from noise where it takes over (0.8)"
    )

    how.add_argument("--steps", type=positive, metavar="N", help="default 50; few-step models such as sdxl-turbo: 4")
    how.add_argument(
        "--guidance-scale",
        type=number,
        metavar="G",
        help="default 7.5 for SD, 5 for SDXL; 1 turns it off (few-step models)",
    )
    how.add_argument(
        "--scheduler",
        metavar="NAME",
        choices=scheduler_names(),
        help="default: the model's own; one of " + ", ".join(scheduler_names()),
    )
    how.add_argument(
        "--rng",
        choices=list(GENERATORS),
        default="torch",
        help="whose random numbers: PyTorch's on a CPU (the default) or on CUDA (not yet verified on one), or MLX's",
    )
    model.add_argument("--prediction-type", **_PREDICTION_TYPE)
    machine = parser.add_argument_group("precision, speed and memory")
    machine.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="auto: float16 on a GPU, else float32"
    )
    machine.add_argument(
        "--compile", choices=["auto", "on", "off"], default="auto", help="fuse the U-Net's operations; auto: on a GPU"
    )
    machine.add_argument("--quantize", type=int, choices=(4, 8), help="bits of the linear layers, to save memory")
    machine.add_argument("--low-memory", action="store_true", help="one thing at a time: slower, in less memory")
    machine.add_argument("--memory-limit", type=number, metavar="GB", help="memory to stay within, where possible")
    machine.add_argument(
        "--vae-tiling",
        choices=["auto", "on", "off"],
        default="auto",
        help="decode large pictures in overlapping parts; auto: when memory is short",
    )

    cache = parser.add_argument_group("caches: the same picture, nearly, in less time")
    cache.add_argument(
        "--cache-interval",
        type=positive,
        metavar="N",
        help="run the deep part of the U-Net every N-th step; 1: always. Default 3; few steps or few-step models: 1",
    )
    cache.add_argument(
        "--cache-branch",
        type=natural,
        default=0,
        metavar="B",
        help="how much of the U-Net a cached step runs: 0 (the default) is least, up to 11 for SD and 8 for SDXL",
    )
    cache.add_argument(
        "--cache",
        action=_Cache,
        metavar="NAME[:key=value,...]",
        help="a caching policy in place of the default one; give the flag again to combine several, and "
        "--cache-interval for plain DeepCache beside them; `--cache list` explains each, `--cache auto` picks by price",
    )
    cache.add_argument(
        "--min-psnr",
        type=number,
        metavar="DB",
        help="with --cache auto: the cheapest cache that keeps pictures this near to the uncached ones, such as 30",
    )
    cache.add_argument(
        "--max-macs",
        type=number,
        metavar="X",
        help="with --cache auto: the nearest pictures within this share of the multiply-adds, such as 0.4",
    )

    watch = parser.add_argument_group("see it happen")
    watch.add_argument("--preview", type=Path, metavar="FILE.png", help="rewrite this picture after every step")
    watch.add_argument("--save-steps", type=Path, metavar="DIR", help="one picture a step: step-001.png, ...")
    watch.add_argument(
        "--preview-vae", metavar="M", help="a small VAE such as madebyollin/taesd for both; default: colours only"
    )
    watch.add_argument("--grid", action="store_true", help="also all pictures in one, OUTPUT-grid.png")
    watch.add_argument(
        "--compare",
        action="store_true",
        help="draw everything again without the cache: both side by side, PSNR and times, OUTPUT-compare.png",
    )

    files = parser.add_argument_group("files")
    files.add_argument("--output", type=Path, default=Path("out.png"), metavar="FILE", help="default out.png")
    files.add_argument("--no-metadata", action="store_true", help="leave prompt and settings out of the PNG")
    files.add_argument("--latents", type=Path, metavar="FILE", help="start from this noise: safetensors, `latents`")
    files.add_argument("--save-latents", type=Path, metavar="FILE", help="write the final latents")
    files.add_argument("--stats", type=Path, metavar="FILE.json", help="write times, steps, multiply-adds and memory")
    files.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add("--version", action="version", version=f"mlx_deepcache {__version__}")
    return parser


class _Cache(argparse.Action):
    """Collects policies; `list` explains them and exits, before anything else is asked for."""

    def __call__(self, parser, namespace, value, option_string=None):
        if value == "list":
            print("\n".join(explain()))
            parser.exit()
        namespace.cache = [*(namespace.cache or []), value]


def convert_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "convert.py",
        "mlx-deepcache-convert",
        description="Write a Hugging Face checkpoint with weights laid out for MLX: all that generate.py needs.",
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="SRC",
        help="a folder in the diffusers layout, a single .safetensors file in the original layout, or a hub id "
        "owner/name[@revision]",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="the folder to write, whole or not at all")
    add("--dtype", choices=DTYPES, help="default: the types that the files have")
    add(
        "--quantize",
        type=int,
        choices=(4, 8),
        metavar="4|8",
        help="bits of the U-Net's and text encoders' linear layers",
    )
    add("--prediction-type", **_PREDICTION_TYPE)
    add("--force", action="store_true", help="replace DIR if it exists")
    add("--version", action="version", version=f"mlx_deepcache {__version__}")
    return parser


def scheduler_names() -> list[str]:
    from ..diffusion.schedulers import SCHEDULERS

    return list(SCHEDULERS)


class Parser(argparse.ArgumentParser):
    """Errors take one line and name the nearest flag or value; exit code 2.

    origin: where the arguments come from, if not from the command line.
    """

    origin: str | None = None

    def __init__(self, script: str, command: str, **options):
        """script, command: what it is called from a clone, and once it is installed."""
        installed = Path(sys.argv[0]).stem == command
        super().__init__(prog=command if installed else script, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        args, rest = self.parse_known_args(args, namespace)
        if rest:
            flag = next((arg for arg in rest if arg.startswith("-")), None)
            nearest = "" if flag is None else suggest(flag.split("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(rest)}{nearest}")
        return args

    def _check_value(self, action, value):
        choices = action.choices
        if choices is not None and value not in choices:
            known = ", ".join(map(str, choices))
            raise argparse.ArgumentError(action, f"expected one of {known}, got {value!r}{suggest(value, choices)}")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {'' if self.origin is None else f'{self.origin}: '}{message}\n")


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks what could come next, if argcomplete is installed."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(parser)
