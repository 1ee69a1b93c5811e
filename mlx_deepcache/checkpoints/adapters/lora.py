"""LoRA and its relatives: small changes to a checkpoint's weights, fused into them as they are loaded.

Read are the names of diffusers and PEFT, of kohya's scripts (which for SDXL has the original U-Net's names), of ComfyUI
and of LyCORIS (LoCon, LoHa, LoKr, full differences), and DoRA in each. What a change is, W' = W + scale * delta:

LoRA (Hu et al. 2022)         delta = alpha / rank * up @ down, with a third factor between them in some convolutions
LoHa (Hyeon-Woo et al. 2022)  delta = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)
LoKr (Yeh et al. 2024)        delta = alpha / rank * kron(w1, w2), of which each may be a product
DoRA (Liu et al. 2024)        delta = magnitude * (W + delta) / its norm - W, so that a scale of 0 leaves W as it is

The alpha of PEFT stands not beside the weights but in adapter_config.json, or in the metadata that diffusers writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ...errors import CheckpointError, UsageError
from ...fields import parse_json
from ...nets.unet_parts import UNetConfig
from ..families import SDXL, family_by
from ..folder import read_json
from ..original import names as ldm
from ..weights import PICKLES, conversion, read_tensors, some

# How a tensor's name ends, and what it is of its layer
_PARTS = {
    r"lora_down\.weight|lora_A(\.\w+)?\.weight|lora(_linear_layer)?\.down\.weight": "down",
    r"lora_up\.weight|lora_B(\.\w+)?\.weight|lora(_linear_layer)?\.up\.weight": "up",
    r"lora_B(\.\w+)?\.bias": "up_bias",
    r"lora_mid\.weight": "mid",
    r"lora_magnitude_vector(\.\w+)*": "magnitude",
    r"diff|w_norm": "diff",
    r"diff_b|b_norm": "bias",
    r"alpha|dora_scale|hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2)": "",  # named as it is
}

# Of which kind of change a part is; other kinds are named in their parts, and these go with several
_KINDS = {"down": "lora", "up": "lora", "mid": "lora", "up_bias": "lora"}
_KINDS |= dict.fromkeys(("alpha", "bias", "magnitude", "dora_scale"), "")

_ENDING = re.compile("(.+?)[._](?:" + "|".join(f"({pattern})" for pattern in _PARTS) + ")")

_UNSUPPORTED = {
    "OFT": r"oft_(blocks|diag|R)\b",
    "(IA)^3": r"\bon_input$|ia3_l",
    "GLoRA": r"\b[ab][12]\.weight$",
    "T-LoRA": r"\blambda_layer$",
    "AdaLoRA": r"\blora_E\b",
    "VeRA": r"\bvera_",
}

_BOTH = "base_model.model."  # PEFT's, of whatever net it wraps

# What a layer's name may start with, for each component
_PREFIXES = {
    "unet": ("unet.", "lora_unet.", "lycoris.", "", _BOTH, f"unet.{_BOTH}", "diffusion_model."),
    "text_encoder": (
        *("text_encoder.", "lora_te.", "lora_te1.", _BOTH, f"text_encoder.{_BOTH}"),
        *("text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
    ),
    "text_encoder_2": (
        *("text_encoder_2.", "lora_te2.", f"text_encoder_2.{_BOTH}", "text_encoders.clip_g.transformer."),
    ),
}

_METADATA = "lora_adapter_metadata"  # where diffusers writes PEFT's settings
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's, and diffusers'

# PEFT's settings, and the values of each with which a LoRA is what its factors say
_PLAIN = {
    "peft_type": ("LORA", "LOHA", "LOKR", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the model too
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
}


@dataclass(frozen=True)
class Place:
    """A layer that can be changed: where it is, and its weight's shape in PyTorch's layout."""

    component: str
    layer: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Lora:
    """A file's changes, by component and layer, and how strongly they are wanted."""

    file: Path
    scale: float
    changes: dict[str, dict[str, dict[str, mx.array]]]


def places(modules: dict[str, nn.Module], config: UNetConfig) -> dict[str, Place]:
    """All names, with dots as underscores, by which a file may call a layer of these components -> the layer.

    modules: the U-Net and the text encoders, without weights; config: the U-Net's.
    """
    original = {new: old for old, new in ldm.unet_places(config).items()}
    found = {}
    for component, module in modules.items():
        for layer, child in module.named_modules():
            if "weight" not in child or not layer:
                continue
            names = {layer}
            if component == "unet":
                names |= {ldm.rename(f"{layer}.weight", original).removesuffix(".weight")}
                names |= {re.sub(r"\.to_out\.0$", ".to_out", name) for name in names}
            else:
                names |= {re.sub(r"\b([qkv])_proj$", r"to_\1", layer), re.sub(r"\bout_proj$", "to_out", layer)}
                names |= {f"text_model.{name}" for name in names}
            place = Place(component, layer, _torch_layout(child.weight).shape)
            for prefix in _PREFIXES[component]:
                found |= {_flat(prefix + name): place for name in names}
    return found


def read(file: Path, scale: float, known: dict[str, Place]) -> Lora:
    """A LoRA for a checkpoint. file: itself, or the folder that it is in, as PEFT and diffusers write it; known: see
    `places`.

    Raises:
        UsageError: the scale is no finite number.
        CheckpointError: the file is damaged or no LoRA, or of a kind or with settings that are not supported, or it
            changes layers that the checkpoint does not have.
    """
    if not math.isfinite(scale):
        raise UsageError(f"a LoRA's scale should be a finite number, got {scale}")
    file = _file_in(file) if file.is_dir() else file
    tensors, metadata = read_tensors(file)
    settings = _settings(file, metadata, tensors)
    if settings.get("", {}).get("base_model_class") == "CLIPTextModelWithProjection":
        components = {place.component for place in known.values()}
        second = "text_encoder_2." if "text_encoder_2" in components else ""
        tensors = {name.replace(_BOTH, second, 1) if second else name: tensor for name, tensor in tensors.items()}
    layers: dict[str, dict[str, mx.array]] = {}
    odd = []
    for name, tensor in tensors.items():
        if (match := _ENDING.fullmatch(name)) is None:
            odd.append(name)
            continue
        layer = match[1]
        layers.setdefault(layer, {})[_part(name.removeprefix(layer)[1:])] = tensor
    if odd:
        for kind, pattern in _UNSUPPORTED.items():
            if found := [name for name in odd if re.search(pattern, name)]:
                raise CheckpointError(
                    f"{file} is of kind {kind} ({found[0]}), which is not supported, only LoRA, LoCon, LoHa, LoKr, "
                    "full differences and DoRA"
                )
        what = "holds" if layers else "is no LoRA: it holds"
        raise CheckpointError(f"{file} {what} {some(odd)}, which is no part of any known kind of LoRA")
    if not layers:
        raise CheckpointError(f"{file} is no LoRA: it is empty")
    hint = _hint(layers, {place.shape[1] for place in known.values() if place.layer.endswith("attn2.to_k")})
    if lost := [name for name in layers if _flat(name) not in known]:
        raise CheckpointError(
            f"{file}: {len(lost)} of its {len(layers)} layers match nothing in this model, such as {some(lost)}{hint}"
        )
    changes: dict[str, dict[str, dict[str, mx.array]]] = {}
    for name, parts in layers.items():
        place = known[_flat(name)]
        of_component = changes.setdefault(place.component, {})
        if place.layer in of_component:
            raise CheckpointError(f"{file} changes {place.component}.{place.layer} twice, the second time as {name}")
        of_component[place.layer] = parts
        if bad := [part for part, tensor in parts.items() if not _possible(part, tensor)]:
            raise CheckpointError(f"{file}: {name}'s {bad[0]} should not have shape {tuple(parts[bad[0]].shape)}")
        if "alpha" not in parts:
            parts |= _told(settings, file, place, name, parts)
        try:
            if len(kinds := {_KINDS.get(part, part.partition("_")[0]) for part in parts} - {""}) > 1:
                raise CheckpointError(f"{file}: {name} is changed in several ways at once ({', '.join(sorted(kinds))})")
            changed(mx.zeros(place.shape), parts, scale)  # not computed, but its shapes are
            for bias in parts.keys() & {"bias", "up_bias"}:
                parts[bias].reshape(place.shape[:1])
        except (KeyError, ValueError) as error:
            if isinstance(error, KeyError):
                raise CheckpointError(f"{file} is not whole: {name} lacks its {error.args[0]}") from None
            shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in parts.items() if tensor.ndim)
            raise CheckpointError(
                f"{file}: {name} ({shapes}) does not fit this model's layer, which has shape {place.shape}{hint}"
            ) from None
    return Lora(file, scale, changes)


def fuse(module: nn.Module, component: str, loras: Sequence[Lora]) -> nn.Module:
    """Change a component's weights for good, all LoRAs one after the other, in float32.

    Quantized layers are made whole, changed, and quantized again in the same way.
    """
    layers = dict(module.named_modules())
    wanted: dict[str, list[tuple[dict[str, mx.array], float]]] = {}
    for lora in loras:
        for name, parts in lora.changes.get(component, {}).items() if lora.scale else ():
            wanted.setdefault(name, []).append((parts, lora.scale))
    for name, changes in wanted.items():
        layer = layers[name]
        quantized = isinstance(layer, nn.QuantizedLinear)
        how = {"group_size": layer.group_size, "bits": layer.bits} if quantized else {}
        old = mx.dequantize(layer.weight, layer.scales, layer.biases, **how) if quantized else layer.weight
        weight = _torch_layout(old.astype(mx.float32))
        for parts, scale in changes:
            weight = changed(weight, parts, scale)
            if (bias := _bias(parts)) is not None:
                if isinstance(layer, nn.Embedding):
                    raise CheckpointError(f"a LoRA changes the bias of {component}.{name}, which can have none")
                old_bias = layer.bias if "bias" in layer else mx.zeros(bias.shape, old.dtype)
                layer.bias = (old_bias.astype(mx.float32) + scale * bias).astype(old_bias.dtype)
        weight = _own_layout(weight).astype(old.dtype)
        if quantized:
            layer.weight, layer.scales, layer.biases = mx.quantize(weight, **how)
        else:
            layer.weight = mx.contiguous(weight)
        mx.eval(layer.parameters())  # one layer at a time, so that not all are in memory twice
    return module


# One layer
def _possible(part: str, tensor: mx.array) -> bool:
    """Whether a part may have such a shape in any layer."""
    return tensor.size == 1 if part == "alpha" else tensor.ndim > 0 < tensor.size


def changed(weight: mx.array, parts: dict[str, mx.array], scale: float) -> mx.array:
    """weight: (out, in) or (out, in, height, width), or with frames before these, float32 -> the same with one change
    made."""
    parts = {name: part.astype(mx.float32) for name, part in parts.items()}
    if parts.keys() <= {"bias", "alpha"}:
        return weight
    delta = _delta(parts).reshape(weight.shape)
    magnitude = parts.get("magnitude", parts.get("dora_scale"))
    if magnitude is None:
        return weight + scale * delta
    changed = weight + delta
    of_inputs = "dora_scale" in parts and magnitude.shape[0] == 1 != weight.shape[0]  # as LyCORIS had it at first
    axes = [axis for axis in range(weight.ndim) if axis != int(of_inputs)]
    norm = mx.sqrt((changed * changed).sum(axis=axes, keepdims=True))
    changed = changed * (magnitude.reshape(norm.shape) / norm)
    return changed if scale == 1 else weight + scale * (changed - weight)


def _bias(parts: dict[str, mx.array]) -> mx.array | None:
    """What is added to the bias at scale 1."""
    if "up_bias" not in parts:
        return parts.get("bias")
    factor = parts["alpha"].astype(mx.float32) / len(parts["down"]) if "alpha" in parts else 1.0
    return parts["up_bias"].astype(mx.float32) * factor + parts.get("bias", 0.0)


def _delta(parts: dict[str, mx.array]) -> mx.array:
    """What is added at scale 1, with the elements in the order of PyTorch's layout."""
    if "diff" in parts:
        return parts["diff"]
    if any(name.startswith("hada") for name in parts):
        rank = parts["hada_w1_b"].shape[0]
        one, two = (_product(parts, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
        delta = one * two
    elif any(name.startswith("lokr") for name in parts):
        factored = [name for name in ("lokr_w1_b", "lokr_w2_b") if name in parts]
        rank = parts[factored[-1]].shape[0] if factored else None
        one, two = (
            parts[f"lokr_w{i}"]
            if f"lokr_w{i}" in parts
            else _product(parts, f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}")
            for i in (1, 2)
        )
        delta = mx.kron(one.reshape(*one.shape, *[1] * (two.ndim - one.ndim)), two)
    else:
        down, up = parts["down"], parts["up"]
        rank = down.shape[0]
        if "mid" in parts:
            delta = mx.einsum("op,pqkl,qi->oikl", _matrix(up), parts["mid"], _matrix(down))
        else:
            delta = _matrix(up) @ _matrix(down)
    if "alpha" in parts and rank is not None:  # LoKr of two whole factors has no rank, and its alpha no meaning
        delta = delta * (parts["alpha"] / rank)
    return delta


def _product(parts: dict[str, mx.array], a: str, b: str, core: str) -> mx.array:
    """Two factors' product, or, in LyCORIS's small convolutions, of two with a core of (rank, rank, height, width)."""
    if core in parts:
        return mx.einsum("ijkl,ip,jr->prkl", parts[core], parts[a], parts[b])
    return _matrix(parts[a]) @ _matrix(parts[b])


def _matrix(tensor: mx.array) -> mx.array:
    return tensor.reshape(tensor.shape[0], -1)


def _torch_layout(weight: mx.array) -> mx.array:
    """Of a convolution over frames as well, which is one over three axes there."""
    if weight.ndim == 3:
        return weight.swapaxes(1, 2)[..., None, None]
    return weight.transpose(0, 3, 1, 2) if weight.ndim == 4 else weight


def _own_layout(weight: mx.array) -> mx.array:
    if weight.ndim == 5:
        return weight[..., 0, 0].swapaxes(1, 2)
    return weight.transpose(0, 2, 3, 1) if weight.ndim == 4 else weight


# Names
def _flat(name: str) -> str:
    return name.replace(".", "_").replace("_processor_", "_")


def _part(ending: str) -> str:
    return next(part or ending for pattern, part in _PARTS.items() if re.fullmatch(pattern, ending))


def _hint(layers: dict[str, dict[str, mx.array]], widths: set[int]) -> str:
    """Which families a file and a model seem to be of, as the end of a message."""
    theirs = {
        parts[part].shape[1]
        for name, parts in layers.items()
        for part in ("down", "hada_w1_b")
        if part in parts and re.search(r"attn2[._](processor\.)?to_[kv]$", name)
    }
    family = family_by(next(iter(theirs), 0))
    if family is None and any(name.startswith(("lora_te2_", "text_encoder_2.")) for name in layers):
        family = SDXL
    if family is None:
        return f"; it was made for another model, with a context of width {theirs.pop()}" if theirs else ""
    known = ((width, family_by(width)) for width in widths)
    own = next((own.name if own else f"one with a context of width {width}" for width, own in known), None)
    return f"; it seems made for {family.name}" + (f", and this model is {own}" if own else "")


# What PEFT says beside the weights
def _file_in(folder: Path) -> Path:
    """The LoRA in a folder."""
    names = sorted(path.name for path in folder.iterdir())
    files = [name for name in names if name.endswith(".safetensors")]
    known = [name for name in _FILES if name in files] or files
    if len(known) < 1 or (len(known) > 1 and known[0] not in _FILES):
        pickles = [name for name in names if name.endswith(PICKLES)]
        got = some(files) if files else f"{some(pickles)}; {conversion(folder / pickles[0])}" if pickles else "none"
        raise CheckpointError(f"{folder} should hold one LoRA, such as {' or '.join(_FILES)}, got {got}")
    return folder / known[0]


def _settings(file: Path, metadata: dict[str, str], names: Iterable[str]) -> dict[str, dict]:
    """PEFT's settings by component, "" for whichever it is.

    Raises:
        CheckpointError: they cannot be read or honoured, or lack where the weights do not say how strong they are.
    """
    beside, wrapped = file.with_name("adapter_config.json"), any(name.startswith(_BOTH) for name in names)
    if _METADATA in metadata:
        try:
            said = parse_json(metadata[_METADATA])
            settings = {name: _starting(said, f"{name}.") for name in _PREFIXES if _starting(said, f"{name}.")}
            settings[""] = {key: value for key, value in said.items() if key.partition(".")[0] not in _PREFIXES}
        except (ValueError, AttributeError, RecursionError):
            got = repr(metadata[_METADATA][:60])
            raise CheckpointError(f"{file}: its metadata {_METADATA} cannot be read: {got}") from None
    elif beside.is_file() and (wrapped or file.name == _FILES[0]):
        settings = {"": read_json(beside)}
        mapping = settings[""].get("auto_mapping")
        settings[""] |= {"base_model_class": mapping.get("base_model_class")} if isinstance(mapping, dict) else {}
    elif wrapped and not any(name.endswith(".alpha") for name in names):
        raise CheckpointError(
            f"{file} was written by PEFT, and how strong it is stands in {beside.name}; put that beside it"
        )
    else:
        return {}
    for said in settings.values():
        for key, allowed in _PLAIN.items():
            if key in said and said[key] not in allowed:
                raise CheckpointError(f"{file}: a LoRA with {key} = {said[key]!r} is not supported")
    return settings


def _starting(said: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in said.items() if key.startswith(prefix)}


def _told(settings: dict[str, dict], file: Path, place: Place, name: str, parts: dict[str, mx.array]) -> dict:
    """What is to be put beside a layer's parts so that they are as strong as PEFT has them."""
    said = settings.get(place.component, settings.get(""))
    factors = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    own = next((len(parts[factor]) for factor in factors if factor in parts), None)
    if not said or (own is None and "lokr_w1" not in parts):
        return {}
    layer = name.removeprefix(f"{place.component}.").removeprefix(_BOTH)
    try:
        rank = own or _of_layer(said, "rank_pattern", layer, said.get("r", 8))
        alpha = _of_layer(said, "alpha_pattern", layer, said.get("lora_alpha", said.get("alpha", rank)))
        strength = float(alpha) / (rank**0.5 if said.get("use_rslora") else rank)  # Kalajdzievski 2023
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, OverflowError, re.error):
        raise CheckpointError(
            f"{file}: PEFT's settings for {layer} should give a rank and an alpha, as numbers"
        ) from None
    if own is None:  # two whole factors, which PEFT scales and LyCORIS does not
        return {"lokr_w1": parts["lokr_w1"] * strength}
    return {"alpha": mx.array(strength * rank)}


def _of_layer(said: dict, patterns: str, layer: str, usual: float) -> float:
    """The first that fits counts."""
    fitting = (value for key, value in (said.get(patterns) or {}).items() if re.fullmatch(rf"(.*\.)?({key})", layer))
    return next(fitting, usual)
