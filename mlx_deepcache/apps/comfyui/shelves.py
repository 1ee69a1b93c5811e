"""Models and files in ComfyUI's own folders, by name."""

from __future__ import annotations

import os
from dataclasses import dataclass

import folder_paths

from mlx_deepcache.errors import UsageError
from mlx_deepcache.fields import suggest


@dataclass(frozen=True)
class Shelf:
    """Things of one kind. what: they are, in words; places: what ComfyUI calls the folders that have them; marker: a
    folder with such a file is one of them, as every .safetensors file is."""

    what: str
    places: tuple[str, ...]
    marker: str | None = None

    def found(self) -> dict[str, str]:
        """Where each is by its name, which is its path from the folder that ComfyUI knows."""
        found: dict[str, str] = {}
        for place in (path for name in self.places for path in folder_paths.get_folder_paths(name)):
            for here, folders, files in os.walk(place, followlinks=True):
                if self.marker in files and here != place:
                    found.setdefault(os.path.relpath(here, place), here)
                    folders.clear()
                    continue
                folders[:] = [folder for folder in folders if not folder.startswith(".")]
                for file in (os.path.join(here, file) for file in files if file.endswith(".safetensors")):
                    found.setdefault(os.path.relpath(file, place), file)
        return found

    def names(self) -> list[str]:
        return sorted(self.found())

    def path(self, name: str) -> str:
        """Raises UsageError if there is no such thing."""
        found = self.found()
        if name not in found:
            places = " or ".join(self.places)
            raise UsageError(f"there is no {self.what} {name!r} in ComfyUI's {places}{suggest(name, found)}")
        return found[name]


MODELS = Shelf("model", ("checkpoints", "diffusers"), "model_index.json")
VAES = Shelf("VAE", ("vae",), "config.json")
LORAS = Shelf("LoRA", ("loras",))
CONTROLNETS = Shelf("ControlNet", ("controlnet",), "config.json")
UPSCALERS = Shelf("upscaler", ("upscale_models",))
