"""Nodes for ComfyUI, whose `custom_nodes` links to this folder: see docs/comfyui.md.

There it is imported by its path, so the package is imported by its name. Nothing here imports MLX before a node runs.
"""


async def comfy_entrypoint():
    """What ComfyUI asks for the nodes."""
    from .nodes import Pack

    return Pack()
