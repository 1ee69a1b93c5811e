"""Pictures and captions for the text-to-emoji model: what it may draw, what that is called, how people ask for it.

The pictures are Noto Color Emoji (SIL OFL 1.1), the captions are composed here from `emoji_concepts.txt`.
"""

import argparse
import gzip
import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
CONCEPTS = HERE / "emoji_concepts.txt"
REFERENCE = HERE / "emoji_reference.txt"  # the 1,144 characters a drawing is compared with
SHEET = HERE / "emoji_reference.png"  # their pictures at 32 px, row by row
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # where Debian's fonts-noto-color-emoji puts it
STRIKE = 109  # px per em of the one bitmap size in that font
YOO = ("uni", "eu", "ufo")  # these begin with a vowel one does not hear
MERGES = 8000  # of CLIP's 48,894 byte pairs, the most frequent first

# Every part may be empty. The templates of emoji_score.py are kept out of these lists.
OPENINGS = (
    "a drawing of|a picture of|an image of|a photo of|an emoji of|emoji of|an icon of|a painting of|a cartoon of|"
    "clip art of|a sticker of|a symbol of|draw|draw me|please draw|can you draw|could you paint|make|make me|paint|"
    "show|show me|give me|i want|i want to see|i need|this is|here is|there is|it is|look at|one|my|your|just|only"
).split("|")
ENDINGS = (
    "emoji|icon|please|for me|picture|drawing|sticker|cartoon|symbol|on white|on a white background|in color|"
    "with a plain background|in the middle|in the style of an emoji|clip art|, high quality|, simple and clean|!|.|?"
).split("|")
PRAISE = "cute|small|little|big|nice|simple|beautiful|lovely|pretty|funny|tiny|great|colored|good|new|single".split("|")


@dataclass(frozen=True)
class Concept:
    """One thing the model draws: `names` (the plain one first) and `traits`, words that are true of its picture."""

    character: str
    names: tuple[str, ...]
    traits: tuple[str, ...]
    bare: frozenset[str]  # the names that take no article

    def phrase(self, name: str, *adjectives: str) -> str:
        """The name as it stands in a sentence: ("dog", "small") -> "a small dog", ("grapes",) -> "grapes"."""
        words = " ".join((*adjectives, name))
        if name in self.bare:
            return words
        return f"{'an' if words[0] in 'aeiou' and not words.startswith(YOO) else 'a'} {words}"


def concepts(table: Path = CONCEPTS) -> list[Concept]:
    """The shipped concepts, in the order of the table."""
    out = []
    for line in table.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        character, rest = line.split(" ", 1)
        names, _, traits = rest.partition("|")
        names = [n.strip() for n in names.split(",")]
        out.append(
            Concept(
                character,
                tuple(n.lstrip("*") for n in names),
                tuple(t.strip() for t in traits.split(",") if t.strip()),
                frozenset(n[1:] for n in names if n.startswith("*")),
            )
        )
    return out


class Captions:
    """Random captions for a concept.

    `words` are the whole words of the tokenizer; those that name nothing in the table serve as chatter around a name,
    so that the text encoder learns to look for the name wherever it stands and to pass over words it has no use for.
    """

    def __init__(self, table: list[Concept], words: list[str]):
        known = {w for c in table for text in (*c.names, *c.traits) for w in text.split()}
        self.chatter = [w for w in words if w.isascii() and w.isalpha() and len(w) > 2 and w not in known]

    def __call__(self, concept: Concept, rng: random.Random) -> str:
        name = concept.names[0] if rng.random() < 0.45 else rng.choice(concept.names)
        kind = rng.random()
        if kind < 0.2:
            return name
        adjectives = []
        if rng.random() < 0.2:
            adjectives.append(rng.choice(PRAISE))
        if concept.traits and rng.random() < 0.2:
            adjectives.append(rng.choice(concept.traits))
        phrase = concept.phrase(name, *adjectives) if rng.random() < 0.7 else " ".join((*adjectives, name))
        if phrase.startswith(("a ", "an ")) and rng.random() < 0.1:
            phrase = f"the {phrase.split(' ', 1)[1]}"
        if kind < 0.75:
            opening = rng.choice(OPENINGS) if rng.random() < 0.7 else ""
            ending = rng.choice(ENDINGS) if rng.random() < 0.4 else ""
        else:
            opening = " ".join(rng.choices(self.chatter, k=rng.randint(0, 5)))
            ending = " ".join(rng.choices(self.chatter, k=rng.randint(0, 3)))
        return f"{opening} {phrase} {ending}".strip().replace(" ,", ",")


def load_pictures(characters: list[str], data: Path | None = None, font: Path = FONT, side: int = 64) -> np.ndarray:
    """Pictures of these characters on white: (N, side, side, 3) uint8.

    They are drawn from the bitmaps of `font`, or taken from a folder `data` that holds an .npz with pictures `x` and a
    .json of the same length with a character `ch` for each.
    """
    if data:
        (file,) = data.glob("*.npz")
        entries = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        row = {entry["ch"]: i for i, entry in enumerate(entries)}
        return np.load(file)["x"][[row[c] for c in characters]]
    face = ImageFont.truetype(font, STRIKE)
    return np.stack([_picture(face, c, side) for c in characters])


def _picture(face: ImageFont.FreeTypeFont, character: str, side: int) -> np.ndarray:
    """One bitmap of the font in the middle of a white square with a small margin: (side, side, 3) uint8."""
    ink = Image.new("RGBA", (160, 160))  # the bitmaps are 136 x 128 px
    ImageDraw.Draw(ink).text((12, 12), character, font=face, embedded_color=True)
    ink = ink.crop(ink.getbbox())
    width = max(122, *(n + 6 for n in ink.size))
    square = Image.new("RGBA", (width, width), "white")
    square.alpha_composite(ink, ((width - ink.width) // 2, (width - ink.height) // 2))
    return np.asarray(square.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))


def clip_tokenizer_files(folder: Path) -> Path:
    """Write to `folder` the files of CLIP's tokenizer, with the first MERGES pairs of open_clip_torch's vocabulary.

    Ids: 256 bytes, the same at the end of a word, the pairs, start and end of text.
    """
    package = Path(importlib.util.find_spec("open_clip").origin).parent  # found, not imported: it would load the models
    lines = gzip.decompress((package / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    pairs = lines[1 : MERGES + 1]
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves, then the others
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    words = letters + [c + "</w>" for c in letters] + [p.replace(" ", "") for p in pairs]
    ends = ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate(words + ends)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")
    special = {"bos_token": ends[0], "eos_token": ends[1], "unk_token": ends[1], "pad_token": ends[1]}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True} | special
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return folder


def tiled(pictures: np.ndarray, columns: int) -> Image.Image:
    """Pictures (N, h, w, 3) uint8 side by side on one white sheet, row by row."""
    n, h, w, _ = pictures.shape
    rows = -(-n // columns)
    grid = np.full((rows * columns, h, w, 3), 255, np.uint8)
    grid[:n] = pictures
    return Image.fromarray(grid.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3))


def main() -> None:
    """Make the sheet of reference pictures that emoji_score.py compares with."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, help="folder with pictures as .npz and .json, instead of the font")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf with bitmaps")
    args = parser.parse_args()
    pictures = load_pictures(list(REFERENCE.read_text(encoding="utf-8").strip()), args.data, args.font)
    small = pictures.reshape(-1, 32, 2, 32, 2, 3).mean((2, 4)).round().astype(np.uint8)
    tiled(small, 44).save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
