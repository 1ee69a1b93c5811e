"""The outside reference for models that read no prompt: diffusers' DDPMPipeline, DDIMPipeline and LDMPipeline, and the
pip package DeepCache, float32. What diffusers has no pipeline for is put together from its parts here.

Results are (x, pictures, full): (N, 3, h, w) before decoding or clamping; (N, H, W, 3) in 0-255; whether each call of
the U-Net was a full one.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
from cache_oracle import masked
from diffusers.utils.torch_utils import randn_tensor
from oracle import generators, helper, make_scheduler
from safetensors.torch import load_file


@functools.lru_cache(maxsize=4)
def shared(folder, kind):
    pipe = getattr(diffusers, kind).from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.own_scheduler = pipe.scheduler
    return pipe


def cache_of(pipe, interval, branch, full):
    """The pip package's cache; full: the steps that are, in place of an interval."""
    if full is None:
        return helper(pipe, interval, branch)
    return masked(pipe, lambda call, *_, **__: call in full, branch)


def to_pictures(x):
    return (np.clip(x.numpy() / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)


@torch.no_grad()
def generate(folder, kind, seeds, steps, interval=1, branch=0, scheduler=None, full=None, config=None, **options):
    """kind: the pipeline's class; scheduler: a name of oracle.SCHEDULERS, None for the checkpoint's own; config: what
    is changed in its config; options: the pipeline's own."""
    pipe = shared(str(folder), kind)
    own = make_scheduler(pipe.own_scheduler, scheduler)
    pipe.scheduler = type(own).from_config(own.config, **(config or {}))
    step, last = pipe.scheduler.step, []

    def remembering(*args, **kwargs):
        result = step(*args, **kwargs)
        last[:] = [result.prev_sample]
        return result

    pipe.scheduler.step = remembering
    with cache_of(pipe, interval, branch, full) as cache:
        draws = generators(list(seeds))
        images = pipe(len(seeds), generator=draws, num_inference_steps=steps, output_type="np", **options)[0]
        ran = list(cache.full)
    return last[0].numpy(), (images * 255).round().astype(np.uint8), ran


@torch.no_grad()
def as_ddims_code(folder, seeds, steps, skip_type, eta=0.0, interval=1, branch=0, full=None, clip=None):
    """The loop of DDIM's own code (Song et al. 2021): its timesteps, and clean latents at the end."""
    pipe = shared(str(folder), "DDPMPipeline")
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    kept = np.concatenate([[1.0], np.cumprod(1 - betas)])  # kept[t + 1] is alpha-bar of t
    if skip_type == "quad":
        seq = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
    else:
        seq = list(range(0, 1000, 1000 // steps))
    draws = generators(list(seeds))
    side = pipe.unet.config.sample_size
    x = randn_tensor((len(seeds), 3, side, side), generator=draws)
    with cache_of(pipe, interval, branch, full) as cache:
        for i, j in zip(reversed(seq), reversed([-1, *seq[:-1]]), strict=True):
            here, there = kept[i + 1], kept[j + 1]
            eps = pipe.unet(x, torch.tensor([i])).sample
            x0 = (x - eps * (1 - here) ** 0.5) / here**0.5
            x0 = x0 if clip is None else x0.clip(-clip, clip)
            c1 = eta * ((1 - here / there) * (1 - there) / (1 - here)) ** 0.5
            x = there**0.5 * x0 + (1 - there - c1**2) ** 0.5 * eps
            if eta:
                x = x + c1 * randn_tensor(x.shape, generator=draws)
            x = x.float()
        ran = list(cache.full)
    return x.numpy(), to_pictures(x), ran


@functools.lru_cache(maxsize=1)
def of_classes(folder):
    folder = Path(folder)
    weight = load_file(folder / "class_embedding" / "diffusion_pytorch_model.safetensors")["embedding.weight"]
    return SimpleNamespace(
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        vqvae=diffusers.VQModel.from_pretrained(folder / "vqvae"),
        scheduler=diffusers.DDIMScheduler.from_pretrained(folder / "scheduler"),
        embedding=torch.nn.Embedding.from_pretrained(weight),
    )


@torch.no_grad()
def of_class(folder, label, seeds, steps, scale, interval=1, branch=0, full=None, eta=0.0, latents=None):
    """LDM-4-G (Rombach et al. 2022) from diffusers' parts: a token of the class, and guidance away from the last one,
    which stands for none."""
    model, n = of_classes(str(folder)), len(seeds)
    model.scheduler.set_timesteps(steps)
    draws, side = generators(list(seeds)), model.unet.config.sample_size
    x = randn_tensor((n, 3, side, side), generator=draws) if latents is None else latents
    guided = scale > 1
    labels = [model.embedding.num_embeddings - 1] * n * guided + [label] * n
    context = model.embedding(torch.tensor(labels))[:, None]
    with cache_of(model, interval, branch, full) as cache:
        for t in model.scheduler.timesteps:
            eps = model.unet(torch.cat([x, x]) if guided else x, t, context).sample
            if guided:
                without, given = eps.chunk(2)
                eps = without + scale * (given - without)
            x = model.scheduler.step(eps, t, x, eta=eta, generator=draws).prev_sample
        ran = list(cache.full)
    return x.numpy(), to_pictures(model.vqvae.decode(x / model.vqvae.config.scaling_factor).sample), ran
