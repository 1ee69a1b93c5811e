"""The benchmarks of videos: their measures are right, and they run."""

import json

import numpy as np
import pytest
from helpers import smooth
from skimage.metrics import peak_signal_noise_ratio

from benchmarks.quality import video as quality
from benchmarks.speed import video as speed


def test_measures():
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 256, (3, 8, 8, 3), np.uint8) for _ in range(2))
    row = quality.row_of([one, one], [other, one])
    near = [peak_signal_noise_ratio(true, test, data_range=255) for true, test in zip(other, one, strict=True)]
    assert row["psnr_by_frame"] == pytest.approx([(value + 100) / 2 for value in near], abs=0.01)
    assert row["psnr_worst"] == pytest.approx(min(near), abs=0.01)
    first, second, third = one.astype(int)
    change = (np.abs(second - first).mean() + np.abs(third - second).mean()) / 2
    assert row["change"] == pytest.approx(change, abs=0.01) != row["change_of_uncached"]


def test_it_runs(video_checkpoint, tmp_path, capsys):
    smooth(64, 64).save(tmp_path / "in.png")
    given = ["--model", str(video_checkpoint), "--image", str(tmp_path / "in.png"), "--frames", "2", "--steps", "3"]
    files = ["--json", str(tmp_path / "a.json"), "--sheet", str(tmp_path / "a.png")]
    given += ["--height", "64", "--width", "64"]
    quality.main([*given, "--intervals", "2", "--branches", "0", "3", *files])
    report = json.loads((tmp_path / "a.json").read_text())
    plain, near, nearer = report["rows"]
    assert plain["psnr"] == 100 and plain["macs"] == 1 and plain["change"] == near["change_of_uncached"]
    assert near["macs"] < nearer["macs"] < 1 and max(near["psnr"], nearer["psnr"]) < 100
    assert "| N = 2, branch 3 |" in capsys.readouterr().out and (tmp_path / "a.png").exists()


def test_memory_of_videos(monkeypatch, capsys):
    """Weights are most of it at a small size: 3.05 GB, and what half of guidance's batch takes besides."""
    for name, few in (("SIZES", ((128, 128),)), ("FRAMES", (2,)), ("CHUNKS", (None, 1))):
        monkeypatch.setattr(speed, name, few)
    speed.main([])
    size, frames, *numbers = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    denoise, low, together, alone = map(float, numbers)
    assert (size, frames) == ("128 x 128", "2") and 3.0 < low <= denoise < 3.6 and alone <= together < 1
