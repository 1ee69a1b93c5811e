"""The command that links ComfyUI's custom_nodes to the nodes."""

import errno
import os
import re

import pytest

from mlx_deepcache.apps.link import NAME, PACK, main_comfyui


@pytest.fixture(params=[("main.py", "comfy"), ("models", "input", "output")], ids=["checkout", "desktop"])
def comfyui(request, tmp_path):
    for name in ("custom_nodes", *request.param):
        (tmp_path / name).mkdir()
    return tmp_path


def test_links_once(comfyui, capfd, monkeypatch):
    monkeypatch.chdir(comfyui.parent)
    link = comfyui / "custom_nodes" / NAME
    for said in ("linked: ", "linked already: "):
        assert main_comfyui([comfyui.name]) == 0
        assert os.readlink(link) == str(PACK) and (link / "__init__.py").is_file()
        assert capfd.readouterr().out.startswith(f"{said}{link}")
    assert os.listdir(link.parent) == [NAME]


def test_links_anew_to_what_is_installed_now(comfyui, capfd):
    link = comfyui / "custom_nodes" / NAME
    link.symlink_to(comfyui / "gone")
    assert main_comfyui([str(comfyui)]) == 0
    assert os.readlink(link) == str(PACK) and f"instead of {comfyui / 'gone'}" in capfd.readouterr().out


def failed(capfd, folder, code, words):
    assert main_comfyui([str(folder)]) == code
    out, err = capfd.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err) and words in err


def test_refuses(comfyui, capfd, tmp_path):
    failed(capfd, tmp_path / "custom_nodes", 2, "is no ComfyUI: expected its folder")
    failed(capfd, tmp_path / "none", 2, "is no ComfyUI")
    (comfyui / "custom_nodes" / NAME).mkdir()
    failed(capfd, comfyui, 1, "is in the way, and is no link")
    with pytest.raises(SystemExit) as stop:
        main_comfyui([])
    assert stop.value.code == 2


def test_a_folder_that_cannot_be_written(comfyui, capfd, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "symlink", refuse)
    failed(capfd, comfyui, 1, "cannot be made: Permission denied")
    assert os.listdir(comfyui / "custom_nodes") == []
