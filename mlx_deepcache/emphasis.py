"""Weights in prompts, in the syntax of AUTOMATIC1111's web UI.

(word) counts 1.1 times as much, [word] 1/1.1 times, (word:1.3) 1.3 times; they nest by multiplication. A backslash
before a bracket makes it an ordinary character.
"""

from __future__ import annotations

import re

ROUND, SQUARE = 1.1, 1 / 1.1
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
