"""A whole checkpoint in one safetensors file, in the original layout, as model sites hand them out.

What it is is told by its tensors: the family by which parts there are, sizes by shapes. Heads, norms and activations
leave no trace in a tensor and are the family's. What the U-Net predicts leaves none either; see `_prediction_type`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from . import ldm, vocabulary
from .config import UNetConfig, VAEConfig
from .errors import CheckpointError
from .weights import read_tensors

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "clip", "open_clip"  # the two layouts of text encoders
_CROSS, _PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
_OPEN_CLIP_H_LAYERS = 23  # SD 2.x uses the last but one layer's output of 24, so the last is not loaded
_V, _EPSILON = "v_prediction", "epsilon"
_PREDICTIONS = {"v": _V, "v_prediction": _V, "v-prediction": _V, "velocity": _V, "epsilon": _EPSILON, "eps": _EPSILON}


class ModelWarning(UserWarning):
    """Something about a model had to be assumed."""


@dataclass(frozen=True)
class Family:
    """What the tensors of all its checkpoints have in common, and what they do not show.

    text: component -> the prefixes that its tensors may have, with their layout; head_size: of attention, or None where
    there are 8 heads everywhere.
    """

    name: str
    pipeline: str
    text: dict[str, dict[str, str]]
    head_size: int | None
    scaling_factor: float
    size: int


_SD = {"cond_stage_model.transformer.": CLIP, "cond_stage_model.model.": OPEN_CLIP}
_SD1 = Family("Stable Diffusion 1.x", "StableDiffusion", {"text_encoder": _SD}, None, 0.18215, 512)
_SD2 = Family("Stable Diffusion 2.x", "StableDiffusion", {"text_encoder": _SD}, 64, 0.18215, 768)
_XL_TEXT = {
    "text_encoder": {"conditioner.embedders.0.transformer.": CLIP},
    "text_encoder_2": {"conditioner.embedders.1.model.": OPEN_CLIP},
}
_XL = Family("SDXL", "StableDiffusionXL", _XL_TEXT, 64, 0.13025, 1024)
_REFINER_TEXT = {"text_encoder_2": {"conditioner.embedders.0.model.": OPEN_CLIP}}
_REFINER = Family("SDXL refiner", "StableDiffusionXLImg2Img", _REFINER_TEXT, 64, 0.13025, 1024)

_SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}

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
        self._inpaints = self._shape(f"{UNET}input_blocks.0.0.weight")[1] == 9
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

    def _shape(self, name: str) -> tuple[int, ...]:
        try:
            return self._shapes[name]
        except KeyError:
            raise CheckpointError(f"{self.path} lacks {name}, so its architecture cannot be told") from None

    def _count(self, pattern: str) -> int:
        """How many blocks there are, from the highest number that the pattern's group takes in the names."""
        found = (re.match(pattern, name) for name in self._shapes)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def _size(self) -> int:
        """Pixels that the U-Net was trained for."""
        return 512 if self._family is _SD2 and self._prediction == _EPSILON else self._family.size

    def _unet(self) -> dict:
        prefix = re.escape(UNET)
        blocks = self._count(rf"{prefix}input_blocks\.(\d+)\.")
        downs = [i for i in range(blocks) if f"{UNET}input_blocks.{i}.0.op.weight" in self._shapes]
        layers = (downs[0] if downs else blocks) - 1
        levels = len(downs) + 1
        if downs != [(layers + 1) * (level + 1) for level in range(levels - 1)] or blocks != levels * (layers + 1):
            raise CheckpointError(f"{self.path}: the U-Net's levels have different numbers of layers: not supported")
        channels, down, up, depths = [], [], [], []
        for level in range(levels):
            first, mirrored = 1 + level * (layers + 1), (levels - 1 - level) * (layers + 1)
            channels.append(self._shape(f"{UNET}input_blocks.{first}.0.out_layers.3.weight")[0])
            attends = f"{UNET}input_blocks.{first}.1.norm.weight" in self._shapes
            down.append((_CROSS if attends else _PLAIN)[0])
            up.insert(0, (_CROSS if f"{UNET}output_blocks.{mirrored}.1.norm.weight" in self._shapes else _PLAIN)[1])
            of_level = [f"input_blocks.{first + i}.1" for i in range(layers)]
            of_level += [f"output_blocks.{mirrored + i}.1" for i in range(layers + 1)]
            of_level += ["middle_block.1"] * (level == levels - 1)
            counts = {self._count(rf"{prefix}{re.escape(at)}\.transformer_blocks\.(\d+)\.") for at in of_level} - {0}
            if len(counts) > 1:
                raise CheckpointError(
                    f"{self.path}: attention layers of one level of the U-Net have {sorted(counts)} transformer "
                    "blocks; only equal numbers are supported"
                )
            depths.append(counts.pop() if counts else 1)
        context = [s[1] for n, s in self._shapes.items() if n.startswith(UNET) and n.endswith("attn2.to_k.weight")]
        if not context:
            raise CheckpointError(f"{self.path}: the U-Net has no cross-attention, so no prompt can be given to it")
        config = {
            "_class_name": "UNet2DConditionModel",
            "in_channels": self._shape(f"{UNET}input_blocks.0.0.weight")[1],
            "out_channels": self._shape(f"{UNET}out.2.weight")[0],
            "block_out_channels": channels,
            "layers_per_block": layers,
            "down_block_types": down,
            "up_block_types": up,
            "mid_block_type": None if not self._count(rf"{prefix}middle_block\.(\d+)\.") else "UNetMidBlock2DCrossAttn",
            "transformer_layers_per_block": depths,
            "cross_attention_dim": context[0],
            "use_linear_projection": self._family is not _SD1,
            "attention_head_dim": 8 if self._family.head_size is None else self._heads(channels),
            "sample_size": self._size() // self._factor,
        }
        if self._family in (_XL, _REFINER):
            added = self._shape(f"{UNET}label_emb.0.0.weight")[1]
            config |= {
                "addition_embed_type": "text_time",
                "projection_class_embeddings_input_dim": added,
                # beside the pooled text: original size, crop, and target size, or the refiner's aesthetic score
                "addition_time_embed_dim": (added - self._pooled) // (5 if self._family is _REFINER else 6),
            }
        return config

    def _heads(self, channels: Iterable[int]) -> list[int]:
        return [max(1, width // self._family.head_size) for width in channels]

    @cached_property
    def _pooled(self) -> int:
        """Width of the pooled text."""
        self.require("text_encoder_2")
        return self._shape(f"{self._part('text_encoder_2')[0]}text_projection")[1]

    @property
    def _factor(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** max(0, self._count(rf"{re.escape(VAE)}decoder\.up\.(\d+)\.") - 1) if self.has("vae") else 8

    def _vae(self) -> dict:
        levels = self._count(rf"{re.escape(VAE)}decoder\.up\.(\d+)\.")
        widths = [self._shape(f"{VAE}decoder.up.{level}.block.0.conv1.weight")[0] for level in range(levels)]
        return {
            "_class_name": "AutoencoderKL",
            "in_channels": self._shape(f"{VAE}encoder.conv_in.weight")[1],
            "out_channels": self._shape(f"{VAE}decoder.conv_out.weight")[0],
            "latent_channels": self._shape(f"{VAE}decoder.conv_in.weight")[1],
            "block_out_channels": widths,
            "layers_per_block": self._count(rf"{re.escape(VAE)}encoder\.down\.0\.block\.(\d+)\."),
            "use_quant_conv": f"{VAE}quant_conv.weight" in self._shapes,
            "use_post_quant_conv": f"{VAE}post_quant_conv.weight" in self._shapes,
            "mid_block_add_attention": f"{VAE}decoder.mid.attn_1.q.weight" in self._shapes,
            "scaling_factor": self._family.scaling_factor,
            "force_upcast": True,
            "sample_size": self._size(),
        }

    def _text(self, name: str) -> dict:
        prefix, layout = self._part(name)
        if layout == CLIP:
            inner = "text_model." if any(n.startswith(f"{prefix}text_model.") for n in self._shapes) else ""
            tokens, positions = (f"{inner}embeddings.{kind}_embedding.weight" for kind in ("token", "position"))
            layer, mlp = rf"{inner}encoder\.layers", f"{inner}encoder.layers.0.mlp.fc1.weight"
        else:
            tokens, positions = "token_embedding.weight", "positional_embedding"
            layer, mlp = r"transformer\.resblocks", "transformer.resblocks.0.mlp.c_fc.weight"
        vocabulary_size, width = self._shape(prefix + tokens)
        layers = self._count(rf"{re.escape(prefix)}{layer}\.(\d+)\.")
        config = {
            "architectures": ["CLIPTextModel"],
            "hidden_size": width,
            "intermediate_size": self._shape(prefix + mlp)[0],
            "num_hidden_layers": min(layers, _OPEN_CLIP_H_LAYERS) if self._family is _SD2 else layers,
            "num_attention_heads": max(1, width // 64),
            "vocab_size": vocabulary_size,
            "max_position_embeddings": self._shape(prefix + positions)[0],
            "hidden_act": "quick_gelu" if layout == CLIP and self._family is not _SD2 else "gelu",
            "eos_token_id": vocabulary.SIZE - 1,
        }
        if name == "text_encoder_2":
            config |= {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": self._pooled}
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
