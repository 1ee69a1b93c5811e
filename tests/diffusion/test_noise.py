"""Random numbers against PyTorch's, and Philox against its authors' published vectors."""

import numpy as np
import pytest
import torch

from mlx_deepcache.diffusion.noise import GENERATORS, BatchNoise, TorchCPU, TorchCUDA, philox
from mlx_deepcache.errors import UsageError

SHAPES = [(1, 4, 64, 64), (1, 4, 8, 8), (1, 4, 9, 13), (1, 4, 5, 5), (1, 4, 2, 2), (1, 4, 128, 96)]


@pytest.mark.parametrize("seed", [*range(16), 42, 2**31, 2**32 + 7, 2**63 - 1, 2**64 - 1, -1, -(2**40)])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_cpu(seed, shape):
    """Three draws from the same generator, as an ancestral sampler makes them."""
    reference, ours = torch.Generator().manual_seed(seed), TorchCPU(seed)
    for _ in range(3):
        assert np.abs(ours.normal(shape) - torch.randn(shape, generator=reference).numpy()).max() < 2e-6


def test_torch_cuda():
    """torch.randn((3, 4)) of seed 0 on an NVIDIA card, as AUTOMATIC1111's web UI quotes it beside its own Philox."""
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    assert np.abs(TorchCUDA(0).normal((3, 4)) - expected).max() < 2e-6


def test_a_handful_of_values_is_refused():
    with pytest.raises(UsageError, match="16 values or more, got 4"):
        TorchCPU(0).normal((1, 4, 1, 1))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known-answer file, philox4x32 with 10 rounds
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox(counter, key, expected):
    words = philox([np.array([c], np.uint64) for c in counter], key)
    assert [int(word[0]) for word in words] == expected


@pytest.mark.parametrize("name", GENERATORS)
def test_normal_and_independent(name):
    """Mean, deviation and correlations of 2^16 values, within five standard errors."""
    generator = GENERATORS[name](3)
    a, b = generator.normal((4, 128, 128)).ravel(), generator.normal((4, 128, 128)).ravel()
    for values in (a, b):
        assert values.dtype == np.float32
        assert abs(values.mean()) < 5 / 256 and abs(values.std() - 1) < 5 / 256
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / 256
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 5 / 256
    assert np.array_equal(GENERATORS[name](3).normal((4, 128, 128)).ravel(), a)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_picture_does_not_depend_on_its_batch(name):
    together, alone = BatchNoise(name, [5, 6]), BatchNoise(name, [6])
    for _ in range(2):
        assert np.array_equal(together.normal((4, 8, 8))[1:], alone.normal((4, 8, 8)))


@pytest.mark.parametrize("name", ["torch-cuda", "mlx"])
def test_all_64_bits_of_a_seed_count(name):
    """Of PyTorch's CPU generator, the lower 32."""
    low, high = (GENERATORS[name](seed).normal((4, 8, 8)) for seed in (7, 2**32 + 7))
    assert not np.array_equal(low, high)


def test_cuda_draws_follow_each_other():
    """Element i of draw k is subsequence i at offset 4k: a shorter draw is the beginning of a longer one."""
    assert np.array_equal(TorchCUDA(1).normal((32,)), TorchCUDA(1).normal((64,))[:32])
    generator = TorchCUDA(1)
    assert not np.array_equal(generator.normal((32,)), generator.normal((32,)))
