"""The nodes: inputs that are the options, pictures that are those of Python and generate.py; bar, previews and stop."""

import gc
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import comfy_host
import numpy as np
import pytest
import torch
from helpers import smooth
from PIL import Image
from safetensors.torch import save_file
from tiny import write_controlnet

import mlx_deepcache
from mlx_deepcache import Control, StableDiffusion
from mlx_deepcache.apps import link
from mlx_deepcache.apps.compare import no_cache
from mlx_deepcache.apps.generate import main_generate
from mlx_deepcache.cache.text import write
from mlx_deepcache.errors import Failure, UsageError
from mlx_deepcache.generation.declared import option_of
from mlx_deepcache.generation.options import ModelOptions, Options
from mlx_deepcache.media.sheets import psnr

# As the contract has them: required, optional, outputs
DRAWING = (
    "pipe positive negative seed batch steps guidance sampler width height strength",
    "cache control image mask fit long_prompt clip_skip mask_blur mask_padding outpaint hires_scale hires_steps "
    "hires_strength hires_upscaler hires_net upscale keep_loaded",
)
NODES = {
    "MLXDeepCacheLoad": ("model dtype quantize low_memory", "model_id vae refiner", "PIPE"),
    "MLXDeepCacheLora": ("pipe lora scale", "", "PIPE"),
    "MLXDeepCacheCache": ("interval branch", "policy min_psnr max_macs", "CACHE"),
    "MLXDeepCacheControl": ("model image scale start end", "previous", "CONTROL"),
    "MLXDeepCacheDraw": (*DRAWING, "IMAGE STRING"),
    "MLXDeepCacheCompare": (*DRAWING, "IMAGE IMAGE STRING"),
}
SMALL = {"steps": 3, "width": 64, "height": 64}
TINY = {"steps": 2, "width": 104, "height": 72, "positive": "a small red cat"}
PICTURES = [smooth(72, 104, seed=seed) for seed in (1, 2)]
MASK = np.pad(np.full((40, 50), 255, np.uint8), ((12, 20), (30, 24)))


@pytest.fixture(scope="module")
def emoji():
    return StableDiffusion.from_pretrained()


def saved(image):
    """The pictures that ComfyUI's SaveImage makes of an IMAGE, by its own arithmetic."""
    assert image.dtype == torch.float32 and image.ndim == 4
    return [np.clip(255.0 * one.numpy(), 0, 255).astype(np.uint8) for one in image]


def image_of(*pictures):
    """IMAGE (B, H, W, 3), as ComfyUI's LoadImage makes it."""
    return torch.stack([torch.from_numpy(np.asarray(one).astype(np.float32) / 255.0) for one in pictures])


def same(image, expected):
    assert len(image) == len(expected)
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(saved(image), expected, strict=True))


def host(*arguments):
    """What a fresh process says of the pack."""
    done = subprocess.run([sys.executable, comfy_host.__file__, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_brings_no_mlx():
    assert host() == {"mlx": []}


def test_without_mlx_each_node_says_so():
    said = host("without")
    del said["mlx"]
    assert said.keys() == NODES.keys()
    for line in said.values():
        assert line.startswith("Failure: MLX cannot be imported") and "pip install mlx" in line and "\n" not in line


def test_ids_inputs_and_outputs(nodes):
    assert nodes.keys() == NODES.keys()
    for name, (required, optional, outputs) in NODES.items():
        found, schema = comfy_host.inputs(nodes[name]), nodes[name].define_schema()
        assert [id for id, (_, _, may) in found.items() if not may] == required.split()
        assert [id for id, (_, _, may) in found.items() if may] == optional.split()
        assert [one.io_type.removeprefix("MLX_DEEPCACHE_") for one in schema.outputs] == outputs.split()
        assert schema.category == "MLX DeepCache"


def test_inputs_are_the_options(nodes):
    """Each says the option's own help, begins where the option does, offers its choices and keeps to its ends."""
    module = sys.modules[nodes["MLXDeepCacheDraw"].__module__]
    for asked in (*module.LOAD, *module.POLICIES, *module.STEERING, *module.DRAW, module.NEGATIVE, *module.MORE):
        o, about = asked.option, asked.input().as_dict()
        assert about["tooltip"].startswith(module.told(o)) and "--" not in about["tooltip"], asked.id
        left_open = asked.default is None and (o.optional or o.many)
        assert asked.value(about["default"]) == (None if left_open else asked.default or o.default), asked.id
        if o.choices is not None:
            assert [asked.value(one) for one in about["options"] if one != asked.none] == list(o.choices)
        for end in (about[end] for end in ("min", "max") if end in about):
            assert end == asked.open or asked.value(end) == end, (asked.id, end)
        if "max" in about and o.check is not None and o.check.most is not None:
            with pytest.raises(UsageError):
                asked.value(about["max"] + 1)
    about = comfy_host.inputs(nodes["MLXDeepCacheDraw"])["seed"][1]
    assert about["control_after_generate"] and about["max"] == 2**64 - 1


def test_same_pixels_as_python_and_generate(run, emoji, tmp_path, monkeypatch):
    """And SaveImage writes them as they are."""
    monkeypatch.chdir(tmp_path)
    (pipe,), (cache,) = run("MLXDeepCacheLoad"), run("MLXDeepCacheCache", interval=2, branch=1)
    image, stats = run("MLXDeepCacheDraw", pipe=pipe, positive="a red apple", seed=3, batch=2, cache=cache, **SMALL)
    result = emoji("a red apple", seeds=[3, 4], cache_interval=2, cache_branch=1, **SMALL)
    assert same(image, [np.asarray(one) for one in result.images])
    flags = "--steps 3 --width 64 --height 64 --cache-interval 2 --cache-branch 1 --seed 3 --num-images 2 --quiet"
    assert main_generate(["--prompt", "a red apple", "--output", "out.png", *flags.split()]) == 0
    files = sorted(tmp_path.glob("out*.png"))
    assert same(image, [np.asarray(Image.open(file)) for file in files])
    stats = json.loads(stats)
    assert stats["steps"] == ["full", "cached", "full"] and stats["seeds"] == [3, 4]
    assert stats["unet_macs"] == result.stats["unet_macs"] < stats["unet_macs_uncached"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),  # the package's own cache, none below ten steps
        ({"interval": 1}, {"cache_interval": 1}),
        (
            {"policy": "tgate:step=2\n\ndeepcache:interval=2\n"},
            {"cache": ["tgate:step=2", "deepcache:interval=2"]},
        ),
    ],
)
def test_caches(run, emoji, given, expected):
    cache = run("MLXDeepCacheCache", **given)[0] if given else None
    (pipe,) = run("MLXDeepCacheLoad")
    asked = {"steps": 4, "guidance": 3.0, "sampler": "euler", "negative": "blue"}
    image, stats = run("MLXDeepCacheDraw", pipe=pipe, positive="a cat", seed=0, batch=1, cache=cache, **asked)
    theirs = {"steps": 4, "guidance_scale": 3.0, "scheduler": "euler", "negative_prompt": "blue"}
    result = emoji("a cat", **theirs, **expected)
    assert same(image, [np.asarray(result.images[0])])
    assert json.loads(stats)["caches"] == result.stats["caches"]


def test_a_cache_by_its_price(run, emoji):
    (pipe,), (cache,) = run("MLXDeepCacheLoad"), run("MLXDeepCacheCache", min_psnr=30.0)
    asked = {"pipe": pipe, "positive": "a cat", "seed": 0, "batch": 1, "steps": 20}
    _, stats = run("MLXDeepCacheDraw", cache=cache, **asked)
    priced = emoji.settings("a cat", cache="auto", min_psnr=30, steps=20)
    assert (
        json.loads(stats)["caches"] == [write(policy) for policy in priced.cache.policies] != ["deepcache:interval=1"]
    )
    (cache,) = run("MLXDeepCacheCache", min_psnr=30.0, policy="tgate:step=2")
    with pytest.raises(UsageError, match="min_psnr is for picking a cache: it needs cache auto"):
        run("MLXDeepCacheDraw", cache=cache, **asked)


def test_bar_and_previews(run, told):
    (pipe,) = run("MLXDeepCacheLoad")
    run("MLXDeepCacheDraw", pipe=pipe, positive="a cat", seed=0, batch=1, **SMALL)
    assert [(done, total) for done, total, _ in told] == [(1, 3), (2, 3), (3, 3)]
    for _, _, (kind, picture, side) in told:
        assert (kind, side, picture.size) == ("JPEG", 512, (64, 64)) and np.ptp(np.asarray(picture)) > 20


def test_stop(run, told):
    """Before the next step; what comes afterwards is drawn as ever."""
    from comfy.model_management import InterruptProcessingException

    (pipe,) = run("MLXDeepCacheLoad")
    asked = {"pipe": pipe, "positive": "a cat", "seed": 0, "batch": 1, **SMALL}
    image, _ = run("MLXDeepCacheDraw", **asked)
    told.clear()
    told.stop_after = 2
    with pytest.raises(InterruptProcessingException):
        run("MLXDeepCacheDraw", **asked)
    assert len(told) == 2
    assert torch.equal(run("MLXDeepCacheDraw", **asked)[0], image)


@pytest.fixture
def readings(monkeypatch):
    """The models that were loaded."""
    found, load = [], StableDiffusion.from_pretrained

    def counted(model=None, *rest, **options):
        found.append(options)
        return load(model, *rest, **options)

    monkeypatch.setattr(StableDiffusion, "from_pretrained", counted)
    return found


def test_loaded_once(run, held, readings):
    asked = {"positive": "a cat", "batch": 1, **SMALL}
    (pipe,), (same_again,) = run("MLXDeepCacheLoad"), run("MLXDeepCacheLoad")
    assert held.pipe is None
    images = [run("MLXDeepCacheDraw", pipe=one, seed=seed, **asked)[0] for seed in (1, 2) for one in (pipe, same_again)]
    assert len(readings) == 1 and held.pipe is not None
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    (other,) = run("MLXDeepCacheLoad", dtype="float32", low_memory=True)
    run("MLXDeepCacheDraw", pipe=other, seed=1, **asked)
    assert len(readings) == 2 and held.pipe.low_memory


def test_freed_when_told_or_let_go(run, held, readings):
    asked = {"positive": "a cat", "seed": 0, "batch": 1, **SMALL}
    (pipe,) = run("MLXDeepCacheLoad")
    run("MLXDeepCacheDraw", pipe=pipe, keep_loaded=False, **asked)
    assert held.pipe is None
    run("MLXDeepCacheDraw", pipe=pipe, **asked)
    assert held.pipe is not None and len(readings) == 2
    del pipe  # as ComfyUI does when it frees its memory
    gc.collect()
    assert held.pipe is None


def test_another_thread_loads_anew(run, held, readings):
    """As MLX's streams belong to one thread."""
    asked = {"positive": "a cat", "seed": 0, "batch": 1, **SMALL}
    (pipe,) = run("MLXDeepCacheLoad")
    images = [run("MLXDeepCacheDraw", pipe=pipe, **asked)[0]]
    other = threading.Thread(target=lambda: images.append(run("MLXDeepCacheDraw", pipe=pipe, **asked)[0]))
    other.start()
    other.join()
    assert len(readings) == 2 and torch.equal(*images)


@pytest.fixture
def tiny(run, checkpoint, shelf):
    """A tiny model in ComfyUI's folder of folders."""
    shutil.copytree(checkpoint("sd15"), shelf("diffusers") / "more" / "tiny")
    return run("MLXDeepCacheLoad", model="more/tiny", dtype="float32")[0]


def drawn(run, pipe, batch=1, seed=5, **asked):
    return run("MLXDeepCacheDraw", pipe=pipe, seed=seed, batch=batch, **TINY | asked)[0]


def by_python(pipeline, seed=5, **options):
    result = pipeline("sd15")("a small red cat", seeds=[seed], steps=2, **{"width": 104, "height": 72} | options)
    return np.asarray(result.images[0])


def test_pictures_to_start_from(run, tiny, pipeline):
    """One for all, or one for each with seeds that count on."""
    one = by_python(pipeline, image=PICTURES[0], strength=0.5)
    other = by_python(pipeline, seed=6, image=PICTURES[1], strength=0.5)
    assert same(drawn(run, tiny, image=image_of(PICTURES[0]), strength=0.5), [one])
    assert same(drawn(run, tiny, 2, image=image_of(*PICTURES), strength=0.5), [one, other])
    together = drawn(run, tiny, 2, image=image_of(PICTURES[0]), strength=0.5)
    result = pipeline("sd15")(
        "a small red cat", seeds=[5, 6], steps=2, width=104, height=72, image=PICTURES[0], strength=0.5
    )
    assert same(together, [np.asarray(image) for image in result.images])
    with pytest.raises(UsageError, match="image has 2 pictures and batch is 3: give it one, or as many as are drawn"):
        drawn(run, tiny, 3, image=image_of(*PICTURES))
    with_alpha = torch.cat([image_of(PICTURES[0]), torch.ones(1, 72, 104, 1)], dim=3)
    assert same(drawn(run, tiny, image=with_alpha, strength=0.5), [one])


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, {}),
        ({"mask_padding": 8, "mask_blur": 2.0}, {"mask_padding": 8, "mask_blur": 2.0}),
        ({"outpaint": "0,0,8,16", "width": 0, "height": 0}, {"outpaint": (0, 0, 8, 16), "width": None, "height": None}),
    ],
)
def test_masks(run, tiny, pipeline, asked, options):
    mask = torch.from_numpy(MASK.astype(np.float32) / 255)[None]
    ours = drawn(run, tiny, image=image_of(PICTURES[0]), mask=mask, strength=0.5, **asked)
    theirs = by_python(pipeline, image=PICTURES[0], mask=Image.fromarray(MASK), strength=0.5, **options)
    assert same(ours, [theirs])


def test_prompts_sizes_and_hires(run, tiny, pipeline):
    ours = drawn(run, tiny, clip_skip=1, hires_scale=1.5, hires_steps=2, hires_strength=0.5, hires_upscaler="lanczos")
    hires = {"hires_scale": 1.5, "hires_steps": 2, "hires_strength": 0.5, "hires_upscaler": "lanczos"}
    assert ours.shape == (1, 112, 160, 3) or ours.shape == (1, 104, 160, 3)
    assert same(ours, [by_python(pipeline, clip_skip=1, **hires)])


def test_loras_controlnets_and_upscalers_from_their_folders(run, tiny, held, checkpoint, shelf):
    """By their names; several LoRAs in a row are one model, several ControlNets are followed together."""
    torch.manual_seed(0)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    files = [shelf("loras") / f"{name}.safetensors" for name in ("ink", "chalk")]
    for file in files:
        sides = {"down": torch.randn(2, 32), "up": torch.randn(32, 2)}
        save_file({f"{layer}.lora_{side}.weight": tensor for side, tensor in sides.items()}, file)
    net = write_controlnet("sd15", shelf("controlnet") / "edges")
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.PReLU(8), torch.nn.Conv2d(8, 12, 3, padding=1)]
    state = torch.nn.Sequential(*layers).state_dict()
    upscaler = shelf("upscale_models") / "net.safetensors"
    save_file({f"body.{name}": tensor for name, tensor in state.items()}, upscaler)

    pipe = tiny
    for file, scale in zip(files, (0.8, -2.0), strict=True):
        (pipe,) = run("MLXDeepCacheLora", pipe=pipe, lora=file.name, scale=scale)
    control = None
    for picture, end in zip(PICTURES, (1.0, 0.5), strict=True):
        about = {"image": image_of(picture), "scale": 0.7, "end": end, "previous": control}
        (control,) = run("MLXDeepCacheControl", model="edges", **about)
    ours = drawn(run, pipe, control=control, upscale="net.safetensors")
    theirs = StableDiffusion.from_pretrained(
        str(checkpoint("sd15")), "float32", loras=[(files[0], 0.8), (files[1], -2.0)]
    )
    controls = [Control(net, picture, 0.7, end=end) for picture, end in zip(PICTURES, (1.0, 0.5), strict=True)]
    options = {"steps": 2, "seeds": [5], "width": 104, "height": 72, "upscale": upscaler}
    result = theirs("a small red cat", controls=controls, **options)
    assert ours.shape == (1, 144, 208, 3) and same(ours, [np.asarray(result.images[0])])
    assert len(held.pipe.options.loras) == 2


def test_with_and_without(run, emoji):
    (pipe,), (cache,) = run("MLXDeepCacheLoad"), run("MLXDeepCacheCache", interval=3)
    asked = {"pipe": pipe, "positive": "a red apple", "seed": 3, "batch": 2}
    cached, uncached, stats = run("MLXDeepCacheCompare", cache=cache, **asked, **SMALL)
    for image, interval in ((cached, 3), (uncached, 1)):
        result = emoji("a red apple", seeds=[3, 4], cache_interval=interval, **SMALL)
        assert same(image, [np.asarray(one) for one in result.images])
    stats = json.loads(stats)
    assert stats["psnr"] == [round(psnr(*pair), 2) for pair in zip(saved(cached), saved(uncached), strict=True)]
    assert stats["cached"]["steps"] == ["full", "cached", "cached"] and stats["uncached"]["steps"] == ["full"] * 3
    assert stats["seconds"] == {name: stats[name]["seconds"]["denoise"] for name in ("cached", "uncached")}
    with pytest.raises(
        UsageError, match="this node shows what the cache changes, but it is off; give interval or policy"
    ):
        run("MLXDeepCacheCompare", **asked, **SMALL)


def test_batches_of_other_sizes(run, monkeypatch, told):
    """As many together as fit, which without a cache may be more: the pictures and the bar stay the same."""
    (pipe,), (cache,) = run("MLXDeepCacheLoad"), run("MLXDeepCacheCache", interval=3)
    asked = {"pipe": pipe, "positive": "a red apple", "seed": 3, "batch": 3, "cache": cache, **SMALL}
    whole = run("MLXDeepCacheCompare", **asked)
    told.clear()
    monkeypatch.setattr(StableDiffusion, "together", lambda pipe, asked: 3 if asked.cache == no_cache() else 2)
    parts = run("MLXDeepCacheCompare", **asked)
    assert [(done, total) for done, total, _ in told] == [(done, 9) for done in range(1, 10)]
    stats = json.loads(parts[2])
    assert [one["seeds"] for one in stats["cached"]] == [[3, 4], [5]] and stats["uncached"]["seeds"] == [3, 4, 5]
    for ours, theirs in zip(parts[:2], whole[:2], strict=True):
        assert psnr(saved(ours)[2], saved(theirs)[2]) > 40  # sums of another order


def test_errors_name_the_inputs(run, tiny, shelf, video_checkpoint):
    (shelf("loras") / "ink.safetensors").touch()
    with pytest.raises(UsageError, match="there is no LoRA 'inc.safetensors' in ComfyUI's loras; did you mean ink"):
        run("MLXDeepCacheLora", pipe=tiny, lora="inc.safetensors")
    with pytest.raises(UsageError, match="fit has no meaning without an image"):
        drawn(run, tiny, fit="crop")
    with pytest.raises(UsageError, match="sampler should be one of"):
        drawn(run, tiny, sampler="eular")
    with pytest.raises(UsageError, match="mask has no meaning without an image"):
        drawn(run, tiny, mask=torch.ones(1, 64, 64))
    with pytest.raises(UsageError, match="outpaint should be pixels"):
        drawn(run, tiny, image=image_of(PICTURES[0]), outpaint="wide")
    with pytest.raises(Failure, match="nothing"):
        drawn(run, run("MLXDeepCacheLoad", model_id="./nothing")[0])
    (pipe,) = run("MLXDeepCacheLoad", model_id=str(video_checkpoint), dtype="float32")
    with pytest.raises(UsageError, match="this model draws videos"):
        drawn(run, pipe, positive="", image=image_of(PICTURES[0]), width=64, height=64)


def test_names_of_what_comfyui_has(run, nodes, shelf, tmp_path):
    """Single files and whole folders, in folders too; their parts are none, and pickles are not offered."""
    for name in ("a.safetensors", "b.ckpt", "kind/c.safetensors", "d/unet/x.safetensors", "d/model_index.json"):
        file = shelf("checkpoints") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    offered = comfy_host.inputs(nodes["MLXDeepCacheLoad"])["model"][1]
    assert offered["options"] == ["emoji", "a.safetensors", "d", str(Path("kind/c.safetensors"))]
    assert offered["default"] == "emoji"
    (shelf("vae") / "v.safetensors").touch()
    (pipe,) = run("MLXDeepCacheLoad", model="d", quantize="8", vae="v.safetensors", refiner="a.safetensors")
    files = {"model": "checkpoints/d", "vae": "vae/v.safetensors", "refiner": "checkpoints/a.safetensors"}
    assert pipe == ModelOptions(quantize=8, **{name: str(tmp_path / file) for name, file in files.items()})
    (pipe,) = run("MLXDeepCacheLoad", model="gone", model_id=" sdxl ")
    assert pipe.model == "sdxl"


@pytest.mark.parametrize(
    "file", sorted((comfy_host.PACK / "example_workflows").glob("*.json")), ids=lambda file: file.stem
)
def test_workflows(run, nodes, emoji, file):
    """Each runs, and its links and widgets are those of the nodes."""
    theirs = {
        "SaveImage": {"images": ("IMAGE", {}), "filename_prefix": ("STRING", {})},
        "PreviewImage": {"images": ("IMAGE", {})},
        "PreviewAny": {"source": ("*", {})},
        "LoadImage": {"image": ("COMBO", {"image_upload": True})},
    }

    def describe(kind):
        return theirs[kind] if kind in theirs else {id: one[:2] for id, one in comfy_host.inputs(nodes[kind]).items()}

    workflow = json.loads(file.read_text())
    made = {}
    for number, node in sorted(comfy_host.as_prompt(workflow, describe).items()):
        given = {
            name: made[value[0]][value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        if node["class_type"] in nodes:
            small = {"steps": 2, "width": 64, "height": 64} if "steps" in given else {}
            made[number] = run(node["class_type"], **given | small)
        else:
            made[number] = (image_of(PICTURES[0]),)
            shown = given.get("images", given.get("source"))
            assert node["class_type"] == "LoadImage" or isinstance(shown, (torch.Tensor, str))


def test_the_pack_describes_itself():
    tomllib = pytest.importorskip("tomllib")
    about = tomllib.loads((comfy_host.PACK / "pyproject.toml").read_text())
    assert about["project"]["name"] == link.NAME and about["project"]["version"] == mlx_deepcache.__version__
    assert about["project"]["dependencies"] == ["mlx-deepcache"]
    assert option_of(Options, "steps").help  # the declaration that nodes are made of is there without MLX
