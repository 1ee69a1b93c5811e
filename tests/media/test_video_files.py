"""Videos as files, read back by Pillow and PyAV."""

import os

import av
import numpy as np
import pytest
from helpers import smooth
from PIL import Image, ImageFilter

from mlx_deepcache.errors import Failure, UsageError
from mlx_deepcache.media import video
from mlx_deepcache.media.video import DESCRIPTION, check_format, read_comment, write_video

FRAMES = [np.asarray(smooth(48, 64, seed=seed).filter(ImageFilter.GaussianBlur(4))) for seed in range(5)]
TEXTS = {"parameters": "a", "mlx_deepcache": '{"fps": 7}'}


def read(file):
    """Frames, and seconds that each is shown."""
    if file.suffix == ".mp4":
        with av.open(str(file)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            return frames, 1 / float(container.streams.video[0].average_rate)
    with Image.open(file) as image:
        frames = []
        for number in range(image.n_frames):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")))
        return frames, image.info["duration"] / 1000


@pytest.mark.parametrize(("suffix", "near"), [(".png", 0), (".gif", 12), (".webp", 4), (".mp4", 5)])
@pytest.mark.parametrize("fps", [7, 25])
def test_frames_and_their_time(tmp_path, suffix, near, fps):
    write_video(tmp_path / f"a{suffix}", FRAMES, fps, TEXTS)
    frames, seconds = read(tmp_path / f"a{suffix}")
    assert len(frames) == 5
    distance = np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(frames, FRAMES, strict=True)])
    assert distance <= near
    assert seconds == pytest.approx(1 / fps, abs=0.005)  # a GIF counts hundredths
    assert os.listdir(tmp_path) == [f"a{suffix}"]


def test_metadata(tmp_path):
    for suffix in (".png", ".webp", ".mp4"):
        write_video(tmp_path / f"a{suffix}", FRAMES, 7, TEXTS)
        write_video(tmp_path / f"b{suffix}", FRAMES, 7)
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert image.text == TEXTS
    with Image.open(tmp_path / "a.webp") as image:
        assert image.getexif()[DESCRIPTION] == TEXTS["mlx_deepcache"]
    assert read_comment(tmp_path / "a.mp4") == TEXTS["mlx_deepcache"]
    assert read_comment(tmp_path / "b.mp4") is None


def test_a_folder_of_frames(tmp_path):
    folder = tmp_path / "frames"
    write_video(folder, FRAMES, 7)
    assert sorted(os.listdir(folder)) == [f"frame-00{i}.png" for i in range(1, 6)]
    for i, frame in enumerate(FRAMES, 1):
        assert np.array_equal(np.asarray(Image.open(folder / f"frame-00{i}.png")), frame)
    with pytest.raises(FileExistsError):
        write_video(folder, FRAMES, 7, replace=False)
    write_video(folder, FRAMES[:2], 7)  # the others do not stay
    assert sorted(os.listdir(folder)) == ["frame-001.png", "frame-002.png"]
    (folder / "letter.txt").write_text("dear")
    with pytest.raises(Failure, match="cannot write .*frames"):
        write_video(folder, FRAMES, 7)
    assert (folder / "letter.txt").read_text() == "dear"
    assert os.listdir(tmp_path) == ["frames"]


def test_odd_sides_are_made_even_in_mp4(tmp_path):
    write_video(tmp_path / "a.mp4", [frame[:47, :63] for frame in FRAMES], 7)
    frames, _ = read(tmp_path / "a.mp4")
    assert frames[0].shape == (48, 64, 3)


def test_nothing_half_written(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_text("before")
    broken = [*FRAMES[:2], np.zeros((48, 64, 7), np.uint8)]
    for suffix in (".mp4", ".png", ""):
        with pytest.raises((Failure, ValueError, TypeError)):
            write_video(tmp_path / f"a{suffix}", broken, 7)
    assert os.listdir(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_text() == "before"
    with pytest.raises(Failure, match="cannot write .*a.mp4"):
        write_video(tmp_path / "none" / "a.mp4", FRAMES, 7)


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="an .mp4 file needs PyAV: pip install"):
        check_format(tmp_path / "a.mp4")
    check_format(tmp_path / "a.webp")
    with pytest.raises(UsageError, match="should end in .mp4, .gif, .webp, .png, or be a folder, got '.*a.avi'"):
        check_format(tmp_path / "a.avi")
    with pytest.raises(Failure, match="needs PyAV"):
        read_comment(tmp_path / "a.mp4")


def test_what_is_no_mp4(tmp_path):
    (tmp_path / "a.mp4").write_text("no")
    with pytest.raises(Failure, match="cannot read .*a.mp4"):
        read_comment(tmp_path / "a.mp4")
