"""What strips exchange, counted from SDXL's shape, against the layers of diffusers' own U-Net."""

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.speed import models
from benchmarks.speed.patches import CHANNELS, HALF, WINS, Strip, gain, over, wins_from


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return UNet2DConditionModel(**models.SDXL)


def test_each_layer_that_looks_beyond_its_strip_sends_one_message(unet):
    """At so wide a picture that a level's width tells its messages from the others'."""
    modules = dict(unet.named_modules())
    convs = [m for m in modules.values() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    norms = [m for m in modules.values() if isinstance(m, torch.nn.GroupNorm)]
    attentions = [m for name, m in modules.items() if name.endswith("attn1")]
    sent = list(Strip(128).full())
    assert len(sent) == len(convs) + len(norms) + len(attentions)
    sizes = Counter(sent)
    assert sizes[Strip(128).norm()] == len(norms)
    for level, channels in list(enumerate(CHANNELS))[1:]:
        positions = (128 >> level) ** 2
        expected = sum(m.to_q.in_features == channels for m in attentions)
        assert sizes[positions // 2 * channels * HALF] == expected


def test_rows_are_those_of_the_convolutions_inputs(unet):
    """Without attention and norms, of a picture that is as wide at every level: channels alone are left."""

    class Flat(Strip):
        def halo(self, channels, level):
            return channels

        def norm(self):
            return 0

        def transformer(self, channels, level, blocks):
            return iter(())

    convs = [m for m in unet.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert Counter(filter(None, Flat(128).full())) == Counter(m.in_channels for m in convs)


def test_gains():
    costs = tuple(over(messages, 100, 1.0) for messages in ([10**8], [10**6]))
    assert costs == pytest.approx((0.1001, 0.0011))
    seconds = wins_from(0.1, 3, costs)
    assert gain(seconds, 0.1, 3, costs, False) == pytest.approx(WINS)
    assert gain(seconds, 0.1, 3, costs, True) > WINS > gain(seconds / 2, 0.1, 3, costs, False)
