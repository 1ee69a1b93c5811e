"""The scripts that DeepCache's README shows, run for diffusers with DeepCache and, with other imports, here."""

import pytest
from helpers import MASK, PICTURE
from twice import compare

TEXT = """\
import torch
from {diffusers} import {name}

pipe = {name}.from_pretrained(MODEL, torch_dtype=torch.float32{more}).to("cpu")
pipe.set_progress_bar_config(disable=True)
prompt = "a photo of the small red cat"

torch.manual_seed(42)
original = pipe(prompt, output_type="pt", num_inference_steps=STEPS // 5).images

from {deepcache} import DeepCacheSDHelper
helper = DeepCacheSDHelper(pipe=pipe)
helper.set_params(
    cache_interval=3,
    cache_branch_id=0,
)
helper.enable()

torch.manual_seed(42)
latents = pipe(prompt, output_type="latent", num_inference_steps=STEPS).images
helper.disable()
generator = torch.manual_seed(42)
again = pipe(prompt, generator=generator, output_type="latent", return_dict=False, num_inference_steps=STEPS // 5)[0]
results = [original, latents, again]
"""
PICTURES = """\
import torch
from {diffusers} import {name}
from {diffusers}.utils import load_image, make_image_grid
from {deepcache} import DeepCacheSDHelper

pipe = {name}.from_pretrained(MODEL, torch_dtype=torch.float32{more})
pipe.enable_attention_slicing()
pipe.set_progress_bar_config(disable=True)
given = {{name: load_image(picture) for name, picture in GIVEN.items()}}
prompt = "the small bird in an old tree"
torch.manual_seed(7)
original = pipe(prompt=prompt, **given, num_inference_steps=STEPS // 2).images[0]

helper = DeepCacheSDHelper(pipe=pipe)
helper.set_params(cache_interval=3, cache_branch_id=0)
helper.enable()
torch.manual_seed(7)
latents = pipe(prompt=prompt, **given, num_inference_steps=STEPS, output_type="latent").images
torch.manual_seed(7)
cached = pipe(prompt=prompt, **given, num_inference_steps=STEPS // 2).images[0]
helper.disable()
results = [latents, [original], [cached], [make_image_grid([original, cached], rows=1, cols=2)]]
"""
VIDEO = """\
import torch
from {diffusers} import StableVideoDiffusionPipeline
from {diffusers}.utils import load_image
from {deepcache} import DeepCacheSDHelper

pipe = StableVideoDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
image = load_image(PICTURE)
size = dict(height=64, width=96)
pipe.set_progress_bar_config(disable=True)
generator = torch.manual_seed(42)
frames = pipe(image, decode_chunk_size=2, generator=generator, num_inference_steps=3, **size).frames[0]

helper = DeepCacheSDHelper(pipe=pipe)
helper.set_params(cache_interval=3, cache_branch_id=0)
helper.enable()
torch.manual_seed(42)
latents = pipe(image, **size, num_inference_steps=STEPS, output_type="latent").frames
torch.manual_seed(42)
cached = pipe(image, decode_chunk_size=2, num_inference_steps=4, **size, output_type="np").frames
helper.disable()
results = [frames, latents, cached]
"""
UNCHECKED = ", safety_checker=None"


def script(text, name=None, more=""):
    return text.format(diffusers="diffusers", deepcache="DeepCache", name=name, more=more)


@pytest.mark.parametrize(
    ("kind", "name", "more", "steps"),
    [
        ("sd15", "StableDiffusionPipeline", UNCHECKED, 50),
        ("sd21-base", "StableDiffusionPipeline", UNCHECKED, 12),
        ("sdxl", "StableDiffusionXLPipeline", ", variant=None, use_safetensors=True", 12),
    ],
)
def test_pictures_of_a_prompt(checkpoint, kind, name, more, steps):
    """In one, as many steps as by default."""
    compare(script(TEXT, name, more), MODEL=checkpoint(kind), STEPS=steps)


@pytest.mark.parametrize(
    ("kind", "name", "masked"),
    [
        ("sd15", "StableDiffusionImg2ImgPipeline", False),
        ("inpaint", "StableDiffusionInpaintPipeline", True),
        ("inpaint-xl", "StableDiffusionXLInpaintPipeline", True),
    ],
)
def test_pictures_of_a_picture(checkpoint, kind, name, masked):
    """One of them has sides that are no multiples of 8."""
    given = {"image": PICTURE, "mask_image": MASK} if masked else {"image": PICTURE.resize((103, 77))}
    more = "" if "XL" in name else UNCHECKED
    compare(script(PICTURES, name, more), MODEL=checkpoint(kind), GIVEN=given, STEPS=10)


def test_videos(video_checkpoint):
    compare(script(VIDEO), MODEL=video_checkpoint, PICTURE=PICTURE, STEPS=7)
