"""From a prompt to weighted tokens in chunks, and from their weights to an encoding that heeds them.

Weights are written as in AUTOMATIC1111's web UI: (word) counts 1.1 times as much, [word] 1/1.1 times, (word:1.3) 1.3
times; they nest by multiplication. A backslash before a bracket makes it an ordinary character.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..errors import UsageError, called

ROUND, SQUARE = 1.1, 1 / 1.1
HEAVIEST = 100  # weights beyond this are mistakes, and lead to numbers that are none
_TOKEN = re.compile(r"\\[\\()\[\]]|\(|\[|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|\)|\]|[^\\()\[\]:]+|[\\:]")


def parse(text: str) -> list[tuple[str, float]]:
    """The pieces of a prompt with their weights; neighbours of one weight are one piece. Brackets without a partner
    reach to the end of the text, or are left out."""
    pieces: list[list] = []
    round_open: list[int] = []  # how many pieces there were when each bracket opened
    square_open: list[int] = []

    def multiply(start: int, factor: float) -> None:
        for piece in pieces[start:]:
            piece[1] *= factor

    for match in _TOKEN.finditer(text):
        token, weight = match[0], match[1]
        if token == "(":
            round_open.append(len(pieces))
        elif token == "[":
            square_open.append(len(pieces))
        elif weight is not None and round_open:
            multiply(round_open.pop(), float(weight))
        elif token == ")" and round_open:
            multiply(round_open.pop(), ROUND)
        elif token == "]" and square_open:
            multiply(square_open.pop(), SQUARE)
        else:
            escaped = len(token) == 2 and token[0] == "\\"
            pieces.append([token[1:] if escaped else token, 1.0])
    for start in round_open:
        multiply(start, ROUND)
    for start in square_open:
        multiply(start, SQUARE)

    merged: list[tuple[str, float]] = []
    for piece, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + piece, weight)
        else:
            merged.append((piece, weight))
    return merged or [("", 1.0)]


Tokens = list[tuple[int, float]]
"""Ids and weights of a text of any length, without those that begin and end it."""


class PromptWarning(UserWarning):
    """A part of a prompt is not used."""


def tokenize(tokenizer, text: str, *, weighted: bool = False, long: bool = False) -> Tokens:
    """weighted: see `parse`; without `long`, a text is cut at what fits into one chunk, with a warning that shows what
    is lost.

    Raises:
        UsageError: a weight is too large to be meant.
    """
    room = _room(tokenizer)
    pieces = parse(text) if weighted else [(text, 1.0)]
    for piece, weight in pieces:
        if not abs(weight) <= HEAVIEST:
            raise UsageError(
                f"a weight in a prompt should be from -{HEAVIEST} to {HEAVIEST}, got {weight:g} for {piece!r}"
            )
    tokens = [(token, weight) for piece, weight in pieces for token in tokenizer.encode(piece)]
    if len(tokens) <= room or long:
        return tokens
    lost = tokenizer.decode([token for token, _ in tokens[room:]])
    warnings.warn(
        f"the prompt is longer than {room} tokens; not used: {lost!r}; {called('long_prompt')} uses all of it",
        PromptWarning,
        stacklevel=3,
    )
    return tokens[:room]


def chunks_needed(tokenizer, texts: Sequence[Tokens]) -> int:
    """How many chunks the longest of these texts takes."""
    return max(1, math.ceil(max(map(len, texts)) / _room(tokenizer)))


def chunked(tokenizer, texts: Sequence[Tokens], chunks: int) -> tuple[mx.array, mx.array]:
    """Ids and weights, (N, chunks, 77) each: each chunk begins, ends and is padded as a text of its own."""
    room = _room(tokenizer)
    first, last, pad = ((token, 1.0) for token in (tokenizer.start, tokenizer.end, tokenizer.pad))
    rows = []
    for tokens in texts:
        parts = (tokens[room * i : room * (i + 1)] for i in range(chunks))
        rows.append([[first, *part, last, *[pad] * (room - len(part))] for part in parts])
    both = np.array(rows)
    return mx.array(both[..., 0].astype(np.int32)), mx.array(both[..., 1].astype(np.float32))


def _room(tokenizer) -> int:
    """Tokens in a chunk beside those that begin and end it."""
    return tokenizer.length - 2


def emphasise(hidden: mx.array, weights: mx.array, *, restore_mean: bool) -> mx.array:
    """Weigh the encoded tokens, as A1111 does it; hidden: (N, chunks, 77, C); weights: (N, chunks, 77).

    restore_mean: scale each chunk so that its mean is again what it was. For hidden states that are not normalised
    (SDXL's), which have a mean near zero, that would not end well, and A1111's "no norm" is used.
    """
    old = hidden.astype(mx.float32)
    new = old * weights[..., None]
    if restore_mean:
        new = new * (old.mean(axis=(2, 3), keepdims=True) / new.mean(axis=(2, 3), keepdims=True))
    return new.astype(hidden.dtype)
