"""CLIP's tokenizer: a checkpoint's own, or one from the vocabulary that comes with the package."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import CheckpointError


def load_tokenizer(folder: Path):
    """transformers' CLIPTokenizer from a checkpoint's tokenizer folder.

    Raises:
        CheckpointError: the folder holds no tokenizer.
    """
    kind = _tokenizer_class()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing; expected a tokenizer there")
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
        tokenizer.model_max_length = min(tokenizer.model_max_length, POSITIONS)  # a config may leave it out
        return tokenizer
    except Exception as error:  # the library raises whatever the broken file led to
        raise CheckpointError(f"{folder} holds no usable CLIP tokenizer: {str(error).splitlines()[0]}") from None


MERGES = Path(__file__).parent / "bundled" / "clip" / "merges.txt"
START, END = "<|startoftext|>", "<|endoftext|>"
POSITIONS, SIZE = 77, 49408


def merges() -> list[tuple[str, str]]:
    """CLIP's 48,894 byte pairs (Radford et al. 2021), most frequent first."""
    lines = MERGES.read_text(encoding="utf-8").splitlines()[1:]
    return [tuple(line.split()) for line in lines]


def vocabulary() -> dict[str, int]:
    """Token -> id, SIZE of them: a character for each byte, printable ones first; the same at a word's end; what the
    merges make; start and end of the text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    words = ["".join(pair) for pair in merges()]
    return {token: i for i, token in enumerate([*alphabet, *(c + "</w>" for c in alphabet), *words, START, END])}


def tokenizer(pad: str):
    """transformers' CLIPTokenizer with this padding token: `END` in SD 1.x and in SDXL's first, else "!"."""
    return _tokenizer_class()(vocab=vocabulary(), merges=merges(), pad_token=pad, model_max_length=POSITIONS)


def _tokenizer_class():
    from transformers import CLIPTokenizer  # slow to import, and needed only once there is text
    from transformers.utils import logging

    logging.set_verbosity_error()
    return CLIPTokenizer


def write(folder: Path, pad: str) -> None:
    """The same as a tokenizer folder of a checkpoint; the folder must exist."""
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    options = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": POSITIONS}
    files = {
        "vocab.json": vocabulary(),
        "special_tokens_map.json": special,
        "tokenizer_config.json": {**options, **special, "tokenizer_class": "CLIPTokenizer"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_bytes(MERGES.read_bytes())
