"""A VAE, a TAESD, a ControlNet or an upscaler in one safetensors file by itself, without a config, with the original
names or with diffusers'."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ...errors import CheckpointError
from ...nets.autoencoder import VAEConfig
from ...nets.controlnet import ControlNetConfig
from ...nets.unet_parts import UNetConfig
from ...nets.upscaler import CompactConfig, RRDBConfig
from ..folder import Part, Tensors
from ..weights import read_header, read_tensors, some
from . import names as ldm
from . import shapes as architecture
from .shapes import Shapes

_TAESD = {
    side: f"taesd_{side}" for side in ("encoder", "decoder")
}  # what its two files are called, and ComfyUI's names
_OTHER_CONTROLS = {
    "a Control-LoRA": r"^lora_controlnet$",
    "a ControlNet-LLLite": r"lllite",
    "a T2I-Adapter": r"^(adapter\.)?body\.\d",
}


def vae(file: Path, scaling_factor: float) -> Part:
    """scaling_factor: of the latents, which a file of an AutoencoderKL does not say.

    Raises:
        CheckpointError: it is no VAE, or one of TAESD's two files without the other.
    """
    shapes, _, _ = read_header(file)
    if (tiny := _taesd(file, shapes)) is not None:
        return tiny
    prefix = next((p for p in ("first_stage_model.", "vae.", "") if f"{p}decoder.conv_in.weight" in shapes), None)
    if prefix is None:
        raise CheckpointError(
            f"{file} is no VAE: it has no decoder.conv_in.weight and no TAESD's tensors, only "
            f"{some(list(shapes)) or 'none'}"
        )
    config = architecture.vae(Shapes(file, prefix, shapes)) | {"scaling_factor": scaling_factor}
    places = ldm.vae_places(VAEConfig.from_dict(config))
    return Part(config, str(file), _renamed(file, prefix, lambda name: ldm.rename(name, places)))


def controlnet(file: Path, unet: UNetConfig) -> tuple[Part, ControlNetConfig]:
    """unet: the config of the U-Net that it is to steer, and whose heads and layers it must have.

    Raises:
        CheckpointError: it is no ControlNet.
    """
    shapes, _, _ = read_header(file)
    for what, pattern in _OTHER_CONTROLS.items():
        if any(re.search(pattern, name) for name in shapes):
            raise CheckpointError(f"{file} is {what}, which is not supported, only a ControlNet")
    prefix = "control_model." if any(name.startswith("control_model.") for name in shapes) else ""
    known = Shapes(file, prefix, shapes)
    original = "input_hint_block.0.weight" in known
    if not original and "controlnet_cond_embedding.conv_in.weight" not in known:
        raise CheckpointError(
            f"{file} is no ControlNet: it has no tensors input_hint_block.* or controlnet_cond_embedding.*, only "
            f"{some(list(shapes)) or 'none'}"
        )
    places = ldm.controlnet_places(unet, known.count(r"input_hint_block\.(\d+)\.") - 1) if original else {}
    old = {new: old for old, new in places.items()}

    def shape(place: str) -> tuple[int, ...]:
        return known[f"{old.get(place, place)}.weight"]

    hints = "controlnet_cond_embedding"
    blocks = sum(name.startswith(f"{hints}.blocks.") for name in old) or known.count(rf"{hints}\.blocks\.(\d+)\.")
    context = known.first("attn2.to_k.weight")
    added = any(place in known for place in ("label_emb.0.0.weight", "add_embedding.linear_1.weight"))
    config = asdict(unet) | {
        "in_channels": shape("conv_in")[1],
        "cross_attention_dim": unet.cross_attention_dim if context is None else context[1],
        "addition_embed_type": "text_time" if added else None,
        "conditioning_channels": shape(f"{hints}.conv_in")[1],
        "conditioning_embedding_out_channels": (
            shape(f"{hints}.conv_in")[0],
            *(shape(f"{hints}.blocks.{i}")[0] for i in range(1, blocks, 2)),
        ),
    }
    rename = _renamed(file, prefix, lambda name: ldm.rename(name, places))
    return Part({}, str(file), rename), ControlNetConfig(**config)


def upscaler(file: Path) -> tuple[Part, RRDBConfig | CompactConfig]:
    """A net of Real-ESRGAN's family, by its names or those of ESRGAN and BSRGAN, and perhaps in the dictionary that
    training put it into.

    Raises:
        CheckpointError: it is none.
    """
    shapes, _, _ = read_header(file)
    starts = ("params_ema.", "params.", "")
    prefix = next(start for start in starts if any(name.startswith(start) for name in shapes) or not start)
    places = _upscaler_places([name.removeprefix(prefix) for name in shapes if name.startswith(prefix)])
    found = {new: shapes[prefix + old] for old, new in places.items()}
    known = Shapes(file, "", found)
    if "conv_first.weight" in found and "body.0.rdb1.conv1.weight" in found:
        features, channels, *_ = known["conv_first.weight"]
        growth, doublings = known["body.0.rdb1.conv1.weight"][0], max(known.count(r"conv_up(\d+)\.") - 1, 0)
        shuffle = max(math.isqrt(channels // 3), 1)
        config = RRDBConfig(features, growth, known.count(r"body\.(\d+)\."), doublings, shuffle)
        fits = channels == 3 * shuffle**2 and max(config.blocks, doublings) <= len(found)  # whatever their numbers
        fits = fits and 2**doublings % shuffle == 0 and known["conv_last.weight"][0] == 3
    elif "body.0.weight" in found and "body.1.weight" in found:
        last = known.count(r"body\.(\d+)\.") - 1
        (features, channels, *_), drawn = known["body.0.weight"], known[f"body.{last}.weight"][0]
        config = CompactConfig(features, last // 2 - 1, math.isqrt(drawn // 3))
        fits = channels == 3 and drawn == 3 * config.factor**2 and config.factor > 0 and last <= len(found)
    else:
        raise CheckpointError(
            f"{file} is no upscaler of Real-ESRGAN's family (RRDBNet, SRVGGNetCompact): it has only "
            f"{some(list(shapes)) or 'no tensors'}"
        )
    if not fits:
        raise CheckpointError(f"{file} is an upscaler of other pictures than RGB, or of an odd scale: not supported")
    return Part({}, str(file), _renamed(file, prefix, lambda name: places.get(name, name))), config


_UPSCALERS = {
    r"model\.0\.": "conv_first.",  # ESRGAN as first published
    r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.": r"body.\1.rdb\2.conv\3.",
    r"model\.1\.sub\.\d+\.(?=weight|bias)": "conv_body.",
    r"RRDB_trunk\.(\d+)\.RDB(\d)\.": r"body.\1.rdb\2.",  # BSRGAN
    r"trunk_conv\.": "conv_body.",
    r"upconv(\d)\.": r"conv_up\1.",
    r"HRconv\.": "conv_hr.",
}


def _upscaler_places(names: list[str]) -> dict[str, str]:
    """Name -> Real-ESRGAN's. In ESRGAN's own, the last layers are numbered with what has no weights between them."""
    numbers = sorted({int(found[1]) for name in names if (found := re.match(r"model\.(\d+)\.(?!sub)", name))})[1:]
    last = [f"conv_up{i}" for i in range(1, len(numbers) - 1)] + ["conv_hr", "conv_last"]
    ends = {rf"model\.{number}\.": f"{place}." for number, place in zip(numbers, last, strict=False)}
    places = {}
    for name in names:
        rules = ((re.match(pattern, name), pattern, new) for pattern, new in (_UPSCALERS | ends).items())
        rule = next(((pattern, new) for found, pattern, new in rules if found), None)
        places[name] = name if rule is None else re.sub(*rule, name, count=1)
    return places


def _renamed(file: Path, prefix: str, rename: Callable[[str], str]) -> Callable[[], Tensors]:
    """Reads a file's tensors whose names start with a prefix."""

    def tensors() -> Tensors:
        found, training = read_tensors(file, prefix)[0].items(), ("loss.", "model_ema.")
        found = {name.removeprefix(prefix): tensor for name, tensor in found}
        return {rename(n): t for n, t in found.items() if not n.startswith(training)}, {}

    return tensors


def _taesd(file: Path, shapes: dict[str, tuple[int, ...]]) -> Part | None:
    """A TAESD in one file, or in its author's two, of which either is named; None if it is none.

    The author numbers the decoder's layers from a clamp without weights, and diffusers does not.
    """
    sides = {}  # side -> its file, what the layers' numbers come behind, and the first layer's, which has weights
    for side, first in (("encoder", 0), ("decoder", 1)):
        for prefix, start in ((f"taesd_{side}.", first), (f"{side}.", first), (f"{side}.layers.", 0)):
            if f"{prefix}{start}.weight" in shapes:
                sides[side] = (file, prefix, start)
    if not sides and "3.conv.0.weight" in shapes:
        side, other = ("encoder", "decoder") if "0.weight" in shapes else ("decoder", "encoder")
        beside = file.with_name(file.name.replace(side, other))
        if beside == file or not beside.is_file():
            raise CheckpointError(f"{file} is the {side} of a TAESD alone; put taesd_{other}.safetensors beside it")
        sides = {side: (file, "", int(side == "decoder")), other: (beside, "", int(other == "decoder"))}
    if len(sides) < 2:
        return None

    def named(read: Callable[[Path, str], dict]) -> dict:
        out = {}
        for side, (where, prefix, start) in sides.items():
            for name, value in read(where, prefix).items():
                number, dot, rest = name.removeprefix(prefix).partition(".")
                out[f"{side}.layers.{int(number) - start}.{rest}" if number.isdecimal() else name] = value
        return out

    def sizes(where: Path, prefix: str) -> dict:
        return {name: shape for name, shape in read_header(where)[0].items() if name.startswith(prefix)}

    def tensors() -> Tensors:
        return named(lambda where, prefix: read_tensors(where, prefix)[0]), {}

    return Part(architecture.taesd(Shapes(file, "", named(sizes))), str(file), tensors)
