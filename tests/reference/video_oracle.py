"""The outside reference for videos: diffusers' StableVideoDiffusionPipeline, its TextToVideoZeroPipeline, and the pip
package DeepCache, float32."""

import copy
import functools
from types import SimpleNamespace

import diffusers
import torch
from diffusers.pipelines.deprecated.text_to_video_synthesis import pipeline_text_to_video_zero as zero
from diffusers.pipelines.deprecated.text_to_video_synthesis import pipeline_text_to_video_zero_sdxl as zero_xl
from oracle import as_torch, generators, helper, make_scheduler
from oracle import shared as pictures_of


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


@torch.no_grad()
def from_prompt(folder, prompt, interval=1, branch=0, seed=0, output_type="latent", **options):
    """TextToVideoZeroPipeline's latents (F, 4, h, w) with DDIM, or pictures (F, H, W, 3) in [0, 1], or those of the one
    for SDXL, and `full`, with a cache that is begun anew in each of its three loops; options: the pipeline's own."""
    own = pictures_of(str(folder))
    parts = own.components | {"scheduler": make_scheduler(own.own_scheduler, "ddim")}
    if "text_encoder_2" in parts:
        zeros = own.config.force_zeros_for_empty_prompt
        pipe = zero_xl.TextToVideoZeroSDXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    else:
        parts.pop("image_encoder")
        pipe = zero.TextToVideoZeroPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    loop, full = pipe.backward_loop, []

    def cached_loop(**given):
        with helper(pipe, interval, branch) as cache:
            latents = loop(**given)
            full.extend(cache.full)
        return latents

    pipe.backward_loop = cached_loop
    out = pipe(prompt, generator=generators(seed), output_type=output_type, **options)
    return torch.as_tensor(out.images).numpy(), full


@torch.no_grad()
def followed(folder, nets, pictures, prompt, interval=1, branch=0, seed=0, scheduler="ddim", **options):
    """Latents (F, 4, h, w) as TextToVideoZero's documentation has them with ControlNets: for each of `nets` (folders)
    one picture a frame, the same noise for all frames, and attention to the first frame in all networks."""
    own = pictures_of(str(folder))
    controls = [diffusers.ControlNetModel.from_pretrained(net, torch_dtype=torch.float32) for net in nets]
    parts = {name: own.components[name] for name in ("vae", "text_encoder", "tokenizer")}
    parts |= {"unet": copy.deepcopy(own.unet), "scheduler": make_scheduler(own.own_scheduler, scheduler)}
    parts |= {"safety_checker": None, "feature_extractor": None, "controlnet": controls}
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    for net in (pipe.unet, *controls):
        net.set_attn_processor(zero.CrossFrameAttnProcessor(batch_size=1 if options.get("guidance_scale") == 1 else 2))
    frames, first = len(pictures[0]), pictures[0][0]
    noise = torch.randn((1, 4, first.height // 8, first.width // 8), generator=generators(seed))
    noise = noise.repeat(frames, 1, 1, 1)
    shown = [list(frame) for frame in zip(*pictures, strict=True)]
    with helper(pipe, interval, branch):
        return pipe([prompt] * frames, shown, latents=noise, output_type="latent", **options).images.numpy()


def moved(latents, frames, x, y):
    """latents (4, h, w) -> those of frames 1 to frames - 1 that the pipeline moves, (F - 1, 4, h, w)."""
    same = as_torch(latents)[None].repeat(frames - 1, 1, 1, 1)
    return zero.create_motion_field_and_warp_latents(x, y, list(range(1, frames)), same).numpy()
