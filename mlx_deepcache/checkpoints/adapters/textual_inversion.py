"""Textual inversion (Gal et al. 2022): a new word, with vectors of its own in the text encoders' tables.

Read are diffusers' files (the word is the tensor's name), A1111's (`emb_params`), and those with a tensor for each
encoder (`clip_l` and `clip_g`, or, from the first trainers for SDXL, `text_encoders_0` and `text_encoders_1`); in the
last two the word is the file's stem.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ...backend.ops import DTYPES
from ...errors import CheckpointError, UsageError
from ...fields import composed
from ...nets.clip import CLIPTextModel
from ..families import FAMILIES
from ..tokenizer import CLIPTokenizer
from ..weights import read_tensors, some

_ENCODERS = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}


@dataclass(frozen=True)
class Embedding:
    """A word and, for each text encoder by name, its vectors: (n, width), the same n for all."""

    word: str
    vectors: dict[str, mx.array]

    @property
    def tokens(self) -> list[str]:
        """A token a vector, named as diffusers names them."""
        n = len(next(iter(self.vectors.values())))
        return [self.word, *(f"{self.word}_{i}" for i in range(1, n))]


def read(file: Path, word: str | None, widths: dict[str, int]) -> Embedding:
    """An embedding for a checkpoint; word: None for the file's own; widths: of its text encoders, by name.

    Raises:
        UsageError: the word is empty or has spaces.
        CheckpointError: the file is damaged or no embedding, or is for other text encoders.
    """
    tensors, _ = read_tensors(file)
    tensors = {_ENCODERS.get(name, name): tensor for name, tensor in tensors.items()}
    if "clip_g" in tensors:
        tensors = {name: tensors[name] for name in ("clip_l", "clip_g") if name in tensors}
        found, own = list(tensors.values()), composed(file.stem)
    elif "emb_params" in tensors:
        found, own = [tensors["emb_params"]], composed(file.stem)
    elif len(tensors) == 1:
        (own, tensor), found = next(iter(tensors.items())), list(tensors.values())
        own = composed(file.stem) if own == "clip_l" else own
    else:
        raise CheckpointError(
            f"{file} is no textual inversion: expected one tensor, `emb_params`, or `clip_l` and `clip_g`, got "
            + (some(sorted(tensors)) or "none")
        )
    found = [tensor[None] if tensor.ndim == 1 else tensor for tensor in found]
    for tensor in found:
        if tensor.ndim != 2 or len(tensor) != len(found[0]) or not tensor.size or tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{file}: a textual inversion's vectors should have shape (n, width), as many for each encoder, got "
                f"{' and '.join(f'{t.dtype} {t.shape}'.removeprefix('mlx.core.') for t in found)}"
            )
    theirs = tuple(tensor.shape[1] for tensor in found)
    if theirs != tuple(widths.values()):
        family = next((family.name for family in FAMILIES if family.widths == theirs), None)
        raise CheckpointError(
            f"{file} has vectors of width {_widths(theirs)}, and this model's text encoders are "
            f"{_widths(widths.values())} wide" + (f"; it was made for {family}" if family else "")
        )
    word = own if word is None else word
    if not word or re.search(r"\s", word):
        raise UsageError(f"{file}: the word of a textual inversion should have no spaces, got {word!r}; try FILE:WORD")
    return Embedding(word, dict(zip(widths, found, strict=True)))


def _widths(values) -> str:
    return " and ".join(str(value) for value in values)


class ExtendedTokenizer:
    """A CLIPTokenizer that knows more words; where one has several vectors, it stands for as many tokens."""

    def __init__(self, tokenizer: CLIPTokenizer, embeddings: Sequence[Embedding]):
        """Raises UsageError if a word is in the vocabulary already."""
        self._tokenizer = tokenizer
        self._longer = []
        for embedding in embeddings:
            if taken := [token for token in embedding.tokens if tokenizer.id(token) is not None]:
                raise UsageError(f"{taken[0]!r} is a word already; give the embedding another one, FILE:WORD")
            tokenizer.add(embedding.tokens)
            if len(embedding.tokens) > 1:
                pattern = re.compile(rf"(?<!\w){re.escape(embedding.word)}(?!\w)", re.IGNORECASE)
                self._longer.append((pattern, " ".join(embedding.tokens)))

    def encode(self, text: str) -> list[int]:
        for pattern, words in self._longer:
            text = pattern.sub(lambda match, words=words: words, text)
        return self._tokenizer.encode(text)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def extend(encoder: CLIPTextModel, name: str, tokenizer: ExtendedTokenizer, embeddings: Sequence[Embedding]) -> None:
    """Put the vectors into a text encoder's table, where the tokenizer's ids for them are."""
    table = encoder.embeddings.token_embedding.weight
    for embedding in embeddings:
        first = tokenizer.id(embedding.word)
        vectors = embedding.vectors[name].astype(table.dtype)
        gap = mx.zeros((max(0, first - len(table)), table.shape[1]), table.dtype)
        table = mx.concatenate([table[:first], gap, vectors, table[first + len(vectors) :]])
    encoder.embeddings.token_embedding.weight = table
