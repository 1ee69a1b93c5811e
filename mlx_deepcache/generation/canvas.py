"""What is drawn on: its size, and the pictures that are given, read and made that size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from ..checkpoints.checkpoint import Checkpoint
from ..errors import UsageError, called
from ..media.pictures import FITS, Given, around, extended, read_mask, read_picture, rounded, size_for, source
from ..media.video import read_frames
from .options import Control, Options, filled

VIDEO_MULTIPLE = 64  # pixels, of the sides of a video that are chosen for it


@dataclass(frozen=True)
class Canvas:
    """height, width: pixels; picture: to start from, as it was given, and given: the same at this size, with its mask;
    followed: the pictures of each ControlNet, one, or one a frame; fit: how these are made another size."""

    height: int
    width: int
    fit: str | None
    picture: Image.Image | None
    given: Given | None
    followed: list[list[Image.Image]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, asked: Options, frames: int | None) -> Canvas:
        """frames: of a video of a prompt, which may follow a video.

        Raises:
            UsageError: a size that cannot be, or pictures that do not go together.
            Failure: a picture cannot be read.
        """
        read = _only if frames is None else partial(read_frames, frames=frames)
        picture, followed = asked.image, [read(control.image) for control in asked.controls]
        fit = None if picture is None and not followed else asked.fit or FITS[0]
        if picture is not None:
            picture = read_picture(picture)
        mask = None if asked.mask is None else read_mask(asked.mask)
        if asked.outpaint is not None:
            picture, mask = extended(picture, mask, asked.outpaint)
        if asked.mask_padding is not None:
            if asked.fit is not None:
                name, padding = called("fit"), called("mask_padding")
                raise UsageError(f"{name} does not go with {padding}: what is drawn is cut out in its proportions")
            height, width = _size(checkpoint, asked)
            given, fit = around(picture, mask, height, width, asked.mask_padding, asked.mask_blur), "pad"
            followed = [[image.resize(picture.size).crop(given.box) for image in pictures] for pictures in followed]
            return cls(height, width, fit, picture, given, followed)
        if asked.outpaint is not None and asked.height is None and asked.width is None:  # its pixels are to stay
            height, width = (rounded(side, checkpoint.multiple) for side in (picture.height, picture.width))
        else:
            first = [] if picture is None else [picture]
            height, width = _size(checkpoint, asked, *first, *(pictures[0] for pictures in followed))
        given = None if picture is None else source(picture, mask, height, width, fit, asked.mask_blur)
        return cls(height, width, fit, picture, given, followed)

    def controls(self, asked: Options, height: int, width: int) -> tuple[Control, ...]:
        """The ControlNets that are asked for, with what they follow at this size."""
        return tuple(
            replace(control, image=np.stack([source(image, None, height, width, self.fit).image for image in pictures]))
            for control, pictures in zip(asked.controls, self.followed, strict=True)
        )


def _only(pictures: object) -> list[Image.Image]:
    """The one picture of an image that is to follow a picture.

    Raises:
        UsageError: there are several.
        Failure: it cannot be read.
    """
    several = isinstance(pictures, (list, tuple)) or len(getattr(pictures, "shape", ())) == 4
    if several and len(pictures) > 1:
        raise UsageError(f"a picture follows one picture, got {len(pictures)}; for a video, give {called('frames')}")
    return [read_picture(pictures[0] if several else pictures)]


def _size(checkpoint: Checkpoint, asked: Options, *pictures) -> tuple[int, int]:
    """(height, width): what was asked for, or the model's own, in the first picture's proportions."""
    factor = checkpoint.multiple
    if pictures:
        multiple = VIDEO_MULTIPLE if checkpoint.video else factor
        height, width = size_for(pictures[0], checkpoint.native_size, asked.height, asked.width, multiple)
    else:
        height, width = (filled(asked, checkpoint, name) for name in ("height", "width"))
    for name, value in (("height", height), ("width", width)):
        if value % factor:
            near = max(factor, round(value / factor) * factor)
            raise UsageError(
                f"{called(name)} should be a positive multiple of {factor} pixels, got {value}; try {near}"
            )
    return height, width
