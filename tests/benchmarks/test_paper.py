"""The paper's tables: our counts are its own, and PyTorch's; what was not run says so."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from PIL import Image
from tiny import write_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from benchmarks import paper
from mlx_deepcache.apps.command import run
from mlx_deepcache.errors import Failure

SMALL = paper._DDPM | {"sample_size": 8, "block_out_channels": [32, 64]} | paper._mirrored([paper.DOWN] * 2)


def command(*words):
    return run(paper.main, paper.flags, [str(word) for word in words], "", "")


@pytest.mark.parametrize("key", paper.TABLES)
def test_every_count_is_the_papers_to_a_hundredth_or_explained(key):
    explained = [row.name for row in paper.TABLES[key].rows if row.note]
    assert explained == {"skips": ["skip branch 7", "skip branch 8"]}.get(key, ["DeepCache, N = 5"] * (key[:2] == "sd"))
    for row in paper.TABLES[key].rows:
        if row.way is not None:
            off = abs(row.gmacs() / row.paper["macs"] - 1)
            assert (off < paper.NEAR) != bool(row.note), (row.name, off)


def test_what_explains_the_others():
    """13 full steps of 50; and one convolution."""
    (row,) = (row for row in paper.TABLES["sd"].rows if row.note)
    whole, cached = paper._macs("sd", row.way.caching.branch)
    assert (13 * whole + 37 * cached) / 50e9 == pytest.approx(row.paper["macs"], rel=1e-3)
    assert sum(paper.DeepCache(interval=4).full_steps(50)) == 13
    for row in (row for row in paper.TABLES["skips"].rows if row.note):
        whole, cached = paper._macs("cifar", row.way.caching.branch)
        without = cached - 256 * 256 * 9 * 16 * 16
        assert row.way.mean(whole, without) / 1e9 == pytest.approx(row.paper["macs"], rel=2e-3)


@pytest.mark.parametrize("name", ["cifar", "bk-small", "ldm"])
def test_counts_are_pytorchs(name):
    """Convolutions and linear layers of diffusers' net, counted by PyTorch."""
    config = dict(paper.NETS[name])
    kind = UNet2DModel if config.pop("_class_name", "") == "UNet2DModel" else UNet2DConditionModel
    side, channels = config["sample_size"], config.get("in_channels", 4)
    with torch.device("meta"):
        net = kind(**config)
        given = [torch.zeros(1, channels, side, side), torch.zeros(1)]
        if name in paper.TOKENS:
            given.append(torch.zeros(1, paper.TOKENS[name], config["cross_attention_dim"]))
    with FlopCounterMode(display=False) as counter:
        net(*given)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    layers = sum(n for op, n in counts.items() if op in ("aten.convolution", "aten.addmm", "aten.mm"))
    assert layers / 2 == pytest.approx(paper._macs(name, 0)[0], rel=1e-6)


def test_all_tables(tmp_path, capsys):
    assert command("--json", tmp_path / "x.json") == 0
    out, report = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert paper.SOURCE in out
    assert report["tables"].keys() == paper.TABLES.keys()
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ") and "paper" not in line]
    assert len(rows) == sum(len(table.rows) for table in paper.TABLES.values())
    for row in rows:  # nothing was timed or drawn; other people's methods were not even counted
        assert (row[5], row[7]) == ("not run", "not run |")
        assert (row[2] == "not run") == ("Diff-Pruning" in row[0])
    assert not re.search("not explained", out)


def test_measured(monkeypatch, capsys):
    monkeypatch.setitem(paper.NETS, "cifar", SMALL)
    paper._macs.cache_clear()
    ways = [paper.Way("cifar", 10), paper._uniform("cifar", 10, 5, 0), paper._uniform("cifar", 10, 2, 2)]
    times = paper.measured([paper.Row(str(i), {}, way) for i, way in enumerate(ways)], 2, 1)
    assert times.keys() == {("cifar", None), ("cifar", 0), ("cifar", 2)}
    assert all(seconds > 0 for seconds in times.values())
    times = {("cifar", None): 1.0, ("cifar", 0): 0.25, ("cifar", 2): 0.5}
    assert [way.seconds(times) for way in ways] == [10, 2 * 1 + 8 * 0.25, 5 * 1 + 5 * 0.5]
    monkeypatch.setattr(paper, "measured", lambda *_: times)
    assert command("--table", "cifar", "--measure") == 0
    out = capsys.readouterr().out
    assert "| DDIM, 100 steps | 6.1 |" in out
    assert " | 1.00 | 1.00 | 4.19 | not run |" in out
    assert f" | 1.40 | {1 / (0.5 + 0.5 * 0.5):.2f} | 4.35 | not run |" in out  # N = 2, at branch 2
    paper._macs.cache_clear()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a tiny CLIP model."""
    folder = tmp_path_factory.mktemp("clip")
    end = write_tokenizer(folder, "<|endoftext|>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = sizes | {"vocab_size": end + 1, "eos_token_id": end, "bos_token_id": end - 1}
        vision = sizes | {"image_size": 32, "patch_size": 8}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    CLIPProcessor(pictures, CLIPTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return folder


def test_clip_scores_are_transformers(clip):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (48, 40, 3), dtype=np.uint8) for _ in range(3)]
    prompts = ["a cat", "a dog", "a small red cat"]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        given = processor(text=prompts, images=[Image.fromarray(i) for i in images], return_tensors="pt", padding=True)
        logits = model(**given).logits_per_image / model.logit_scale.exp()
    expected = 100 * logits.diagonal().clamp(min=0)
    assert np.allclose(paper.clip_scores(images, prompts, clip), expected, atol=1e-3)
    with pytest.raises(Failure, match="has no CLIP model"):
        paper.clip_scores(images, prompts, clip.parent)


def test_clip_scores_of_what_is_drawn(checkpoint, clip, tmp_path, monkeypatch, capsys):
    """The SD table with tiny weights: its own rows run, BK-SDM's and others' do not."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    plain = paper.TABLES["sd"]
    rows = tuple(
        paper.Row(row.name, row.paper, paper.Way(row.way.net, 3, row.way.caching), note=row.note) for row in plain.rows
    )
    options = plain.options | {"height": 32, "width": 32}
    monkeypatch.setitem(paper.TABLES, "sd", paper.Table(plain.title, rows, plain.quality, (), options))
    words = ["--table", "sd", "--model", f"sd={checkpoint('sd15')}", "--clip", clip, "--work", tmp_path / "work"]
    assert command(*words, "--prompts", tmp_path / "prompts.txt", "--json", tmp_path / "x.json") == 0
    found = {row["name"]: row["quality"] for row in json.loads((tmp_path / "x.json").read_text())["tables"]["sd"]}
    assert {name for name, value in found.items() if value is None} == {
        f"BK-SDM-{s}" for s in ("Base", "Small", "Tiny")
    }
    images = [np.asarray(Image.open(tmp_path / "work" / "sd-plms--50-steps" / f"{i:06}.png")) for i in range(2)]
    assert found["PLMS, 50 steps"] == pytest.approx(paper.clip_scores(images, ["a cat", "a dog"], clip).mean())
    assert command(*words, "--prompts", tmp_path / "prompts.txt") == 0  # nothing is drawn again
    assert " left" not in capsys.readouterr().out.split(paper.SOURCE)[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "sd=x"], "the CLIP score of sd needs --prompts and --clip"),
        (["--model", "ldm=x", "--weights", "w"], "the FID of ldm needs --against"),
        (["--model", "x"], "--model should be TABLE=NAME"),
        (["--against", "flux=x"], "--against should be TABLE=NAME"),
    ],
)
def test_what_lacks(capsys, words, said):
    assert command(*words) == 2
    assert said in capsys.readouterr().err
