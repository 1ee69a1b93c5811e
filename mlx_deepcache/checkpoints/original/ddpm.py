"""A DDPM in one file with the names of the code of DDPM and DDIM in PyTorch: a U-Net and nothing else."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from ...errors import CheckpointError
from ..families import DDPM, EPSILON
from ..folder import FLAT, Part, Tensors
from ..weights import read_header, read_tensors
from .names import rename
from .shapes import Shapes

FIRST = "temb.dense.0.weight"  # which no other layout has
ATTENDS_AT = 16  # the side of the maps that attention looks at, in all of Ho et al.'s nets
CIFAR = 32  # pixels along a side of the one that was trained with the larger variance
_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
_RESNET |= {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def is_ddpm(file: Path) -> bool:
    """Whether a file is one; raises CheckpointError if it cannot be read."""
    return FIRST in read_header(file)[0]


class DDPMFile:
    """The source of a checkpoint's parts (see `folder.Source`) that such a file is; it reads no text."""

    def __init__(self, path: Path, prediction_type: str | None = None):
        self.path, self._prediction = path, prediction_type or EPSILON
        self._shapes = Shapes(path, "", read_header(path)[0])

    @property
    def index(self) -> dict:
        """As model_index.json would have it."""
        scheduler = next(iter(DDPM.variants.values()))[1]
        return {
            "_class_name": f"{DDPM.pipeline}Pipeline",
            "unet": ["diffusers", FLAT],
            "scheduler": ["diffusers", scheduler],
        }

    def part(self, name: str) -> Part:
        """The U-Net; raises CheckpointError for any other."""
        if name != "unet":
            raise CheckpointError(f"{self.path} is the U-Net of a {DDPM.name} alone: it has no {name}")
        return Part(self._config, f"{self.path} (unet)", self._tensors)

    def scheduler(self) -> dict:
        """Ho et al.'s (2020, section 4), with the variances that each net was published with."""
        large = self._config["sample_size"] == CIFAR
        return {
            "_class_name": "DDPMScheduler",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "num_train_timesteps": 1000,
            "prediction_type": self._prediction,
            "variance_type": "fixed_large" if large else "fixed_small",
            "clip_sample": True,
        }

    @cached_property
    def _config(self) -> dict:
        shapes = self._shapes
        levels = shapes.count(r"down\.(\d+)\.")
        attends = [level for level in range(levels) if f"down.{level}.attn.0.q.weight" in shapes]
        down = ["AttnDownBlock2D" if level in attends else "DownBlock2D" for level in range(levels)]
        return {
            "_class_name": FLAT,
            "in_channels": shapes["conv_in.weight"][1],
            "out_channels": shapes["conv_out.weight"][0],
            "block_out_channels": [shapes[f"down.{level}.block.0.conv1.weight"][0] for level in range(levels)],
            "layers_per_block": shapes.count(r"down\.0\.block\.(\d+)\."),
            "down_block_types": down,
            "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
            "attention_head_dim": None,
            "sample_size": ATTENDS_AT * 2 ** attends[0] if attends else CIFAR,
            "norm_eps": 1e-6,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
        }

    def _tensors(self) -> Tensors:
        places = _places(len(self._config["block_out_channels"]), self._config["layers_per_block"])
        return {rename(name, places): tensor for name, tensor in read_tensors(self.path)[0].items()}, {}


def _places(levels: int, layers: int) -> dict[str, str]:
    """Original place -> diffusers' place; the original counts decoder levels from the outside too."""
    places = {"temb.dense.0": "time_embedding.linear_1", "temb.dense.1": "time_embedding.linear_2"}
    places["norm_out"] = "conv_norm_out"
    resnets = {f"mid.block_{i + 1}": f"mid_block.resnets.{i}" for i in range(2)}
    attentions = {"mid.attn_1": "mid_block.attentions.0"}
    for level in range(levels):
        for side, block, n in (("down", level, layers), ("up", levels - 1 - level, layers + 1)):
            new = f"{side}_blocks.{block}"
            resnets |= {f"{side}.{level}.block.{i}": f"{new}.resnets.{i}" for i in range(n)}
            attentions |= {f"{side}.{level}.attn.{i}": f"{new}.attentions.{i}" for i in range(n)}
            places[f"{side}.{level}.{side}sample.conv"] = f"{new}.{side}samplers.0.conv"
    for modules, parts in ((resnets, _RESNET), (attentions, _ATTENTION)):
        places |= {f"{old}.{a}": f"{new}.{b}" for old, new in modules.items() for a, b in parts.items()}
    return places
