"""Prompt weights: the parser against the examples in AUTOMATIC1111's own documentation of it."""

import pytest

from mlx_deepcache.generation.prompts import parse

PUBLISHED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.573),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641),
        (".", 1.1),
    ],
}


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_examples(text):
    pieces, expected = parse(text), PUBLISHED[text]
    assert [piece for piece, _ in pieces] == [piece for piece, _ in expected]
    assert [weight for _, weight in pieces] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", [("", 1.0)]),
        ("a: b, 16:9", [("a: b, 16:9", 1.0)]),
        ("16:9) wide", [("16:9) wide", 1.0)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("(sky: .5)", [("sky", 0.5)]),
        (r"C:\dir (x:2)", [("C:\\dir ", 1.0), ("x", 2.0)]),
    ],
)
def test_other_uses_of_the_characters(text, expected):
    pieces = parse(text)
    assert [p for p, _ in pieces] == [p for p, _ in expected]
    assert [w for _, w in pieces] == pytest.approx([w for _, w in expected])
