"""Videos as files: H.264 in MP4 by PyAV, animations by Pillow, or a folder of frames."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import Failure, UsageError
from .files import is_stream, whole, why
from .pictures import read_animation, read_picture

SUFFIXES = (".mp4", ".gif", ".webp", ".png", "")  # the last is a folder's
FRAME = re.compile(r"frame-\d{3,}\.png")  # as a folder's files are called
DESCRIPTION = 270  # EXIF's tag ImageDescription
_QUALITY = {"crf": "17"}  # x264's, at which hardly anything is lost


def check_format(file: Path) -> None:
    """Raises UsageError, before any work, if a video of this kind cannot be written here."""
    if file.suffix.lower() not in SUFFIXES and not is_stream(file):
        known = ", ".join(filter(None, SUFFIXES))
        raise UsageError(f"a video's file should end in {known}, or be a folder, got {str(file)!r}")
    if file.suffix.lower() == ".mp4" and find_spec("av") is None:
        raise UsageError(
            "an .mp4 file needs PyAV: pip install 'mlx_deepcache[video]', or name a .webp, .gif or .png file, or a "
            "folder"
        )


def write_video(
    file: Path, frames: Sequence[np.ndarray], fps: int, texts: dict[str, str] | None = None, *, replace: bool = True
) -> None:
    """Write frames (H, W, 3) uint8 as the file's suffix says, whole or not at all; a device gets an animated PNG.

    texts: metadata by name; a GIF and a folder have no place for it, MP4 and WebP for the last one only. replace: see
    `whole`.

    Raises:
        FileExistsError: there is such a file, and it should not be replaced.
        Failure: the file cannot be written.
    """
    suffix = ".png" if is_stream(file) else file.suffix.lower()
    if suffix == "":
        _write_folder(file, frames, replace)
        return
    with whole(file, suffix, replace=replace) as part:
        if suffix == ".mp4":
            _write_mp4(part, frames, fps, list((texts or {}).values())[-1:])
        else:
            _write_animation(part, suffix, frames, fps, texts or {})


def _write_animation(part: Path, suffix: str, frames: Sequence[np.ndarray], fps: int, texts: dict[str, str]) -> None:
    pictures = [Image.fromarray(frame) for frame in frames]
    options = {"save_all": True, "duration": 1000 / fps, "loop": 0}
    if suffix == ".png":
        options["pnginfo"] = info = PngInfo()
        for name, text in texts.items():
            info.add_itxt(name, text)
    elif suffix == ".gif":
        options["duration"] = round(100 / fps) * 10  # the format counts hundredths of a second
        pictures = [picture.quantize(256) for picture in pictures]
    else:
        exif = Image.Exif()
        for text in list(texts.values())[-1:]:
            exif[DESCRIPTION] = text
        options |= {"duration": round(1000 / fps), "quality": 95, "method": 4, "exif": exif}
    pictures[0].save(part, append_images=pictures[1:], **options)


def _write_mp4(part: Path, frames: Sequence[np.ndarray], fps: int, texts: list[str]) -> None:
    import av

    try:
        with av.open(str(part), "w", format="mp4") as container:
            for text in texts:
                container.metadata["comment"] = text
            stream = container.add_stream("libx264", rate=fps, options=_QUALITY)
            height, width, _ = frames[0].shape
            stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
            for frame in frames:
                even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise RuntimeError(error.strerror) from None  # which `whole` turns into a message


def _write_folder(folder: Path, frames: Sequence[np.ndarray], replace: bool) -> None:
    """frame-001.png, frame-002.png, ... in a new folder; one of frames from before is replaced, if it may be."""
    if os.path.lexists(folder) and not replace:
        raise FileExistsError(folder)
    new = folder.with_name(f".{os.getpid()}.part")
    try:
        new.mkdir()
        for number, frame in enumerate(frames, 1):
            Image.fromarray(frame).save(new / f"frame-{number:03}.png")
        if folder.is_dir():
            for file in folder.iterdir():
                if FRAME.fullmatch(file.name):
                    file.unlink()
        new.rename(folder)  # which fails if other files are in it
    except OSError as error:
        raise Failure(f"cannot write {folder}: {why(error)}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_frames(pictures: object, frames: int) -> list[Image.Image]:
    """What `are_pictures` takes as so many pictures, each as `read_picture` gives it: those of a list or an array, of a
    folder in the order of their names (frame-2 before frame-10), or the frames of an animation or an .mp4 file.

    Raises:
        UsageError: there are more or fewer.
        Failure: they cannot be read.
    """
    named = isinstance(pictures, (str, os.PathLike))
    what = f"{pictures} has" if named else "got"

    def check(count: int) -> None:
        if count != frames:
            raise UsageError(f"a video of {frames} frames is to follow as many pictures, and {what} {count}")

    if named and Path(pictures).suffix.lower() == ".mp4":
        seen = _read_mp4(Path(pictures), frames)
        check(len(seen))
        return [Image.fromarray(frame) for frame in seen[:frames]]
    if named and Path(pictures).is_dir():
        pictures = sorted(filter(_may_be_picture, Path(pictures).iterdir()), key=_in_order)
    elif hasattr(pictures, "shape"):
        pictures = pictures if len(pictures.shape) == 4 else [pictures]
    elif not isinstance(pictures, (list, tuple)):
        return read_animation(pictures, check)
    check(len(pictures))
    return [read_picture(picture) for picture in pictures]


def _may_be_picture(file: Path) -> bool:
    return not file.name.startswith(".") and file.suffix.lower() in Image.registered_extensions()


def _in_order(file: Path) -> list[tuple[int, str]]:
    """A key by which numbers in names count as numbers."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", file.name)]


def _read_mp4(file: Path, most: int) -> list[np.ndarray | None]:
    """Its frames, (H, W, 3) uint8; of those beyond `most` only that they are there."""
    with _opened(file) as container:
        frames = enumerate(container.decode(video=0))
        return [frame.to_ndarray(format="rgb24") if number < most else None for number, frame in frames]


def read_comment(file: Path) -> str | None:
    """The text in an MP4's metadata, or None if there is none.

    Raises:
        Failure: it cannot be read, or PyAV is not here.
    """
    with _opened(file) as container:
        return container.metadata.get("comment")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """PyAV's container of an .mp4 file; raises Failure where it cannot be read, or PyAV is not here."""
    if find_spec("av") is None:
        raise Failure(f"{file}: reading an .mp4 file needs PyAV: pip install 'mlx_deepcache[video]'")
    import av

    try:
        with av.open(str(file)) as container:
            yield container
    except (av.FFmpegError, OSError) as error:
        raise Failure(f"cannot read {file}: {error.strerror}") from None
    except IndexError:
        raise Failure(f"cannot read {file}: it has no video") from None
