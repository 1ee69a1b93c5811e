"""LoRAs and embeddings as diffusers' pipelines have them: LoRAs by name, with weights, some active, some fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..fields import suggest, valued
from .notes import note_all
from .parts import weights

if TYPE_CHECKING:
    from .model import Model

Loras = tuple[tuple[str, float], ...]
"""Files and scales."""


@dataclass
class Adapters:
    """files: by name; weights: of the active ones; fused: what stays when adapters go; on: whether the active count."""

    files: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    fused: dict[str, tuple[str, float]] = field(default_factory=dict)
    on: bool = True

    def add(self, file: str, name: str | None) -> None:
        """One more, which alone is active then."""
        name = f"default_{len(self.files)}" if name is None else name
        if name in self.files:
            raise UsageError(f"there is a LoRA {name!r} already; give this one another adapter_name")
        self.files[name] = file
        self.weights = {name: 1.0}

    def use(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Have these active, with these weights (1)."""
        names = [names] if isinstance(names, str) else list(names)
        weights = 1.0 if weights is None else weights
        weights = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(weights) != len(names):
            raise UsageError(f"there should be a weight for each of {len(names)} LoRAs, got {len(weights)}")
        if any(isinstance(weight, dict) for weight in weights):
            raise TypeError("adapter_weights by block cannot be honoured here; give one number a LoRA")
        self._check(names)
        self.weights = {n: 1.0 if w is None else float(w) for n, w in zip(names, weights, strict=True)}

    def fuse(self, scale: float, names: Sequence[str] | None) -> None:
        """Make active ones part of the model."""
        self._check(names or ())
        for name in names or list(self.weights):
            self.fused[name] = self.files[name], scale * self.weights.get(name, 1.0)

    def unload(self) -> None:
        """Forget all that are not fused."""
        self.files, self.weights = {}, {}

    def delete(self, names: str | Sequence[str]) -> None:
        names = [names] if isinstance(names, str) else list(names)
        self._check(names)
        for name in names:
            del self.files[name]
            self.weights.pop(name, None)

    def loras(self, scale: float = 1.0) -> Loras:
        """What the model is read with; scale: a call's own, on what is not fused."""
        active = self.weights if self.on else {}
        loose = tuple((self.files[name], scale * weight) for name, weight in active.items() if name not in self.fused)
        return *self.fused.values(), *(pair for pair in loose if pair[1])

    def _check(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.files:
                raise UsageError(f"there is no LoRA {name!r}{suggest(name, self.files)}; load_lora_weights loads one")


class Adaptable:
    """A pipeline's methods for these."""

    model: Model

    def load_lora_weights(
        self,
        lora: str,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **ignored: Any,
    ) -> None:
        """From a file, a folder or a hub id; it alone is active then."""
        note_all("load_lora_weights", ignored)
        self.model.adapters.add(weights(lora, weight_name, subfolder), adapter_name)
        self.model.check()

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        self.model.adapters.use(adapter_names, adapter_weights)

    def get_active_adapters(self) -> list[str]:
        return list(self.model.adapters.weights)

    def enable_lora(self) -> None:
        self.model.adapters.on = True

    def disable_lora(self) -> None:
        self.model.adapters.on = False

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        self.model.adapters.delete(adapter_names)

    def unload_lora_weights(self) -> None:
        self.model.adapters.unload()

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """components: all that LoRAs change, or none named."""
        if components is not None and not {"unet", "text_encoder"} <= {*components}:
            raise TypeError(f"fuse_lora: components={valued(components)} cannot be honoured here, only all of them")
        self.model.adapters.fuse(lora_scale, adapter_names)

    def unfuse_lora(self, **ignored: Any) -> None:
        self.model.adapters.fused = {}

    def load_textual_inversion(
        self,
        embedding: str | Sequence[str],
        token: str | Sequence[str] | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **ignored: Any,
    ) -> None:
        """From a file, a folder or a hub id, called by a word, or by the file's own."""
        note_all("load_textual_inversion", ignored)
        several = isinstance(embedding, (list, tuple))
        files = list(embedding) if several else [embedding]
        words = list(token) if isinstance(token, (list, tuple)) else [token] * len(files)
        pairs = [(weights(file, weight_name, subfolder), word) for file, word in zip(files, words, strict=True)]
        self.model.embeddings = [*self.model.embeddings, *pairs]
        self.model.check()

    def unload_textual_inversion(self, tokens: None = None, **ignored: Any) -> None:
        if tokens is not None:
            raise TypeError("unload_textual_inversion: tokens cannot be honoured here, only all of them")
        self.model.embeddings = []
