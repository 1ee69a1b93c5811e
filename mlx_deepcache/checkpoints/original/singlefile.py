"""A whole checkpoint in one safetensors file, in the original layout, as model sites hand them out.

What it is is told by its tensors: the family by which parts there are, sizes by shapes (see `architecture`). What the
U-Net predicts leaves no trace in a tensor; see `_prediction_type`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path

import mlx.core as mx

from ...errors import CheckpointError, called
from ...nets.autoencoder import VAEConfig
from ...nets.temporal_vae import TemporalVAEConfig
from ...nets.unet_parts import UNetConfig
from ...nets.vq import VQConfig
from .. import tokenizer as vocabulary
from ..families import CLIP, EPSILON, LDM, LDM_CLASS, SVD, Family, V, family_of
from ..folder import FLAT, Part
from ..weights import read_header, read_tensors
from . import names as ldm
from . import shapes as architecture
from .shapes import Shapes

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# Of Stable Video Diffusion's files: CLIP's encoder of pictures, and the VAE's encoder, of which `VAE` has the decoder
VISION, VAE_ENCODER = "conditioner.embedders.0.open_clip.model.visual.", "conditioner.embedders.3.encoder."
LABELS = "cond_stage_model.embedding."  # of classes
TIME = ".time_stack."  # in the names of layers over frames
_PREDICTIONS = {"v": V, "v_prediction": V, "v-prediction": V, "velocity": V, "epsilon": EPSILON, "eps": EPSILON}

# All families'; the class is the family's, see `Family.variants`
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


_UNETS = {SVD.name: "UNetSpatioTemporalConditionModel", LDM.name: FLAT}  # of all others UNet2DConditionModel
_TOLD = ("fps", "motion_bucket", "noise_aug")  # the numbers that a U-Net of videos reads


class ModelWarning(UserWarning):
    """Something about a model had to be assumed."""


# What a file may be that is no checkpoint: (a pattern in its tensors' names, what it is and what to do)
_NO_CHECKPOINT = (
    (r"lora_(down|up|A|B)\b|lora[._](down|up)\.|hada_w1|lokr_w", "is a LoRA; give it to {lora}, and a checkpoint here"),
    (r"^control_model\.|^controlnet_", "is a ControlNet; give it to {controlnet}, and a checkpoint here"),
    (r"^(emb_params|clip_[lg]|string_to_param)$", "is a textual inversion; give it to {embedding}"),
    (r"joint_blocks|double_blocks|double_stream|^transformer_blocks", "is of another family than Stable Diffusion's"),
    (r"^(down_blocks|text_model|encoder\.layers|embeddings)\.", "is one part of a checkpoint; name its whole folder"),
    (r"^(taesd_)?(encoder|decoder)\.", "is a VAE alone; give it to {vae}, and a checkpoint here"),
)


def is_checkpoint(file: Path) -> bool:
    """Whether a file holds a U-Net, as a whole checkpoint does; raises CheckpointError if it cannot be read."""
    return f"{UNET}input_blocks.0.0.weight" in read_header(file)[0]


class SingleFile:
    """The source of a checkpoint's parts (see `folder.Source`) that one file is."""

    def __init__(self, path: Path, prediction_type: str | None = None):
        """prediction_type: what the U-Net predicts, if not what the file says.

        Raises:
            CheckpointError: the file is damaged, or no checkpoint, or of an unknown kind.
        """
        self.path = path
        self._shapes, _, self._metadata = read_header(path)
        self._family = self._told_apart()
        self._inpaints = self._shapes_of("unet")["input_blocks.0.0.weight"][1] == 9
        variants = self._family.variants
        said = prediction_type or _prediction_type(self._metadata, self._shapes)
        if said is None and len(variants) > 1 and not self._inpaints:
            warnings.warn(
                f"{path} does not say whether it predicts noise or v, and its tensors cannot tell; taken for v, at "
                "768 x 768 pixels. If its pictures are noise, pass "
                f"{called('prediction_type', 'epsilon')} (512 x 512 pixels)",
                ModelWarning,
                stacklevel=4,
            )
        usual = next(iter(variants))
        self._prediction = said or (EPSILON if self._inpaints else usual)
        self._size, self._sampler = variants.get(self._prediction, variants[usual])

    # What a source answers

    @cached_property
    def index(self) -> dict:
        """As model_index.json would have it."""
        task = "Inpaint" if self._inpaints else "Img2Img" if self._family.refines else ""
        parts = {}
        for name, encoder in self._family.text.items():
            parts[name] = ["transformers", "CLIPTextModel" + "WithProjection" * encoder.projects]
            parts[encoder.tokenizer] = ["transformers", "CLIPTokenizer"]
        if self._family.sees is not None:
            parts[self._family.sees] = ["transformers", "CLIPVisionModelWithProjection"]
        if self._family.labelled is not None:
            parts[self._family.labelled] = ["mlx_deepcache", "LabelEmbedding"]
        return {
            "_class_name": f"{self._family.pipeline}{task}Pipeline",
            "scheduler": ["diffusers", self.scheduler()["_class_name"]],
            "unet": ["diffusers", _UNETS.get(self._family.name, "UNet2DConditionModel")],
            "vae": ["diffusers", "AutoencoderKLTemporalDecoder" if self._video else self._vae_class],
            **self._family.index,
            **parts,
        }

    def part(self, name: str) -> Part:
        """A component; raises CheckpointError if it lacks."""
        configs = {"unet": self._unet, "vae": self._vae, SVD.sees: self._vision, LDM_CLASS.labelled: self._labels}
        config = configs.get(name, partial(self._text, name))()
        return Part(config, f"{self.path} ({name})", partial(self._tensors, name, config))

    def scheduler(self) -> dict:
        """The scheduler of the family's own repositories, which is what diffusers gives a single file."""
        config = {"_class_name": self._sampler, "prediction_type": self._prediction, **_SCHEDULER}
        config |= self._family.schedule
        if "ztsnr" in self._shapes or _true(self._metadata.get("ss_zero_terminal_snr")):
            # the last level is pure noise, and drawing must start there (Lin et al. 2024, sections 3.1 and 3.3)
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            if self._sampler == "PNDMScheduler":
                config["_class_name"] = "DDIMScheduler"
        return config

    def tokenizer(self, name: str) -> vocabulary.CLIPTokenizer:
        """CLIP's own."""
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
                    names = {"lora": "loras", "controlnet": "controls", "embedding": "embeddings", "vae": "vae"}
                    what = what.format(**{field: called(option) for field, option in names.items()})
                    raise CheckpointError(f"{self.path} {what}")
            raise CheckpointError(
                f"{self.path} is no Stable Diffusion checkpoint: it has no tensors {UNET}input_blocks.*, only "
                f"{', '.join(list(names)[:3]) or 'none'}"
            )
        if {"edm_mean", "edm_vpred.sigma_max"} & names.keys():
            raise CheckpointError(f"{self.path} has an EDM noise schedule (Playground v2.5, CosXL): not supported")
        if any(name.startswith(UNET) and TIME in name for name in names):
            return SVD
        if f"{LABELS}weight" in names:
            return LDM_CLASS
        if any(name.startswith(UNET) and name.endswith(".qkv.weight") for name in names):
            return LDM
        linear = next((len(shape) == 2 for name, shape in names.items() if name.endswith(".1.proj_in.weight")), False)

        def fits(family: Family) -> bool:
            return any(self._starts(prefix) for encoder in family.text.values() for prefix in encoder.prefixes)

        return family_of(f"{UNET}label_emb.0.0.weight" in names, linear, fits)

    def _starts(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._shapes)

    def _prefix(self, name: str) -> str:
        """What the names of a component's tensors start with; raises CheckpointError if there are none."""
        known = {"unet": (UNET,), "vae": (VAE,), SVD.sees: (VISION,), LDM_CLASS.labelled: (LABELS,)}
        prefixes = known[name] if name in known else tuple(self._family.text[name].prefixes)
        if (prefix := next(filter(self._starts, prefixes), None)) is None:
            raise CheckpointError(
                f"{self.path} is no whole checkpoint: it has the U-Net of {self._family.name}, but lacks the {name} "
                f"({' or '.join(f'{prefix}*' for prefix in prefixes)}); get a file with all parts in it"
                + (", or name a VAE with --vae" if name == "vae" else "")
            )
        return prefix

    @property
    def _video(self) -> bool:
        return self._family.sees is not None

    def _shapes_of(self, name: str) -> Shapes:
        return Shapes(self.path, self._prefix(name), self._shapes)

    def _unet(self) -> dict:
        family, shapes = self._family, self._shapes_of("unet")
        if self._video:
            config = architecture.video_unet(shapes, head_size=family.head_size, numbers=len(_TOLD))
            frames = 25 if re.search(r"(?<![a-z])xt(?![a-z])", self.path.stem.lower()) else 14  # which leaves no trace
            return config | {"sample_size": self._size // 8, "num_frames": frames}
        config = architecture.unet(shapes, head_size=family.head_size, linear=family.linear, heads=family.heads)
        if family.time_ids is not None:
            added = shapes["label_emb.0.0.weight"][1]  # the pooled text, which the last encoder gives, and the numbers
            pooled = self._text(list(family.text)[-1])["projection_dim"]
            config |= {
                "addition_embed_type": "text_time",
                "projection_class_embeddings_input_dim": added,
                "addition_time_embed_dim": (added - pooled) // len(family.time_ids(0, 0, True)),
            }
        factor = VAEConfig.from_dict(self._vae()).factor if self._starts(VAE) else 8
        return config | {"sample_size": self._size // factor}

    def _vae(self) -> dict:
        own = {"scaling_factor": self._family.scaling_factor, "force_upcast": True, "sample_size": self._size}
        if self._video:
            encoder = Shapes(self.path, VAE_ENCODER, self._shapes)
            return architecture.video_vae(self._shapes_of("vae"), encoder) | own
        return architecture.vae(self._shapes_of("vae")) | own

    @property
    def _vae_class(self) -> str:
        return "VQModel" if f"{VAE}{architecture.CODEBOOK}" in self._shapes else "AutoencoderKL"

    def _labels(self) -> dict:
        classes, width = self._shapes_of(LDM_CLASS.labelled)["weight"]
        return {"_class_name": "LabelEmbedding", "num_embeddings": classes, "embedding_dim": width}

    def _vision(self) -> dict:
        return architecture.clip_vision(self._shapes_of(SVD.sees))

    def _text(self, name: str) -> dict:
        shapes, encoder = self._shapes_of(name), self._family.text[name]
        if encoder.prefixes[shapes.prefix] == CLIP:
            config = architecture.clip(shapes) | {"hidden_act": encoder.hidden_act}
        else:
            config = architecture.open_clip(shapes)
        config["eos_token_id"] = vocabulary.SIZE - 1
        if encoder.layers is not None:
            config["num_hidden_layers"] = min(config["num_hidden_layers"], encoder.layers)
        if encoder.projects:
            config |= {
                "architectures": ["CLIPTextModelWithProjection"],
                "projection_dim": shapes["text_projection"][1],
            }
        return config

    def _tensors(self, name: str, config: dict) -> tuple[dict[str, mx.array], dict[str, str]]:
        """A component's tensors by diffusers' names, in PyTorch's layout, read when first used; and no metadata."""
        prefix = self._prefix(name)
        found = {n.removeprefix(prefix): t for n, t in read_tensors(self.path, prefix)[0].items()}
        if name == "unet":
            unet = UNetConfig.from_dict(config)
            places = ldm.unet_places(unet)
            found = {ldm.rename(n, places): t for n, t in found.items()}
            return (found if unet.cross_attention_dim is not None else _apart(found, self._family.head_size)), {}
        if name == self._family.labelled:
            return {f"embedding.{n}": t for n, t in found.items()}, {}
        if name == "vae" and self._video:
            places = ldm.vae_places(TemporalVAEConfig.from_dict(config))
            halves = {n: t for n, t in found.items() if n.startswith("decoder.")}
            for n, t in read_tensors(self.path, VAE_ENCODER)[0].items():
                if (n := n.removeprefix(VAE_ENCODER)).startswith(("encoder.", "quant_conv.")):
                    halves[n] = t
            return {ldm.rename(n, places): t for n, t in halves.items()}, {}
        if name == SVD.sees:
            return _from_open_clip(found, config["num_hidden_layers"], projects=True), {}
        if name == "vae":
            kind = VQConfig if self._vae_class == "VQModel" else VAEConfig
            places = ldm.vae_places(kind.from_dict(config))
            training = ("loss.", "model_ema.")
            return {ldm.rename(n, places): t for n, t in found.items() if not n.startswith(training)}, {}
        encoder = self._family.text[name]
        if encoder.prefixes[prefix] == CLIP:  # its projection is a part of CLIP that SD does not use
            return {n: t for n, t in found.items() if n not in ("text_projection.weight", "logit_scale")}, {}
        return _from_open_clip(found, config["num_hidden_layers"], encoder.projects), {}

    def _pad(self, name: str) -> str:
        return next(encoder.pad for encoder in self._family.text.values() if encoder.tokenizer == name)


def _prediction_type(metadata: dict[str, str], names: Iterable[str]) -> str | None:
    """What the U-Net predicts, if a marker tensor or the metadata say so: those of Stability's model spec
    (`modelspec.prediction_type`, `modelspec.architecture`), or of kohya's scripts (`ss_v_parameterization`)."""
    if "v_pred" in names:
        return V
    if (said := _PREDICTIONS.get(str(metadata.get("modelspec.prediction_type")).lower())) is not None:
        return said
    if "ss_v_parameterization" in metadata:
        return V if _true(metadata["ss_v_parameterization"]) else EPSILON
    architecture = str(metadata.get("modelspec.architecture"))
    if "v2-768-v" in architecture:
        return V
    return EPSILON if "v2-512" in architecture else None


def _true(text: str | None) -> bool:
    return str(text).lower() in ("true", "1")


def _apart(tensors: dict[str, mx.array], head_size: int) -> dict[str, mx.array]:
    """An unconditional U-Net's tensors with q, k and v apart, which the original has side by side for each head, and
    its attention's convolutions over a line as matrices."""
    out = {}
    for name, tensor in tensors.items():
        place, _, kind = name.rpartition(".")
        tensor = tensor[..., 0] if tensor.ndim == 3 else tensor
        if place.endswith(".qkv"):
            by_head = tensor.reshape(-1, 3, head_size, *tensor.shape[1:])
            for i, part in enumerate("qkv"):
                new = f"{place.removesuffix('qkv')}to_{part}.{kind}"
                out[new] = mx.contiguous(by_head[:, i]).reshape(-1, *tensor.shape[1:])
        else:
            out[name] = tensor
    return out


def _from_open_clip(tensors: dict[str, mx.array], layers: int, projects: bool) -> dict[str, mx.array]:
    """One of OpenCLIP's encoders as transformers has it: q, k and v apart, the projection a linear layer's weight."""
    out = {}
    for old, tensor in tensors.items():
        name = ldm.rename_open_clip(old)
        number = re.match(r"encoder\.layers\.(\d+)\.", name)
        if old == "logit_scale" or (number and int(number[1]) >= layers):
            continue
        if old in ("text_projection", "proj"):
            if projects:
                out[name] = mx.contiguous(tensor.T)  # products differ by the layout, in the last bit
        elif (kind := name.rpartition(".")[2]).startswith("in_proj_"):
            for part, piece in zip("qkv", mx.split(tensor, 3), strict=True):
                out[name.replace(kind, f"{part}_proj.{kind.removeprefix('in_proj_')}")] = piece
        else:
            out[name] = tensor
    return out
