"""Train the bundled text-to-emoji Stable Diffusion: VAE, text encoder and U-Net, from nothing or from a given folder.

    python benchmarks/bundled/train_emoji.py --out run --minutes 120                   # everything, from nothing
    python benchmarks/bundled/train_emoji.py --out run --init FOLDER --stage unet      # go on from a diffusers folder

PyTorch, diffusers, transformers and Pillow are needed here only; the package itself uses none of them. A run that was
stopped goes on where it was when the same command is given again. The result is OUT/model, a diffusers folder.
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.bundled.emoji_data import (
    FONT,
    REFERENCE,
    Captions,
    clip_tokenizer_files,
    concepts,
    load_pictures,
    tiled,
)

SCALE = 0.18215  # Stable Diffusion's; the latents' own mean and deviation are folded into the quant convolutions
STOP, DROP, DECAY = 0.02, 0.12, 0.997  # last share of the learning rate, share of emptied captions, EMA
NOISE = 0.25  # the most noise the decoder learns to see through, in deviations of the latents
NETS = {
    "vae": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 8,
        "sample_size": 64,
        "mid_block_add_attention": False,
    },
    "unet": {
        "block_out_channels": (32, 96, 192),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 192,
        "norm_num_groups": 16,
        "sample_size": 16,
    },
    "text_encoder": {"hidden_size": 192, "projection_dim": 192, "intermediate_size": 768}
    | {"num_hidden_layers": 3, "num_attention_heads": 4},
    "scheduler": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
}


class Budget:
    """How much of a stage is done, from 0 to 1, by minutes: however slow the machine, the learning rate comes down in
    time. A pause of the process counts as one slow step, so that it takes at most ten seconds from the schedule."""

    def __init__(self, minutes: float, spent: float = 0.0):
        self.total, self.spent, self.last = 60 * minutes, spent, time.monotonic()

    def tick(self) -> float:
        now = time.monotonic()
        self.spent += min(now - self.last, 10.0)
        self.last = now
        return min(self.spent / self.total, 1.0)


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over 2% of the schedule, hold to 20%, cosine to STOP: most of what one sees comes while it falls."""
    fall = 0.5 + 0.5 * math.cos(math.pi * max(0.0, progress - 0.2) / 0.8)
    return peak * min(1.0, progress / 0.02 + 0.01) * (STOP + (1 - STOP) * fall)


class Trainer:
    """Parameters with their optimizer, average, budget and checkpoint: what the stages have in common."""

    def __init__(self, name: str, nets: list[torch.nn.Module], minutes: float, args):
        self.name, self.file, self.log = name, args.out / f"{name}.pt", args.out / "log.jsonl"
        self.parameters = [p for net in nets for p in net.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.peak, self.samples, self.loss, self.budget = args.lr, 0, 0.0, Budget(minutes)
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        if self.file.exists():
            state = torch.load(self.file, weights_only=True, map_location="cpu")
            with torch.no_grad():
                kept = state["parameters"] + state["average"]
                for mine, value in zip(self.parameters + self.average, kept, strict=True):
                    mine.copy_(value)
            self.optimizer.load_state_dict(state["optimizer"])
            self.samples, self.budget.spent = state["samples"], state["spent"]
        self.saved = self.shown = time.monotonic()
        self.progress = self.budget.tick()

    def step(self, loss: torch.Tensor, samples: int) -> None:
        """One update from the mean loss of so many samples; logs every 20 seconds, saves every two minutes."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.progress, self.peak)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.samples += samples
        # The average follows fast at first, so that it does not remember where the weights began.
        decay = min(DECAY, (1 + self.samples / samples) / (10 + self.samples / samples))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        self.loss = 0.98 * self.loss + 0.02 * loss.item() if self.loss else loss.item()
        self.progress = self.budget.tick()
        now = time.monotonic()
        if now - self.shown > 20 or self.progress >= 1:
            self.shown = now
            line = {"stage": self.name, "samples": self.samples, "progress": round(self.progress, 4)}
            line |= {"loss": round(self.loss, 5), "lr": group["lr"], "rate": round(self.samples / self.budget.spent, 1)}
            print(json.dumps(line), flush=True)
            with self.log.open("a") as log:
                log.write(json.dumps(line) + "\n")
        if now - self.saved > 120 or self.progress >= 1:
            self.saved = now
            self.save()

    def save(self) -> None:
        state = {"parameters": [p.detach() for p in self.parameters], "average": self.average}
        state |= {"optimizer": self.optimizer.state_dict(), "samples": self.samples, "spent": self.budget.spent}
        torch.save(state, self.file.with_suffix(".new"))
        self.file.with_suffix(".new").replace(self.file)  # whoever stops us finds a whole file

    def finish(self) -> None:
        """Put the average in the place of the weights."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                parameter.copy_(average)


def build(init: Path | None, out: Path, device: str) -> dict:
    """The parts of the pipeline, in float32: from a diffusers folder, or new."""
    files = init / "tokenizer" if init else clip_tokenizer_files(out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(files)
    if init:
        vae = AutoencoderKL.from_pretrained(init, subfolder="vae", torch_dtype=torch.float32)
        unet = UNet2DConditionModel.from_pretrained(init, subfolder="unet", torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(init, subfolder="text_encoder", dtype=torch.float32)
    else:
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        ids = {"vocab_size": len(tokenizer), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
        vae, unet = AutoencoderKL(**NETS["vae"], latent_channels=4), UNet2DConditionModel(**NETS["unet"])
        text = CLIPTextModel(CLIPTextConfig(**NETS["text_encoder"], **ids))
    parts = {"vae": vae.to(device), "unet": unet.to(device), "text_encoder": text.to(device), "tokenizer": tokenizer}
    parts["files"] = files
    parts["scheduler"] = DDIMScheduler(**NETS["scheduler"])
    return parts


def to_tensor(pictures: np.ndarray, device: str) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The pictures, each moved by up to 4 px over white: (N, 3, H, W)."""
    side = x.shape[-1]
    x = F.pad(x, (4, 4, 4, 4), value=1.0)
    at = torch.randint(0, 9, (len(x), 2)).tolist()
    return torch.stack([p[:, i : i + side, j : j + side] for p, (i, j) in zip(x, at, strict=True)])


def picture_loss(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """L1 + L2 + the differences of neighbouring pixels, which keep edges sharp and flat areas flat."""
    error = made - true
    slope = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * slope


def train_vae(parts: dict, pictures: np.ndarray, minutes: float, args) -> None:
    """Both halves of the autoencoder, on all pictures of the data set."""
    vae, device = parts["vae"], args.device
    x_all = to_tensor(pictures, device)
    trainer = Trainer("vae", [vae], minutes, args)
    while trainer.progress < 1:
        x = shifted(x_all[torch.randint(len(x_all), (args.batch,))])
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            posterior = vae.encode(x).latent_dist
            made = vae.decode(posterior.sample()).sample
        trainer.step(picture_loss(made.float(), x) + 1e-6 * posterior.kl().mean(), args.batch)
    trainer.finish()
    fold(vae, x_all)


def train_decoder(parts: dict, shipped: np.ndarray, table: list, minutes: float, args) -> None:
    """The decoder alone, on what it will be handed: half latents that the finished U-Net drew, half encoded pictures
    with noise. It learns that nearly white is white, and undoes what guidance does to the colours. The encoder stays,
    so the U-Net still fits."""
    vae, device = parts["vae"], args.device
    x_all = to_tensor(shipped, device)
    cache = args.out / "drawn.pt"
    if not cache.exists():
        names = [concept.names[0] for concept in table]
        torch.save(torch.stack([draw(parts, names, seed, 25) for seed in range(args.drawn)]).cpu(), cache)
    drawn = torch.load(cache, weights_only=True).to(device)
    with torch.no_grad():  # a drawing of something else would teach the decoder to lie
        z_all = vae.encode(x_all).latent_dist.mode() * SCALE
        made = torch.stack([decode(parts, z) for z in drawn])
        good = ((made - x_all) / 2).square().mean((2, 3, 4)) < 0.03
    use = good.nonzero().tolist()
    print(f"decoder: {len(use)} of {good.numel()} drawings are of what was asked for", flush=True)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    trainer = Trainer("decoder", [vae], minutes, args)
    half = args.batch // 2
    while trainer.progress < 1:
        seeds, own = zip(*random.choices(use, k=half), strict=True)
        others = torch.randint(len(x_all), (args.batch - half,))
        noise = torch.randn_like(z_all[others]) * torch.rand(len(others), 1, 1, 1, device=device) * NOISE
        x = torch.cat([x_all[others], x_all[list(own)]])
        z = torch.cat([z_all[others] + noise, drawn[list(seeds), list(own)]])
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            made = vae.decode(z / SCALE).sample
        trainer.step(picture_loss(made.float(), x), args.batch)
    trainer.finish()
    vae.requires_grad_(True)


@torch.no_grad()
def fold(vae: AutoencoderKL, x: torch.Tensor) -> None:
    """Give the latents of pictures `x` mean 0 and deviation 1 / SCALE, inside the two quant convolutions."""
    z = torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(64)])
    mean, size = z.mean((0, 2, 3)), z.std((0, 2, 3)) * SCALE
    after, before = vae.quant_conv, vae.post_quant_conv
    before.bias += before.weight[:, :, 0, 0] @ mean
    before.weight *= size[None, :, None, None]
    after.bias[:4] = (after.bias[:4] - mean) / size
    after.bias[4:] -= 2 * size.log()  # the second half is the logarithm of the variance
    after.weight[:4] /= size[:, None, None, None]


def tokenize(tokenizer: CLIPTokenizer, said: list[str]) -> torch.Tensor:
    """Token ids of N captions, padded as Stable Diffusion does: (N, 77)."""
    return tokenizer(said, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids


def weights(alpha: torch.Tensor, most: float = 40) -> torch.Tensor:
    """Of each timestep's loss, by the cumulated alphas: (1 + snr) / snr, as if the net predicted v. Large and middle
    noise decide what is drawn, and plain epsilon hardly weighs them."""
    return (1 / alpha).clamp(max=most)


def times(n: int) -> torch.Tensor:
    """(n,) timesteps in any order, one in each of n equal parts of the schedule: less luck in the loss."""
    return ((torch.arange(n) + torch.rand(n)) * 1000 / n).long()[torch.randperm(n)]


def train_unet(parts: dict, shipped: np.ndarray, table: list, minutes: float, args) -> None:
    """Text encoder and U-Net together, on the latents of the shipped pictures and captions made up as they go."""
    unet, text, tokenizer, device = parts["unet"], parts["text_encoder"], parts["tokenizer"], args.device
    with torch.no_grad():
        latents = parts["vae"].encode(to_tensor(shipped, device)).latent_dist.mode() * SCALE
    alpha = parts["scheduler"].alphas_cumprod.to(device)
    weight = weights(alpha)
    captions = Captions(table, [word[:-4] for word in tokenizer.get_vocab() if word.endswith("</w>")])
    trainer = Trainer("unet", [unet, text], minutes, args)
    rng = random.Random(f"{args.seed} {trainer.samples}")
    deck = []
    while trainer.progress < 1:
        if len(deck) < args.batch:  # every concept equally often
            deck += rng.sample(range(len(table)), len(table))
        chosen, deck = deck[: args.batch], deck[args.batch :]
        said = ["" if rng.random() < DROP else captions(table[i], rng) for i in chosen]
        ids = tokenize(tokenizer, said)
        z = latents[chosen]
        noise = torch.randn_like(z)
        t = times(len(z)).to(device)
        a = alpha[t].view(-1, 1, 1, 1)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            made = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, text(ids.to(device))[0]).sample
        trainer.step(((made.float() - noise).square().mean((1, 2, 3)) * weight[t]).mean(), len(z))
    trainer.finish()


@torch.no_grad()
def draw(parts: dict, prompts: list[str], seed: int, steps: int, guidance: float = 5.0) -> torch.Tensor:
    """Latents of deviation 1 for the prompts, by DDIM with classifier-free guidance: (N, 4, 16, 16)."""
    scheduler, device = parts["scheduler"], parts["unet"].device
    scheduler.set_timesteps(steps)
    noise = torch.randn((len(prompts), 4, 16, 16), generator=torch.Generator().manual_seed(seed)).to(device)
    out = []
    for some, z in zip([prompts[at : at + 32] for at in range(0, len(prompts), 32)], noise.split(32), strict=True):
        context = parts["text_encoder"](tokenize(parts["tokenizer"], some + [""] * len(some)).to(device))[0]
        for t in scheduler.timesteps:
            asked, free = parts["unet"](torch.cat([z, z]), t, context).sample.chunk(2)
            z = scheduler.step(free + guidance * (asked - free), t, z).prev_sample
        out.append(z)
    return torch.cat(out)


@torch.no_grad()
def decode(parts: dict, latents: torch.Tensor) -> torch.Tensor:
    """(N, 4, 16, 16) latents of deviation 1 -> pictures (N, 3, 64, 64) in [-1, 1]."""
    return torch.cat([parts["vae"].decode(z / SCALE).sample for z in latents.split(32)]).clamp(-1, 1)


def sheet(pictures: torch.Tensor, file: Path) -> None:
    """Save pictures (N, 3, H, W) in [-1, 1] side by side."""
    tiled(((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy(), 17).save(file)


def export(parts: dict, folder: Path) -> None:
    """Write a diffusers folder in float16."""
    for name in ("vae", "unet", "text_encoder"):
        net, text = parts[name], name == "text_encoder"
        (folder / name).mkdir(parents=True, exist_ok=True)
        config = json.loads((net.config if text else net).to_json_string())
        if text:
            config |= {"architectures": ["CLIPTextModel"], "dtype": "float16"}
        config.pop("_name_or_path", None)  # where it was read from
        (folder / name / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        # Stable Diffusion's files know the text encoder's weights by this prefix; newer transformers drop it.
        prefix = "text_model." if text else ""
        weights = {prefix + key.removeprefix(prefix): v.half().contiguous() for key, v in net.state_dict().items()}
        file = "model.safetensors" if text else "diffusion_pytorch_model.safetensors"
        save_file(weights, folder / name / file, metadata={"format": "pt"})
        (folder / name / file).chmod(0o644)  # a package's data must be readable by all
    shutil.copytree(parts["files"], folder / "tokenizer", dirs_exist_ok=True)
    parts["scheduler"].save_pretrained(folder / "scheduler")
    index = {name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")}
    index |= {name: ["diffusers", type(parts[name]).__name__] for name in ("scheduler", "unet", "vae")}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: checkpoints, log, sheet, model")
    parser.add_argument("--init", type=Path, help="diffusers folder to start from; nothing: from scratch")
    parser.add_argument("--stage", choices=("vae", "unet", "all"), default="all", help="vae with --init: decoder")
    parser.add_argument("--minutes", type=float, default=60, help="of work, for all stages together")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, help="highest learning rate; 2e-3 from scratch, 1e-3 from a folder")
    parser.add_argument("--data", type=Path, help="folder with pictures as .npz and .json, instead of the font")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf with bitmaps")
    parser.add_argument("--drawn", type=int, default=2, help="drawings of each concept that the decoder learns from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.lr = args.lr or (1e-3 if args.init else 2e-3)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)

    table = concepts()
    shipped = load_pictures([c.character for c in table], args.data, args.font)
    parts = build(args.init, args.out, args.device)
    # The decoder comes last: it is fitted to what the U-Net draws.
    vae, decoder = 0.15 * (args.init is None), 0.15
    vae, unet, decoder = {"unet": (0, 1, 0), "vae": (vae, 0, 1 - vae), "all": (vae, 1 - vae - decoder, decoder)}[
        args.stage
    ]
    if vae:
        everything = list(REFERENCE.read_text(encoding="utf-8").strip())
        train_vae(parts, load_pictures(everything, args.data, args.font), vae * args.minutes, args)
    if unet:
        train_unet(parts, shipped, table, unet * args.minutes, args)
    if decoder:
        train_decoder(parts, shipped, table, decoder * args.minutes, args)
    export(parts, args.out / "model")
    sheet(decode(parts, draw(parts, [c.names[0] for c in table], args.seed, 25)), args.out / "sheet.png")


if __name__ == "__main__":
    main()
