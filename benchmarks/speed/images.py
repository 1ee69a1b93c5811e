"""Whole pictures, uncached and cached: the DeepCache documentation's table, with seconds by phase and peak memory.

python benchmarks/speed/images.py --config sd21 --sizes 512,768 --batches 1,8
python benchmarks/speed/images.py --config sd15 --steps 10 --against torch

Random weights and token ids at real size (emoji: the bundled model), through the pipeline that users run: DDIM with
guidance, one prompt for a batch. `--against torch` draws the same pictures with diffusers and the pip package DeepCache
in turn with ours, on CUDA if PyTorch has it, else on the CPU, from random weights. A picture's time is that of its
three phases; loading is not in it. Peak memory is each phase's, with all weights loaded; on the CPU PyTorch has no such
number. Speed-up is over the original (interval 1) of the same framework in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks.speed import models
from benchmarks.timing import add_common, header, machine, write_json

VARIANTS = {"original": (1, 0), "I=3 B=0": (3, 0), "I=5 B=0": (5, 0), "I=5 B=1": (5, 1)}
PHASES = ("encode", "denoise", "decode")
GUIDANCE = 7.5
TORCH_PACKAGES = ("mlx", "torch", "diffusers", "transformers", "DeepCache")


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=[*models.UNETS, "emoji"], default="sd15")
    parser.add_argument(
        "--sizes", type=numbers, metavar="PX,..", help="sides of the pictures; default: the model's own"
    )
    parser.add_argument("--batches", type=numbers, default=[1], metavar="N,..", help="pictures at once (1)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--intervals", type=numbers, metavar="N,..", help="of the table's rows, only these (1,3,5)")
    parser.add_argument("--against", choices=["torch"], help="compare with diffusers and DeepCache")
    add_common(parser, 3)
    return parser.parse_args(argv)


# Ours


class RandomIds:
    """Stands in for a tokenizer: random token ids between those that begin and end a text."""

    length = 77
    start, end, pad = 49406, 49407, 49407

    def encode(self, text: str) -> list[int]:
        return random_ids(text)[1:-1]


def random_ids(text: str, vocabulary: int = 49408) -> list[int]:
    """77 token ids; the vocabulary's last two begin and end a text."""
    ids = np.random.default_rng(zlib.crc32(text.encode())).integers(0, vocabulary - 2, 75)
    return [vocabulary - 2, *ids.tolist(), vocabulary - 1]


def ours(config: str, dtype: str, **options):
    """Our pipeline, keeping each phase's seconds and peak memory; options: the pipeline's."""
    from mlx_deepcache import StableDiffusion
    from mlx_deepcache.checkpoints.checkpoint import Checkpoint
    from mlx_deepcache.checkpoints.folder import Part
    from mlx_deepcache.diffusion.schedulers import schedule
    from mlx_deepcache.nets.autoencoder import VAEConfig
    from mlx_deepcache.nets.clip import CLIPConfig, CLIPTextModel
    from mlx_deepcache.nets.unet_parts import UNetConfig

    class Nowhere:
        """A checkpoint's source without files."""

        def __init__(self):
            self.path, self.index = Path(config), {}

        def part(self, name):
            return Part({}, "nowhere", lambda: ({}, {}))

        def scheduler(self):
            return dict(models.SCHEDULER)

        def tokenizer(self, name):
            return RandomIds()

    class RandomCheckpoint(Checkpoint):
        """The published architectures, filled with random weights."""

        def schedule(self, name):
            return schedule(models.SCHEDULER, name)

        def module(self, name):
            if name.startswith("text_encoder"):
                return CLIPTextModel(CLIPConfig.from_dict(models.TEXT_ENCODERS[config][name]))
            return super().module(name)

        def load(self, name, dtype):
            return models.fill_mlx(self.module(name), dtype)

    class Measured(StableDiffusion):
        name = "ours"

        def picture(self, size: int, batch: int, steps: int, interval: int, branch: int):
            """Seconds and peak memory by phase."""
            result = self(
                "a picture",
                steps=steps,
                guidance_scale=GUIDANCE,
                height=size,
                width=size,
                seeds=range(batch),
                scheduler="ddim",
                cache_interval=interval,
                cache_branch=branch,
            )
            return {phase: result.stats["seconds"][phase] for phase in PHASES}, result.stats[
                "peak_memory_bytes_by_phase"
            ]

    if config == "emoji":
        checkpoint = Checkpoint.open(None)
    else:
        unet, vae = UNetConfig.from_dict(models.UNETS[config]), VAEConfig.from_dict(models.VAES[config])
        checkpoint = RandomCheckpoint(Nowhere(), unet, vae)
    return Measured(checkpoint, dtype, **options)


# PyTorch


def architectures(config: str, folder: Path) -> tuple[dict, dict, dict]:
    """Configs of the U-Net, the VAE and the text encoders by name."""
    if config != "emoji":
        return models.UNETS[config], models.VAES[config], models.TEXT_ENCODERS[config]
    unet, vae, text = (json.loads((folder / n / "config.json").read_text()) for n in ("unet", "vae", "text_encoder"))
    return _public(unet), _public(vae), {"text_encoder": text}


def _public(config: dict) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


class Theirs:
    """diffusers' pipeline with the pip package DeepCache, with the same method `picture`."""

    name = "PyTorch"

    def __init__(self, config: str, folder: Path, dtype: str):
        import diffusers
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.set_verbosity_error()
        torch.set_grad_enabled(False)
        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, dtype)
        unet, vae, encoders = architectures(config, folder)
        self.encoders = [self._to(models.torch_text_encoder(text)) for text in encoders.values()]
        parts = {
            "unet": self._to(models.torch_unet(unet)),
            "vae": self._to(models.torch_vae(vae), torch.float32 if config == "sdxl" else None),  # as diffusers does
            "scheduler": diffusers.DDIMScheduler(**models.SCHEDULER),
            **dict(zip(encoders, self.encoders, strict=True)),
            **{name.replace("text_encoder", "tokenizer"): None for name in encoders},
        }
        if len(encoders) == 2:
            self.pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            self.pipe = diffusers.StableDiffusionPipeline(**parts)
        self.pipe.set_progress_bar_config(disable=True)

    @property
    def device_name(self) -> str:
        return self.torch.cuda.get_device_name() if self.device == "cuda" else "the CPU"

    def _to(self, net, dtype=None):
        return net.to(self.device, dtype or self.dtype)

    def picture(self, size: int, batch: int, steps: int, interval: int, branch: int):
        """Seconds and peak memory by phase."""
        seconds, peak = {}, {}
        with self._phase("encode", seconds, peak):
            embeds = self._encode()
        with self._phase("denoise", seconds, peak):
            options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "height": size, "width": size}
            with self._cached(interval, branch):
                latents = self.pipe(**embeds, **options, num_images_per_prompt=batch, output_type="latent").images
        with self._phase("decode", seconds, peak):
            vae = self.pipe.vae
            image = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
            self.pipe.image_processor.postprocess(image, output_type="np")
        return seconds, peak

    def _encode(self) -> dict:
        """The arguments that the pipeline's own encoding would lead to."""
        xl, embeds = len(self.encoders) == 2, {}
        for prefix, text in (("", "a picture"), ("negative_", "")):
            ids = random_ids(text, self.encoders[0].config.vocab_size)
            ids = self.torch.tensor([ids], device=self.device)
            outs = [encoder(ids, output_hidden_states=True) for encoder in self.encoders]
            hidden = [out.hidden_states[-2] if xl else out.last_hidden_state for out in outs]
            embeds[f"{prefix}prompt_embeds"] = self.torch.cat(hidden, dim=-1)
            if xl:
                embeds[f"{prefix}pooled_prompt_embeds"] = outs[1].text_embeds
        return embeds

    @contextmanager
    def _cached(self, interval: int, branch: int):
        from DeepCache import DeepCacheSDHelper

        if interval == 1:
            yield
            return
        helper = DeepCacheSDHelper(pipe=self.pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
        try:
            yield
        finally:
            helper.disable()

    @contextmanager
    def _phase(self, name: str, seconds: dict, peak: dict):
        cuda = self.torch.cuda if self.device == "cuda" else None
        if cuda:
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if cuda:
            cuda.synchronize()
            peak[name] = cuda.max_memory_allocated()
        seconds[name] = time.perf_counter() - start


# The table


def measure(sides: list, variants: dict, size: int, batch: int, steps: int, repeats: int) -> list[dict]:
    """A row for each variant and framework; the frameworks take turns, variant by variant, `repeats` times."""
    for branch in {branch for _, branch in variants.values()}:
        for side in sides:
            side.picture(size, batch, 2, 2, branch)  # warm up: a full and a cached step
    runs = {(variant, side.name): [] for variant in variants for side in sides}
    for _ in range(repeats):
        for variant, (interval, branch) in variants.items():
            for side in sides:
                runs[variant, side.name].append(side.picture(size, batch, steps, interval, branch))
    rows = [
        {"size": size, "batch": batch, "steps": steps, "variant": variant, "framework": name} | summary(results)
        for (variant, name), results in runs.items()
    ]
    return with_ratios(rows)


def summary(results: list[tuple[dict, dict]]) -> dict:
    """Medians of the phases' seconds and of their sum, and the highest peaks."""
    seconds = {phase: statistics.median(s[phase] for s, _ in results) for phase in PHASES}
    total = statistics.median(sum(s.values()) for s, _ in results)
    peak = {phase: max(p[phase] for _, p in results) for phase in PHASES if phase in results[0][1]}
    return {"seconds": seconds | {"total": total}, "peak_bytes": peak}


def with_ratios(rows: list[dict]) -> list[dict]:
    """Adds the speed-up over the framework's original, and for ours the ratio of seconds to theirs."""
    by = {(row["variant"], row["framework"]): row["seconds"] for row in rows}
    for row in rows:
        original, theirs = by["original", row["framework"]], by.get((row["variant"], Theirs.name))
        row["speedup"] = {key: original[key] / row["seconds"][key] for key in ("total", "denoise")}
        if theirs and row["framework"] != Theirs.name:
            row["ours_over_theirs"] = {key: row["seconds"][key] / theirs[key] for key in theirs}
    return rows


def show(rows: list[dict], repeats: int) -> None:
    first = rows[0]
    print(f"\n{first['size']} px, batch {first['batch']}, {first['steps']} steps, median of {repeats}: seconds")
    print(
        f"{'':8} {'':7} {'encode':>8} {'denoise':>8} {'decode':>8} {'total':>8} {'speed-up':>8} {'denoise':>8}"
        f"  {'peak GB by phase':18}"
    )
    for row in rows:
        seconds = " ".join(f"{row['seconds'][key]:8.3f}" for key in (*PHASES, "total"))
        speedup = " ".join(f"{row['speedup'][key]:7.2f}x" for key in ("total", "denoise"))
        peak = " ".join(f"{row['peak_bytes'][phase] / 1e9:5.2f}" for phase in PHASES if phase in row["peak_bytes"])
        print(f"{row['variant']:8} {row['framework']:7} {seconds} {speedup}  {peak or '-'}")
    for row in rows:
        if "ours_over_theirs" in row:
            ratios = " ".join(f"{row['ours_over_theirs'][key]:8.2f}" for key in (*PHASES, "total"))
            print(f"{row['variant']:8} {'ratio':7} {ratios}  ours/theirs")


def main(argv=None) -> None:
    args = parse(argv)
    pipe = ours(args.config, args.dtype)
    dtype = str(pipe.dtype).removeprefix("mlx.core.")
    sides, packages = [pipe], ("mlx",)
    if args.against is not None:
        sides.append(Theirs(args.config, pipe.checkpoint.source.path, dtype))
        packages = TORCH_PACKAGES
    about = machine(dtype, packages)
    if args.against is not None:
        about["torch_device"] = sides[1].device_name
    print(
        f"{args.config}, {header(about)}" + (f"; PyTorch on {about['torch_device']}" if args.against else ""),
        flush=True,
    )
    kept = {1, *(args.intervals or (3, 5))}
    variants = {name: row for name, row in VARIANTS.items() if row[0] in kept}
    rows = []
    for size in args.sizes or [pipe.checkpoint.native_size[0]]:
        for batch in args.batches:
            made = measure(sides, variants, size, batch, args.steps, args.repeats)
            show(made, args.repeats)
            rows += made
    write_json(args.json, about | {"config": args.config, "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
