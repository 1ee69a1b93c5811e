"""What other programs read in a prompt beside its words: LoRAs by name, and syntax that is only text here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path

from ..checkpoints.names import offered
from ..errors import UsageError, called
from ..fields import composed, finite, suggest
from .prompts import PromptWarning, parse

_LORA = re.compile(r"<lora:([^<>:]+)((?::[^<>:]*)*)>")
# A1111's, apart from weights: chunks by hand, several prompts, one that changes on the way, one that alternates
_ONLY_TEXT = r"<(?:lora|lyco|hypernet):[^<>]*>|\bBREAK\b|\bAND\b"
_IN_BRACKETS = r"(?<!\\)\[[^\[\]]*:\s*\d*\.?\d+\s*\]|(?<!\\)\[[^\[\]]*\|[^\[\]]*\]"

_AROUND_A_NAME = set(
    "a an the of on in with and draw drawing picture image photo photograph painting cartoon emoji icon sticker".split()
)

NamedLoras = tuple[tuple[Path, float], ...]


def take_loras(prompts: Sequence[str], folder: str | None) -> tuple[tuple[str, ...], NamedLoras]:
    """Prompts without their `<lora:name:scale>`, and the LoRAs in the folder, or below it, that they name; with no
    folder they stay as they are.

    Raises:
        UsageError: there is no such LoRA, or its scale cannot be, or the prompts name different ones.
    """
    if folder is None:
        return tuple(prompts), ()
    known = dict(map(offered, sorted(Path(folder).rglob("*.safetensors"), reverse=True)))
    named = [tuple(_lora(match, known, folder) for match in _LORA.finditer(text)) for text in prompts]
    if len(set(named)) > 1:
        raise UsageError("prompts of pictures that are drawn together should name the same LoRAs")
    return tuple(_LORA.sub("", text) for text in prompts), named[0]


def named_loras(text: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """A prompt without its `<lora:name:scale>`, and what these say.

    Raises:
        UsageError: a scale cannot be.
    """
    return _LORA.sub("", text), tuple((_name(match), _scale(match)) for match in _LORA.finditer(text))


def _lora(match: re.Match, known: dict[str, Path], folder: str) -> tuple[Path, float]:
    name = _name(match)
    if name not in known:
        raise UsageError(f"there is no LoRA {name!r} in {folder}{suggest(name, known)}")
    return known[name], _scale(match)


def _name(match: re.Match) -> str:
    return composed(match[1]).strip().removesuffix(".safetensors")


def _scale(match: re.Match) -> float:
    try:
        values = {finite(scale) for scale in match[2].split(":")[1:]} or {1.0}
    except ValueError:
        raise UsageError(f"{match[0]} should be <lora:name> or <lora:name:scale> with a finite number") from None
    if len(values) > 1:
        raise UsageError(f"{match[0]} has a scale for text and one for pictures; here a LoRA has one, for both")
    return values.pop()


def note_unknown(prompts: Sequence[str], things: Sequence[Sequence[str]]) -> None:
    """Warn of prompts that name nothing that a model draws, which then draws some other thing.

    things: see `folder.read_prompts`; none where a prompt may be anything."""
    if not things:
        return
    plain = {name: names[0] for names in things for name in names}
    for prompt in prompts:
        said = " ".join("".join(piece for piece, _ in parse(prompt)).lower().split())
        if not said or any(re.search(rf"(?<!\w){re.escape(name)}(?:s|es)?(?!\w)", said) for name in plain):
            continue
        words = [word for word in re.findall(r"\w+", said) if word not in _AROUND_A_NAME][:20]
        words = [" ".join(words), *words]
        near = sorted(plain, key=partial(_unlike, words))
        nearest = ", ".join(list(dict.fromkeys(plain[name] for name in near))[:3])
        warnings.warn(
            f"{said[:60]!r} is not one of the {len(things)} things this model draws; nearest: {nearest}",
            PromptWarning,
            stacklevel=3,
        )


def _unlike(words: Sequence[str], name: str) -> float:
    """How little a name has of the nearest of these words."""
    return -max(SequenceMatcher(None, name, word).ratio() for word in words)


def note_only_text(texts: Sequence[str | None], *, weighted: bool) -> None:
    """Warn of what means something elsewhere; weighted: whether brackets mean anything."""
    pattern = f"{_ONLY_TEXT}|{_IN_BRACKETS}" if weighted else _ONLY_TEXT
    found = list(dict.fromkeys(part for text in texts if text for part in re.findall(pattern, text)))
    if found:
        lora = any(part.startswith("<lora:") for part in found)
        cure = f"; {called('lora_dir')} names the folder that LoRAs are looked for in" if lora else ""
        shown = ", ".join(found[:3]) + (" and others" if len(found) > 3 else "")
        warnings.warn(f"read as plain text here: {shown}{cure}", PromptWarning, stacklevel=3)
