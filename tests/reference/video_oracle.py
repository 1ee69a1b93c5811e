"""The outside reference for videos: diffusers' StableVideoDiffusionPipeline and the pip package DeepCache, float32."""

import functools
from types import SimpleNamespace

import diffusers
import torch
from oracle import as_torch, generators, helper


@functools.lru_cache(maxsize=1)
def shared(folder):
    pipe = diffusers.StableVideoDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def unet_call(folder, x, t, context, ids):
    """One U-Net call. x (N, F, 8, h, w), t a number, context (N, 1, C), ids (N, 3) -> (N, F, 4, h, w)."""
    return shared(str(folder)).unet(as_torch(x), torch.tensor(t), as_torch(context), as_torch(ids)).sample.numpy()


@torch.no_grad()
def unet_cached_call(folder, branch, first, second, context, ids):
    """A full call on first = (x, t), then a cached one on second = (x, t). Returns the cached call's output."""
    unet = shared(str(folder)).unet
    with helper(SimpleNamespace(unet=unet, scheduler=SimpleNamespace(order=1)), 2, branch):
        for x, t in (first, second):
            out = unet(as_torch(x), torch.tensor(t), as_torch(context), as_torch(ids)).sample
    return out.numpy()


@torch.no_grad()
def generate(folder, image, interval=1, branch=0, seed=0, output_type="latent", **options):
    """The pipeline's frames, or latents (N, F, 4, h, w), and `full`: whether each U-Net call was a full one.

    image: a Pillow picture, or one a video; seed: an int, or one a video; options: the pipeline's own.
    """
    pipe = shared(str(folder))
    with helper(pipe, interval, branch) as cache:
        frames = pipe(image, generator=generators(seed), output_type=output_type, **options).frames
        full = list(cache.full)
    return frames, full
