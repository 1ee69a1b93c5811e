# PYTHON_ARGCOMPLETE_OK
"""`convert.py` writes a checkpoint in MLX's layout."""

from __future__ import annotations

import argparse

from ..generation.declared import option_of
from ..generation.options import DTYPES, ModelOptions
from .command import run
from .flags import Named, Parser, add_option, complete
from .outputs import check


def main_convert(argv: list[str] | None = None) -> int:
    """convert.py; returns its exit code."""
    return run(_convert, _flags, argv, "cancelled; nothing was written", "a component is converted as a whole")


def convert_parser() -> Parser:
    parser = Parser(
        "convert.py",
        "mlx-deepcache-convert",
        description="Write a Hugging Face checkpoint with weights laid out for MLX: all that generate.py needs. Or "
        "make a safetensors file of a pickle.",
    )
    add = parser.add_argument
    add(
        "--model",
        type=Named(str),
        required=True,
        metavar="SRC",
        help="a folder in the diffusers layout, a single .safetensors file in the original layout, a hub id "
        "owner/name[@revision], or what PyTorch pickled: .ckpt, .pt, .pth, .bin, or a folder with such files",
    )
    add(
        "--output",
        type=Named(written=True),
        required=True,
        metavar="DIR|FILE",
        help="the folder to write, whole or not at all; or, of a pickle, the .safetensors file: a LoRA, an embedding, "
        "a VAE, a ControlNet, an upscaler, a checkpoint as it is",
    )
    add("--dtype", choices=DTYPES, help="default: the types that the files have")
    add(
        "--quantize",
        type=int,
        choices=(4, 8),
        metavar="4|8",
        help="bits of the U-Net's and text encoders' linear layers",
    )
    add_option(parser, option_of(ModelOptions, "prediction_type"))
    add_option(parser, option_of(ModelOptions, "vae"))
    add("--force", action="store_true", help="replace what is there")
    return parser


def _flags(argv: list[str]) -> argparse.Namespace:
    parser = convert_parser()
    complete(parser)
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def _convert(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..backend.ops import dtype_of
    from ..checkpoints.convert import convert

    with tqdm(unit="component", bar_format="{desc} {n_fmt} done, {elapsed}") as bar:

        def progress(name: str) -> None:
            bar.set_description(f"converting {name}")
            bar.update()

        report = convert(
            args.model,
            args.output,
            dtype=None if args.dtype is None else dtype_of(args.dtype),
            bits=args.quantize,
            force=args.force,
            prediction_type=getattr(args, "prediction_type", None),
            vae=getattr(args, "vae", None),
            progress=progress,
        )
    print(f"{'component':16}{'parameters':>16}{'bytes':>16}  type")
    for row in report:
        note = (
            f", {row.quantized} linear layers in {args.quantize} bits, {row.left} left"
            if row.quantized or row.left
            else ""
        )
        print(f"{row.name:16}{row.parameters:>16,}{row.bytes:>16,}  {row.dtype}{note}")
    print(f"{'together':16}{sum(r.parameters for r in report):>16,}{sum(r.bytes for r in report):>16,}")
    print(f"wrote {args.output}")
