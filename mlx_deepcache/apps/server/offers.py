"""What the server offers: models and files by name. A request names, and never says where something lies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ...checkpoints.names import BUNDLED_NAME, hub_id, offered
from ...errors import UsageError
from ...fields import composed
from .refused import unknown


@dataclass
class Shelf:
    """Things of one kind by name, and the folders in which more may appear. what: they are, in words; folders: whether
    one of them can be a folder with a model in it."""

    what: str
    named: dict[str, str] = field(default_factory=dict)
    places: tuple[Path, ...] = ()
    folders: bool = False
    code: str | None = None
    found: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for place in self.places:
            if not place.is_dir():
                raise UsageError(f"expected a folder of {self.what}s, got {str(place)!r}")
        self.look()

    def look(self) -> None:
        """Look into the folders again."""
        found: dict[str, str] = {}
        for place in self.places:
            files = place.rglob("*.safetensors") if not self.folders else place.glob("*.safetensors")
            models = [one for one in place.iterdir() if (one / "model_index.json").is_file()] if self.folders else []
            for path in sorted([*files, *models]):
                name, where = offered(path) if path.is_file() else (composed(path.name), path)
                found.setdefault(name, str(where))
        self.found = found | self.named  # at once, as others read it

    def names(self) -> list[str]:
        """The given ones first."""
        return list(self.named | self.found)

    def path(self, name: str) -> str:
        """Raises Refused for what is not offered."""
        if not isinstance(name, str) or composed(name) not in self.found:
            raise unknown(self.what, name, self.found, self.code)
        return self.found[composed(name)]


class Offers:
    """All that a request may name."""

    def __init__(
        self,
        models: Iterable[str] = (),
        model_dirs: Iterable[Path] = (),
        lora_dirs: Iterable[Path] = (),
        embedding_dirs: Iterable[Path] = (),
        controlnet_dirs: Iterable[Path] = (),
        upscaler_dirs: Iterable[Path] = (),
        vae: str | None = None,
        refiner: str | None = None,
    ):
        """models: [ID=]M each, the first is the default. Raises UsageError if two have one name."""
        named: dict[str, str] = {}
        for text in models:
            name, path = _named(text)
            if named.setdefault(name, path) != path:
                raise UsageError(f"two models are called {name!r}; give one another name, ID=MODEL")
        model_dirs = tuple(model_dirs)
        if not named and not model_dirs:
            named = {BUNDLED_NAME: BUNDLED_NAME}
        self.models = Shelf("model", named, model_dirs, folders=True, code="model_not_found")
        self.vaes = Shelf("VAE", {} if vae is None else dict([_named(vae)]))
        self.refiners = Shelf("refiner", {} if refiner is None else dict([_named(refiner)]))
        self.loras = Shelf("LoRA", {}, tuple(lora_dirs))
        self.embeddings = Shelf("embedding", {}, tuple(embedding_dirs))
        self.controlnets = Shelf("ControlNet", {}, tuple(controlnet_dirs))
        self.upscalers = Shelf("upscaler", {}, tuple(upscaler_dirs))
        if not self.models.found:
            raise UsageError("there is no model in the folders given: expected single files or folders with one")

    @property
    def default(self) -> str:
        return self.models.names()[0]

    def look(self) -> None:
        for shelf in vars(self).values():
            shelf.look()


def _named(text: str) -> tuple[str, str]:
    """A model's name and where it is, from [ID=]M."""
    name, equals, path = text.partition("=")
    if equals and name and path and not Path(text).exists():
        return composed(name), path
    if (found := hub_id(text)) is not None and not Path(text).exists():
        return (found.file or found.repository).rpartition("/")[2], text
    path = Path(text)
    return composed(path.stem if path.suffix == ".safetensors" else path.name) or text, text


def stem(name: str) -> str:
    """A name as clients save it: perhaps with a hash in brackets, or a file's ending."""
    plain = name.rpartition(" [")[0] if name.endswith("]") and " [" in name else name
    return plain.strip().removesuffix(".safetensors")
