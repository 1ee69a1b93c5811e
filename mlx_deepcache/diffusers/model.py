"""The model under one or several pipelines: diffusers' pipelines that are made from one another share their networks,
with the LoRAs and the cache in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import StableDiffusion
from ..backend.ops import dtype_of
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UsageError
from ..fields import valued
from ..generation.options import DTYPES
from .adapters import Adapters, Loras

if TYPE_CHECKING:
    from .helper import DeepCacheSDHelper


class Model:
    """name: a folder, a file or a hub id; helper: the one that is enabled; tiling: see `Options.vae_tiling`."""

    def __init__(self, name: str, dtype: str, vae: str | None = None):
        self.name, self.dtype, self.vae = name, dtype, vae
        self.checkpoint = Checkpoint.open(name, half=dtype == "float16", vae=vae)
        self.adapters, self.embeddings, self.tiling = Adapters(), [], "auto"
        self.helper: DeepCacheSDHelper | None = None
        self._made: tuple[Any, StableDiffusion] | None = None

    def drawing(self, loras: Loras) -> StableDiffusion:
        """What draws, with these LoRAs; where they are others than in the last call, its networks are read anew."""
        key = loras, tuple(self.embeddings), self.dtype, self.vae
        if self._made is None or self._made[0] != key:
            self._made = None  # free what was held before more is read
            options = {"loras": loras, "embeddings": self.embeddings}
            self._made = key, StableDiffusion(self.checkpoint, self.dtype, **options)
        return self._made[1]

    def use_vae(self, vae: str) -> None:
        """Another VAE in place of the model's own."""
        self.vae = vae
        self.checkpoint = Checkpoint.open(self.name, half=self.dtype == "float16", vae=vae)

    def use_dtype(self, dtype: str) -> None:
        self.dtype = dtype

    def check(self) -> None:
        """Read LoRAs and embeddings, and find that they fit, before something is drawn with them."""
        self.drawing(self.adapters.loras())


def dtype_named(dtype: Any) -> str:
    """A torch.dtype, or its name; diffusers' default is float32."""
    name = str("float32" if dtype is None else dtype).removeprefix("torch.")
    name = {"half": "float16", "float": "float32"}.get(name, name)
    if name != "auto" and name not in DTYPES:
        raise UsageError(f"dtype should be one of {', '.join(DTYPES)}, got {valued(dtype)}")
    return name if name != "auto" else str(dtype_of("auto")).rpartition(".")[2]
