"""LoRAs as diffusers' pipelines have them: by name, each with a weight, some active, some fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import UsageError
from ..fields import suggest

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
