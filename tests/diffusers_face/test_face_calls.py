"""Single calls and features of diffusers' pipelines, each a script that runs for both; and what is refused, by name."""

import subprocess
import sys
import warnings

import diffusers
import numpy as np
import oracle
import pytest
import tiny
import torch
from helpers import MASK, PICTURE, error, smooth
from safetensors.torch import save_file
from twice import compare

import mlx_deepcache.diffusers as face
from mlx_deepcache.diffusers.arguments import NEUTRAL, PROMPTED, VIDEO
from mlx_deepcache.diffusers.helper import older
from mlx_deepcache.errors import UsageError

BEGIN = """\
import torch
from diffusers import *
from DeepCache import DeepCacheSDHelper

def seeded(*seeds):
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]

def opened(cls, **more):
    pipe = cls.from_pretrained(MODEL, torch_dtype=torch.float32, **more)
    pipe.set_progress_bar_config(disable=True)
    encoder = getattr(getattr(pipe, "components", {}).get("text_encoder"), "__dict__", None)
    if encoder is not None and not hasattr(pipe.text_encoder, "text_model"):  # where this diffusers looks for it
        encoder["text_model"] = pipe.text_encoder
    return pipe

def cached(pipe, interval, branch=0):
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    return helper

def draw(pipe, *args, seeds=(5,), **more):
    options = {"num_inference_steps": 5, "output_type": "latent", "generator": seeded(*seeds)} | more
    return pipe(*args, **options).images

small = {"height": 64, "width": 72}
"""
UNCHECKED = "safety_checker=None"


def held(text, tolerance=1e-4, **names):
    """Each line's value of a script is compared, its assignments are not."""
    return compare(BEGIN + "results = []\n" + text, tolerance, **names)


SCRIPTS = {
    "several prompts, several pictures each, one generator": (
        "sd15",
        """
pipe = opened(StableDiffusionPipeline, safety_checker=None)
results += [draw(pipe, ["a cat", "the old tree"], num_images_per_prompt=2, negative_prompt=["rain", "rain"], **small)]
results += [draw(pipe, "a (red) cat [dog:0.5]", 64, 72, clip_skip=1, guidance_scale=1.0), draw(pipe, "a cat", clip_skip=1, **small)]
""",
    ),
    "a generator each, which go on from call to call": (
        "sd15",
        """
pipe = opened(StableDiffusionPipeline, safety_checker=None)
generators = seeded(3, 4)
for _ in range(2):
    results += [draw(pipe, "a cat", num_images_per_prompt=2, generator=generators, **small)]
""",
    ),
    "latents of one's own, and every kind of output": (
        "sd15",
        """
pipe = opened(StableDiffusionPipeline, safety_checker=None)
latents = torch.randn(2, 4, 8, 9, generator=seeded(9))
for kind in ("latent", "pt", "np", "pil"):
    results += [draw(pipe, ["a cat", "a dog"], latents=latents, output_type=kind, **small)]
""",
    ),
    "PNDM's second step, which DeepCache looks up where it first stands": (
        "sd15",
        """
pipe = opened(StableDiffusionPipeline, safety_checker=None)
helper = cached(pipe, 2, 1)
results += [draw(pipe, "a cat", num_inference_steps=8, **small)]
helper.set_params(cache_interval=4, cache_branch_id=3)
results += [draw(pipe, "a cat", num_inference_steps=8, **small)]
""",
    ),
    "a picture changed from the second step on": (
        "sd15",
        """
text = opened(StableDiffusionPipeline, safety_checker=None)
pipe = StableDiffusionImg2ImgPipeline(**text.components)
helper = cached(pipe, 2)
for seeds in ((3,), (3, 4)):
    results += [draw(pipe, "a dog", PICTURE, strength=0.6, seeds=seeds, num_images_per_prompt=2, num_inference_steps=10)]
""",
    ),
    "inpainting with a net that was not trained for it": (
        "sd15",
        """
pipe = opened(AutoPipelineForInpainting, safety_checker=None)
more = {"image": PICTURE, "mask_image": MASK, "num_images_per_prompt": 2, **small}
results += [draw(pipe, "a dog", strength=0.7, **more), draw(pipe, "a dog", seeds=(3, 4), strength=0.7, **more)]
results += [draw(pipe, "a dog", image=PICTURE, mask_image=MASK, padding_mask_crop=8, output_type="pil", **small)]
""",
    ),
    "SDXL": (
        "sdxl",
        """
pipe = opened(DiffusionPipeline)
sizes = {"original_size": (64, 72), "target_size": (64, 72), "crops_coords_top_left": (0, 0)}
results += [draw(pipe, "a cat", "in the rain", negative_prompt="dog", negative_prompt_2="blue", clip_skip=1, **small, **sizes)]
pipe = AutoPipelineForImage2Image.from_pipe(pipe)
helper = cached(pipe, 2)
results += [draw(pipe, "a cat", image=PICTURE, strength=0.5, num_inference_steps=10)]
""",
    ),
    "LoRAs": (
        "sd15",
        """
pipe = opened(StableDiffusionPipeline, safety_checker=None)
pipe.load_lora_weights(LORAS, weight_name="a.safetensors", adapter_name="a")
results += [draw(pipe, "a cat", **small), draw(pipe, "a cat", cross_attention_kwargs={"scale": 0.4}, **small)]
pipe.load_lora_weights(LORAS + "/b.safetensors")
results += [draw(pipe, "a cat", **small)]
pipe.set_adapters(["a", "default_1"], adapter_weights=[0.5, 0.3])
results += [draw(pipe, "a cat", **small)]
pipe.disable_lora()
results += [draw(pipe, "a cat", **small)]
pipe.enable_lora()
pipe.fuse_lora(lora_scale=0.7)
pipe.unload_lora_weights()
results += [draw(pipe, "a cat", **small)]
""",
    ),
    "a textual inversion": (
        "sd15",
        """
pipe = opened(StableDiffusionPipeline, safety_checker=None)
pipe.load_textual_inversion(EMBEDDING, token="<toy>")
results += [draw(pipe, "a <toy> in the rain", **small)]
""",
    ),
    "a ControlNet": (
        "sd15",
        """
net = ControlNetModel.from_pretrained(NET, torch_dtype=torch.float32)
pipe = opened(StableDiffusionControlNetPipeline, safety_checker=None, controlnet=net)
helper = cached(pipe, 2, 1)
window = {"control_guidance_start": 0.2, "control_guidance_end": 0.8}
results += [draw(pipe, "a cat", EDGES, controlnet_conditioning_scale=0.6, **window)]
pipe = opened(StableDiffusionControlNetImg2ImgPipeline, safety_checker=None, controlnet=net)
results += [draw(pipe, "a cat", image=PICTURE, control_image=EDGES, strength=0.9)]
pipe = opened(AutoPipelineForInpainting, safety_checker=None, controlnet=net)
results += [draw(pipe, "a cat", image=PICTURE, mask_image=MASK, control_image=EDGES, strength=0.9)]
pipe = opened(StableDiffusionControlNetPipeline, safety_checker=None, controlnet=[net, net])
results += [draw(pipe, "a cat", [EDGES, PICTURE], controlnet_conditioning_scale=[0.5, 1.0])]
""",
    ),
    "a callback that sees each step and stops": (
        "sd15",
        """
pipe = opened(StableDiffusionPipeline, safety_checker=None)
seen = []

def look(pipe, step, timestep, shown):
    seen.append(torch.tensor([step, int(timestep), pipe.num_timesteps])[None, None].float() + 1)
    results.append(shown["latents"].clone())
    pipe._interrupt = step == 2
    return shown

results += [draw(pipe, "a cat", callback_on_step_end=look, **small)]
results += [torch.cat(seen, 1)]
""",
    ),
}


@pytest.fixture(scope="module")
def beside(checkpoint, tmp_path_factory):
    """What scripts are given: pictures, and files of LoRAs, an embedding and a ControlNet."""
    folder, g = tmp_path_factory.mktemp("beside"), torch.Generator().manual_seed(1)
    pipe = oracle.shared(str(checkpoint("sd15")))
    for name in "ab":
        made = {}
        for part in ("unet", "text_encoder"):
            for layer, module in getattr(pipe, part).named_modules():
                if layer.endswith(("to_q", "to_v", "q_proj", "v_proj")):
                    out, inner = module.weight.shape
                    made[f"{part}.{layer}.lora_A.weight"] = torch.randn(3, inner, generator=g) / inner**0.5
                    made[f"{part}.{layer}.lora_B.weight"] = torch.randn(out, 3, generator=g) * 0.3
        save_file(made, folder / f"{name}.safetensors")
    save_file({"emb_params": torch.randn(2, 32, generator=g)}, folder / "toy.safetensors")
    net = tiny.write_controlnet("sd15", folder / "net")
    edges = smooth(72, 104, seed=3)
    files = {"LORAS": folder, "EMBEDDING": folder / "toy.safetensors", "NET": net}
    return files | {"PICTURE": PICTURE, "MASK": MASK, "EDGES": edges}


@pytest.mark.parametrize("what", SCRIPTS)
def test_the_same_script_draws_the_same(checkpoint, beside, what):
    kind, text = SCRIPTS[what]
    print(what, held(text, MODEL=checkpoint(kind), **beside))


SCHEDULERS = [
    ("DDIMScheduler", "", ", eta=0.5"),
    ("PNDMScheduler", ", skip_prk_steps=False", ""),
    ("EulerDiscreteScheduler", ", timestep_spacing='trailing'", ""),
    ("EulerAncestralDiscreteScheduler", "", ""),
    ("HeunDiscreteScheduler", "", ""),
    ("DPMSolverMultistepScheduler", "", ""),
    ("DPMSolverMultistepScheduler", ", use_karras_sigmas=True", ""),
    ("DPMSolverMultistepScheduler", ", algorithm_type='sde-dpmsolver++'", ""),
    ("UniPCMultistepScheduler", "", ""),
    ("LCMScheduler", "", ", guidance_scale=1.5"),
    ("DDPMScheduler", "", ""),
]


@pytest.mark.parametrize(("name", "changed", "more"), SCHEDULERS)
def test_schedulers(checkpoint, name, changed, more):
    """By from_config, and by from_pretrained in a pipeline that is opened; a cache where the helper has no fault of its
    own (see docs/diffusers.md). What is assigned may be diffusers' own object."""
    heun = name == "HeunDiscreteScheduler"
    text = f"""
pipe = opened(StableDiffusionPipeline, safety_checker=None)
pipe.scheduler = {name}.from_config(pipe.scheduler.config{changed})
{"" if heun else "helper = cached(pipe, 3)"}
results += [draw(pipe, "a cat", num_inference_steps=7, num_images_per_prompt=2, seeds=(3, 4){more}, **small)]
scheduler = {name}.from_pretrained(MODEL, subfolder="scheduler"{changed})
pipe = opened(StableDiffusionPipeline, safety_checker=None, scheduler=scheduler)
results += [draw(pipe, "a cat", num_inference_steps=7{more}, **small)]
"""
    print(name, changed, held(text, MODEL=checkpoint("sd15")))
    pipe = face.StableDiffusionPipeline.from_pretrained(str(checkpoint("sd15")))
    theirs = getattr(diffusers, name).from_config(oracle.shared(str(checkpoint("sd15"))).scheduler.config)
    pipe.scheduler = theirs
    want = {key: value for key, value in theirs.config.items() if key in pipe.scheduler.config and key[0] != "_"}
    assert {key: pipe.scheduler.config[key] for key in want} == want
    assert set(pipe.scheduler.config["_use_default_values"]) <= set(theirs.config["_use_default_values"])
