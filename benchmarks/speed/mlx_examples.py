"""A full U-Net call against that of mlx-examples' Stable Diffusion, in turn, on this device.

git clone https://github.com/ml-explore/mlx-examples
python benchmarks/speed/mlx_examples.py --checkout mlx-examples/stable_diffusion --config sd15

The prompt's keys and values, which ours computes once a picture and theirs at every step, are given beforehand. Both
nets hold random weights, the same arrays where shapes agree, so that two of SDXL fit into memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.speed.models import UNETS, mlx_unet
from benchmarks.timing import add_common, header, machine, medians, write_json


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, required=True, metavar="DIR", help="mlx-examples/stable_diffusion")
    parser.add_argument("--config", choices=list(UNETS), default="sd15")
    parser.add_argument("--size", type=int, metavar="PX", help="side of the picture; default: the model's own")
    add_common(parser, 5)
    return parser.parse_args(argv)


def theirs(checkout: Path, ours):
    """Their U-Net of the same architecture."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    sys.path.insert(0, str(checkout))
    from stable_diffusion.config import UNetConfig
    from stable_diffusion.unet import UNetModel

    config = ours.config
    levels = config.levels
    unet = UNetModel(
        UNetConfig(
            block_out_channels=config.block_out_channels,
            layers_per_block=[config.layers_per_block] * levels,
            transformer_layers_per_block=config.transformer_layers,
            num_attention_heads=config.heads,
            cross_attention_dim=[config.cross_attention_dim] * levels,
            down_block_types=config.down_block_types,
            up_block_types=config.up_block_types[::-1],
            addition_embed_type=config.addition_embed_type,
            addition_time_embed_dim=config.addition_time_embed_dim,
            projection_class_embeddings_input_dim=config.projection_class_embeddings_input_dim,
        )
    )
    by_shape = {p.shape: p for _, p in tree_flatten(ours.parameters())}
    dtype = ours.conv_in.weight.dtype
    weights = []
    for name, parameter in tree_flatten(unet.parameters()):
        shape = parameter.shape
        fan_in = max(1, parameter.size // shape[0])
        value = by_shape.get(shape)
        weights.append((name, (mx.random.normal(shape) * fan_in**-0.5).astype(dtype) if value is None else value))
    count = sum(p.size for _, p in tree_flatten(ours.parameters()))
    if sum(p.size for _, p in weights) != count:
        sys.exit(f"the checkout's U-Net is another: it has not {count:,} parameters")
    unet.update(tree_unflatten(weights))
    mx.eval(unet.parameters())
    return unet


def main(argv=None) -> None:
    args = parse(argv)
    import mlx.core as mx
    import numpy as np

    from mlx_deepcache.backend.ops import dtype_of
    from mlx_deepcache.nets.unet_parts import Conditioning

    dtype = dtype_of(args.dtype)
    ours = mlx_unet(UNETS[args.config], dtype)
    config = ours.config
    other = theirs(args.checkout, ours)
    side = args.size // 8 if args.size else config.sample_size

    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((2, side, side, 4))).astype(dtype)
    context = mx.array(rng.standard_normal((2, 77, config.cross_attention_dim))).astype(dtype)
    text_time = None
    if config.addition_embed_type is not None:
        text_time = (mx.array(rng.standard_normal((2, 1280))).astype(dtype), mx.full((2, 6), float(side * 8)))
    prompt = ours.prepare(Conditioning(context, *(text_time or ())))
    temb = ours.time_embed(mx.array([500]), prompt)[0]
    mx.eval(x, context, temb)

    seconds = medians(
        {
            "ours": lambda: mx.eval(ours(x, temb, prompt)[0]),
            "mlx-examples": lambda: mx.eval(other(x, mx.array([500, 500]), context, text_time=text_time)),
        },
        args.repeats,
    )
    about = machine(str(dtype).removeprefix("mlx.core."))
    ratio = seconds["ours"] / seconds["mlx-examples"]
    print(f"{args.config}, {side * 8} px, batch 2; {header(about)}")
    print(f"full step: ours {seconds['ours']:.3f} s, mlx-examples {seconds['mlx-examples']:.3f} s, ratio {ratio:.3f}")
    write_json(args.json, about | {"config": args.config, "size": side * 8, "seconds": seconds, "ratio": ratio})


if __name__ == "__main__":
    main()
