"""What all caching policies share: the questions that they answer, and checks of their settings."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from ..errors import UsageError


def check_branch(branch: int) -> None:
    if branch < 0:
        raise UsageError(f"cache branch must be at least 0, got {branch}")


def check_warmup(warmup: int) -> None:
    if warmup < 0:
        raise UsageError(f"warmup must be at least 0 steps, got {warmup}")


def check_window(name: str, start: float, end: float) -> None:
    if not 0 <= start < end <= 1:
        raise UsageError(f"{name}'s start and end are fractions with 0 <= start < end <= 1, got {start:g} and {end:g}")


ATTENTION = {"attention": "which attention outputs are used again"}


GUIDANCE = {"guidance": "on which steps the unconditional half runs"}


def keyed(default: Any, key: str) -> Any:
    """A field that is called `key` for short on the command line."""
    return field(default=default, metadata={"key": key})


def check_skip_range(policy: str, key: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UsageError(f"{policy}'s {key} must be at least 1 (every time), got {value}")


def check_timesteps(policy: str, key: str, window: tuple[int, int]) -> None:
    if len(window) != 2 or not window[0] < window[1]:
        raise UsageError(f"{policy}'s {key} should be two timesteps, the lower first, such as 100..800, got {window}")
