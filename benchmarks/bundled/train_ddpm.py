"""Train the bundled unconditional model: a DDPM that draws in 32 x 32 pixels, without a prompt and without a VAE.

    python benchmarks/bundled/train_ddpm.py --out run --minutes 60

The pictures are the 129 drawings that the text-to-emoji model knows. PyTorch and diffusers are needed here only. A run
that was stopped goes on where it was when the same command is given again. The result is OUT/model, laid out as the
repositories of Ho et al. (2020) are in diffusers.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.bundled.emoji_data import FONT, concepts, load_pictures
from benchmarks.bundled.train_emoji import Trainer, sheet, times, to_tensor, weights

SIDE = 32
NET = {
    "sample_size": SIDE,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    # as google/ddpm-cifar10-32 has them
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
SCHEDULER = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": True}


def smaller(pictures: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, SIDE, SIDE, 3) uint8, each pixel the mean of those that it stands for."""
    n, height, width, channels = pictures.shape
    cells = pictures.reshape(n, SIDE, height // SIDE, SIDE, width // SIDE, channels)
    return cells.mean((2, 4)).round().astype(np.uint8)


def train(unet: UNet2DModel, pictures: torch.Tensor, args) -> None:
    """pictures: (N, 3, SIDE, SIDE) in [-1, 1]."""
    alpha = DDPMScheduler(**SCHEDULER).alphas_cumprod.to(args.device)
    weight = weights(alpha, args.most)
    trainer = Trainer("ddpm", [unet], args.minutes, args)
    rng = random.Random(f"{args.seed} {trainer.samples}")
    deck = []
    while trainer.progress < 1:
        if len(deck) < args.batch:  # every drawing equally often
            deck += rng.sample(range(len(pictures)), len(pictures))
        chosen, deck = deck[: args.batch], deck[args.batch :]
        x = pictures[chosen]
        t = times(len(x)).to(args.device)
        a, noise = alpha[t].view(-1, 1, 1, 1), torch.randn_like(x)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            made = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t).sample
        trainer.step(((made.float() - noise).square().mean((1, 2, 3)) * weight[t]).mean(), len(x))
    trainer.finish()


@torch.no_grad()
def draw(unet: UNet2DModel, pictures: int, seed: int, steps: int) -> torch.Tensor:
    """Pictures (N, 3, SIDE, SIDE) in [-1, 1], by DDIM."""
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    x = torch.randn((pictures, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).to(unet.device)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return x.clamp(-1, 1)


def export(unet: UNet2DModel, folder: Path) -> None:
    """Write a diffusers folder in float16."""
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    config = json.loads(unet.to_json_string())
    (folder / "unet" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = {key: value.half().contiguous() for key, value in unet.state_dict().items()}
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # a package's data must be readable by all
    DDPMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    index |= {"unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: checkpoint, log, sheet, model")
    parser.add_argument("--init", type=Path, help="U-Net to start from: a folder of a model in the diffusers layout")
    parser.add_argument("--minutes", type=float, default=60, help="of work")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--most", type=float, default=40, help="most that a timestep may weigh")
    parser.add_argument("--data", type=Path, help="folder with pictures as .npz and .json, instead of the font")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf with bitmaps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)

    drawings = load_pictures([concept.character for concept in concepts()], args.data, args.font)
    unet = UNet2DModel(**NET)
    if args.init:
        unet = UNet2DModel.from_pretrained(args.init, subfolder="unet", torch_dtype=torch.float32)
    unet = unet.to(args.device)
    train(unet, to_tensor(smaller(drawings), args.device), args)
    export(unet, args.out / "model")
    sheet(draw(unet, 136, args.seed, 100), args.out / "sheet.png")


if __name__ == "__main__":
    main()
