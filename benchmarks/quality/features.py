"""What pictures are compared by: InceptionV3's features, or those of a small classifier trained on the spot.

The Frechet Inception distance (FID, Heusel et al. 2017) and the Inception score (Salimans et al. 2016) are of one net
with one set of weights, "inception-2015-12-05"; torch-fidelity has both, bit for bit as the authors' TensorFlow code,
and reads the weights from a file. Statistics made by pytorch-fid, which the paper's experiments use, are of the same
weights and fit. Where the weights are not at hand, a small classifier takes their place. Its distances compare runs
with each other, on the data that it was trained on, and are no FID.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from benchmarks.bundled.emoji_data import REFERENCE, SHEET, concepts
from mlx_deepcache.errors import Failure
from mlx_deepcache.media.files import whole

BATCH = 50  # pictures through a net at once
SIDE = 32  # that the small classifier sees, in pixels


@dataclass(frozen=True)
class Statistics:
    """A Gaussian's mean (D,) and covariance (D, D), float64, of the features of so many pictures.

    features: by what they were made, as `Inception.name` and `Classifier.name` say it; count: 0 where it is not known.
    """

    mean: np.ndarray
    covariance: np.ndarray
    features: str
    count: int = 0

    @classmethod
    def of(cls, rows: np.ndarray, features: str) -> Statistics:
        """rows: (N, D). Raises Failure if there are too few of them for a covariance."""
        if len(rows) < 2:
            raise Failure(f"a distance needs 2 pictures or more, got {len(rows)}")
        rows = rows.astype(np.float64)
        return cls(rows.mean(0), np.atleast_2d(np.cov(rows, rowvar=False)), features, len(rows))

    @classmethod
    def read(cls, file: Path) -> Statistics:
        """From an .npz in the usual layout: `mu` and `sigma`. Files of others do not say what features they are of;
        these are InceptionV3's.

        Raises:
            Failure: it is no such file.
        """
        try:
            with np.load(file, allow_pickle=False) as found:
                mean, covariance = (np.asarray(found[name], np.float64) for name in ("mu", "sigma"))
                features = str(found["features"]) if "features" in found else Inception.name
                count = int(found["count"]) if "count" in found else 0
        except (OSError, ValueError, KeyError) as error:
            raise Failure(f"{file} has no statistics: expected an .npz with mu and sigma ({error})") from None
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise Failure(f"{file}: mu should have shape (D,) and sigma (D, D), got {mean.shape}, {covariance.shape}")
        return cls(mean, covariance, features, count)

    def write(self, file: Path) -> None:
        with whole(file) as part, part.open("wb") as out:
            said = {"features": self.features, "count": self.count}
            np.savez(out, mu=self.mean, sigma=self.covariance, **said)


def distance(one: Statistics, other: Statistics) -> float:
    """Frechet distance of two Gaussians (Dowson and Landau 1982): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Raises:
        Failure: they are of different features.
    """
    if one.features != other.features:
        raise Failure(f"statistics of different features cannot be compared: {one.features}, and {other.features}")
    # C1^(1/2) C2 C1^(1/2) has the eigenvalues of C1 C2 and is symmetric, so that none comes out complex
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ other.covariance @ root).clip(0)
    apart = one.mean - other.mean
    return float(apart @ apart + np.trace(one.covariance) + np.trace(other.covariance) - 2 * np.sqrt(mixed).sum())


class Inception:
    """InceptionV3 as torch-fidelity has it, with the user's own weights; its distance is the FID."""

    name: ClassVar[str] = "InceptionV3, 2048 features"
    distance_name: ClassVar[str] = "FID"
    says: ClassVar[str] = "FID"

    def __init__(self, weights: Path):
        """weights: weights-inception-2015-12-05-6726825d.pth of torch-fidelity, or pt_inception-2015-12-05-6726825d.pth
        of pytorch-fid, which is the same.

        Raises:
            Failure: torch-fidelity is not installed, or the file does not have its weights.
        """
        import torch

        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # the latter of a torchvision made for another PyTorch
            raise Failure(f"FID needs torch-fidelity: pip install torch-fidelity ({error})") from None
        try:
            torch.load(weights, weights_only=True)  # so that the package, which would run it, reads tensors only
            self._net = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise Failure(f"{weights} does not have InceptionV3's weights: {reason}") from None

    def __call__(self, pictures: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, 2048) and logits (N, 1008) of pictures (H, W, 3) uint8 of one size."""
        import torch

        rows, logits = [], []
        with torch.no_grad():
            for batch in _batches(pictures):
                features, scores = self._net(torch.from_numpy(batch).permute(0, 3, 1, 2))
                rows.append(features.numpy())
                logits.append(scores.numpy())
        return np.concatenate(rows), np.concatenate(logits)

    def compare(self, one: Statistics, other: Statistics) -> float:
        """The package's own distance."""
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

        if one.features != other.features:
            distance(one, other)  # says what does not fit
        first, second = ({"mu": s.mean, "sigma": s.covariance} for s in (one, other))
        return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]

    def score(self, logits: np.ndarray) -> tuple[float, float]:
        """Inception score, its mean and deviation over ten parts."""
        import torch
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

        found = isc_features_to_metric(torch.from_numpy(logits))
        return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]

    @property
    def made_by(self) -> str:
        return f"torch-fidelity {_version('torch-fidelity')}"


class Classifier:
    """A small convolutional net that tells the pictures of a data set apart, each one a class, however moved, mirrored,
    blurred or tinted; the features are the 64 numbers before its last layer.

    Trained in a minute or two on a CPU from a fixed seed, in one thread, so that the same PyTorch on the same kind of
    machine gives the same net; it is kept in a file all the same.
    """

    distance_name: ClassVar[str] = "distance by a small classifier"
    says: ClassVar[str] = "distance by a small classifier trained here, to be compared with its own kind only"
    FEATURES: ClassVar[int] = 64
    WIDTHS: ClassVar[tuple[int, ...]] = (24, 48, 96)
    STEPS: ClassVar[int] = 800
    MOST: ClassVar[int] = 2000  # pictures that it is trained on

    def __init__(self, pictures: Sequence[np.ndarray], kept: Path | None = None):
        """pictures: (H, W, 3) uint8 each, to be trained on; kept: a folder where the net is kept, and found again."""
        import torch

        chosen = np.random.default_rng(0).permutation(len(pictures))[: self.MOST]
        self._pictures = np.stack([_small(pictures[i]) for i in sorted(chosen)])
        self._torch = torch
        about = [self._pictures.shape, self.FEATURES, self.WIDTHS, self.STEPS, 1]  # 1: how it is trained
        mark = hashlib.sha256(self._pictures.tobytes() + json.dumps(about).encode()).hexdigest()[:12]
        self.name = f"{self.FEATURES} features of a small classifier of {len(self._pictures)} pictures ({mark})"
        self._net = self._built(len(self._pictures))
        file = None if kept is None else kept / f"classifier-{mark}.safetensors"
        if file is not None and file.exists():
            from safetensors.torch import load_file

            self._net.load_state_dict(load_file(file))
        else:
            self._train(self.STEPS)
            if file is not None:
                from safetensors.torch import save_file

                kept.mkdir(parents=True, exist_ok=True)
                with whole(file, ".safetensors") as part:
                    save_file(self._net.state_dict(), part)
        self._net.eval()

    def _built(self, classes: int):
        nn = self._torch.nn
        layers, before = [], 3
        with self._torch.random.fork_rng(devices=[]):
            self._torch.manual_seed(0)
            for i, width in enumerate(self.WIDTHS):
                for stride in (2 if i else 1, 1):
                    layers += [nn.Conv2d(before, width, 3, stride, 1), nn.GroupNorm(8, width), nn.SiLU()]
                    before = width
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, self.FEATURES)]
            return nn.Sequential(nn.Sequential(*layers), nn.Sequential(nn.SiLU(), nn.Linear(self.FEATURES, classes)))

    def _train(self, steps: int, batch: int = 64) -> None:
        torch, threads = self._torch, self._torch.get_num_threads()
        every = _tensor(torch, self._pictures)
        optimizer = torch.optim.AdamW(self._net.parameters(), lr=1e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=max(2, steps))
        torch.set_num_threads(1)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                for _ in range(steps):
                    chosen = torch.randint(len(every), (batch,))
                    loss = torch.nn.functional.cross_entropy(self._net(_disturbed(torch, every[chosen])), chosen)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        finally:
            torch.set_num_threads(threads)

    def accuracy(self) -> float:
        """The share of its pictures, disturbed anew, that it names."""
        torch = self._torch
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            every = _tensor(torch, self._pictures)
            named = torch.cat([self._net(_disturbed(torch, part)).argmax(1) for part in every.split(BATCH)])
        return float((named == torch.arange(len(named))).float().mean())

    def __call__(self, pictures: Iterable[np.ndarray]) -> tuple[np.ndarray, None]:
        """Features (N, 64) of pictures (H, W, 3) uint8; and no logits, as its classes are no known ones."""
        torch, rows = self._torch, []
        with torch.no_grad():
            for batch in _batches(_small(picture) for picture in pictures):
                rows.append(self._net[0](_tensor(torch, batch)).numpy())
        return np.concatenate(rows), None

    def compare(self, one: Statistics, other: Statistics) -> float:
        return distance(one, other)

    @property
    def made_by(self) -> str:
        return f"{self.name}, PyTorch {_version('torch')}"


def emoji_drawings(all_of_them: bool = False) -> np.ndarray:
    """The drawings of the bundled models in 32 x 32 pixels, (129, 32, 32, 3) uint8; or all 1,144 that the repository
    has."""
    sheet = np.asarray(Image.open(SHEET).convert("RGB"))
    columns = sheet.shape[1] // SIDE
    cells = sheet.reshape(-1, SIDE, columns, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
    characters = list(REFERENCE.read_text(encoding="utf-8").strip())
    if all_of_them:
        return cells[: len(characters)]
    return cells[[characters.index(concept.character) for concept in concepts()]]


def _batches(pictures: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    """(N, H, W, 3) each; raises Failure if the pictures have different sizes, or there are none."""
    batch, any_ = [], False
    for picture in pictures:
        if batch and picture.shape != batch[0].shape:
            raise Failure(f"pictures should have one size, got {batch[0].shape[:2]} and {picture.shape[:2]}")
        batch.append(picture)
        any_ = True
        if len(batch) == BATCH:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)
    if not any_:
        raise Failure("there are no pictures")


def _small(picture: np.ndarray) -> np.ndarray:
    if picture.shape[:2] == (SIDE, SIDE):
        return picture
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX))


def _tensor(torch, pictures: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _disturbed(torch, x):
    """(N, 3, 32, 32), each moved by up to 2 pixels, perhaps mirrored, tinted, and given noise or blur."""
    n = len(x)
    x = torch.where(torch.rand(n, 1, 1, 1) < 0.5, x.flip(-1), x)
    place = torch.zeros(n, 2, 3)
    place[:, 0, 0] = place[:, 1, 1] = 1 + 0.1 * (2 * torch.rand(n) - 1)
    place[:, :, 2] = 2 / 16 * (2 * torch.rand(n, 2) - 1)
    grid = torch.nn.functional.affine_grid(place, x.shape, align_corners=False)
    x = torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = torch.lerp(x, blurred, 0.5 * torch.rand(n, 1, 1, 1))
    x = x * (1 + 0.1 * (2 * torch.rand(n, 3, 1, 1) - 1)) + 0.05 * torch.randn(n, 3, 1, 1)
    return x + 0.1 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
