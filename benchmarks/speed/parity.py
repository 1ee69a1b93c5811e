"""Parity with PyTorch at full size: the same random weights and noise through both, and the errors against limits.

python benchmarks/speed/parity.py  # both frameworks on this machine
python benchmarks/speed/parity.py --torch-device cuda --save-reference ref.safetensors  # PyTorch's half alone, on CUDA
python benchmarks/speed/parity.py --device gpu --reference ref.safetensors  # MLX's half on a Mac, no PyTorch

Compared are the text encoders, one U-Net call, a cached run of 10 steps (DDIM, interval 3, branch 0, against diffusers
with the pip package DeepCache) and the VAE's decoder. An error is relative: the norm of the difference over that of
what is right. float32: ours against PyTorch's, at most 1e-3. float16: ours against our float32 must be no worse than
PyTorch's float16 against its float32, times a slack of 1.5 as both are a few numbers' rounding noise. Exit status 1 on
a miss.

The weights keep unit variance and the scheduler predicts v without guidance, so that the latents stay at unit variance
too. Latents are small (--size, and half of it a side for the VAE) as a CPU is slow in float16; nothing else is small.
One net is in memory at a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # or float32 on some GPUs would not be float32
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks.speed import models
from benchmarks.timing import header, machine, write_json

CONFIGS = ("sd15", "sdxl")
FLOAT32_LIMIT = 1e-3
SLACK = 1.5
STEPS, INTERVAL, BRANCH = 10, 3, 0
T = 500  # of the single U-Net call
TORCH_PACKAGES = ("torch", "diffusers", "transformers", "DeepCache")


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="sd15,sdxl", help="comma-separated (sd15,sdxl)")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="side of the picture, a multiple of 64 (64)")
    parser.add_argument("--dtypes", default="float32,float16", help="float32, or float32,float16 (the default)")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="MLX's; default: its own choice")
    parser.add_argument("--torch-device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--save-reference", type=Path, metavar="FILE", help="run PyTorch alone and keep its outputs")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="compare with outputs that were kept")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    args.config, args.dtypes = args.config.split(","), args.dtypes.split(",")
    if unknown := set(args.config) - set(CONFIGS):
        parser.error(f"--config should be of {', '.join(CONFIGS)}, got {', '.join(unknown)}")
    if args.dtypes not in (["float32"], ["float32", "float16"]):
        parser.error("--dtypes should be float32 or float32,float16: float16 is judged by float32")
    if args.size < 64 or args.size % 64:
        parser.error("--size should be a positive multiple of 64")
    if args.reference and args.save_reference:
        parser.error("--reference and --save-reference exclude each other")
    return args


def inputs(config: str, size: int) -> dict[str, np.ndarray]:
    """What every net is given, in PyTorch's layout."""
    rng, side = np.random.default_rng(1), size // 8
    ids = rng.integers(0, 49406, (1, 77))
    ids[:, 0], ids[:, -1] = 49406, 49407  # begin and end of text
    unet = models.UNETS[config]
    given = {
        "ids": ids,
        "x": rng.standard_normal((1, 4, side, side), dtype=np.float32),
        "z": rng.standard_normal((1, 4, side // 2, side // 2), dtype=np.float32),  # the VAE's
        "context": rng.standard_normal((1, 77, unet["cross_attention_dim"]), dtype=np.float32),
    }
    if "addition_embed_type" in unet:
        given["pooled"] = rng.standard_normal((1, 1280), dtype=np.float32)
        given["time_ids"] = np.array([[size, size, 0, 0, size, size]], np.float32)
    return given


def nets(config: str) -> list[str]:
    return [*models.TEXT_ENCODERS[config], "unet", "vae"]


def outputs(side, configs: list[str], dtypes: list[str], size: int) -> dict[str, np.ndarray]:
    """Every part's output in every type, float32, in PyTorch's layout, by "config/part/dtype"; one net at a time.

    side: a framework, see `Torch`.
    """
    found = {}
    for config in configs:
        given = inputs(config, size)
        for name in nets(config):
            net = side.build(config, name)
            for dtype in dtypes:
                start = time.perf_counter()
                net = side.cast(net, dtype)
                run = side.text if name.startswith("text") else getattr(side, name)
                for part, array in run(net, given, dtype, config).items():
                    part = part if name != "text_encoder_2" else f"{part} 2"
                    found[f"{config}/{part}/{dtype}"] = np.ascontiguousarray(array, np.float32)
                seconds = time.perf_counter() - start
                print(f"{config} {name} {dtype}: {side.name}, {seconds:.1f} s", file=sys.stderr, flush=True)
            del net
            side.clean()
    return found


class Torch:
    """PyTorch's half: diffusers, transformers and the pip package DeepCache."""

    def __init__(self, device: str | None):
        import diffusers
        import torch

        diffusers.utils.logging.set_verbosity_error()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.set_grad_enabled(False)
        self.torch, self.device = torch, device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.name = f"PyTorch on {torch.cuda.get_device_name() if self.device == 'cuda' else 'the CPU'}"

    def build(self, config: str, name: str):
        if name.startswith("text"):
            net = models.torch_text_encoder(models.TEXT_ENCODERS[config][name])
        elif name == "unet":
            net = models.torch_unet(models.UNETS[config])
        else:
            net = models.torch_vae(models.VAES[config])
        return net.to(self.device)

    def cast(self, net, dtype: str):
        return net.to(getattr(self.torch, dtype))

    def clean(self) -> None:
        gc.collect()
        if self.device == "cuda":
            self.torch.cuda.empty_cache()

    def tensor(self, array: np.ndarray, dtype: str):
        array = self.torch.from_numpy(array).to(self.device)
        return array.to(getattr(self.torch, dtype)) if array.is_floating_point() else array

    def text(self, net, given: dict, dtype: str, config: str) -> dict:
        out = net(self.tensor(given["ids"], dtype), output_hidden_states=True)
        xl = len(models.TEXT_ENCODERS[config]) == 2
        parts = {"text encoder": out.hidden_states[-2] if xl else out.last_hidden_state}
        if "text_embeds" in out:
            parts["pooled text"] = out.text_embeds
        return {name: part.float().cpu().numpy() for name, part in parts.items()}

    def unet(self, net, given: dict, dtype: str, config: str) -> dict:
        from DeepCache import DeepCacheSDHelper
        from diffusers import DDIMScheduler

        x, context = self.tensor(given["x"], dtype), self.tensor(given["context"], dtype)
        added = None
        if "pooled" in given:
            added = {
                "text_embeds": self.tensor(given["pooled"], dtype),
                "time_ids": self.tensor(given["time_ids"], dtype),
            }

        def predict(x, t):
            return net(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample

        call = predict(x, T)
        scheduler = DDIMScheduler(**models.SCHEDULER)
        scheduler.set_timesteps(STEPS)
        helper = DeepCacheSDHelper(SimpleNamespace(unet=net, scheduler=scheduler))
        helper.set_params(cache_interval=INTERVAL, cache_branch_id=BRANCH)
        helper.enable()
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t), t, x).prev_sample
        helper.disable()
        return {"U-Net call": call.float().cpu().numpy(), "cached run": x.float().cpu().numpy()}

    def vae(self, net, given: dict, dtype: str, config: str) -> dict:
        z = self.tensor(given["z"], dtype) / net.config.scaling_factor
        return {"VAE decode": net.decode(z).sample.float().cpu().numpy()}


class Ours:
    """MLX's half, with the same methods."""

    def __init__(self):
        import mlx.core as mx

        self.mx, self.name = mx, f"MLX on the {mx.default_device().type.name.upper()}"

    def build(self, config: str, name: str):
        if name.startswith("text"):
            return models.mlx_text_encoder(models.TEXT_ENCODERS[config][name])
        return models.mlx_unet(models.UNETS[config]) if name == "unet" else models.mlx_vae(models.VAES[config])

    def cast(self, net, dtype: str):
        net.set_dtype(getattr(self.mx, dtype))
        self.mx.eval(net.parameters())
        return net

    def clean(self) -> None:
        gc.collect()
        self.mx.clear_cache()

    def array(self, array: np.ndarray, dtype: str):
        array = self.mx.array(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)
        return array.astype(getattr(self.mx, dtype)) if self.mx.issubdtype(array.dtype, self.mx.floating) else array

    def numpy(self, array) -> np.ndarray:
        array = np.array(array.astype(self.mx.float32))
        return array.transpose(0, 3, 1, 2) if array.ndim == 4 else array

    def text(self, net, given: dict, dtype: str, config: str) -> dict:
        hidden, pooled = net(self.array(given["ids"], dtype), penultimate=len(models.TEXT_ENCODERS[config]) == 2)
        parts = {"text encoder": hidden}
        if net.config.with_projection:
            parts["pooled text"] = pooled
        return {name: self.numpy(part) for name, part in parts.items()}

    def unet(self, net, given: dict, dtype: str, config: str) -> dict:
        from mlx_deepcache.cache.composition import Caches
        from mlx_deepcache.cache.deepcache import DeepCache
        from mlx_deepcache.diffusion.schedulers import schedule
        from mlx_deepcache.nets.unet_parts import Conditioning
        from mlx_deepcache.sampler import Denoiser, sample

        cond = Conditioning(
            self.array(given["context"], dtype),
            self.array(given["pooled"], dtype) if "pooled" in given else None,
            self.mx.array(given["time_ids"]) if "time_ids" in given else None,
        )
        prompt = net.prepare(cond)
        call, _ = net(self.array(given["x"], dtype), net.time_embed(self.mx.array([T]), prompt)[0], prompt)

        denoiser = Denoiser(net, cond, schedule(models.SCHEDULER, "ddim").plan(STEPS), None)
        for progress in sample(denoiser, self.array(given["x"], "float32"), Caches(DeepCache(INTERVAL, BRANCH)), None):
            latents = progress.latents
        return {"U-Net call": self.numpy(call), "cached run": self.numpy(latents)}

    def vae(self, net, given: dict, dtype: str, config: str) -> dict:
        return {"VAE decode": self.numpy(net.decode(self.array(given["z"], dtype)))}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Error of a, where b is right."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[dict]:
    """A row for each output: its error, PyTorch's where that sets the limit, the limit, and whether it holds."""
    rows = []
    for key, mine in ours.items():
        config, part, dtype = key.split("/")
        if dtype == "float32":
            error, other, limit = relative(mine, theirs[key]), None, FLOAT32_LIMIT
        else:
            exact = f"{config}/{part}/float32"
            error, other = relative(mine, ours[exact]), relative(theirs[key], theirs[exact])
            limit = SLACK * other
        rows.append(
            {"config": config, "part": part, "dtype": dtype, "error": error, "torch": other, "limit": limit}
            | {"apart": relative(mine, theirs[key]), "ok": bool(error <= limit)}
        )
    return rows


def save(file: Path, arrays: dict[str, np.ndarray], about: dict) -> None:
    from safetensors.numpy import save_file

    save_file(arrays, str(file), {"about": json.dumps(about)})


def load(file: Path) -> tuple[dict[str, np.ndarray], dict]:
    from safetensors import safe_open

    with safe_open(str(file), framework="numpy") as stored:
        return {key: stored.get_tensor(key) for key in stored.keys()}, json.loads(stored.metadata()["about"])  # noqa: SIM118


def reference(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], dict]:
    """PyTorch's outputs, computed or read, and what they were computed with."""
    if args.reference is None:
        side = Torch(args.torch_device)
        about = machine(" and ".join(args.dtypes), TORCH_PACKAGES) | {"device": side.name, "size": args.size}
        return outputs(side, args.config, args.dtypes, args.size), about
    arrays, about = load(args.reference)
    if about["size"] != args.size:
        sys.exit(f"{args.reference} was made with --size {about['size']}, not {args.size}")
    wanted = [f"{config}/VAE decode/{dtype}" for config in args.config for dtype in args.dtypes]
    if missing := [key for key in wanted if key not in arrays]:
        sys.exit(f"{args.reference} lacks {', '.join(missing)}; choose --config and --dtypes that it holds")
    return arrays, about


def set_device(name: str | None) -> None:
    import mlx.core as mx

    if name == "gpu" and not mx.is_available(mx.gpu):
        sys.exit("MLX has no GPU here")
    if name is not None:
        mx.set_default_device(getattr(mx, name))


def report(rows: list[dict], args: argparse.Namespace, about: dict) -> None:
    print(f"{args.size} px; ours: {header(about)}\nreference: {header(about['reference'])}")
    print("error: float32 against PyTorch's float32; float16 against our own float32, limit: PyTorch's own x 1.5")
    print(f"{'':5} {'part':15} {'dtype':8} {'error':>9} {'limit':>9} {'PyTorch':>9} {'apart':>9}")
    for row in rows:
        other = "" if row["torch"] is None else f"{row['torch']:.2e}"
        print(
            f"{row['config']:5} {row['part']:15} {row['dtype']:8} {row['error']:9.2e} {row['limit']:9.2e} "
            f"{other:>9} {row['apart']:9.2e} {'ok' if row['ok'] else 'MISS'}"
        )
    if "float16" not in args.dtypes:
        print("not run: float16")
    for config in CONFIGS:
        if config not in args.config:
            print(f"not run: {config}")


def main(argv=None) -> int:
    args = parse(argv)
    theirs, about_theirs = reference(args)
    if args.save_reference is not None:
        save(args.save_reference, theirs, about_theirs)
        print(f"wrote {args.save_reference}: {len(theirs)} outputs of {about_theirs['device']}")
        return 0
    set_device(args.device)
    ours = outputs(Ours(), args.config, args.dtypes, args.size)
    rows = compare(ours, theirs)
    about = machine(" and ".join(args.dtypes)) | {"size": args.size, "slack": SLACK, "reference": about_theirs}
    report(rows, args, about)
    write_json(args.json, about | {"rows": rows})
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
