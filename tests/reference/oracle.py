"""The outside reference: diffusers, transformers and the pip package DeepCache, in float32 on the CPU.

Arrays are PyTorch's, channels first. Latents are always those of the sampler, that is VAE latents times its scaling
factor. The cache's features are stored and given back by the pip package's own code; only its clock is replaced, as it
looks the timestep up in a list in which PNDM and Heun have duplicates (see `Helper`).
"""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
import transformers
from DeepCache import DeepCacheSDHelper

diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
}


class Helper(DeepCacheSDHelper):
    """The pip helper, with its step counter replaced by ours and middle blocks that are absent allowed.

    Clock: call c of the U-Net belongs to step c // scheduler.order (order is 2 for Heun, else 1), and a step is full
    when step % interval == 0. Absent middle block (BK-SDM small, tiny): an identity stands in for it while the helper
    is enabled, which is what the U-Net does without one; `enable` would raise AttributeError otherwise.
    """

    def reset_states(self):
        super().reset_states()
        self.full = []

    def wrap_unet_forward(self):
        self.function_dict["unet_forward"] = forward = self.pipe.unet.forward

        def counted(*args, **kwargs):
            self.cur_timestep = len(self.full) // self.pipe.scheduler.order
            self.full.append(self.cur_timestep % self.params["cache_interval"] == 0)
            return forward(*args, **kwargs)

        self.pipe.unet.forward = counted

    def __enter__(self):
        self.no_mid = self.pipe.unet.mid_block is None
        if self.no_mid:
            self.pipe.unet.mid_block = Identity()
        self.enable()
        return self

    def __exit__(self, *_):
        self.disable()
        if self.no_mid:
            self.pipe.unet.mid_block = None


class Identity(torch.nn.Module):
    def forward(self, x, *_, **__):
        return x


def helper(pipe, interval, branch):
    """A Helper to be used in a `with` statement; `.full` lists, a U-Net call each, whether it was a full one."""
    result = Helper(pipe)
    result.set_params(cache_interval=interval, cache_branch_id=branch)
    return result


# -------------------------------------------------------------------------------------------------------- pipelines


def make_scheduler(own, name=None):
    """A new scheduler: like the checkpoint's own one, or the one called `name` made from that one's config."""
    cls, options = (type(own).__name__, {}) if name is None else SCHEDULERS[name]
    return getattr(diffusers, cls).from_config(own.config, **options)


def pipeline(folder, scheduler=None):
    """A fresh StableDiffusionPipeline or StableDiffusionXLPipeline, float32, silent, without safety checker.

    Its `own_scheduler` is the checkpoint's, as the pipeline's constructor left it (it may correct the config).
    """
    kind = json.loads((Path(folder) / "model_index.json").read_text())["_class_name"]
    options = {"add_watermarker": False} if "XL" in kind else {"safety_checker": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, kind).from_pretrained(folder, dtype=torch.float32, **options)
    pipe.own_scheduler = pipe.scheduler
    pipe.scheduler = make_scheduler(pipe.own_scheduler, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.lru_cache(maxsize=2)
def shared(folder):
    """The pipeline that the functions below share: one a folder (a string), which nobody changes meanwhile."""
    return pipeline(folder)


def generators(seed):
    """A torch generator of a seed, or the generator itself; of a list, a list."""
    if isinstance(seed, list | tuple):
        return [generators(s) for s in seed]
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


@torch.no_grad()
def generate(
    folder,
    prompt,
    negative_prompt=None,
    steps=5,
    guidance_scale=7.5,
    height=None,
    width=None,
    scheduler=None,
    interval=1,
    branch=0,
    latents=None,
    seed=0,
    num_images=1,
    pipe=None,
    options=None,
):
    """Text to image, with DeepCache when interval > 1; the schedule is `Helper`'s.

    prompt (and negative_prompt): a string, or a list with one an image. scheduler: a name in SCHEDULERS, None for the
    checkpoint's own. latents: (N, 4, h, w) of unit variance, else drawn. seed: an int or a generator for the whole
    batch, or a list with one an image; the steps of euler-a, dpm++2m-sde, lcm and ddpm draw from the same generators,
    after the starting noise if that was drawn. pipe: one that `pipeline` made, else a shared one. options: more
    arguments of the diffusers pipeline.

    Returns latents (N, 4, h, w) float32, image (N, H, W, 3) uint8, full: list of bool, one a U-Net call.
    """
    pipe = shared(str(folder)) if pipe is None else pipe
    pipe.scheduler = make_scheduler(pipe.own_scheduler, scheduler)
    if latents is not None:
        latents = as_torch(latents)
        num_images = len(latents)
    if not isinstance(prompt, str):
        num_images = 1
    with helper(pipe, interval, branch) as cache:
        sizes = {} if "Img2Img" in type(pipe).__name__ else {"height": height, "width": width}
        out = pipe(
            prompt,
            **sizes,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            **({} if negative_prompt is None else {"negative_prompt": negative_prompt}),
            num_images_per_prompt=num_images,
            generator=generators(seed),
            **({} if latents is None else {"latents": latents}),
            output_type="latent",
            **(options or {}),
        ).images
        full = list(cache.full)
    pixels = np.clip(decode(pipe, out) / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    return {"latents": out.numpy(), "image": (pixels * 255).round().astype(np.uint8), "full": full}


PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler", "controlnet")


def variant(pipe, purpose, **more):
    """The diffusers pipeline for another purpose ("Img2Img", "Inpaint", "ControlNet"), over the same components."""
    xl = "XL" in type(pipe).__name__
    parts = {name: getattr(pipe, name) for name in PARTS if getattr(pipe, name, None) is not None} | more
    if xl:
        rest = {"add_watermarker": False}
    else:
        rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    name = f"StableDiffusion{'XL' * xl}{purpose}Pipeline"
    result = getattr(diffusers, name)(**parts, **rest)
    result.own_scheduler = pipe.own_scheduler
    result.set_progress_bar_config(disable=True)
    return result


def from_picture(folder, prompt, image, mask=None, strength=None, **options):
    """`generate`, from a Pillow picture: with the pipeline for image to image, or for inpainting if there is a mask.

    With several seeds, inpainting is given a picture and a mask for each: else it takes one draw of the VAE for all.
    """
    pipe = shared(str(folder))
    if "Img2Img" not in type(pipe).__name__:  # as the refiner's is
        pipe = variant(pipe, "Img2Img" if mask is None else "Inpaint")
    n = options.get("num_images", 1)
    more = {"image": image} if mask is None else {"image": [image] * n, "mask_image": [mask] * n}
    if mask is not None and n > 1:
        prompt, options["num_images"] = [prompt] * n, 1
        if options.get("negative_prompt") is not None:
            options["negative_prompt"] = [options["negative_prompt"]] * n
    if strength is not None:
        more["strength"] = strength
    return generate(folder, prompt, pipe=pipe, options=more, **options)


def controlled(folder, prompt, nets, images, scales, windows, every_step=True, base=None, more=None, **options):
    """`generate` with ControlNets; every_step False: a cached step is given the residuals of the last full one; base:
    a pipeline to take the parts of, else the shared one; more: arguments of the diffusers pipeline."""
    nets = [diffusers.ControlNetModel.from_pretrained(net) for net in nets]
    pipe = variant(shared(str(folder)) if base is None else base, "ControlNet", controlnet=nets)
    forward, kept, calls = pipe.controlnet.forward, [], []

    def remembering(*args, **kwargs):
        step = len(calls) // pipe.scheduler.order
        calls.append(step)
        if every_step or step % options["interval"] == 0:
            kept[:] = [forward(*args, **kwargs)]
        return kept[0]

    pipe.controlnet.forward = remembering
    starts, ends = map(list, zip(*windows, strict=True))
    more = (more or {}) | {
        "image": images,
        "controlnet_conditioning_scale": scales,
        "control_guidance_start": starts,
        "control_guidance_end": ends,
    }
    return generate(folder, prompt, pipe=pipe, options=more, **options)


def refined(base, refiner, prompt, share, seed, height, width, control=None, **options):
    """`generate`, first by SDXL up to `share` of the noise schedule, then by its refiner; control: a ControlNet's
    folder and picture, for SDXL."""
    draws = generators(seed)
    options = options | {"num_images": len(seed), "seed": draws}
    if control is None:
        first = generate(base, prompt, height=height, width=width, options={"denoising_end": share}, **options)
    else:
        first = controlled_until(base, prompt, share, *control, height=height, width=width, **options)
    more = {"denoising_start": share, "image": as_torch(first["latents"])}
    last = generate(refiner, prompt, pipe=shared(str(refiner)), options=more, **options)
    return last | {"full": first["full"] + last["full"]}


def controlled_until(folder, prompt, share, net, image, **options):
    """`controlled` up to `share` of the noise schedule, for which diffusers' pipeline has no argument: the latents are
    taken from a whole run."""
    visited = []

    def visit(pipe, i, t, now):
        visited.append((int(t), now["latents"].numpy().copy()))
        return now

    whole = controlled(folder, prompt, [net], [image], [1.0], [(0, 1)], more={"callback_on_step_end": visit}, **options)
    until = sum(t >= round(1000 - share * 1000) for t, _ in visited)
    return {"latents": visited[until - 1][1], "full": whole["full"][:until]}


@torch.no_grad()
def controlnet_call(net, x, t, context, picture, added=None):
    """One ControlNet call, picture (N, 3, H, W) in [0, 1]. Returns the residuals: one a skip, and the middle's."""
    net = diffusers.ControlNetModel.from_pretrained(net)
    args, kwargs = unet_arguments(x, t, context, added)
    out = net(*args, controlnet_cond=as_torch(picture), **kwargs)
    return [r.numpy() for r in (*out.down_block_res_samples, out.mid_block_res_sample)]


def full_calls(folder, steps, interval, scheduler=None):
    """The schedule alone: whether each U-Net call is a full one."""
    solver = make_scheduler(shared(str(folder)).own_scheduler, scheduler)
    solver.set_timesteps(steps)
    return [call // solver.order % interval == 0 for call in range(len(solver.timesteps))]


# ------------------------------------------------------------------------------------------------------- components


def as_torch(array):
    """A float32 tensor of a numpy array or a tensor."""
    return torch.as_tensor(np.asarray(array)).float()


def unet_arguments(x, t, context, added):
    """Positional and keyword arguments of diffusers' U-Net, all tensors."""
    args = as_torch(x), torch.as_tensor(np.asarray(t)), as_torch(context)
    return args, {"added_cond_kwargs": added and {name: as_torch(value) for name, value in added.items()}}


@torch.no_grad()
def unet_call(folder, x, t, context, added=None):
    """One U-Net call. x (N, 4, h, w), t a number or (N,), context (N, T, C), added None or text_embeds and time_ids.

    Returns the output (N, 4, h, w).
    """
    args, kwargs = unet_arguments(x, t, context, added)
    return shared(str(folder)).unet(*args, **kwargs).sample.numpy()


@torch.no_grad()
def unet_cached_call(folder, branch, first, second, context, added=None):
    """A full call on first = (x, t), then a cached one on second = (x, t). Returns the cached call's output."""
    unet = shared(str(folder)).unet
    with helper(SimpleNamespace(unet=unet, scheduler=SimpleNamespace(order=1)), 2, branch):
        for x, t in (first, second):
            args, kwargs = unet_arguments(x, t, context, added)
            out = unet(*args, **kwargs).sample
    return out.numpy()


@torch.no_grad()
def text(folder, prompts):
    """prompts: list of N strings. Returns what encode_prompt gives: context (N, 77, C); pooled (N, P) or None (SD)."""
    out = shared(str(folder)).encode_prompt(
        prompts, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    pooled = out[2].numpy() if len(out) == 4 else None
    return out[0].numpy(), pooled


def token_ids(folder, prompts, suffix=""):
    """Token ids (N, 77), padded and cut as diffusers does; suffix "_2" for SDXL's second tokenizer."""
    tokenizer = getattr(shared(str(folder)), "tokenizer" + suffix)
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return tokenizer(prompts, return_tensors="np", **options).input_ids


@torch.no_grad()
def text_encoder(folder, ids, suffix=""):
    """One text encoder on ids (N, 77). Returns last (after the final norm), penultimate, pooled (projected in "_2")."""
    out = getattr(shared(str(folder)), "text_encoder" + suffix)(torch.as_tensor(ids).long(), output_hidden_states=True)
    pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
    parts = {"last": out.last_hidden_state, "penultimate": out.hidden_states[-2], "pooled": pooled}
    return {name: value.numpy() for name, value in parts.items()}


@torch.no_grad()
def vae_decode(folder, latents):
    """Sampler latents (N, 4, h, w), that is the VAE's times scaling_factor. Returns images (N, 3, H, W), unclipped."""
    return decode(shared(str(folder)), as_torch(latents))


def decode(pipe, latents):
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.numpy()


@torch.no_grad()
def vae_encode(folder, image):
    """Images (N, 3, H, W) in [-1, 1]. Returns sampler latents (N, 4, h, w): the mean times scaling_factor."""
    vae = shared(str(folder)).vae
    return (vae.encode(as_torch(image)).latent_dist.mean * vae.config.scaling_factor).numpy()
