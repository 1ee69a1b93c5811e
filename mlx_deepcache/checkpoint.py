"""A checkpoint: which components it has, loading them, and writing it anew in MLX's layout."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import front, weights
from .autoencoders import OtherVAE, vae_config, vae_module
from .clip import CLIPTextModel
from .config import CLIPConfig, TinyVAEConfig, UNetConfig, VAEConfig, read_json
from .controlnet import ControlNetConfig, ControlNetModel
from .errors import CheckpointError, Failure, UsageError
from .fewstep import FewStep, few_step
from .hub import find
from .schedulers import NoiseSchedule
from .sources import Folder, Source, find_source
from .unet import UNet2DConditionModel

BUNDLED = Path(__file__).parent / "models" / "emoji"
PREDICTION_TYPES = ("epsilon", "v_prediction")
_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LatentConsistencyModelPipeline",
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's description, and its parts to be loaded from where they are."""

    source: Source
    unet_config: UNetConfig
    vae_config: VAEConfig | TinyVAEConfig
    name_or_path: str | None = None  # what the U-Net's config says that it was loaded from

    @classmethod
    def open(
        cls, model: str | None, *, half: bool = False, prediction_type: str | None = None, vae: str | None = None
    ) -> Checkpoint:
        """Find a model (see `hub.find`; None is the bundled one) and read what it is, without its weights.

        prediction_type: `epsilon` or `v_prediction`, if not what the model says of itself; vae: see `OtherVAE.open`.

        Raises:
            CheckpointError: it cannot be found, is no checkpoint, or is of a kind that is not supported.
            UsageError: no such prediction type.
        """
        if prediction_type not in (None, *PREDICTION_TYPES):
            raise UsageError(f"prediction type should be {' or '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
        if model is not None:
            source = find_source(model, half=half, prediction_type=prediction_type)
        elif (BUNDLED / "model_index.json").is_file():
            source = Folder(BUNDLED, prediction_type)
        else:
            raise CheckpointError("the bundled model is not installed; name another with --model, such as sd15")
        kind = source.index.get("_class_name", _PIPELINES[0])
        if kind not in _PIPELINES:
            raise CheckpointError(f"{source.path} holds a {kind}, which is not supported, only {', '.join(_PIPELINES)}")
        for name in ("unet", "vae", "text_encoder_2" if _refines(source.index) else "text_encoder"):
            source.require(name)
        described = source.config("unet")
        unet = UNetConfig.from_dict(described)
        own = vae_config(source.config("vae"))
        if vae is not None:
            source = OtherVAE.open(vae, own, half=half).beside(source)
        latents = vae_config(source.config("vae"))
        if unet.in_channels not in (latents.latent_channels, 2 * latents.latent_channels + 1):
            raise CheckpointError(
                f"the U-Net reads {unet.in_channels} channels where the VAE's latents have {latents.latent_channels}; "
                "of variants with further inputs only inpainting is supported, with a mask and a second picture"
            )
        return cls(source, unet, latents, described.get("_name_or_path"))

    @property
    def index(self) -> dict:
        """What model_index.json says."""
        return self.source.index

    @property
    def xl(self) -> bool:
        """Whether this is SDXL: two text encoders, and a U-Net that is told sizes."""
        return self.unet_config.addition_embed_type == "text_time"

    @property
    def inpainting(self) -> bool:
        """Whether the U-Net also reads a mask and the latents of the picture under it."""
        return self.unet_config.in_channels > self.vae_config.latent_channels

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Folder names of the text encoders; each has a tokenizer of the same ending."""
        if self.refiner:
            return ("text_encoder_2",)
        return ("text_encoder", "text_encoder_2") if self.xl else ("text_encoder",)

    @property
    def refiner(self) -> bool:
        """Whether this is SDXL's refiner: one text encoder, and a U-Net that is told how good the picture should be."""
        return _refines(self.index)

    @property
    def components(self) -> tuple[str, ...]:
        """Folder names of all that has weights."""
        return (*self.text_encoders, "unet", "vae")

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the U-Net was trained for."""
        size = self.unet_config.sample_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return height * self.vae_config.factor, width * self.vae_config.factor

    @property
    def few_step(self) -> FewStep | None:
        """The defaults of a model made for few steps, or None."""
        path = self.source.path
        hub = next((part for part in path.parts if part.startswith("models--")), "")
        names = [hub, path.name, self.index.get("_name_or_path"), self.name_or_path]
        scheduler = self.source.config("scheduler")
        texts = (name for name in names if isinstance(name, str))
        return few_step(texts, scheduler, self.unet_config.time_cond_proj_dim is not None)

    @property
    def guidance_scale(self) -> float:
        """The default: what the checkpoint says, or its family's usual one."""
        usual = 5.0 if self.xl else 7.5
        if (few := self.few_step) is not None:
            usual = few.guidance_scale
        scale = self.index.get("default_guidance_scale", usual)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise CheckpointError(f"model_index.json: default_guidance_scale should be a number, got {scale!r}")
        return float(scale)

    def schedule(self, name: str | None) -> NoiseSchedule:
        """The noise schedule of one of `SCHEDULERS`, or of the checkpoint's own scheduler.

        SD's published configs had two mistakes, which diffusers' pipeline corrects as it loads them; so does this. It
        leaves SDXL's as they are.
        """
        config = self.source.config("scheduler")
        corrections = {} if self.xl else {"steps_offset": 1, "clip_sample": False}
        config |= {key: value for key, value in corrections.items() if name is None or key in config}
        return NoiseSchedule(config, name)

    def module(self, name: str) -> nn.Module:
        """A component with weights yet to be loaded."""
        if name == "unet":
            return UNet2DConditionModel(self.unet_config)
        if name == "vae":
            return vae_module(self.vae_config)
        return CLIPTextModel(CLIPConfig.from_dict(self.source.config(name)))

    def load(self, name: str, dtype: mx.Dtype | None) -> nn.Module:
        """A component with its weights, strictly loaded; dtype None keeps the file's types.

        Raises:
            CheckpointError: see `weights.fill`.
        """
        return weights.fill(self.module(name), *self.source.tensors(name), self.source.where(name), dtype)

    def check_files(self) -> None:
        """Read the files' headers only: a damaged VAE is better found before drawing than after.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        for name in self.components:
            self.source.tensors(name)


def _refines(index: dict) -> bool:
    return bool(index.get("requires_aesthetics_score"))


def load_controlnet(model: str, checkpoint: Checkpoint, dtype: mx.Dtype) -> ControlNetModel:
    """A ControlNet by a folder or a hub id, strictly loaded, for use with `checkpoint`.

    Raises:
        CheckpointError: it cannot be had, is damaged or not supported, or is for another kind of U-Net.
    """
    folder, config = find_controlnet(model, checkpoint, dtype)
    return weights.load(ControlNetModel(config), folder, dtype)


def find_controlnet(model: str, checkpoint: Checkpoint, dtype: mx.Dtype) -> tuple[Path, ControlNetConfig]:
    """Where a ControlNet is and what it is, without its weights; raises as `load_controlnet`."""
    folder = find(model, half=dtype == mx.float16, alone=True)
    if folder.is_file() or (folder / "model_index.json").is_file():
        what = "a file" if folder.is_file() else "a whole model"
        raise CheckpointError(f"{folder} is {what}; expected a ControlNet, a folder with its config.json")
    config = ControlNetConfig.from_dict(read_json(folder / "config.json"))
    for name in ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type"):
        its, ours = getattr(config, name), getattr(checkpoint.unet_config, name)
        if its != ours:
            raise CheckpointError(f"{folder} is for another kind of model: its {name} is {its}, the model's {ours}")
    if config.picture_factor != checkpoint.vae_config.factor:
        raise CheckpointError(
            f"{folder} makes {config.picture_factor} pixels of its picture into one, the model's VAE "
            f"{checkpoint.vae_config.factor}; they do not go together"
        )
    return folder, config


@dataclass(frozen=True)
class Converted:
    """What became of one component: parameters, bytes on disk, type, and linear layers quantized and left."""

    name: str
    parameters: int
    bytes: int
    dtype: str
    quantized: int
    left: int


def convert(
    model: str,
    output: Path,
    *,
    dtype: mx.Dtype | None = None,
    bits: int | None = None,
    force: bool = False,
    prediction_type: str | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Converted]:
    """Write a checkpoint anew with MLX's layout: all that drawing needs and nothing else, whole or not at all.

    dtype: None keeps the types of the files; bits: 4 or 8 quantizes the linear layers of the U-Net and the text
    encoders; force: replace an `output` that exists; prediction_type: see `Checkpoint.open`; progress: called with each
    component's name before it starts.

    Raises:
        UsageError: `output` exists, and `force` is not given.
        CheckpointError: the model cannot be had, or is damaged or not supported.
        Failure: `output` cannot be written.
    """
    try:
        output = output.resolve()  # "." and links would not survive being renamed
        output.exists()
    except OSError as error:  # a name that is too long
        raise Failure(f"cannot write {output}: {error.strerror or error}") from None
    if output.exists() and not force:
        raise UsageError(f"{output} exists; pass --force to replace it")
    if output.exists() and not (output / "model_index.json").is_file():
        raise UsageError(f"{output} exists and is no checkpoint, so it is not replaced; remove it yourself")
    half = dtype is not None and dtype == mx.float16
    checkpoint = Checkpoint.open(model, half=half, prediction_type=prediction_type)
    checkpoint.source.config("scheduler")
    if output.exists() and output == checkpoint.source.path.resolve():
        raise UsageError(f"{output} is the model itself; name another folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise Failure(f"cannot write {output}: {error.strerror}") from None
    try:
        new = temporary / "new"
        new.mkdir()
        report = [_convert_one(checkpoint, name, new, dtype, bits, progress) for name in checkpoint.components]
        _copy_settings(checkpoint, new)
        _put_in_place(new, output, temporary / "old")
    except OSError as error:
        raise Failure(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        if output.exists() or not (temporary / "old").exists():
            shutil.rmtree(temporary, ignore_errors=True)
    return report


def _put_in_place(new: Path, output: Path, old: Path) -> None:
    """Rename a folder to `output`; what is there is first set aside as `old`, and put back if that fails.

    Raises:
        OSError: it failed, and `output` is what it was.
        Failure: `output` could not be put back either; says where it is.
    """
    try:
        if output.exists():
            output.rename(old)
        new.rename(output)
    except BaseException:  # Ctrl-C too
        if old.exists() and not output.exists():
            try:
                old.rename(output)
            except OSError as error:
                reason = error.strerror or error
                raise Failure(
                    f"cannot write {output}: {reason}; what was there could not be put back: it is now {old}"
                ) from None
        raise


def _convert_one(checkpoint, name, target, dtype, bits, progress) -> Converted:
    progress(name)
    module = checkpoint.load(name, dtype)
    parameters = sum(p.size for _, p in tree_flatten(module.parameters()))
    kind = str(next(p.dtype for _, p in tree_flatten(module.parameters()))).removeprefix("mlx.core.")
    was = next((m.bits for m in module.modules() if isinstance(m, nn.QuantizedLinear)), None)
    quantized = left = 0
    if bits is not None and name != "vae":
        if was is not None:
            raise CheckpointError(
                f"{checkpoint.source.where(name)} is already quantized, to {was} bits; start from the original"
            )
        quantized, left = weights.quantize(module, bits)
        was = bits
    size = weights.save(module, target / name, bits=was)
    _write_json(target / name / "config.json", checkpoint.source.config(name))
    return Converted(name, parameters, size, kind, quantized, left)


def _copy_settings(checkpoint: Checkpoint, target: Path) -> None:
    """model_index.json, the scheduler's config, the tokenizers, and what caches cost if that was measured."""
    keep = {k: v for k, v in checkpoint.index.items() if not isinstance(v, list)}
    names = (
        *checkpoint.components,
        "scheduler",
        *(n.replace("text_encoder", "tokenizer") for n in checkpoint.text_encoders),
    )
    keep |= {name: checkpoint.index[name] for name in names if name in checkpoint.index}
    _write_json(target / "model_index.json", keep)
    (target / "scheduler").mkdir()
    _write_json(target / "scheduler" / "scheduler_config.json", checkpoint.source.config("scheduler"))
    for name in checkpoint.text_encoders:
        tokenizer = name.replace("text_encoder", "tokenizer")
        (target / tokenizer).mkdir()
        checkpoint.source.write_tokenizer(tokenizer, target / tokenizer)
    if (prices := front.find(checkpoint.source.path)) is not None:
        shutil.copyfile(prices, target / front.FILE)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
