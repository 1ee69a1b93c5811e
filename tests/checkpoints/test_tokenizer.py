"""The tokenizer against transformers', whatever its folder says and whatever the text holds."""

import json
import random
import shutil

import pytest
from tiny import write_tokenizer
from transformers import CLIPTokenizer

from mlx_deepcache.checkpoints import tokenizer as ours
from mlx_deepcache.errors import CheckpointError

ALPHABETS = [
    "abcdefghij XYZ.,!?'",
    "".join(map(chr, range(128))),
    " \t\n\r\v\f\x1c\x85\xa0\u2003\u2028\u3000\u200b\ufeff",
    "éÉßİıſKÅﬁ中文字カナ한अआ0123456789½²٣४",
    "🙂👩\u200d👧🇩🇪❤\ufe0f🏽" + "".join(map(chr, range(0x300, 0x340))),
]
WORDS = "a photo of|cat|don't|IT'S|'|!|!!|</w>|a</w>|<|endoftext|>|<|startoftext|>|<|ENDOFTEXT|>|zyx|ZYX|zyxt|<toy>"
WORDS = [*WORDS.replace("|>", "\0>").replace("<|", "<\0").split("|"), "x" * 3000, "!" * 200, ""]


def texts(number=150):
    rng = random.Random(0)

    def part():
        if rng.random() < 0.4:
            return rng.choice(WORDS).replace("\0", "|")
        if rng.random() < 0.2:
            return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
        return "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randint(1, 6)))

    return ["", " ", *("".join(part() for _ in range(rng.randint(0, 8))) for _ in range(number))]


def edit(file, **entries):
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({key: value for key, value in (old | entries).items() if value is not None}))


def token(content, **about):
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False} | about


def clip(folder, pad="!"):
    folder.mkdir()
    ours.write(folder, pad)
    return folder / "special_tokens_map.json", folder / "tokenizer_config.json"


def as_openai(folder):
    special, _ = clip(folder, ours.END)
    edit(special, bos_token=token(ours.START), eos_token=token(ours.END), unk_token=token(ours.END))


def as_stability(folder):
    special, config = clip(folder)
    edit(special, bos_token=token(ours.START), eos_token=token(ours.END), unk_token=token(ours.END, normalized=False))
    edit(config, bos_token=token(ours.START, __type="AddedToken"))


def with_a_decoder(folder):
    special, config = clip(folder)
    special.unlink()
    added = {"0": token("!", normalized=False, special=True), "49407": token(ours.END, special=True)}
    edit(config, added_tokens_decoder=added, pad_token="!")


def with_added_words(folder):
    clip(folder)
    edit(folder / "added_tokens.json", **{"<toy>": 49408, "zyx": 49409})


def saved_by_transformers(folder):
    as_stability(folder)
    theirs = CLIPTokenizer.from_pretrained(folder)
    theirs.add_tokens(["zyx"])
    shutil.rmtree(folder)
    theirs.save_pretrained(folder)
    assert not (folder / "vocab.json").exists()


def without_configs(folder):
    for file in clip(folder):
        file.unlink()


def of_another_vocabulary(folder):
    folder.mkdir()
    write_tokenizer(folder, "!")


@pytest.mark.parametrize(
    "make",
    [
        as_openai,
        as_stability,
        with_a_decoder,
        with_added_words,
        saved_by_transformers,
        without_configs,
        of_another_vocabulary,
    ],
)
def test_ids_are_those_of_transformers(tmp_path, make):
    make(tmp_path / "tokenizer")
    theirs, own = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"), ours.load_tokenizer(tmp_path / "tokenizer")
    assert (own.start, own.end, own.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    for text in texts():
        ids = theirs(text)["input_ids"]
        assert [own.start, *own.encode(text), own.end] == ids, text
        assert own.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize("words", [["zyx"], ["zyx", "zyx_1"]])
def test_added_words_are_those_of_transformers(tmp_path, words):
    clip(tmp_path / "tokenizer")
    theirs, own = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"), ours.load_tokenizer(tmp_path / "tokenizer")
    from transformers import AddedToken

    theirs.add_tokens([AddedToken(word, single_word=True) for word in words])
    own.add(words)
    for text in texts():
        assert [own.start, *own.encode(text), own.end] == theirs(text)["input_ids"], text


def test_length_of_texts(tmp_path):
    _, config = clip(tmp_path / "tokenizer")
    for said, length in ((77, 77), (20, 20), (10**30, 77), (None, 77)):
        edit(config, model_max_length=said)
        assert ours.load_tokenizer(tmp_path / "tokenizer").length == length


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("vocab.json", '{"a": -1}'),
        ("vocab.json", '{"a": "b"}'),
        ("vocab.json", "[" * 100_000),
        ("vocab.json", None),
        ("merges.txt", "#version: 0.2\na b c\n"),
        ("merges.txt", "#version: 0.2\nzzzz zzzz\n"),
        ("merges.txt", b"\xff\xfe"),
        ("merges.txt", None),
        ("tokenizer.json", "{}}"),
        ("tokenizer.json", '{"model": {"vocab": []}}'),
        ("tokenizer_config.json", '{"model_max_length": "77"}'),
        ("tokenizer_config.json", '{"model_max_length": 2}'),
        ("special_tokens_map.json", '{"pad_token": 3}'),
        ("special_tokens_map.json", '{"eos_token": {"text": "x"}}'),
        ("special_tokens_map.json", "null"),
    ],
)
def test_damaged_files_take_one_line(tmp_path, file, content):
    clip(tmp_path / "tokenizer")
    damaged = tmp_path / "tokenizer" / file
    if content is None:
        damaged.unlink()
    elif isinstance(content, bytes):
        damaged.write_bytes(content)
    else:
        damaged.write_text(content)
    with pytest.raises(CheckpointError, match="no usable CLIP tokenizer: .") as caught:
        ours.load_tokenizer(tmp_path / "tokenizer")
    assert "\n" not in str(caught.value)
