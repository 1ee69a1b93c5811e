"""What caches cost in picture: measured by calibrate.py, stored beside the model, and picked from by `--cache auto`."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks.quality import quality
from mlx_deepcache import StableDiffusion
from mlx_deepcache.apps import calibrate
from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.cache import prices as front
from mlx_deepcache.cache.prices import Front, Price
from mlx_deepcache.cache.text import write
from mlx_deepcache.checkpoints import folder as folder_module
from mlx_deepcache.checkpoints.checkpoint import BUNDLED
from mlx_deepcache.errors import CheckpointError, UsageError

PRICES = (
    Price(("deepcache:interval=10",), 0.15, 31.0, 26.0, 3.04, 0.95),
    Price(("deepcache:interval=5", "taylorseer"), 0.25, 47.0, 44.0, 1.74, 0.99),
    Price(("deepcache:interval=5",), 0.25, 41.0, 40.0, 0.87, 0.98),
    Price(("deepcache:interval=4", "tgate:step=25"), 0.3, 33.0, 30.0, 1.74, 0.96),
    Price(("deepcache:interval=2",), 0.55, 58.0, 56.0, 1.3, 0.999),
)
FRONT = Front("bundled", 50, "ddim", 5.0, 64, 64, 24, "0.1.0", "2026-11-21", PRICES)


@pytest.mark.parametrize(
    "promise, index",
    [
        ((30, None), 1),  # interval 10 keeps 31 dB on average, but with its spread only 24
        ((24, None), 0),
        ((39, None), 1),  # of two equally cheap ones, the nearer
        ((50, None), 4),
        ((None, 0.4), 1),
        ((None, 0.2), 0),
        ((None, 1.0), 4),
        ((30, 0.3), 1),
    ],
)
def test_the_cheapest_that_keeps_the_promise_is_picked(promise, index):
    price, why = FRONT.pick(*promise)
    assert price == PRICES[index]
    assert str(price) in why and f"{price.psnr_worst:.1f} dB at worst" in why and "\n" not in why


@pytest.mark.parametrize(
    "promise, message",
    [
        ((60, None), "no calibrated cache keeps 95% of pictures at 60 dB .* deepcache:interval=2, at 55.0 dB"),
        ((None, 0.1), "as cheap as 0.1 .* deepcache:interval=10, takes 0.150"),
        ((50, 0.3), "within 0.3 of the multiply-adds keeps 95% of pictures at 50 dB"),
    ],
)
def test_an_impossible_promise_says_what_the_best_is(promise, message):
    with pytest.raises(UsageError, match=message):
        FRONT.pick(*promise)


@pytest.mark.parametrize(
    ("pictures", "factor"), [(3, 7.656), (5, 4.203), (10, 2.911), (24, 2.309), (50, 2.065), (100, 1.927), (1000, 1.727)]
)
def test_the_margin_is_that_of_published_tables(pictures, factor):
    """One-sided tolerance factors for 95% at 95% confidence (Natrella 1963, table A-7); the formula is their
    approximation."""
    assert front.margin(pictures) == pytest.approx(factor, rel=0.015 if pictures > 5 else 0.3)


def test_the_promise_holds_for_the_share_that_is_said():
    """Of calibrations on random pictures, 19 in 20 promise what 19 in 20 further pictures keep."""
    rng, held = np.random.default_rng(0), []
    for _ in range(400):
        known, further = rng.normal(40, 3, 24), rng.normal(40, 3, 1000)
        price = Price(("tgate",), 0.5, known.mean(), known.min(), known.std(ddof=1), 1.0)
        held.append((further >= price.promise(24)).mean() >= 0.95)
    assert 0.92 < np.mean(held) < 0.98


def test_files_without_a_spread_are_read(tmp_path):
    """Until 0.1 they had none: it is told from the mean and the least."""
    rng, spreads = np.random.default_rng(0), []
    for _ in range(200):
        known = rng.normal(40, 3, 24)
        spreads.append(front.spread_of(known.mean(), known.min(), 24))
    assert np.mean(spreads) == pytest.approx(3, rel=0.05)
    content = json.loads(FRONT.to_json())
    for row in content["policies"]:
        del row["psnr_spread"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert front.read(tmp_path / "old.json").policies[0].psnr_spread == pytest.approx(5 / 1.945, rel=0.01)


@pytest.mark.parametrize("order", [1, -1])
def test_of_equally_good_ones_the_better_is_picked(order):
    cheap, dear, near = PRICES[2], replace(PRICES[2], macs=0.3), replace(PRICES[2], psnr=45.0)
    pick = replace(FRONT, policies=(cheap, dear)[::order]).pick
    assert pick(None, 1.0)[0] == pick(39, None)[0] == cheap  # as near, at less
    pick = replace(FRONT, policies=(cheap, near)[::order]).pick
    assert pick(None, 1.0)[0] == pick(39, None)[0] == near  # as cheap, and nearer


def test_caches_that_cannot_be_had_are_passed_over(checkpoint, pipeline, tmp_path):
    folder = shutil.copytree(checkpoint("sd15"), tmp_path / "model")
    (folder / folder_module.PRICES).write_text(replace(FRONT, policies=PRICES[3:]).to_json())
    pipe = pipeline("sd15").from_pretrained(str(folder), "float32")
    with pytest.warns(UserWarning, match="20 where 50"):  # T-GATE's 25th step is none of these
        settings = pipe.settings("a cat", steps=20, cache="auto", max_macs=1)
    assert [policy.name for policy in settings.cache.policies] == ["deepcache"] and settings.cache.when.interval == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cache": "auto"}, "needs min_psnr"),
        ({"cache": ["auto", "taylorseer"], "min_psnr": 30}, "no other cache"),
        ({"cache": "auto", "min_psnr": 30, "cache_interval": 3}, "no other cache"),
        ({"cache": "auto", "min_psnr": -1}, "above 0"),
        ({"cache": "auto", "max_macs": 1.5}, "at most 1"),
        ({"min_psnr": 30}, "needs cache auto"),
        ({"cache": "deepcache", "max_macs": 0.5}, "needs cache auto"),
        ({"cache": "auto", "min_psnr": 30}, r"nothing was calibrated .* mlx-deepcache-calibrate --model"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message, pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=message):
        pipeline("sd15").settings("a cat", **options)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: "{",
        lambda d: "[]",
        lambda d: json.dumps(d | {"policies": []}),
        lambda d: json.dumps({k: v for k, v in d.items() if k != "steps"}),
        lambda d: json.dumps(d | {"steps": "fifty"}),
        lambda d: json.dumps(d | {"policies": [d["policies"][0] | {"cache": ["deepcashe"]}]}),
        lambda d: json.dumps(d | {"policies": [d["policies"][0] | {"cache": 3}]}),
        lambda d: json.dumps(d | {"policies": [d["policies"][0] | {"macs": float("nan")}]}),
        lambda d: json.dumps(d | {"policies": 7}),
    ],
)
def test_a_damaged_file_is_told(damage, tmp_path):
    file = tmp_path / folder_module.PRICES
    file.write_text(FRONT.to_json())
    assert front.read(file) == FRONT
    file.write_text(damage(json.loads(FRONT.to_json())))
    with pytest.raises(CheckpointError, match="is damaged.*mlx-deepcache-calibrate") as caught:
        front.read(file)
    assert "\n" not in str(caught.value)


def test_calibrating_and_drawing_with_what_is_picked(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(checkpoint("sd15"), tmp_path / "model")
    (tmp_path / "prompts").write_text("a cat\na dog\n")
    (tmp_path / "policies").write_text(
        "# a comment\ndeepcache:interval=2\ndeepcache:interval=5,branch=0\ntgate:step=50\n"
    )
    how = ["--model", folder, "--steps", 10, "--dtype", "float32", "--height", 64, "--width", 64]
    calibration = [*how, "--prompts", tmp_path / "prompts", "--policies", tmp_path / "policies"]
    calibration += ["--work", tmp_path / "work", "--batch", 2]
    assert calibrate.main_calibrate([str(a) for a in calibration]) == 0
    said = capsys.readouterr().out
    assert "left out tgate:step=50" in said and f"wrote {folder / folder_module.PRICES}" in said
    assert calibrate.main_calibrate([str(a) for a in calibration]) == 0
    assert "round" not in capsys.readouterr().out  # all of it was kept

    stored = front.read(folder / folder_module.PRICES)
    by_name = {str(price): price for price in stored.policies}
    cheap, near = by_name["deepcache:interval=5"], by_name["deepcache:interval=2"]
    assert 0 < cheap.macs < near.macs < 1 and cheap.psnr < near.psnr and cheap.psnr_worst <= cheap.psnr
    assert (stored.steps, stored.pictures, stored.scheduler) == (10, 2, "pndm")

    # the figures are those of pictures drawn by themselves
    pipe = calibrate_pipe(folder)
    options = {"steps": 10, "height": 64, "width": 64, "seeds": [0, 1]}
    plain, cached = (pipe(["a cat", "a dog"], cache_interval=n, **options) for n in (1, 5))
    pairs = [[np.asarray(i) for i in pair] for pair in zip(plain.images, cached.images, strict=True)]
    expected = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs]
    expected_db = expected
    np.testing.assert_allclose([cheap.psnr, cheap.psnr_worst], [np.mean(expected), min(expected)], atol=2e-3)
    expected = np.mean([structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in pairs])
    np.testing.assert_allclose(cheap.ssim, expected, atol=1e-4)
    np.testing.assert_allclose(cheap.macs, cached.stats["unet_macs"] / plain.stats["unet_macs"], atol=1e-5)

    out = ["--prompt", "a cat", "--cache", "auto", "--output", tmp_path / "a.png", "--stats", tmp_path / "a.json"]
    np.testing.assert_allclose(cheap.psnr_spread, np.std(expected_db, ddof=1), atol=2e-3)
    promise = ["--min-psnr", (cheap.promise(2) + near.promise(2)) / 2]
    assert cheap.promise(2) < near.promise(2)
    assert main_generate([str(a) for a in [*how, *out, *promise]]) == 0
    assert "cache: deepcache:interval=2: cheapest of 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["caches"] == ["deepcache:interval=2"]
    assert json.loads(Image.open(tmp_path / "a.png").text["mlx_deepcache"])["cache"] == ["deepcache:interval=2"]
    assert main_generate([str(a) for a in [*how, *out, "--max-macs", cheap.macs, "--steps", 12]]) == 0
    said = capsys.readouterr()
    assert "cache: deepcache:interval=5: nearest of 1" in said.out
    assert said.err.count("warning: ") == 1 and "steps 12 where 10 was calibrated" in said.err

    assert main_convert(["--model", str(folder), "--output", str(tmp_path / "converted")]) == 0
    assert front.read(tmp_path / "converted" / folder_module.PRICES) == stored


def calibrate_pipe(folder):
    return StableDiffusion.from_pretrained(str(folder), "float32")


def test_where_fronts_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    room = tmp_path / "cache" / "mlx_deepcache" / "fronts"
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    single = tmp_path / "dreams.safetensors"
    single.write_bytes(b"")
    assert folder_module.price_places(snapshot) == [room / "some--model.json"]
    assert [file.parent for file in folder_module.price_places(single)] == [room]
    assert folder_module.price_places(tmp_path)[0] == tmp_path / folder_module.PRICES


def test_the_bundled_model_has_a_front(monkeypatch, tmp_path):
    """Picked is the cheapest in the file that keeps the promise for 95% of pictures."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = StableDiffusion.from_pretrained().settings("a red apple", cache="auto", min_psnr=40)
    rows = json.loads((BUNDLED / folder_module.PRICES).read_text())["policies"]
    near = [row for row in rows if row["psnr"] - front.margin(24) * row["psnr_spread"] >= 40]
    assert 0 < len(near) < len(rows)
    cheapest = min(near, key=lambda row: (row["macs"], -row["psnr"]))
    assert [write(policy) for policy in settings.cache.policies] == cheapest["cache"]
    assert settings.cache_choice.startswith(f"cache: {' '.join(cheapest['cache'])}: cheapest of {len(near)} ")
    assert False in settings.cache.when.full_steps(50)


def test_who_beats_whom():
    def row(name, kind, macs, psnr, own=0.0):
        return {"name": name, "kind": kind, "macs": macs, "psnr": psnr, "psnr_own": own}

    rows = [
        row("good", "cache", 0.3, 50),
        row("dominated", "cache", 0.4, 45),
        row("loses", "cache", 0.5, 20),
        row("same", "cache", 0.3, 50),
        row("ddim, 20 steps", "fewer steps", 0.4, 30),
        row("unipc, 10 steps", "fewer steps", 0.2, 15, own=48),
    ]
    quality.judge(rows)
    assert [r["name"] for r in rows if r["front"]] == ["good", "same", "unipc, 10 steps"]
    told = {r["name"]: (r["loses_to"], r["loses_to_own"], r["dominated_by"]) for r in rows if r["kind"] == "cache"}
    assert told["good"] == told["same"] == (None, None, None)
    assert told["dominated"] == (None, "unipc, 10 steps", "good")
    assert told["loses"] == ("ddim, 20 steps", "unipc, 10 steps", "good")

    rows = [row("a", "cache", 0.3, 50), row("as near, dearer", "cache", 0.31, 50), row("as cheap", "cache", 0.3, 49)]
    rows.append(row("ddim, 15 steps", "fewer steps", 0.3, 50, own=50))
    quality.judge(rows)
    assert [r["name"] for r in rows if r["front"]] == ["a", "ddim, 15 steps"]
    assert [r["dominated_by"] for r in rows[:3]] == [None, "a", "a"]
    assert {r["loses_to"] for r in rows[:3]} == {r["loses_to_own"] for r in rows[:3]} == {"ddim, 15 steps"}


def test_psnr_of_equal_pictures_is_finite():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    near = images.copy()
    near[1, 0, 0, 0] ^= 1
    same, one_level = calibrate.psnr(near, images)
    assert same == calibrate.IDENTICAL > one_level > 70
