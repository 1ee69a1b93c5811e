"""CLIP's picture encoder, and what it is shown, against transformers and diffusers."""

import mlx.core as mx
import numpy as np
import pytest
import torch
import video_oracle
from helpers import error, smooth

from mlx_deepcache.checkpoints.folder import Part
from mlx_deepcache.nets.clip import CLIPVisionConfig
from mlx_deepcache.nets.clip_vision import CLIPVisionModelWithProjection, clip_pixels


@pytest.mark.parametrize("size", [(576, 1024), (224, 224), (900, 100), (30, 50), (3, 700), (223, 225)])
def test_what_the_encoder_is_shown_and_says(video_checkpoint, size):
    """Tall, wide, small and large; seen where diffusers hands it to the encoder."""
    picture, pipe, seen = smooth(*size), video_oracle.shared(str(video_checkpoint)), []
    hook = pipe.image_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend([*args, *kwargs.values()]), with_kwargs=True
    )
    with torch.no_grad():
        expected = pipe._encode_image(picture, "cpu", 1, False)[:, 0].numpy()
    hook.remove()
    pixels = clip_pixels(np.asarray(picture), 224)
    assert np.abs(np.array(pixels) - seen[0].permute(0, 2, 3, 1).numpy()).max() < 2e-5
    part = Part.of(video_checkpoint / "image_encoder")
    encoder = part.load(CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(part.config)), None)
    assert error(encoder(pixels), expected) < 1e-5


def test_pictures_are_encoded_one_by_one(video_checkpoint):
    part = Part.of(video_checkpoint / "image_encoder")
    encoder = part.load(CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(part.config)), None)
    two = mx.concatenate([clip_pixels(np.asarray(smooth(40, 60, seed=seed)), 224) for seed in (0, 1)])
    both = encoder(two)
    assert error(both[:1], encoder(two[:1])) < 1e-6
    assert error(both[1], both[0]) > 1e-2
