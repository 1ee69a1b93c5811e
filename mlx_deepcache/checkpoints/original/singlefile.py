"""A whole checkpoint in one safetensors file, in the original layout, as model sites hand them out.

What it is is told by its tensors: the family by which parts there are, sizes by shapes (see `architecture`). What the
U-Net predicts leaves no trace in a tensor; see `_prediction_type`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from ...errors import CheckpointError
from ...nets.autoencoder import VAEConfig
from ...nets.unet_parts import UNetConfig
from .. import tokenizer as vocabulary
from ..families import _OPEN_CLIP_H_LAYERS, _REFINER, _SCHEDULER, _SD1, _SD2, _XL, CLIP, Family
from ..weights import read_tensors
from . import names as ldm
from . import shapes as architecture
from .shapes import Shapes

UNET, VAE = "model.diffusion_model.", "first_stage_model."


_V, _EPSILON = "v_prediction", "epsilon"


_PREDICTIONS = {"v": _V, "v_prediction": _V, "v-prediction": _V, "velocity": _V, "epsilon": _EPSILON, "eps": _EPSILON}


class ModelWarning(UserWarning):
    """Something about a model had to be assumed."""


# What a file may be that is no checkpoint: (a pattern in its tensors' names, what it is and what to do)
_NO_CHECKPOINT = (
    (r"lora_(down|up|A|B)\b|lora[._](down|up)\.|hada_w1|lokr_w", "is a LoRA; give it to --lora, and a checkpoint here"),
    (r"^control_model\.|^controlnet_", "is a ControlNet, which steers a checkpoint and draws nothing by itself"),
    (r"^(emb_params|clip_[lg]|string_to_param)$", "is a textual inversion; give it to --embedding"),
    (r"joint_blocks|double_blocks|double_stream|^transformer_blocks", "is of another family than Stable Diffusion's"),
    (r"^(down_blocks|text_model|encoder\.layers|embeddings)\.", "is one part of a checkpoint; name its whole folder"),
    (r"^(encoder|decoder)\.", "is a VAE alone"),
)


class SingleFile:
    """The source of a checkpoint's parts (see `sources.Source`) that one file is."""

    def __init__(self, path: Path, prediction_type: str | None = None):
        """prediction_type: what the U-Net predicts, if not what the file says.

        Raises:
            CheckpointError: the file is damaged, or no checkpoint, or of an unknown kind.
        """
        self.path = path
        tensors, self._metadata = read_tensors(path)
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._family = self._told_apart()
        said = prediction_type or _prediction_type(self._metadata, self._shapes)
        self._inpaints = self._shapes[f"{UNET}input_blocks.0.0.weight"][1] == 9
        if said is None and self._family is _SD2 and not self._inpaints:
            warnings.warn(
                f"{path} does not say whether it predicts noise or v, and its tensors cannot tell; taken for v, at "
                "768 x 768 pixels. If its pictures are noise, pass --prediction-type epsilon (512 x 512 pixels)",
                ModelWarning,
                stacklevel=4,
            )
            said = _V
        self._prediction = said or _EPSILON

    # What a source answers

    @cached_property
    def index(self) -> dict:
        """As model_index.json would have it."""
        pipeline = self._family.pipeline + "Inpaint" * self._inpaints + "Pipeline"
        parts = {name: ["transformers", "CLIPTextModel"] for name in self._family.text if name == "text_encoder"}
        if "text_encoder_2" in self._family.text:
            parts["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
            parts["force_zeros_for_empty_prompt"] = self._family is _XL
        if self._family is _REFINER:
            parts |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
        parts |= {n.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for n in self._family.text}
        return {
            "_class_name": pipeline,
            "scheduler": ["diffusers", self.config("scheduler")["_class_name"]],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            **parts,
        }

    def has(self, name: str) -> bool:
        """Whether a component is in the file; a scheduler and tokenizers need not be."""
        if name in ("unet", "vae") or name in self._family.text:
            return self._part(name) is not None
        return name == "scheduler" or name.replace("tokenizer", "text_encoder") in self._family.text

    def require(self, name: str) -> None:
        """Raises CheckpointError if a component lacks."""
        if not self.has(name):
            prefixes = {"unet": [UNET], "vae": [VAE]}.get(name) or list(self._family.text.get(name, {}))
            raise CheckpointError(
                f"{self.path} is no whole checkpoint: it has the U-Net of {self._family.name}, but lacks the {name} "
                f"({' or '.join(f'{prefix}*' for prefix in prefixes)}); get a file with all parts in it"
            )

    def config(self, name: str) -> dict:
        """A component's config as diffusers and transformers write it."""
        if name == "scheduler":
            return self._scheduler()
        self.require(name)
        return {"unet": self._unet, "vae": self._vae}.get(name, lambda: self._text(name))()

    def tensors(self, name: str) -> tuple[dict[str, mx.array], dict[str, str]]:
        """A component's tensors by diffusers' names, in PyTorch's layout, read when first used; and metadata."""
        self.require(name)
        prefix, layout = self._part(name)
        found = {n.removeprefix(prefix): t for n, t in read_tensors(self.path)[0].items() if n.startswith(prefix)}
        if name == "unet":
            places = ldm.unet_places(UNetConfig.from_dict(self.config("unet")))
            return {ldm.rename(n, places): t for n, t in found.items()}, {}
        if name == "vae":
            places = ldm.vae_places(VAEConfig.from_dict(self.config("vae")))
            training = ("loss.", "model_ema.")
            return {ldm.rename(n, places): t for n, t in found.items() if not n.startswith(training)}, {}
        if layout == CLIP:  # its projection is a part of CLIP that SD does not use
            return {n: t for n, t in found.items() if n not in ("text_projection.weight", "logit_scale")}, {}
        return _from_open_clip(found, self._text(name)["num_hidden_layers"], name == "text_encoder_2"), {}

    def where(self, name: str) -> str:
        """For messages."""
        return f"{self.path} ({name})"

    def tokenizer(self, name: str):
        """transformers' CLIPTokenizer."""
        return vocabulary.tokenizer(self._pad(name))

    def write_tokenizer(self, name: str, folder: Path) -> None:
        """Its files, into a folder that exists."""
        vocabulary.write(folder, self._pad(name))

    # What the tensors say

    def _told_apart(self) -> Family:
        names = self._shapes
        if f"{UNET}input_blocks.0.0.weight" not in names:
            for pattern, what in _NO_CHECKPOINT:
                if any(re.search(pattern, name) for name in names):
                    raise CheckpointError(f"{self.path} {what}")
            raise CheckpointError(
                f"{self.path} is no Stable Diffusion checkpoint: it has no tensors {UNET}input_blocks.*, only "
                f"{', '.join(list(names)[:3]) or 'none'}"
            )
        if {"edm_mean", "edm_vpred.sigma_max"} & names.keys():
            raise CheckpointError(f"{self.path} has an EDM noise schedule (Playground v2.5, CosXL): not supported")
        if f"{UNET}label_emb.0.0.weight" in names:
            both = any(name.startswith("conditioner.embedders.1.") for name in names)
            if both or any(name.startswith("conditioner.embedders.0.transformer.") for name in names):
                return _XL
            if any(name.startswith("conditioner.embedders.0.model.") for name in names):
                return _REFINER
            return _XL  # the U-Net alone; `require` says what lacks
        linear = next((len(shape) == 2 for name, shape in names.items() if name.endswith(".1.proj_in.weight")), False)
        return _SD2 if linear else _SD1

    def _part(self, name: str) -> tuple[str, str] | None:
        """Prefix of a component's tensors, and layout; None if there are none."""
        choices = {"unet": {UNET: ""}, "vae": {VAE: ""}}.get(name) or self._family.text[name]
        return next(
            (item for item in choices.items() if any(n.startswith(item[0]) for n in self._shapes)),
            None,
        )

    def _shapes_of(self, name: str) -> Shapes:
        return Shapes(self.path, self._part(name)[0], self._shapes)

    def _size(self) -> int:
        """Pixels that the U-Net was trained for."""
        return 512 if self._family is _SD2 and self._prediction == _EPSILON else self._family.size

    def _unet(self) -> dict:
        family, shapes = self._family, self._shapes_of("unet")
        config = architecture.unet(shapes, head_size=family.head_size, linear=family is not _SD1)
        if family in (_XL, _REFINER):
            added = shapes["label_emb.0.0.weight"][1]
            # beside the pooled text: original size, crop, and target size, or the refiner's aesthetic score
            numbers = 5 if family is _REFINER else 6
            config |= {
                "addition_embed_type": "text_time",
                "projection_class_embeddings_input_dim": added,
                "addition_time_embed_dim": (added - self.config("text_encoder_2")["projection_dim"]) // numbers,
            }
        factor = VAEConfig.from_dict(self._vae()).factor if self.has("vae") else 8
        return config | {"sample_size": self._size() // factor}

    def _vae(self) -> dict:
        own = {"scaling_factor": self._family.scaling_factor, "force_upcast": True, "sample_size": self._size()}
        return architecture.vae(self._shapes_of("vae")) | own

    def _text(self, name: str) -> dict:
        shapes, layout = self._shapes_of(name), self._part(name)[1]
        config = architecture.clip(shapes) if layout == CLIP else architecture.open_clip(shapes)
        config["hidden_act"] = "quick_gelu" if layout == CLIP and self._family is not _SD2 else "gelu"
        config["eos_token_id"] = vocabulary.SIZE - 1
        if self._family is _SD2:
            config["num_hidden_layers"] = min(config["num_hidden_layers"], _OPEN_CLIP_H_LAYERS)
        if name == "text_encoder_2":
            config["architectures"] = ["CLIPTextModelWithProjection"]
            config["projection_dim"] = shapes["text_projection"][1]
        return config

    def _pad(self, name: str) -> str:
        """The padding token of a tokenizer: OpenCLIP's is token 0."""
        return "!" if name == "tokenizer_2" or self._family is _SD2 else vocabulary.END

    def _scheduler(self) -> dict:
        """The scheduler of the family's own repositories, which is what diffusers gives a single file."""
        kind = "PNDMScheduler"
        if self._family in (_XL, _REFINER):
            kind = "EulerDiscreteScheduler"
        elif self._family is _SD2 and self._prediction == _V:
            kind = "DDIMScheduler"
        config = {"_class_name": kind, "prediction_type": self._prediction, **_SCHEDULER}
        if "ztsnr" in self._shapes or _true(self._metadata.get("ss_zero_terminal_snr")):
            # the last level is pure noise, and drawing must start there (Lin et al. 2024, sections 3.1 and 3.3)
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            config["_class_name"] = "DDIMScheduler" if kind == "PNDMScheduler" else kind
        return config


def _prediction_type(metadata: dict[str, str], names: Iterable[str]) -> str | None:
    """What the U-Net predicts, if a marker tensor or the metadata say so: those of Stability's model spec
    (`modelspec.prediction_type`, `modelspec.architecture`), or of kohya's scripts (`ss_v_parameterization`)."""
    if "v_pred" in names:
        return _V
    if (said := _PREDICTIONS.get(str(metadata.get("modelspec.prediction_type")).lower())) is not None:
        return said
    if "ss_v_parameterization" in metadata:
        return _V if _true(metadata["ss_v_parameterization"]) else _EPSILON
    architecture = str(metadata.get("modelspec.architecture"))
    if "v2-768-v" in architecture:
        return _V
    return _EPSILON if "v2-512" in architecture else None


def _true(text: str | None) -> bool:
    return str(text).lower() in ("true", "1")


def _from_open_clip(tensors: dict[str, mx.array], layers: int, projects: bool) -> dict[str, mx.array]:
    """OpenCLIP's text encoder as transformers has it: q, k and v apart, the projection as a linear layer's weight."""
    out = {}
    for old, tensor in tensors.items():
        name = ldm.rename_open_clip(old)
        number = re.match(r"encoder\.layers\.(\d+)\.", name)
        if old == "logit_scale" or (number and int(number[1]) >= layers):
            continue
        if old == "text_projection":
            if projects:
                out[name] = tensor.T
        elif (kind := name.rpartition(".")[2]).startswith("in_proj_"):
            for part, piece in zip("qkv", mx.split(tensor, 3), strict=True):
                out[name.replace(kind, f"{part}_proj.{kind.removeprefix('in_proj_')}")] = piece
        else:
            out[name] = tensor
    return out
