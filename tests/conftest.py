"""Shared fixtures. PyTorch comes first, to keep its own BLAS; then mlx_deepcache, which loads a fast one for MLX."""

import gc
import os

gc.disable()  # until `pytest_collection` is over
for library in ("MKL", "OPENBLAS"):  # the nets are tiny: threads would only wait for each other
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import torch  # noqa: E402, I001
import mlx_deepcache  # noqa: E402
import tiny  # noqa: E402
import tiny_unprompted  # noqa: E402
import tiny_video  # noqa: E402
import pytest  # noqa: E402
from mlx_deepcache.backend import ops  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What was imported stays: half a million objects, which each collection of garbage would look through."""
    found = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return found


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(kind): the folder of a tiny diffusers checkpoint, built once; copy it before changing it."""
    built = {}

    def folder(kind):
        if kind not in built:
            built[kind] = tiny.build(kind, tmp_path_factory.mktemp(kind))
        return built[kind]

    return folder


@pytest.fixture(scope="session")
def video_checkpoint(tmp_path_factory):
    """The folder of a tiny Stable Video Diffusion checkpoint."""
    return tiny_video.build(tmp_path_factory.mktemp("svd"))


@pytest.fixture(scope="session")
def unprompted(tmp_path_factory):
    """unprompted(kind): the folder of a tiny checkpoint that reads no prompt, built once, and our pipeline over it."""
    built = {}

    def both(kind):
        if kind not in built:
            folder = tiny_unprompted.build(kind, tmp_path_factory.mktemp(kind))
            built[kind] = folder, mlx_deepcache.StableDiffusion.from_pretrained(str(folder), "float32")
        return built[kind]

    return both


@pytest.fixture(scope="session")
def pipeline(checkpoint):
    """pipeline(kind): our pipeline over that checkpoint in float32, kept loaded."""
    pipes = {}

    def loaded(kind):
        if kind not in pipes:
            pipes[kind] = mlx_deepcache.StableDiffusion.from_pretrained(str(checkpoint(kind)), "float32")
        return pipes[kind]

    return loaded


@pytest.fixture
def gpu_branch(monkeypatch):
    """What a GPU would be asked for, on the CPU, which has all of MLX's operations too."""
    monkeypatch.setattr(ops, "on_gpu", lambda: True)


@pytest.fixture(scope="session")
def taesd(tmp_path_factory):
    """The folder of a tiny AutoencoderTiny."""
    return tiny.write_taesd(tmp_path_factory.mktemp("taesd"))


@pytest.fixture(scope="session")
def video_pipeline(video_checkpoint):
    """Our pipeline over that checkpoint in float32, kept loaded."""
    return mlx_deepcache.StableDiffusion.from_pretrained(str(video_checkpoint), "float32")
