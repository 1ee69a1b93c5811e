"""`mlx-deepcache-comfyui` has ComfyUI load our nodes: its `custom_nodes` links to them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import Failure, UsageError
from .command import run
from .flags import Parser

PACK = Path(__file__).parent / "comfyui"
NAME = "mlx-deepcache-nodes"  # as in the pack's pyproject.toml
# A checkout has the first, and the folder that its desktop application keeps beside itself the second
MARKS = ("main.py", "comfy/"), ("models/", "input/", "output/")


def main_link(argv: list[str] | None = None) -> int:
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
    return parser.parse_args(argv)


def _link(args: argparse.Namespace) -> None:
    folder = args.comfyui.expanduser()
    has = {
        mark: (folder / mark).is_dir() if mark.endswith("/") else (folder / mark).is_file() for mark in sum(MARKS, ())
    }
    if not (folder / "custom_nodes").is_dir() or not any(all(has[mark] for mark in marks) for marks in MARKS):
        raise UsageError(
            f"{str(args.comfyui)!r} is no ComfyUI: expected its folder, with custom_nodes/, {' and '.join(MARKS[0])} in it"
        )
    link = folder.resolve() / "custom_nodes" / NAME
    if link.is_symlink():
        if link.resolve() == PACK.resolve():
            print(f"linked already: {link}")
            return
        link_before = os.readlink(link)
        _make(link)
        print(f"linked: {link} -> {PACK}, instead of {link_before}; start ComfyUI again")
        return
    if link.exists():
        raise Failure(f"{link} is in the way, and is no link; move it away")
    _make(link)
    print(f"linked: {link} -> {PACK}; start ComfyUI again")


def _make(link: Path) -> None:
    """At once, also in place of another link."""
    new = link.with_name(f".{NAME}-{os.getpid()}")
    try:
        new.symlink_to(PACK, target_is_directory=True)
        new.replace(link)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise Failure(f"{link} cannot be made: {error.strerror}") from None
