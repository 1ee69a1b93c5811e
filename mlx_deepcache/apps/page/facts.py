"""What the page has to know of a model; asked of the server's painter on the worker's thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...errors import Failure, UsageError
from ...generation.options import FREE, LABELLED, PICTURES
from ..server.schema import SERVED

if TYPE_CHECKING:
    from ...cache.prices import Front
    from ...checkpoints.checkpoint import Checkpoint
    from ..server.service import Service

SIZES = {"1:1": 1, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9}  # width to height
COARSE = 64  # pixels that the sides of larger pictures are multiples of


@dataclass(frozen=True)
class Facts:
    """settings: what a request that says nothing comes to, with a picture to start from; options: the names of those
    that have a meaning; sizes: (width, height) by their proportions; prompts: what it draws, if that is a list; most:
    the largest values of options, where the model says; front: what caches cost it; problem: why it cannot draw."""

    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    options: frozenset[str] = frozenset()
    reads: bool = True
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    most: dict[str, int] = field(default_factory=dict)
    front: Front | None = None
    problem: str | None = None


def facts_of(service: Service, model: str) -> Facts:
    from ...checkpoints.folder import read_prompts

    try:
        checkpoint = service.painter.checkpoint(model)
        family = checkpoint.family
        kind = PICTURES if family.text else FREE if family.labelled is None else LABELLED
        options = {o.name for o in SERVED if o.only is None or kind in o.only}
        if not family.second_prompt:
            options -= {"prompt_2", "negative_prompt_2"}
        return Facts(
            family.name,
            _settings(service, model, checkpoint),
            frozenset(options),
            bool(family.text),
            sizes_of(checkpoint.native_size, checkpoint.multiple),
            tuple(names[0] for names in read_prompts(checkpoint.source.path)),
            {"cache_branch": checkpoint.unet_config.branches - 1},
            service.painter.front(model),
        )
    except (Failure, UsageError) as error:
        return Facts(model, problem=str(error))


def _settings(service: Service, model: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Raises UsageError if no request that is this short will do."""
    plain: dict = {"class_label": 0} if checkpoint.labels is not None else {}
    white = Image.new("RGB", checkpoint.native_size[::-1], "white")
    found, refused = {}, None
    for options in (plain | {"image": white}, plain):
        try:
            wanted = service.wanted("", options, model=model, seed=0)
            found |= {k: v for k, v in service.painter.plan(wanted)["settings"].items() if v is not None}
        except UsageError as error:
            refused = error
    if not found:
        raise refused
    return found


def sizes_of(native: tuple[int, int], multiple: int) -> dict[str, tuple[int, int]]:
    """(width, height) of about as many pixels as the model was trained for."""
    height, width = native
    pixels, step = height * width, max(multiple, COARSE if min(native) >= 8 * COARSE else multiple)
    sizes = {}
    for name, ratio in SIZES.items():
        long, short = (max(step, round((pixels * r) ** 0.5 / step) * step) for r in (ratio, 1 / ratio))
        turned = ":".join(reversed(name.split(":")))
        sizes |= {name: (long, short), turned: (short, long)} if ratio != 1 else {name: (width, height)}
    return sizes
