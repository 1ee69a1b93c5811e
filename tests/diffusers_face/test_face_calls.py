"""Single calls and features of diffusers' pipelines, each a script that runs for both; and what is refused, by name."""

import inspect
import shutil
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
from mlx_deepcache.diffusers.arguments import NEUTRAL, PROMPTED, SIZES, VIDEO
from mlx_deepcache.diffusers.helper import older
from mlx_deepcache.errors import CheckpointError, UsageError

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
results += [draw(pipe, "a (red) cat [dog:0.5]", 64, 72, clip_skip=1, guidance_scale=1.0)]
results += [draw(pipe, "a cat", clip_skip=1, **small)]
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
    more = {"num_images_per_prompt": 2, "num_inference_steps": 10}
    results += [draw(pipe, "a dog", PICTURE, strength=0.6, seeds=seeds, **more)]
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
told = {"original_size": (64, 72), "target_size": (64, 72), "crops_coords_top_left": (0, 0), **small}
told |= {"negative_prompt": "dog", "negative_prompt_2": "blue", "clip_skip": 1}
results += [draw(pipe, "a cat", "in the rain", **told)]
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
results += [draw(pipe, "a cat", **small)]
pipe.load_lora_weights(LORAS + "/b.safetensors")
results += [draw(pipe, "a cat", **small)]
pipe.set_adapters(["a", "default_1"], adapter_weights=[0.5, 0.3])
results += [draw(pipe, "a cat", **small), draw(pipe, "a cat", cross_attention_kwargs={"scale": 0.4}, **small)]
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
    "SDXL's ControlNets": (
        "sdxl",
        """
net = ControlNetModel.from_pretrained(NET_XL)
pipe = opened(AutoPipelineForText2Image, controlnet=net)
results += [draw(pipe, "a cat", image=EDGES, num_inference_steps=3)]
pipe = StableDiffusionXLControlNetImg2ImgPipeline(**pipe.components)
helper = cached(pipe, 2)
results += [draw(pipe, "a cat", image=PICTURE, control_image=EDGES, strength=0.9)]
pipe = opened(StableDiffusionXLControlNetInpaintPipeline, controlnet=net)
results += [draw(pipe, "a cat", image=PICTURE, mask_image=MASK, control_image=EDGES, num_inference_steps=3)]
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
    net_xl = tiny.write_controlnet("sdxl", folder / "net-xl")
    edges = smooth(72, 104, seed=3)
    files = {"LORAS": folder, "EMBEDDING": folder / "toy.safetensors", "NET": net, "NET_XL": net_xl}
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


# What is refused, and what is ignored


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return face.StableDiffusionPipeline.from_pretrained(str(checkpoint("sd15")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_inference_step": 5}, "no argument 'num_inference_step'; did you mean num_inference_steps"),
        ({"output_all_sequence": True}, "StableDiffusionPipeline has no argument 'output_all_sequence'"),
        ({"strength": 0.5}, "StableDiffusionPipeline has no argument 'strength'"),
        ({"prompt_embeds": torch.zeros(1, 77, 32)}, "prompt_embeds=an array"),
        ({"guidance_rescale": 0.7}, "guidance_rescale=0.7 cannot be honoured"),
        ({"timesteps": [999, 500]}, "timesteps="),
        ({"ip_adapter_image": PICTURE}, "ip_adapter_image="),
        ({"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}, "callback_on_step_end_tensor_inputs="),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: one for all pictures"),
        ({"cross_attention_kwargs": {"gligen": {}}}, "cross_attention_kwargs="),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1, 4, 8, 8)}}, "other latents than it was shown"),
        ({"callback_on_step_end": lambda *_: {"prompt_embeds": None}}, "other prompt_embeds than it was shown"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_named(pipe, arguments, words):
    with pytest.raises(TypeError, match=words):
        pipe("a cat", height=64, width=64, **{"num_inference_steps": 2} | arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"output_type": "jpg"}, "output_type should be one of pil, np, pt, latent, got 'jpg'"),
        ({"generator": [1, 2]}, "a list of 1, one a picture; got 2"),
        ({"generator": "7"}, "should be a torch.Generator or a seed, got '7'"),
        ({"height": 60}, "height should be a positive multiple of 8"),
        ({"prompt": None}, "prompt should be a text"),
        ({"cache_interval": 5, "uniform": False}, "uniform=False needs pow and center"),
    ],
)
def test_values_that_cannot_be(pipe, arguments, words):
    with pytest.raises(UsageError, match=words):
        pipe(**{"prompt": "a cat", "num_inference_steps": 2} | arguments)


def test_sizes_that_sdxl_is_told_are_those_that_are_drawn(checkpoint):
    pipe = face.StableDiffusionXLPipeline.from_pretrained(str(checkpoint("sdxl")))
    with pytest.raises(TypeError, match=r"target_size=\(128, 128\) cannot be honoured"):
        pipe("a cat", height=64, width=64, target_size=(128, 128))


def test_everything_that_diffusers_takes_is_known():
    """With diffusers' own defaults, in its order where arguments may be given by position."""
    for name, takes in {**PROMPTED, "StableVideoDiffusionPipeline": VIDEO}.items():
        theirs = dict(inspect.signature(getattr(diffusers, name).__call__).parameters)
        for gone in ("self", "kwargs"):
            theirs.pop(gone, None)
        for argument, parameter in theirs.items():
            known = takes if argument in takes else NEUTRAL
            default = None if parameter.default is inspect.Parameter.empty else parameter.default
            assert known[argument] == default, (name, argument)
        last = list(takes).index("num_inference_steps")
        assert list(takes)[: last + 1] == [name for name in theirs if name in takes][: last + 1]
        assert set(takes) - set(theirs) <= {*older_arguments, "cache_branch", *SIZES}


older_arguments = ("cache_interval", "cache_layer_id", "cache_block_id", "uniform", "pow", "center")


@pytest.mark.parametrize("mode", ["non_uniform", "adaptive", None])
def test_other_skip_modes_name_the_policies(mode):
    with pytest.raises(NotImplementedError, match="DeepCache, Adaptive, TaylorSeer, .*GuidanceInterval"):
        face.DeepCacheSDHelper().set_params(skip_mode=mode)


def test_the_helper_needs_a_pipeline(pipe):
    with pytest.raises(UsageError, match="which pipeline"):
        face.DeepCacheSDHelper().enable()
    helper = face.DeepCacheSDHelper()
    helper.enable(pipe)
    assert pipe.model.helper is helper
    helper.disable()
    assert pipe.model.helper is None
    with pytest.raises(UsageError, match="cache interval must be at least 1"):
        helper.set_params(cache_interval=0)


@pytest.mark.parametrize(
    ("interval", "power", "full"),
    [
        (5, 1.4, [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]),  # as the paper's code gives
        (10, 1.2, [0, 10, 18, 27, 38]),
    ],
)
def test_deepcaches_older_pipelines(interval, power, full):
    asked = dict.fromkeys(older_arguments) | {"uniform": True}
    assert older(asked) is None
    cache = older(
        asked | {"cache_interval": interval, "uniform": False, "pow": power, "center": 15, "cache_layer_id": 1}
    )
    assert [i for i, is_full in enumerate(cache.full_steps(50)) if is_full] == full and cache.branch == 4
    cache = older(asked | {"cache_interval": interval, "cache_layer_id": 0, "cache_block_id": 2, "pow": power})
    assert cache.full_steps(50) == [i % interval == 0 for i in range(50)] and cache.branch == 3
    assert older({"cache_interval": 3, "cache_branch": 0}).branch == 1


def test_the_call_arguments_are_the_helpers_branches(checkpoint, pipe):
    """cache_layer_id is a block and cache_block_id a layer in it: the helper's branch one further out."""
    options = {"num_inference_steps": 6, "height": 64, "width": 64, "output_type": "latent"}
    theirs = oracle.generate(checkpoint("sd15"), "a cat", steps=6, height=64, width=64, interval=3, branch=5, seed=4)
    ours = pipe("a cat", generator=4, cache_interval=3, cache_layer_id=1, cache_block_id=1, **options).images
    assert error(ours, theirs["latents"]) < 1e-4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda pipe: setattr(pipe, "unet", object()), "unet cannot be given"),
        (lambda pipe: setattr(pipe, "vae", object()), "vae should be an AutoencoderKL"),
        (lambda pipe: setattr(pipe, "scheduler", diffusers.KDPM2DiscreteScheduler()), "KDPM2DiscreteScheduler is no"),
        (lambda pipe: face.DDIMScheduler(thresholding=True), "thresholding = True is not supported"),
        (lambda pipe: face.DDIMScheduler(betas=1), "DDIMScheduler has no setting 'betas'"),
        (
            lambda pipe: face.DDIMScheduler.from_config(pipe.scheduler.config, steps_of=1),
            "no setting 'steps_of'; did you",
        ),
        (lambda pipe: pipe.load_lora_weights({}), "not as a dict of tensors"),
        (lambda pipe: pipe.fuse_lora(components=["unet"]), "fuse_lora: components="),
        (lambda pipe: pipe.unload_textual_inversion("<toy>"), "tokens cannot be honoured"),
        (lambda pipe: pipe.set_adapters("ink"), "there is no LoRA 'ink'"),
        (lambda pipe: pipe.enable_freeu(), "StableDiffusionPipeline here has no 'enable_freeu'"),
        (lambda pipe: face.StableDiffusionXLPipeline(**pipe.components), "which is Stable Diffusion 1.x"),
        (lambda pipe: face.StableDiffusionControlNetPipeline(**pipe.components), "needs a controlnet"),
    ],
)
def test_what_cannot_be_honoured_is_named(pipe, make, words):
    with pytest.raises((TypeError, NotImplementedError, UsageError, AttributeError), match=words):
        make(pipe)


def test_what_has_no_effect_is_noted_once(checkpoint):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            pipe = face.StableDiffusionPipeline.from_pretrained(
                str(checkpoint("sd15")), device_map="auto", variant="fp16"
            )
            assert pipe.to("mps") is pipe
            pipe.enable_sequential_cpu_offload()
    words = [str(warning.message) for warning in seen]
    assert [text.partition(" ")[0] for text in words] == ["device_map", ".to('mps')", "enable_sequential_cpu_offload"]


def test_a_dtype_is_taken(checkpoint, pipe):
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "latent"}
    exact = pipe("a cat", generator=1, **options).images
    opened = face.StableDiffusionPipeline.from_pretrained
    half = opened(str(checkpoint("sd15")), torch_dtype=torch.float16)
    late = opened(str(checkpoint("sd15"))).to("mps", torch.float16)
    first, second = (one("a cat", generator=1, **options).images for one in (half, late))
    assert torch.equal(first, second) and 1e-6 < error(first, exact) < 0.05


def test_another_vae(checkpoint, taesd, pipe):
    """Given, and assigned."""
    latents = {"latents": torch.randn(1, 4, 8, 8), "num_inference_steps": 1, "output_type": "np", "height": 64}
    vae = face.AutoencoderTiny.from_pretrained(taesd)
    given = face.StableDiffusionPipeline.from_pretrained(str(checkpoint("sd15")), vae=vae)
    theirs = oracle.pipeline(checkpoint("sd15"))
    theirs.vae = diffusers.AutoencoderTiny.from_pretrained(taesd)
    expected = theirs("a cat", width=64, **latents).images
    assert np.abs(given("a cat", width=64, **latents).images - expected).mean() < 0.5 / 255
    own = face.StableDiffusionPipeline.from_pretrained(str(checkpoint("sd15")))
    own.vae = vae
    assert np.abs(own("a cat", width=64, **latents).images - expected).mean() < 0.5 / 255
    own.vae.enable_tiling()
    assert own.model.tiling == "on"
    assert np.abs(pipe("a cat", width=64, **latents).images - expected).mean() > 0.01


def test_a_models_own_scheduler_that_is_not_supported_can_be_replaced(checkpoint, tmp_path):
    for number, strange in enumerate(({"_class_name": "DEISMultistepScheduler"}, {"beta_schedule": "sigmoid"})):
        folder = shutil.copytree(checkpoint("sd15"), tmp_path / str(number))
        tiny.write_json(folder / "scheduler" / "scheduler_config.json", tiny.PNDM | strange)
        own = face.StableDiffusionPipeline.from_pretrained(str(folder))
        with pytest.raises(CheckpointError, match="is not supported"):
            own("a cat", num_inference_steps=2, height=64, width=64)
        assert own.scheduler.config.beta_end == 0.012
        config = dict(own.scheduler.config) | {"beta_schedule": "linear"}
        own.scheduler = face.DDIMScheduler.from_config(config)
        assert own("a cat", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)


def test_pages_of_files_on_the_hub():
    located = face.parts.located
    assert located("https://huggingface.co/owner/name/blob/main/a/b.safetensors") == "owner/name:a/b.safetensors"
    assert located("https://huggingface.co/o/n/resolve/v2/b.safetensors?download=true") == "o/n@v2:b.safetensors"
    assert located("owner/name", "fp16") == "owner/name@fp16"


def test_a_model_of_its_own_kind_is_opened(checkpoint, video_checkpoint):
    opened = face.DiffusionPipeline.from_pretrained
    kinds = {"sd15": "StableDiffusionPipeline", "inpaint-xl": "StableDiffusionXLInpaintPipeline"}
    kinds["refiner"] = "StableDiffusionXLImg2ImgPipeline"
    for kind, name in kinds.items():
        assert type(opened(str(checkpoint(kind)))).__name__ == name
    assert type(opened(str(video_checkpoint))).__name__ == "StableVideoDiffusionPipeline"
    assert type(face.AutoPipelineForImage2Image.from_pretrained(str(checkpoint("sdxl")))).__name__ == kinds["refiner"]


def test_importing_brings_neither_pytorch_nor_diffusers():
    """Nor does a picture from a seed; and the command line knows nothing of this."""
    check = (
        "import sys, mlx_deepcache.diffusers as d; pipe = d.DiffusionPipeline.from_pretrained('emoji'); "
        "pipe('a red apple', num_inference_steps=1, generator=3, output_type='np'); "
        "assert not {'torch', 'diffusers', 'transformers', 'DeepCache'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
    command = "import sys, mlx_deepcache.apps.generate; assert 'mlx_deepcache.diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True)
