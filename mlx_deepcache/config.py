"""Model descriptions: frozen dataclasses read from the JSON configs that diffusers and transformers write.

A key that this code does not know is ignored only if it cannot change the result. A known key with a value that is
not supported is an error that names it, so a checkpoint is never run with a part of its description dropped.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from .errors import CheckpointError


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; expected a checkpoint in the diffusers layout") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold a JSON object, got {type(data).__name__}")
    return data


def per_level(value, levels: int, name: str) -> tuple:
    """A config value given once for all levels, or as one value a level, as a tuple of one a level."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if len(values) != levels:
        raise CheckpointError(f"{name} should have one value for each of the {levels} levels, got {list(values)}")
    return values


def _build(cls, data: dict, supported: dict[str, tuple]):
    """cls from the keys it knows; `supported` lists, for other keys, the values that leave the model as it is."""
    for key, allowed in supported.items():
        if key in data and data[key] not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise CheckpointError(f"{key} = {data[key]!r} is not supported in a {cls.__name__}, only {choices}")
    known = {f.name: f for f in fields(cls)}
    lacking = [n for n, f in known.items() if f.default is MISSING and n not in data]
    if lacking:
        raise CheckpointError(f"this is no complete {cls.__name__}: it lacks {', '.join(lacking)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
    for name, value in values.items():
        if not any(_is(value, kind) for kind in known[name].type.split(" | ")):
            raise CheckpointError(
                f"{name} = {data[name]!r} in a {cls.__name__} should be {_in_words(known[name].type)}"
            )
    return cls(**values)


def _is(value, kind: str) -> bool:
    """Whether a JSON value is of a field's kind, as its annotation has it; whole numbers are 0 or more."""
    if kind.startswith("tuple["):
        kinds = kind.removeprefix("tuple[").removesuffix("]").split(", ")
        if kinds[-1] == "...":
            return isinstance(value, tuple) and len(value) > 0 and all(_is(v, kinds[0]) for v in value)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is, value, kinds))
    if isinstance(value, bool) or kind == "bool":
        return isinstance(value, bool) and kind == "bool"
    if kind == "int":
        return isinstance(value, int) and 0 <= value < 2**31
    return isinstance(value, {"float": (int, float), "str": str, "None": type(None)}[kind])


def _in_words(annotation: str) -> str:
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}
    return " or ".join("a list" if kind.startswith("tuple") else words[kind] for kind in annotation.split(" | "))


def _check_split(widths, heads, name: str) -> None:
    """Widths are split among heads or groups."""
    for width, n in zip(widths, heads, strict=True):
        if n < 1 or width < 1 or width % n:
            raise CheckpointError(f"a width of {width} cannot be split evenly as {name} = {n} says")


@dataclass(frozen=True)
class UNetConfig:
    """UNet2DConditionModel's config.json."""

    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    cross_attention_dim: int
    in_channels: int = 4
    out_channels: int = 4
    sample_size: int | tuple[int, int] = 64
    layers_per_block: int = 2
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None

    @classmethod
    def from_dict(cls, data: dict) -> UNetConfig:
        """Raises CheckpointError for a value that this U-Net cannot honour."""
        down = {"CrossAttnDownBlock2D", "DownBlock2D"}
        up = {"CrossAttnUpBlock2D", "UpBlock2D"}
        config = _build(cls, data, _UNET_SUPPORTED)
        for name, types, known in (
            ("down_block_types", config.down_block_types, down),
            ("up_block_types", config.up_block_types, up),
        ):
            for kind in set(types) - known:
                raise CheckpointError(f"{name} holds {kind!r}, which is not supported, only {sorted(known)}")
            per_level(types, config.levels, name)
        if config.mid_block_type not in ("UNetMidBlock2DCrossAttn", None):
            raise CheckpointError(
                f"mid_block_type = {config.mid_block_type!r} is not supported, only 'UNetMidBlock2DCrossAttn' or null"
            )
        if config.addition_embed_type not in (None, "text_time"):
            raise CheckpointError(
                f"addition_embed_type = {config.addition_embed_type!r} is not supported, only null or 'text_time'"
            )
        if not isinstance(config.layers_per_block, int):
            raise CheckpointError(f"layers_per_block = {config.layers_per_block!r} is not supported, only one number")
        if not isinstance(config.cross_attention_dim, int):
            raise CheckpointError(
                f"cross_attention_dim = {config.cross_attention_dim!r} is not supported, only one number"
            )
        for name, per in (
            ("norm_num_groups", (config.norm_num_groups,) * config.levels),
            ("attention_head_dim", config.heads),
        ):
            _check_split(config.block_out_channels, per, name)
        return config

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.block_out_channels)

    @property
    def branches(self) -> int:
        """Number of cache branches, 0 to branches - 1: three a level, as the pip package DeepCache counts them."""
        return 3 * self.levels

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level. diffusers calls this number `attention_head_dim`, for history's sake."""
        heads = self.attention_head_dim if self.num_attention_heads is None else self.num_attention_heads
        return per_level(heads, self.levels, "attention_head_dim")

    @property
    def transformer_layers(self) -> tuple[int, ...]:
        """Transformer blocks of each level's attention layers."""
        return per_level(self.transformer_layers_per_block, self.levels, "transformer_layers_per_block")


_UNET_SUPPORTED = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": (64, None),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1, 1.0),
    "num_class_embeds": (None,),
    "only_cross_attention": (False, [False] * 4, [False] * 3),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


@dataclass(frozen=True)
class VAEConfig:
    """AutoencoderKL's config.json."""

    block_out_channels: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    sample_size: int = 512
    force_upcast: bool = True
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @classmethod
    def from_dict(cls, data: dict) -> VAEConfig:
        """Raises CheckpointError for a value that this VAE cannot honour."""
        config = _build(cls, data, {"act_fn": ("silu",)})
        for name, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            kinds = data.get(name, [])
            if not isinstance(kinds, list) or any(kind != only for kind in kinds):
                raise CheckpointError(f"{name} = {kinds!r} is not supported in a VAE, only {only!r}")
        _check_split(
            config.block_out_channels, (config.norm_num_groups,) * len(config.block_out_channels), "norm_num_groups"
        )
        if not config.scaling_factor:
            raise CheckpointError("scaling_factor = 0 is not supported in a VAE")
        return config

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TinyVAEConfig:
    """AutoencoderTiny's config.json (TAESD). `latent_magnitude` and `latent_shift` are for storing latents as bytes,
    which nothing here does."""

    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    act_fn: str = "relu"
    upsampling_scaling_factor: int = 2
    scaling_factor: float = 1.0
    shift_factor: float | None = 0.0
    force_upcast: bool = False

    @classmethod
    def from_dict(cls, data: dict) -> TinyVAEConfig:
        """Raises CheckpointError for a value that this VAE cannot honour."""
        config = _build(cls, data, {"act_fn": ("relu",), "upsample_fn": ("nearest",)})
        for kind in ("encoder", "decoder"):
            per_level(getattr(config, f"num_{kind}_blocks"), len(getattr(config, f"{kind}_block_out_channels")), kind)
            if len(set(getattr(config, f"{kind}_block_out_channels"))) > 1:
                raise CheckpointError(f"{kind}_block_out_channels should all be equal in an AutoencoderTiny")
        if 2 ** (len(config.num_encoder_blocks) - 1) != config.factor:
            raise CheckpointError("an AutoencoderTiny's encoder and decoder should scale by the same factor")
        if not config.scaling_factor:
            raise CheckpointError("scaling_factor = 0 is not supported in a VAE")
        return config

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """The decoder's, by the name that AutoencoderKL's config has for them."""
        return self.decoder_block_out_channels

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""
        return self.upsampling_scaling_factor ** (len(self.decoder_block_out_channels) - 1)


@dataclass(frozen=True)
class CLIPConfig:
    """CLIPTextModel's (or CLIPTextModelWithProjection's) config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int = 512
    with_projection: bool = False

    @classmethod
    def from_dict(cls, data: dict) -> CLIPConfig:
        """Raises CheckpointError for a value that this text encoder cannot honour."""
        projection = data.get("architectures") == ["CLIPTextModelWithProjection"]
        config = _build(cls, {**data, "with_projection": projection}, {})
        if config.hidden_act not in ("quick_gelu", "gelu"):
            raise CheckpointError(f"hidden_act = {config.hidden_act!r} is not supported, only 'quick_gelu' or 'gelu'")
        _check_split((config.hidden_size,), (config.num_attention_heads,), "num_attention_heads")
        return config
