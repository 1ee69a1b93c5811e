"""What several tests share: layouts, one measure of error, U-Net inputs, and pictures to start from."""

import re
from collections import Counter

import mlx.core as mx
import numpy as np
import oracle
from PIL import Image

from mlx_deepcache.backend import ops


def error(ours, reference) -> float:
    """Relative L2 distance."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def same(ours, theirs) -> bool:
    """To the bit; on a GPU nearly, as its kernels may round otherwise with other rows beside them."""
    if not ops.on_gpu():
        return np.array_equal(ours, theirs)
    return error(ours, theirs) < (1e-4 if np.asarray(ours).dtype.kind == "f" else 1e-2)


def primitives(folder, *outputs) -> Counter:
    """How many of each of MLX's operations are still to be done for these arrays; folder: for a file."""
    mx.export_to_dot(str(folder / "graph.dot"), *outputs)
    return Counter(re.findall(r'label ?= ?"(\w+)", shape=rectangle', (folder / "graph.dot").read_text()))


def to_mlx(channels_first) -> mx.array:
    """(N, C, H, W) -> (N, H, W, C)."""
    return mx.array(np.asarray(channels_first, np.float32).transpose(0, 2, 3, 1))


def to_torch_layout(channels_last) -> np.ndarray:
    """(N, H, W, C) -> (N, C, H, W)."""
    return np.array(channels_last).transpose(0, 3, 1, 2)


def unet_inputs(config, size=(16, 16), batch=2, seed=0):
    """Random x, context and, for SDXL, text_embeds and time_ids, as numpy in PyTorch's layout."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, config.in_channels, *size), dtype=np.float32)
    context = rng.standard_normal((batch, 77, config.cross_attention_dim), dtype=np.float32)
    added = None
    if config.addition_embed_type is not None:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {
            "text_embeds": rng.standard_normal((batch, pooled), dtype=np.float32),
            "time_ids": rng.integers(0, 1024, (batch, 6)).astype(np.float32),
        }
    return x, context, added


def conditioning(context, added):
    """The same as our U-Net's Conditioning."""
    from mlx_deepcache.nets.unet_parts import Conditioning

    if added is None:
        return Conditioning(mx.array(context))
    return Conditioning(mx.array(context), mx.array(added["text_embeds"]), mx.array(added["time_ids"]))


def at(unet, prompt, t):
    """The embedding of one timestep."""
    return unet.time_embed(mx.array([t], dtype=mx.float32), prompt)[0]


def token_rows(tokenizer, texts):
    """Token ids as an encoder reads them, (N, 77), each text cut to one chunk."""
    from mlx_deepcache.generation.prompts import chunked, tokenize

    return chunked(tokenizer, [tokenize(tokenizer, text) for text in texts], 1)[0][:, 0]


def smooth(height, width, channels=3, seed=0):
    """A picture with large and small forms in it."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 7, channels), dtype=np.uint8).squeeze()
    large = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(np.clip(large + rng.integers(-20, 20, large.shape), 0, 255).astype(np.uint8))


PICTURE = smooth(72, 104)
MASK = Image.fromarray(np.pad(np.full((40, 50), 255, np.uint8), ((12, 20), (30, 24))))


def compare_from_picture(checkpoint, pipeline, kind, mask=None, tolerance=1e-4, **options):
    """Two pictures by diffusers with DeepCache and by us. Returns our result and the relative error of the latents."""
    interval, branch = options.pop("interval", 1), options.pop("branch", 0)
    expected = oracle.from_picture(
        checkpoint(kind),
        "a small red cat",
        PICTURE,
        mask,
        interval=interval,
        branch=branch,
        seed=[3, 4],
        num_images=2,
        height=72,
        width=104,
        **options,
    )
    steps = []
    result = pipeline(kind)(
        "a small red cat",
        image=PICTURE,
        mask=mask,
        seeds=[3, 4],
        height=72,
        width=104,
        cache_interval=interval,
        cache_branch=branch,
        on_step=steps.append,
        **options,
    )
    assert [step.full for step in steps for _ in range(step.calls)] == expected["full"]
    assert error(to_torch_layout(result.latents), expected["latents"]) < tolerance
    return result, expected


def loaded(addons, name):
    """A component of a checkpoint with LoRAs and embeddings in it."""
    net = addons.checkpoint.load(name, mx.float32)
    addons.apply(net, name)
    return net
