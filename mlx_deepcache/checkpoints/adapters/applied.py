"""What is put on top of a checkpoint as it is loaded: LoRAs and textual inversions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.nn as nn

from ...errors import UsageError
from ..checkpoint import Checkpoint
from ..hub import find_file
from . import lora, textual_inversion


class Addons:
    """A checkpoint's LoRAs and embeddings, read and found to fit it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        loras: Sequence[str | Path | tuple[str | Path, float]] = (),
        embeddings: Sequence[str | Path | tuple[str | Path, str | None]] = (),
    ):
        """loras: files, each with its scale (1); embeddings: files, each with its word (the file's own); both see
        `hub.find_file`.

        Raises:
            CheckpointError: a file is damaged, or not of its kind, or does not fit the checkpoint.
            UsageError: a scale or a word that cannot be, or a word given twice.
        """
        self.checkpoint = checkpoint
        self.loras, self.embeddings = [], []
        encoders = checkpoint.family.encoders
        if loras:
            modules = {name: checkpoint.module(name) for name in (*encoders, "unet")}
            places = lora.places(modules, checkpoint.unet_config)
            self.loras = [lora.read(find_file(str(file)), scale, places) for file, scale in map(_pair(1.0), loras)]
        if embeddings:
            widths = {name: checkpoint.module(name).config.hidden_size for name in encoders}
            read = textual_inversion.read
            self.embeddings = [read(find_file(str(file)), word, widths) for file, word in map(_pair(None), embeddings)]
        words = [token.lower() for embedding in self.embeddings for token in embedding.tokens]
        if (twice := next((word for word in words if words.count(word) > 1), None)) is not None:
            raise UsageError(f"two embeddings are called by {twice!r}; give one another word, FILE:WORD")

    def tokenizer(self, name: str):
        """The checkpoint's tokenizer, which knows the embeddings' words."""
        tokenizer = self.checkpoint.source.tokenizer(name)
        return textual_inversion.ExtendedTokenizer(tokenizer, self.embeddings) if self.embeddings else tokenizer

    def apply(self, module: nn.Module, name: str) -> None:
        """Change a component that was just loaded."""
        lora.fuse(module, name, self.loras)
        if self.embeddings and name in (tokenizers := self.checkpoint.family.encoders):
            textual_inversion.extend(module, name, self.tokenizer(tokenizers[name]), self.embeddings)


def _pair(default):
    """A file alone gets this default as its second half."""
    return lambda item: item if isinstance(item, tuple) else (item, default)
