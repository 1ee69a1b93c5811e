"""What tests of the commands share."""

import shutil

import pytest
from running import SMALL, exit_code

from mlx_deepcache.apps.generate import main_generate


@pytest.fixture
def draw(checkpoint, tmp_path, monkeypatch):
    """draw(*flags): generate.py in this process and an empty folder; a later flag overrides an earlier one."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*flags, model=None):
        model = checkpoint("sd15") if model is None else model
        return exit_code(main_generate, ["--model", model, "--prompt", "a cat", *SMALL, "--overwrite", *flags])

    return run


@pytest.fixture
def copy(checkpoint, tmp_path):
    """copy(kind): a checkpoint to damage."""
    return lambda kind="sd15": shutil.copytree(checkpoint(kind), tmp_path / f"copy-of-{kind}")
