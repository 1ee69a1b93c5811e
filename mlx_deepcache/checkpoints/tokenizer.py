"""CLIP's tokenizer: a checkpoint's own, or one from the vocabulary that comes with the package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MERGES = Path(__file__).parent / "bundled" / "clip" / "merges.txt"
START, END = "<|startoftext|>", "<|endoftext|>"
POSITIONS, SIZE = 77, 49408

_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
_SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}


class CLIPTokenizer:
    """Byte pairs of words in small letters (Radford et al. 2021, section 2.4), the same as transformers' of this name.

    start, end, pad: ids of the tokens that begin, end and fill up a text; length: how many a text has with them.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        special: dict[str, Any] | None = None,
        added: Iterable = (),
        length: int = POSITIONS,
    ):
        """special: a token, or tokenizers' AddedToken, for each of `_SPECIAL` that differs; added: AddedTokens, which
        are found in a text before it is split into words, as are the special ones."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        special = _SPECIAL | (special or {})
        unknown = str(special["unk_token"])
        model = models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=unknown)
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        words = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False)])
        self._tokenizer.decoder = decoders.ByteLevel()
        found = list(added)
        names = {str(token) for token in found}
        for token in special.values():  # of several with one name, the last counts
            if str(token) not in names:
                found.append(AddedToken(token, special=True) if isinstance(token, str) else token)
                found[-1].special = True
        self._tokenizer.add_tokens(found)
        self.start, self.end, self.pad = (self.id(str(special[f"{name}_token"])) for name in ("bos", "eos", "pad"))
        self.length = length

    def encode(self, text: str) -> list[int]:
        """A text's ids, without those that begin and end it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False).replace("</w>", " ").strip()

    def id(self, token: str) -> int | None:
        """A token's id, if it is one."""
        return self._tokenizer.token_to_id(token)

    def add(self, tokens: Sequence[str]) -> None:
        """Know these whole words too, however they are capitalised; they get the next ids."""
        from tokenizers import AddedToken

        self._tokenizer.add_tokens([AddedToken(token, single_word=True) for token in tokens])


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """A checkpoint's tokenizer: `tokenizer.json`, or `vocab.json` and `merges.txt`, with the small files beside them.

    Raises:
        CheckpointError: the folder holds no tokenizer.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing; expected a tokenizer there")
    try:
        return _read(folder)
    except Exception as error:  # a broken file leads to whatever its contents do, in Python or in the library
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise CheckpointError(f"{folder} holds no usable CLIP tokenizer: {reason.splitlines()[0][:200]}") from None


def _read(folder: Path) -> CLIPTokenizer:
    """As transformers reads it: what `tokenizer_config.json` says under `added_tokens_decoder` wins, else what
    `special_tokens_map.json`, `added_tokens.json` and `tokenizer.json` say."""
    from tokenizers import AddedToken

    def read(name: str) -> dict:
        file = folder / name
        data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if not isinstance(data, dict):
            raise ValueError(f"{name} should hold a JSON object, got {type(data).__name__}")
        return data

    def made(token: Any) -> Any:
        if not isinstance(token.get("content") if isinstance(token, dict) else token, str):
            raise ValueError(f"a token should be text, or an object with its content, got {token!r}")
        if isinstance(token, str):
            return token
        return AddedToken(token["content"], **{how: token[how] for how in _FLAGS if how in token})

    config, whole = read("tokenizer_config.json"), read("tokenizer.json")
    special = {name: made(config[name]) for name in _SPECIAL if config.get(name) is not None}
    if (decoder := config.get("added_tokens_decoder")) is not None:
        added = {int(number): made(token) for number, token in decoder.items()}
    else:
        said = read("special_tokens_map.json")
        special |= {name: made(said[name]) for name in _SPECIAL if said.get(name) is not None}
        names = {str(token) for token in special.values()}
        added = {
            number: AddedToken(token, normalized=token not in names, special=token in names)
            for token, number in read("added_tokens.json").items()
        }
        for token in whole.get("added_tokens", ()):
            added[token["id"]] = made(token)
    if whole:
        vocabulary, lines = whole["model"]["vocab"], whole["model"]["merges"]
    elif not (folder / "vocab.json").exists() or not (folder / "merges.txt").exists():
        raise ValueError("expected vocab.json and merges.txt, or tokenizer.json")
    else:
        vocabulary, lines = read("vocab.json"), _lines(folder / "merges.txt")
    if not isinstance(vocabulary, dict) or not all(type(i) is int and i >= 0 for i in vocabulary.values()):
        raise ValueError("a vocabulary should give each token a whole number")
    pairs = [tuple(line.split(" ") if isinstance(line, str) else line) for line in lines]
    if (odd := next((pair for pair in pairs if len(pair) != 2), None)) is not None:
        raise ValueError(f"a merge should be of two tokens, got {' '.join(odd)!r}")
    length = config.get("model_max_length")
    length = POSITIONS if length is None else min(length, POSITIONS)  # a placeholder for "any" is a huge number
    if length < 3:
        raise ValueError(f"model_max_length should be 3 or more, got {length}")
    ordered = [added[number] for number in sorted(added)]
    return CLIPTokenizer(vocabulary, pairs, special=special, added=ordered, length=length)


def _lines(merges: Path) -> list[str]:
    """A line a merge, after one that names the version."""
    lines = merges.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#version")]


def merges() -> list[tuple[str, str]]:
    """CLIP's 48,894 byte pairs (Radford et al. 2021), most frequent first."""
    return [tuple(line.split()) for line in _lines(MERGES)]


def vocabulary() -> dict[str, int]:
    """Token -> id, SIZE of them: a character for each byte, printable ones first; the same at a word's end; what the
    merges make; start and end of the text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    words = ["".join(pair) for pair in merges()]
    return {token: i for i, token in enumerate([*alphabet, *(c + "</w>" for c in alphabet), *words, START, END])}


def tokenizer(pad: str) -> CLIPTokenizer:
    """CLIP's own with this padding token: `END` in SD 1.x and in SDXL's first, else "!"."""
    return CLIPTokenizer(vocabulary(), merges(), special={"pad_token": pad})


def write(folder: Path, pad: str) -> None:
    """The same as a tokenizer folder of a checkpoint; the folder must exist."""
    special = _SPECIAL | {"pad_token": pad}
    options = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": POSITIONS}
    files = {
        "vocab.json": vocabulary(),
        "special_tokens_map.json": special,
        "tokenizer_config.json": {**options, **special, "tokenizer_class": "CLIPTokenizer"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_bytes(MERGES.read_bytes())
