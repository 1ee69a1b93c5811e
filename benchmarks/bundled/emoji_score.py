"""Does the bundled model draw what it is asked for, and does caching change that?

    python benchmarks/bundled/emoji_score.py                        # uncached; intervals 2, 3, 5, 10 at branches 0, 1
    python benchmarks/bundled/emoji_score.py --settings 1:0 3:0 --every 4   # a quarter of the prompts, two settings

Every concept is asked for three times: by its plain name, and in two sentences whose wording the training captions do
not contain (their words may turn up there as random chatter around a name). The second sentence uses another of the
concept's names where it has one. A picture counts as right when the nearest of the data set's 1,144 pictures, most of
which the model was never shown, is the one asked for (top-1) or that one is among the five nearest (top-5).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.bundled.emoji_data import REFERENCE, SHEET, Concept, concepts, tiled
from mlx_deepcache import StableDiffusion

SENTENCES = ("an illustration of {}", "i would love to look at {} today")
STEPS, GUIDANCE = 50, 5.0
REACH = 2  # px a drawing may be off its place


def prompts_of(concept: Concept) -> tuple[str, str, str]:
    """The plain name and the two paraphrases of one concept."""
    plain, *others = concept.names
    other = others[0] if others else plain
    return plain, SENTENCES[0].format(concept.phrase(plain)), SENTENCES[1].format(concept.phrase(other))


def halved(pictures: np.ndarray) -> np.ndarray:
    """(N, 2h, 2w, 3) in 0..255 -> (N, h, w, 3) float32 in 0..1, each value the mean of 2 x 2 pixels."""
    n, h, w, c = pictures.shape
    return pictures.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4), dtype=np.float32) / 255


def blurred(pictures: np.ndarray) -> np.ndarray:
    """A binomial blur (1, 2, 1) in both directions, the border repeated: (N, h, w, 3) -> the same."""
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (1, 1)
        p = np.pad(pictures, pad, mode="edge")
        n = pictures.shape[axis]
        a, b, c = (np.take(p, np.arange(i, i + n), axis) for i in range(3))
        pictures = (a + 2 * b + c) / 4
    return pictures


def distances(drawn: np.ndarray, reference: np.ndarray, reach: int = REACH) -> np.ndarray:
    """Mean squared difference after the blur, at the best of all shifts up to `reach` px.

    drawn: (N, 64, 64, 3) uint8; reference: (M, 32, 32, 3) uint8, at half the size -> (N, M), values in 0..1.
    """
    known = blurred(reference.astype(np.float32) / 255).reshape(len(reference), -1)
    size = np.square(known).sum(1)
    padded = np.pad(drawn, ((0, 0), (reach, reach), (reach, reach), (0, 0)), constant_values=255)
    side = drawn.shape[1]
    best = np.full((len(drawn), len(reference)), np.inf, np.float32)
    for i in range(2 * reach + 1):
        for j in range(2 * reach + 1):
            x = blurred(halved(padded[:, i : i + side, j : j + side])).reshape(len(drawn), -1)
            best = np.minimum(best, (np.square(x).sum(1)[:, None] - 2 * x @ known.T + size) / x.shape[1])
    return best


def ranks(distance: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How many references are nearer than the wanted one: (N, M), (N,) -> (N,); 0 is a hit."""
    return (distance < distance[np.arange(len(wanted)), wanted][:, None]).sum(1)


def load_reference(file: Path = SHEET) -> np.ndarray:
    """The 1,144 pictures of the sheet in the order of emoji_reference.txt: (1144, 32, 32, 3) uint8."""
    sheet = np.asarray(Image.open(file).convert("RGB"))
    rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
    tiles = sheet.reshape(rows, 32, columns, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    return tiles[: len(REFERENCE.read_text(encoding="utf-8").strip())]


class Drawer:
    """Draws with the package, many prompts at once."""

    def __init__(self, model: str | None, batch: int = 16):
        self.pipe, self.batch = StableDiffusion.from_pretrained(model), batch

    def draw(self, prompts: list[str], seeds: list[int], interval: int, branch: int) -> np.ndarray:
        """One picture a prompt, cached every `interval` steps at `branch` (1: not at all): (N, 64, 64, 3) uint8."""
        images = []
        for at in range(0, len(prompts), self.batch):
            part = slice(at, at + self.batch)
            images += self.pipe(
                prompts[part],
                seeds=seeds[part],
                steps=STEPS,
                guidance_scale=GUIDANCE,
                cache_interval=interval,
                cache_branch=branch,
            ).images
        return np.stack([np.asarray(image) for image in images])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the bundled one")
    parser.add_argument("--settings", nargs="+", default=["1:0"] + [f"{i}:{b}" for b in (0, 1) for i in (2, 3, 5, 10)])
    parser.add_argument("--every", type=int, default=1, help="take every so manyth concept only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=Path, help="save the drawings of the first setting here, as a PNG sheet")
    parser.add_argument("--json", type=Path, help="save the numbers here")
    args = parser.parse_args()

    table = concepts()[:: args.every]
    prompts = [p for kind in zip(*map(prompts_of, table), strict=True) for p in kind]  # all plain names first
    order = REFERENCE.read_text(encoding="utf-8").strip()
    wanted = np.array([order.index(c.character) for c in table] * 3)
    plain = np.arange(len(prompts)) < len(table)
    reference, drawer, results, uncached = load_reference(), Drawer(args.model), [], None
    print(f"{len(table)} concepts, {STEPS} steps, guidance {GUIDANCE:g}, seed {args.seed}")
    print("interval branch | plain top-1 top-5 | paraphrase top-1 top-5 | PSNR to uncached | seconds")
    for setting in args.settings:
        interval, branch = map(int, setting.split(":"))
        start = time.perf_counter()
        drawn = drawer.draw(prompts, [args.seed] * len(prompts), interval, branch)
        seconds = time.perf_counter() - start
        distance = distances(drawn, reference)
        rank = ranks(distance, wanted)
        row = {"interval": interval, "branch": branch, "seconds": round(seconds, 1)}
        for name, some in (("plain", plain), ("paraphrase", ~plain)):
            row[f"{name}_top1"], row[f"{name}_top5"] = (float((rank[some] < n).mean()) for n in (1, 5))
        if interval == 1:
            uncached = drawn
        elif uncached is not None:
            error = np.square(uncached / 255.0 - drawn / 255.0).mean((1, 2, 3))
            row["psnr"] = float((-10 * np.log10(np.maximum(error, 1e-10))).mean())
        row["missed"] = {prompts[i]: order[distance[i].argmin()] for i in np.flatnonzero(rank)}
        scores = [f"{100 * row[k]:5.1f}" for k in ("plain_top1", "plain_top5", "paraphrase_top1", "paraphrase_top5")]
        psnr = f"{row['psnr']:.1f} dB" if "psnr" in row else "-"
        print(f"{interval:8} {branch:6} | {' '.join(scores[:2])} | {' '.join(scores[2:])} | {psnr} | {seconds:.1f}")
        if not results:
            print("  drawn as something else:", ", ".join(f"{p!r}: {c}" for p, c in row["missed"].items()) or "nothing")
            if args.pictures:
                tiled(drawn, 17).save(args.pictures)
        results.append(row)
    if args.json:
        args.json.write_text(
            json.dumps({"steps": STEPS, "guidance": GUIDANCE, "seed": args.seed, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
