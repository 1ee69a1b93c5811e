"""The miniature: all of it with a tiny net, twice."""

import json

import pytest

from benchmarks.quality import miniature
from benchmarks.quality.features import Classifier
from mlx_deepcache.apps.command import run
from mlx_deepcache.cache.deepcache import DeepCache


def command(*words):
    return run(miniature.main, miniature.flags, [str(word) for word in words], "", "")


def test_the_cases():
    """What the issue asks for: five intervals with none, two branches, two schedules, beside fewer steps."""
    found = miniature.cases(100)
    assert found[0].options["cache"] == ["deepcache:interval=1"]
    cached = [case for case in found if case.caching is not None]
    assert {(c.caching.interval, c.caching.branch, c.schedule) for c in cached} == {
        (n, b, s) for n in (2, 3, 5, 10) for b in (0, 2) for s in ("uniform", "quad-centre")
    }
    for case in cached:
        even = DeepCache(interval=case.caching.interval)
        assert sum(case.caching.full_steps(100)) == sum(even.full_steps(100))
    assert [case.steps for case in found if case.caching is None] == [100, 50, 40, 25, 20, 10]
    assert len({case.folder for case in found}) == len(found)


def test_a_whole_run(unprompted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Classifier, "STEPS", 3)
    monkeypatch.setattr(miniature, "INTERVALS", (2, 5))
    folder, pipe = unprompted("ddpm")
    report = tmp_path / "x.json"
    words = ["--model", folder, "--steps", 10, "--batch", 2, "--work", tmp_path / "work", "--json", report]
    assert command(*words, "--count", 4, "--minutes", 0) == 1
    assert "0 minutes are not enough for 2 samples" in capsys.readouterr().err
    assert command(*words, "--count", 4) == 0
    out, said = capsys.readouterr().out, json.loads(report.read_text())
    assert "4 samples each" in out
    assert "FID" not in out.replace("is no FID", "") + report.read_text()
    rows = {row["name"]: row for row in said["rows"]}
    whole = rows["10 steps"]
    assert (whole["macs"], whole["to_uncached"], whole["psnr"]) == (1, 0, 100)
    assert rows[miniature.DATA].keys() == {"name", "kind", "distance"}
    size = {"height": 16, "width": 16}
    every = pipe(None, seeds=[0], **miniature.cases(10)[0].options | size).stats["unet_macs"]
    for case in miniature.cases(10):
        row = rows[case.name]
        assert row["distance"] > 0
        if case.caching is None:
            assert row["macs"] == pytest.approx(case.steps / 10, abs=1e-3)
        else:
            own = pipe(None, seeds=[0], **case.options | size).stats["unet_macs"]
            assert row["macs"] == pytest.approx(own / every, abs=0.02)
            assert 0 < row["psnr"] < 100
    assert command(*words, "--count", 6, "--minutes", 0) == 0  # no time for more: what is there is reported
    again = json.loads(report.read_text())
    assert again["pictures"] == 4
    keep = ("name", "distance", "macs", "psnr")
    assert [[row.get(k) for k in keep] for row in again["rows"]] == [[row.get(k) for k in keep] for row in said["rows"]]
    assert " left" not in capsys.readouterr().out


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"name": miniature.DATA, "kind": "data", "distance": 0.5}]
    for number, case in enumerate(miniature.cases(100)):
        row = {"name": case.name, "kind": "cache" if case.caching else "fewer steps", "macs": 1 / (number + 1)}
        if case.caching:
            row |= {"interval": case.caching.interval, "branch": case.caching.branch, "schedule": case.schedule}
        rows.append(row | {"distance": 1.0 + number})
    report = {"rows": rows, "pictures": 2000, "steps": 100, "model": "emoji-ddpm", "date": "2026-11-22"}
    miniature.plot(report, tmp_path / "x.png")
    miniature.plot(report, tmp_path / "x.svg")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert b"branch 2, quad-centre" in (tmp_path / "x.svg").read_bytes()
