"""A model's networks and tokenizers: read when first needed, held for the next call or freed after their phase."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn

from ..backend import ops
from ..checkpoints.adapters.applied import Addons
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.part import load_controlnet, load_upscaler
from ..checkpoints.weights import quantize, stored_bits
from ..errors import UsageError, called
from ..nets.controlnet import Controlled
from .options import Control


class Components:
    """The parts of one checkpoint, by their names in the diffusers layout.

    keep: hold them; else `release` frees them. compile: run the U-Net and the VAE's decoder through `mx.compile`; auto
    does on a GPU, as on the CPU it gains nothing. bits: 4 or 8, of the U-Net's and text encoders' linear layers, after
    LoRAs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: mx.Dtype,
        *,
        keep: bool = True,
        compile: str = "auto",
        bits: int | None = None,
        addons: Addons | None = None,
    ):
        self.checkpoint, self.dtype, self.keep, self.bits = checkpoint, dtype, keep, bits
        self.compile = ops.on_gpu() if compile == "auto" else compile == "on"
        self.addons = Addons(checkpoint) if addons is None else addons
        self.held: dict = {}
        self._started: set[str] = set()  # whose weights are still being read

    def frugal(self) -> Components:
        """The same parts, of which nothing is held."""
        other = copy.copy(self)
        other.keep, other.held = False, {}
        return other

    def tokenizer(self, name: str):
        """A tokenizer, which knows the embeddings' words."""
        if name not in self.held:
            self.held[name] = self.addons.tokenizer(name)
        return self.held[name]

    def start(self, name: str) -> None:
        """Begin to read a network's weights, without waiting for them."""
        if name not in self.held:
            module = self.checkpoint.load(name, self.dtype_of(name))
            self.addons.apply(module, name)
            if self.bits is not None and name != "vae":
                self._quantize(module, name)
            mx.async_eval(module.parameters())
            self.held[name] = module
            self._started.add(name)

    def network(self, name: str) -> nn.Module:
        """A network, ready to be used."""
        self.start(name)
        if name in self._started:
            mx.eval(self.held[name].parameters())
            self._started.discard(name)
        return self.held[name]

    def to_run(self, name: str) -> nn.Module:
        """The U-Net, or the VAE to decode with: compiled or not."""
        net = self.network(name)
        if not self.compile:
            return net
        if _compiled(name) not in self.held:
            self.held[_compiled(name)] = net.compiled()
        return self.held[_compiled(name)]

    def controlled(self, control: Control) -> Controlled:
        """A ControlNet, ready to be used, with its picture."""
        name = name_of(control)
        if name not in self.held:
            unet, vae = self.checkpoint.unet_config, self.checkpoint.vae_config
            net = load_controlnet(control.model, unet, vae.factor, self.dtype)
            mx.eval(net.parameters())
            self.held[name] = net
        picture = mx.array(control.image).astype(mx.float32) / 255
        return Controlled(self.held[name], picture, control.scale, control.start, control.end)

    def upscaler(self, model: str) -> nn.Module:
        """What enlarges pictures, ready to be used."""
        name = upscaler_of(model)
        if name not in self.held:
            net = load_upscaler(model, self.dtype)
            mx.eval(net.parameters())
            self.held[name] = net
        return self.held[name]

    def dtype_of(self, name: str) -> mx.Dtype:
        """SDXL's VAE overflows in float16, and says so in its config; for its encoder alone see `encodes_in`."""
        upcast = name == "vae" and self.checkpoint.family.upcasts_vae and self.checkpoint.vae_config.force_upcast
        return mx.float32 if upcast else self.dtype

    @property
    def encodes_in(self) -> mx.Dtype:
        """In what the VAE's encoder is run, whatever its weights are held in."""
        checkpoint, own = self.checkpoint, self.dtype_of("vae")
        upcast = checkpoint.family.upcasts_encoder and checkpoint.vae_config.force_upcast and own == mx.float16
        return mx.float32 if upcast else own

    def bits_of(self, name: str) -> int | None:
        """Of a network's linear layers, if they are quantized: here, or in its file."""
        if self.bits is not None:
            return self.bits
        _, metadata = self.checkpoint.part(name).tensors()
        return stored_bits(metadata)

    def release(self, *names: str) -> None:
        """Free these parts, unless all are held."""
        if not self.keep:
            for name in names:
                self.held.pop(name, None)
                self.held.pop(_compiled(name), None)
            mx.clear_cache()

    def _quantize(self, module: nn.Module, name: str) -> None:
        if any(isinstance(layer, nn.QuantizedLinear) for layer in module.modules()):
            raise UsageError(f"{self.checkpoint.part(name).where} is quantized already; leave out {called('quantize')}")
        quantize(module, self.bits)


def _compiled(name: str) -> str:
    """What a network is held as once it is compiled."""
    return f"compiled {name}"


def name_of(control: Control) -> str:
    """What its network is held as."""
    return f"controlnet {control.model}"


def upscaler_of(model: str | None) -> str:
    """What such a network is held as, if there is one."""
    return f"upscaler {model}"
