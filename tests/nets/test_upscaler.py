"""Nets that enlarge pictures, against their published code and, where it is installed, against spandrel."""

import importlib.util
import sys
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import error, smooth, to_mlx, to_torch_layout
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from mlx_deepcache.apps.convert import main_convert
from mlx_deepcache.checkpoints.part import load_upscaler
from mlx_deepcache.errors import CheckpointError, UsageError
from mlx_deepcache.nets.upscaler import upscaled

# ------------------------------------------------------------------------- as published (BasicSR's archs, Real-ESRGAN)


class Dense(nn.Module):
    def __init__(self, nf, gc):
        super().__init__()
        for i in range(5):
            setattr(self, f"conv{i + 1}", nn.Conv2d(nf + i * gc, nf if i == 4 else gc, 3, 1, 1))

    def forward(self, x):
        maps = [x]
        for i in range(4):
            maps.append(F.leaky_relu(getattr(self, f"conv{i + 1}")(torch.cat(maps, 1)), 0.2))
        return self.conv5(torch.cat(maps, 1)) * 0.2 + x


class Residual(nn.Module):
    def __init__(self, nf, gc):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = Dense(nf, gc), Dense(nf, gc), Dense(nf, gc)

    def forward(self, x):
        return self.rdb3(self.rdb2(self.rdb1(x))) * 0.2 + x


class RRDBNet(nn.Module):
    def __init__(self, scale, nf=12, nb=2, gc=32):
        super().__init__()
        self.shuffle = 4 // scale
        self.conv_first = nn.Conv2d(3 * self.shuffle**2, nf, 3, 1, 1)
        self.body = nn.Sequential(*[Residual(nf, gc) for _ in range(nb)])
        self.conv_body, self.conv_up1, self.conv_up2, self.conv_hr = (nn.Conv2d(nf, nf, 3, 1, 1) for _ in range(4))
        self.conv_last = nn.Conv2d(nf, 3, 3, 1, 1)

    def forward(self, x):
        x = self.conv_first(F.pixel_unshuffle(x, self.shuffle))
        x = x + self.conv_body(self.body(x))
        for conv in (self.conv_up1, self.conv_up2):
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))


class Compact(nn.Module):
    def __init__(self, scale, nf=12, nc=3):
        super().__init__()
        convs = [nn.Conv2d(3, nf, 3, 1, 1), *(nn.Conv2d(nf, nf, 3, 1, 1) for _ in range(nc))]
        layers = [layer for conv in convs for layer in (conv, nn.PReLU(nf))]
        self.scale, self.body = scale, nn.ModuleList([*layers, nn.Conv2d(nf, 3 * scale**2, 3, 1, 1)])

    def forward(self, x):
        out = x
        for layer in self.body:
            out = layer(out)
        return F.pixel_shuffle(out, self.scale) + F.interpolate(x, scale_factor=self.scale, mode="nearest")


def made(kind, scale):
    """A random net that does something."""
    torch.manual_seed(scale)
    net = kind(scale).eval()
    for parameter in net.parameters():
        parameter.data *= 2
    return net


def as_esrgan(tensors):
    """The names that ESRGAN was first published with."""
    blocks = {f"body.{i}.rdb{j}.conv{k}.": f"model.1.sub.{i}.RDB{j}.conv{k}.0." for i in (0, 1) for j in (1, 2, 3)
              for k in range(1, 6)}  # fmt: skip
    rest = {"conv_first.": "model.0.", "conv_body.": "model.1.sub.2.", "conv_up1.": "model.3.", "conv_up2.": "model.6."}
    return renamed(tensors, blocks | rest | {"conv_hr.": "model.8.", "conv_last.": "model.10."})


def as_bsrgan(tensors):
    blocks = {f"body.{i}.rdb{j}.": f"RRDB_trunk.{i}.RDB{j}." for i in (0, 1) for j in (1, 2, 3)}
    rest = {"conv_body.": "trunk_conv.", "conv_up1.": "upconv1.", "conv_up2.": "upconv2.", "conv_hr.": "HRconv."}
    return renamed(tensors, blocks | rest)


def renamed(tensors, table):
    def new(name):
        start = next((old for old in table if name.startswith(old)), "")
        return table.get(start, "") + name.removeprefix(start)

    return {new(name): tensor.contiguous() for name, tensor in tensors.items()}


NAMES = {"own": dict, "esrgan": as_esrgan, "bsrgan": as_bsrgan}
NETS = [(RRDBNet, scale, names) for scale in (1, 2, 4) for names in NAMES if names == "own" or scale == 4]
NETS += [(Compact, scale, "own") for scale in (1, 2, 4)]
PIXELS = np.random.default_rng(0).random((2, 3, 12, 20), dtype=np.float32)


@pytest.mark.parametrize(("kind", "scale", "names"), NETS)
def test_as_published(tmp_path, kind, scale, names):
    net = made(kind, scale)
    save_file(NAMES[names](net.state_dict()), tmp_path / "net.safetensors")
    ours = load_upscaler(str(tmp_path / "net.safetensors"), None)
    assert ours.config.factor == scale
    with torch.no_grad():
        expected = net(torch.tensor(PIXELS))
    assert error(to_torch_layout(ours(to_mlx(PIXELS))), expected) < 1e-5
    assert expected.std() > 0.05


@pytest.fixture(scope="module")
def spandrel():
    """It asks for torchvision, of which two nets that are not tried here use a function."""
    if importlib.util.find_spec("spandrel") is None:
        pytest.skip("spandrel is not installed (pip install --no-deps spandrel einops)")
    lacking = importlib.util.find_spec("torchvision") is None
    parts = ("", ".ops", ".models", ".transforms", ".transforms.functional")
    names = [f"torchvision{part}" for part in parts] if lacking else []
    for name in names:
        sys.modules[name] = module = ModuleType(name)
        module.__path__ = []
        module.__getattr__ = lambda attribute: object
    try:
        import spandrel

        yield spandrel
    finally:
        for name in names:
            del sys.modules[name]


@pytest.mark.parametrize(("kind", "scale", "names"), NETS)
def test_as_spandrel_loads_it(spandrel, tmp_path, kind, scale, names):
    """Whole files; sides that are no multiples of what pixels are gathered by."""
    found = NAMES[names](made(kind, scale).state_dict())
    save_file(found, tmp_path / "net.safetensors")
    ours = load_upscaler(str(tmp_path / "net.safetensors"), None)
    net = spandrel.ModelLoader().load_from_state_dict(dict(found))
    assert net.scale == ours.config.factor
    picture = np.asarray(smooth(23, 30))
    with torch.no_grad():
        expected = net.model(torch.tensor(picture.transpose(2, 0, 1).copy())[None] / 255)[0].permute(1, 2, 0)
    expected = (expected.clamp(0, 1) * 255).round().numpy()
    assert np.abs(upscaled(ours, picture, mx.float32).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("kind", "scale", "most"), [(RRDBNet, 2, 4), (Compact, 4, 0)])
def test_tiles_see_beyond_their_edges(tmp_path, kind, scale, most):
    """Three by two of them, by a net that sees no farther, and by one that does."""
    save_file(made(kind, scale).state_dict(), tmp_path / "net.safetensors")
    ours = load_upscaler(str(tmp_path / "net.safetensors"), None)
    picture = np.asarray(smooth(66, 91))
    whole, tiled = (upscaled(ours, picture, mx.float32, tile).astype(int) for tile in (192, 40))
    assert tiled.shape == (66 * scale, 91 * scale, 3)
    assert np.abs(whole - tiled).max() <= most and whole.std() > 10


def test_a_pth_file_is_converted_first(tmp_path, capfd):
    """It is read as safely as all others, and the average of the weights is taken."""
    net, other = made(RRDBNet, 4), made(RRDBNet, 2)
    torch.save({"params": other.state_dict(), "params_ema": net.state_dict()}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"pickle file.*convert.py"):
        load_upscaler(str(tmp_path / "net.pth"), None)
    assert main_convert(["--model", str(tmp_path / "net.pth"), "--output", str(tmp_path / "net.safetensors")]) == 0
    ours = load_upscaler(str(tmp_path / "net.safetensors"), None)
    with torch.no_grad():
        assert error(to_torch_layout(ours(to_mlx(PIXELS))), net(torch.tensor(PIXELS))) < 1e-5


def test_in_the_dictionary_of_training(tmp_path):
    """As some converters leave it."""
    found = {f"params_ema.{name}": tensor for name, tensor in made(Compact, 2).state_dict().items()}
    save_file(found, tmp_path / "net.safetensors")
    assert load_upscaler(str(tmp_path / "net.safetensors"), None).config.factor == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv_last.weight": torch.zeros(1, 12, 3, 3)}, "other pictures than RGB"),
        ({"conv_first.weight": torch.zeros(12, 4, 3, 3)}, "other pictures than RGB"),
        ({"conv_body.bias": None}, "lacks conv_body.bias"),
        ({"body.0.rdb1.conv1x1.weight": torch.zeros(32, 12, 1, 1)}, "no place for"),  # ESRGAN+
        ({"conv_first.weight": None}, "is no upscaler"),
        ({"body.9999999999.rdb1.conv1.bias": torch.zeros(32)}, "not supported"),
    ],
)
def test_refused(tmp_path, change, words):
    found = made(RRDBNet, 4).state_dict() | change
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_upscaler(str(tmp_path / "net.safetensors"), None)


def wide(folder):
    """A net that takes more than the VAE."""
    save_file(Compact(4, nf=256, nc=1).state_dict(), folder / "wide.safetensors")
    return str(folder / "wide.safetensors")


def test_of_a_whole_picture(pipeline, tmp_path):
    """The last thing that is done, after a mask's picture is put back; each of a batch."""
    net = made(Compact, 2)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    pipe, file = pipeline("sd15"), str(tmp_path / "net.safetensors")
    options = {"steps": 2, "height": 64, "width": 64, "seeds": [1, 2]}
    plain, large = pipe("a cat", **options).images, pipe("a cat", upscale=file, **options).images
    for small, ours in zip(plain, large, strict=True):
        with torch.no_grad():
            pixels = torch.tensor(np.asarray(small).transpose(2, 0, 1).copy())[None] / 255
            expected = (net(pixels)[0].permute(1, 2, 0).clamp(0, 1) * 255).round().numpy()
        assert np.abs(np.asarray(ours).astype(int) - expected).max() <= 1
    plain, large = (pipe.estimate(pipe.settings("a cat", upscale=given))["decode"] for given in (None, wide(tmp_path)))
    assert large > 2 * plain
    with pytest.raises(CheckpointError, match="there is no file"):
        pipe.settings("a cat", upscale="nowhere.safetensors")
    with pytest.raises(UsageError, match="upscale does not go with frames"):
        pipe.settings("a cat", upscale=file, frames=3)
