"""`convert.py` writes a checkpoint in MLX's layout."""

from __future__ import annotations

import argparse

from .command import run
from .flags import complete, convert_parser


def main_convert(argv: list[str] | None = None) -> int:
    """convert.py; returns its exit code."""
    return run(_convert, _convert_flags, argv)


def _convert_flags(argv: list[str]) -> argparse.Namespace:
    parser = convert_parser()
    complete(parser)
    return parser.parse_args(argv)


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
            prediction_type=args.prediction_type,
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
