"""The pieces of a step at the U-Net's widest level, ours against PyTorch's, in turn: which of them holds a step back.

python benchmarks/speed/kernels.py

SD 1.5's shapes at that level, for one picture with guidance, on the CPU or on CUDA, each framework on its own. "taps"
are the two ways to upsample: a convolution over the doubled picture, and `Upsample2D`'s over the small one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.timing import add_common, header, machine, medians, write_json

CHANNELS, HEADS, GROUPS = 320, 8, 32


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, metavar="PX", help="side of the picture (512)")
    add_common(parser, 9)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    import mlx.core as mx

    from mlx_deepcache.backend.ops import attention, conv2d, dtype_of, pad_heads
    from mlx_deepcache.nets.blocks import FeedForward, Upsample2D
    from mlx_deepcache.nets.layers import GroupNorm

    dtype = dtype_of(args.dtype)
    name = str(dtype).removeprefix("mlx.core.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_grad_enabled(False)
    side, rng = args.size // 8, np.random.default_rng(0)

    def both(*shape):
        """The same numbers as an MLX array and a tensor."""
        values = rng.standard_normal(shape, dtype=np.float32)
        return mx.array(values).astype(dtype), torch.from_numpy(values).to(device, getattr(torch, name))

    def done(tensor):
        if device == "cuda":
            torch.cuda.synchronize()
        return tensor

    x, x_t = both(2, side, side, CHANNELS)
    image_t = x_t.permute(0, 3, 1, 2).contiguous()
    w, w_t = both(CHANNELS, 3, 3, CHANNELS)
    filters_t = w_t.permute(0, 3, 1, 2).contiguous()
    small, _ = both(2, side // 2, side // 2, CHANNELS)
    heads, heads_t = both(2, HEADS, side * side, CHANNELS // HEADS)
    tokens, tokens_t = both(2, side * side, CHANNELS)
    norm, forward, up = GroupNorm(GROUPS, CHANNELS, 1e-5), FeedForward(CHANNELS), Upsample2D(CHANNELS)
    for module in (norm, forward, up):
        module.set_dtype(dtype)
    linear_t = [torch.nn.Linear(a, b).to(x_t) for a, b in ((CHANNELS, 8 * CHANNELS), (4 * CHANNELS, CHANNELS))]
    norm_t = torch.nn.GroupNorm(GROUPS, CHANNELS).to(x_t)
    mx.eval(x, w, small, heads, tokens, up.fold())

    def geglu(t):
        value, gate = linear_t[0](t).chunk(2, dim=-1)
        return linear_t[1](value * F.gelu(gate))

    def doubled():
        large = mx.repeat(mx.repeat(small, 2, axis=1), 2, axis=2)
        return conv2d(large, up.conv.weight, up.conv.bias, padding=1)

    runs = {
        "convolution 3x3": (lambda: conv2d(x, w, padding=1), lambda: F.conv2d(image_t, filters_t, padding=1)),
        "group norm, SiLU": (lambda: norm(x, then_silu=True), lambda: F.silu(norm_t(image_t))),
        "self-attention": (
            lambda: attention(heads, pad_heads(heads), pad_heads(heads)),
            lambda: F.scaled_dot_product_attention(heads_t, heads_t, heads_t),
        ),
        "feed-forward": (lambda: forward(tokens), lambda: geglu(tokens_t)),
    }
    timed = {f"{piece}, ours": (lambda f=f: mx.eval(f())) for piece, (f, _) in runs.items()}
    timed |= {f"{piece}, PyTorch": (lambda f=f: done(f())) for piece, (_, f) in runs.items()}
    timed |= {"taps, doubled": lambda: mx.eval(doubled()), "taps, folded": lambda: mx.eval(up(small))}
    seconds = medians(timed, args.repeats)

    about = machine(name, ("mlx", "torch"))
    print(f"{args.size} px, {CHANNELS} channels; {header(about)}; PyTorch on {device}")
    print(f"{'ms':18} {'ours':>8} {'PyTorch':>8} {'ratio':>6}")
    for piece in runs:
        ours, theirs = seconds[f"{piece}, ours"], seconds[f"{piece}, PyTorch"]
        print(f"{piece:18} {ours * 1e3:8.2f} {theirs * 1e3:8.2f} {ours / theirs:6.2f}")
    doubled_s, folded_s = seconds["taps, doubled"], seconds["taps, folded"]
    print(f"upsampling: folded {folded_s * 1e3:.2f} ms, doubled {doubled_s * 1e3:.2f} ms, {folded_s / doubled_s:.2f}")
    write_json(args.json, about | {"size": args.size, "seconds": seconds})


if __name__ == "__main__":
    main()
