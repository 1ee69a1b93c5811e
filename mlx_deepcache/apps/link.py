# PYTHON_ARGCOMPLETE_OK
"""`mlx-deepcache-comfyui` has ComfyUI load our nodes: its `custom_nodes` links to them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import Failure, UsageError
from .command import run
from .flags import Parser, complete

PACK = Path(__file__).resolve().parent / "comfyui"
NAME = "mlx-deepcache-nodes"  # as in the pack's pyproject.toml
# Beside custom_nodes, a checkout has the first, and the folder of the desktop application the second
MARKS = ("main.py", "comfy"), ("models", "input", "output")


def main_comfyui(argv: list[str] | None = None) -> int:
    """mlx-deepcache-comfyui; returns its exit code."""
    return run(_link, _flags, argv, "cancelled; nothing was linked", "nothing was linked")


def _flags(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "mlx-deepcache-comfyui",
        "mlx-deepcache-comfyui",
        description="Link ComfyUI's custom_nodes to mlx_deepcache's nodes. Run it with ComfyUI's own Python, in which "
        "mlx_deepcache is installed.",
    )
    parser.add_argument("comfyui", type=Path, metavar="COMFYUI", help="ComfyUI's folder, which has custom_nodes in it")
    complete(parser)
    return parser.parse_args(argv)


def _link(args: argparse.Namespace) -> None:
    nodes = args.comfyui.expanduser().absolute() / "custom_nodes"
    if not nodes.is_dir() or not any(all((nodes.parent / mark).exists() for mark in marks) for marks in MARKS):
        raise UsageError(
            f"{str(args.comfyui)!r} is no ComfyUI: expected its folder, with custom_nodes, main.py and comfy in it"
        )
    link = nodes / NAME
    before = os.readlink(link) if link.is_symlink() else None
    if before is None and link.exists():
        raise Failure(f"{link} is in the way, and is no link; move it away")
    if before == str(PACK):
        print(f"linked already: {link}")
        return
    new = link.with_name(f".{NAME}-{os.getpid()}")
    try:
        new.symlink_to(PACK, target_is_directory=True)
        new.replace(link)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise Failure(f"{link} cannot be made: {error.strerror}") from None
    print(f"linked: {link} -> {PACK}{'' if before is None else f', instead of {before}'}; start ComfyUI again")
