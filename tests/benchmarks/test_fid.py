"""Samples and distances: against torch-fidelity's and SciPy's, and what a folder of samples holds to."""

import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from benchmarks.quality import fid
from benchmarks.quality.features import Classifier, Inception, Statistics, distance, emoji_drawings
from mlx_deepcache.apps.command import run
from mlx_deepcache.errors import Failure, UsageError


def command(*words):
    return run(fid.main, fid.flags, [str(word) for word in words], "", "")


@pytest.fixture
def fidelity(monkeypatch):
    """torch-fidelity. It needs torchvision for data sets and other nets; where that was made for another PyTorch, as
    next to one for CPUs alone, stand-ins without anything in them let the rest be imported."""
    if not _has_torchvision():
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            monkeypatch.setitem(sys.modules, f"torchvision{name}", types.ModuleType(f"torchvision{name}"))
        sys.modules["torchvision.datasets"].__dict__.update(dict.fromkeys(("CIFAR10", "CIFAR100", "STL10"), object))
        for outer, inner in (("", "transforms"), (".transforms", "functional")):
            setattr(sys.modules[f"torchvision{outer}"], inner, sys.modules[f"torchvision{outer}.{inner}"])
    return pytest.importorskip("torch_fidelity")


def _has_torchvision():
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


@pytest.fixture
def quick(monkeypatch):
    """A classifier of a few steps."""
    monkeypatch.setattr(Classifier, "STEPS", 3)


def gaussian(n, width, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, width)) @ rng.standard_normal((width, width)) + rng.standard_normal(width)
    return Statistics.of(rows.astype(np.float32), "some")


SIZES = [(200, 8), (50, 64), (3, 5), (2, 1)]  # also fewer samples than features, whose covariance is singular


@pytest.mark.parametrize(("n", "width"), SIZES)
def test_the_distance_is_the_papers(n, width):
    """With SciPy's root of a matrix."""
    one, other = gaussian(n, width, 1), gaussian(2 * n, width, 2)
    mixed = np.trace(sqrtm(one.covariance @ other.covariance)).real
    apart = np.square(one.mean - other.mean).sum()
    by_hand = apart + np.trace(one.covariance) + np.trace(other.covariance) - 2 * mixed
    assert distance(one, other) == pytest.approx(by_hand, rel=1e-5)
    assert distance(one, one) == pytest.approx(0, abs=1e-6 * np.trace(one.covariance))


@pytest.mark.parametrize(("n", "width"), SIZES)
def test_the_distance_is_torch_fidelitys(fidelity, n, width):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    one, other = gaussian(n, width, 1), gaussian(2 * n, width, 2)
    theirs = fid_statistics_to_metric(*({"mu": s.mean, "sigma": s.covariance} for s in (one, other)), verbose=False)[
        "frechet_inception_distance"
    ]
    assert distance(one, other) == pytest.approx(theirs, rel=1e-6)
    if width > 1:
        rows = torch.randn(n, width).double()
        ours, told = Statistics.of(rows.numpy(), "some"), fid_features_to_statistics(rows)
        assert np.allclose(ours.mean, told["mu"])
        assert np.allclose(ours.covariance, told["sigma"])


def test_statistics_in_the_usual_layout(tmp_path):
    one = gaussian(20, 4, 0)
    np.savez_compressed(tmp_path / "theirs.npz", mu=one.mean, sigma=one.covariance)  # as pytorch-fid does
    theirs = Statistics.read(tmp_path / "theirs.npz")
    assert (theirs.features, theirs.count) == (Inception.name, 0)
    assert np.array_equal(theirs.covariance, one.covariance)
    one.write(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as found:
        assert np.array_equal(found["mu"][:], one.mean)
        assert np.array_equal(found["sigma"][:], one.covariance)
    ours = Statistics.read(tmp_path / "ours.npz")
    assert (ours.features, ours.count) == ("some", 20)
    with pytest.raises(Failure, match="different features cannot be compared: some, and InceptionV3"):
        distance(ours, theirs)
    (tmp_path / "text.npz").write_text("no statistics")
    np.savez(tmp_path / "other.npz", mu=one.mean)
    np.savez(tmp_path / "odd.npz", mu=one.mean, sigma=one.covariance[:2])
    np.savez(tmp_path / "pickled.npz", mu=np.array([object()]), sigma=one.covariance)
    for name in ("text", "other", "odd", "pickled", "none"):
        with pytest.raises(Failure, match=f"{name}.npz"):
            Statistics.read(tmp_path / f"{name}.npz")


def test_the_drawings():
    """129 of 1,144, each once."""
    every, known = emoji_drawings(all_of_them=True), emoji_drawings()
    assert (every.shape, known.shape) == ((1144, 32, 32, 3), (129, 32, 32, 3))
    assert {picture.tobytes() for picture in known} <= {picture.tobytes() for picture in every}
    assert len({picture.tobytes() for picture in known}) == 129


def test_the_classifier(tmp_path, monkeypatch):
    """The same twice, kept in a file, not another one's, and its distance tells noise from none."""
    monkeypatch.setattr(Classifier, "STEPS", 60)
    monkeypatch.setattr(Classifier, "WIDTHS", (8, 16, 32))
    data = emoji_drawings()[:10]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again = Classifier(data, tmp_path), Classifier(data)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(one(data)[0], again(data)[0])
    assert one.accuracy() > 0.3
    monkeypatch.setattr(Classifier, "_train", None)
    assert np.array_equal(Classifier(data, tmp_path)(data)[0], one(data)[0])
    with pytest.raises(TypeError):  # another data set's is not found
        Classifier(data[:9], tmp_path)
    rng = np.random.default_rng(0)
    truth = Statistics.of(one(data)[0], one.name)
    noisy = [np.clip(data + rng.normal(0, level, data.shape), 0, 255).astype(np.uint8) for level in (10, 40, 90)]
    apart = [distance(Statistics.of(one(part)[0], one.name), truth) for part in noisy]
    assert 0 < apart[0] < apart[1] < apart[2]
    large = np.stack([np.asarray(Image.fromarray(picture).resize((64, 64), 0)) for picture in data])
    assert np.array_equal(one(large)[0], one(data)[0])  # made smaller by the mean of each cell


# ------------------------------------------------------------------------------------------------------------ samples


def content(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.png")}


def test_a_run_goes_on(unprompted, tmp_path, capsys):
    """Cut, made larger, or with another batch, it comes to the same samples; with other settings it is refused."""
    _, pipe = unprompted("ddpm")
    options = {"steps": 3, "scheduler": "ddim", "cache": ["deepcache:interval=2,branch=1"]}
    whole = fid.draw(pipe, tmp_path / "whole", 5, options, seed=7, batch=5)
    fid.draw(pipe, tmp_path / "parts", 2, options, seed=7, batch=2)
    first = {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in content(tmp_path / "parts")}
    (tmp_path / "parts" / "000000.png").unlink()  # as if it had been cut there
    said = fid.draw(pipe, tmp_path / "parts", 5, options, seed=7, batch=3)
    assert (tmp_path / "parts" / "000001.png").stat().st_mtime_ns == first["000001.png"]
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert sorted(content(tmp_path / "whole")) == [f"{i:06}.png" for i in range(5)]
    assert said["macs"] == whole["macs"] > 0
    alone = pipe(None, seeds=[9], **options).images[0]
    assert np.abs(np.asarray(alone).astype(int) - np.asarray(Image.open(tmp_path / "whole" / "000002.png"))).max() <= 1
    capsys.readouterr()
    fid.draw(pipe, tmp_path / "whole", 4, options, seed=7)  # enough
    assert capsys.readouterr().out == ""
    for change, word in (
        ({"steps": 4}, "steps"),
        ({"cache": ["deepcache:interval=3,branch=1"]}, "cache"),
        ({"eta": 0.5}, "eta"),
    ):
        with pytest.raises(UsageError, match=rf"drawn otherwise \({word}\)"):
            fid.draw(pipe, tmp_path / "whole", 5, options | change, seed=7)
    with pytest.raises(UsageError, match=r"drawn otherwise \(seed\)"):
        fid.draw(pipe, tmp_path / "whole", 5, options, seed=8)
    _, other = unprompted("ddpm-6")
    with pytest.raises(UsageError, match="weights"):
        fid.draw(other, tmp_path / "whole", 5, options, seed=7)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000000.png").write_text("mine")
    with pytest.raises(UsageError, match="no folder of samples"):
        fid.draw(pipe, tmp_path / "mine", 5, options)
    (tmp_path / "whole" / "settings.json").write_text("{")
    with pytest.raises(Failure, match="settings.json is damaged"):
        fid.draw(pipe, tmp_path / "whole", 5, options, seed=7)


def test_an_adaptive_cache_depends_on_the_batch(unprompted, tmp_path):
    _, pipe = unprompted("ddpm")
    options = {"steps": 10, "scheduler": "ddim", "cache": ["adaptive:threshold=0.1"]}
    fid.draw(pipe, tmp_path / "run", 2, options, batch=2)
    with pytest.raises(UsageError, match=r"drawn otherwise \(batch\)"):
        fid.draw(pipe, tmp_path / "run", 3, options, batch=1)


def test_prompts_take_turns(pipeline, tmp_path):
    pipe, options = pipeline("sd15"), {"steps": 1, "height": 32, "width": 32}
    fid.draw(pipe, tmp_path / "run", 3, options, batch=2, prompts=["a cat", "a dog"])
    for number, prompt in enumerate(("a cat", "a dog", "a cat")):
        alone = np.asarray(pipe(prompt, seeds=[number], **options).images[0]).astype(int)
        assert np.abs(alone - np.asarray(Image.open(tmp_path / "run" / f"{number:06}.png"))).max() <= 1
    with pytest.raises(UsageError, match="prompts"):
        fid.draw(pipe, tmp_path / "run", 3, options, prompts=["a cat"])


def test_classes_are_drawn_equally_often(unprompted, tmp_path):
    """And a class that is named, alone."""
    folder, pipe = unprompted("class")
    options = {"steps": 1, "guidance_scale": 1.0, "height": 32, "width": 32}
    fid.draw(pipe, tmp_path / "run", 4, options, batch=3)
    for number, label in enumerate((0, 250, 500, 750)):
        alone = np.asarray(pipe(None, seeds=[number], class_label=label, **options).images[0]).astype(int)
        assert np.abs(alone - np.asarray(Image.open(tmp_path / "run" / f"{number:06}.png"))).max() <= 1
    with pytest.raises(UsageError, match="count"):
        fid.draw(pipe, tmp_path / "run", 5, options)
    said = fid.draw(pipe, tmp_path / "one", 2, options | {"class_label": 7}, batch=2)
    assert said["class_label"] == 7
    assert "classes" not in said


# ------------------------------------------------------------------------------------------------------------ command


def test_without_the_weights_it_is_no_fid(unprompted, tmp_path, capsys, quick):
    """A whole command, twice: samples against the drawings, and against another run's statistics."""
    folder, _ = unprompted("ddpm")
    words = ["--model", folder, "--dtype", "float32", "--steps", 2, "--scheduler", "ddim", "--count", 4]
    stats, report = tmp_path / "one.npz", tmp_path / "one.json"
    rest = ["--work", tmp_path, "--save-stats", stats, "--json", report]
    assert command(tmp_path / "one", *words, "--against", "emoji", *rest) == 0
    out, said = capsys.readouterr().out, json.loads(report.read_text())
    assert "distance by a small classifier" in out
    assert "FID" not in out.replace("is no FID", "") + report.read_text()
    assert (said["pictures"], said["against"], said["steps"]) == (4, "emoji", 2)
    assert said["distance"] > 0
    assert said["measure"].startswith("distance by a small classifier trained here")
    assert command(tmp_path / "one", "--against", stats, "--work", tmp_path) == 0  # itself
    apart = re.search(r"^distance by a small classifier (\S+): 4 pictures", capsys.readouterr().out, re.MULTILINE)
    assert abs(float(apart[1])) < 1e-3
    assert command(tmp_path / "two", *words, "--seed", 100, "--against", tmp_path / "one", "--work", tmp_path) == 0
    assert len(content(tmp_path / "two")) == 4


def test_with_the_weights(unprompted, tmp_path, capsys, monkeypatch, fidelity):
    """FID and Inception score as torch-fidelity has them, with weights that say nothing."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with monkeypatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    weights = tmp_path / "inception.pth"
    torch.save(net.state_dict(), weights)
    folder, _ = unprompted("class")
    words = ["--model", folder, "--dtype", "float32", "--steps", 1, "--height", 32, "--width", 32, "--count", 10]
    words += ["--guidance-scale", 1, "--weights", weights, "--json", tmp_path / "x.json"]
    data = tmp_path / "data"
    data.mkdir()
    for i, picture in enumerate(emoji_drawings()[:6]):
        Image.fromarray(picture).save(data / f"{i}.png")
    assert command(tmp_path / "run", *words, "--against", data) == 0
    out, said = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    batch = [np.stack(list(fid.pictures_of(place))) for place in (tmp_path / "run", data)]
    with torch.no_grad():
        rows = [net(torch.from_numpy(part).permute(0, 3, 1, 2)) for part in batch]
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric

    expected = fid_statistics_to_metric(*(fid_features_to_statistics(f.double()) for f, _ in rows), verbose=False)
    assert said["distance"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3, abs=1e-3)
    assert said["measure"] == "FID"
    assert out.count("FID") >= 1
    score = isc_features_to_metric(rows[0][1])
    assert said["inception_score"][0] == pytest.approx(score["inception_score_mean"], abs=2e-3)
    torch.save({"a": torch.zeros(1)}, weights)
    assert command(tmp_path / "run", "--against", data, "--weights", weights) == 1
    assert "does not have InceptionV3's weights" in capsys.readouterr().err
    torch.save({"a": Exception("code")}, weights)
    assert command(tmp_path / "run", "--against", data, "--weights", weights) == 1
    assert "does not have InceptionV3's weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["run"], 2, "nothing to do"),
        (["none", "--against", "emoji"], 1, "there is no folder none"),
        (["empty", "--against", "emoji"], 1, "0 pictures"),
        (["data", "--against", "none.npz"], 1, "none.npz has no statistics"),
        (["data", "--against", "inception.npz"], 1, "different features"),
        (["mixed", "--against", "emoji", "--weights", "none.pth"], 1, "none.pth does not have"),
        (["one", "--against", "emoji"], 1, "2 pictures or more, got 1"),
        (["broken", "--against", "emoji"], 1, "cannot read broken"),
    ],
)
def test_what_cannot_be_compared(tmp_path, monkeypatch, capsys, quick, request, words, code, said):
    monkeypatch.chdir(tmp_path)
    if "--weights" in words:
        request.getfixturevalue("fidelity")
    for name in ("empty", "data", "mixed", "one", "broken"):
        (tmp_path / name).mkdir()
    for i, picture in enumerate(emoji_drawings()[:3]):
        for name in ("data", "mixed"):
            Image.fromarray(picture[: 32 - i]).save(tmp_path / name / f"{i}.png")
    Image.fromarray(emoji_drawings()[0]).save(tmp_path / "one" / "0.png")
    (tmp_path / "broken" / "0.png").write_text("no picture")
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert command(*words, "--work", tmp_path) == code
    assert said in capsys.readouterr().err
