"""Arrays at another size, against PyTorch."""

import numpy as np
import pytest
import torch
from helpers import error
from torch.nn import functional as F

from mlx_deepcache.media.resample import FILTERS, resample


@pytest.mark.parametrize("size", [(18, 26), (14, 20), (9, 13), (31, 13), (5, 40), (4, 6), (1, 1)])
@pytest.mark.parametrize("how", FILTERS)
def test_as_interpolate_does(how, size):
    x = np.random.default_rng(0).standard_normal((2, 4, 9, 13)).astype(np.float32)
    mode, _, antialias = how.partition("-a")
    expected = F.interpolate(torch.tensor(x), size=size, mode=mode, **({"antialias": True} if antialias else {}))
    assert error(resample(x.transpose(0, 2, 3, 1), *size, how).transpose(0, 3, 1, 2), expected) < 1e-6
