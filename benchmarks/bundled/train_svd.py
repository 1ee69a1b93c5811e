"""Train a small Stable Video Diffusion on the bundled drawings, moved, turned and scaled by simple laws.

    python benchmarks/bundled/train_svd.py --out run --minutes 60

A clip is 8 frames of 64 px. What a drawing does is its own law: vehicles drive, a rocket flies, fruit swings, faces
nod, balls turn, hearts beat. How fast is what `--motion-bucket` and `--fps` say. The VAE is the bundled model's, which
stays as it is; U-Net and encoder of pictures are new, as the U-Net's norms have 32 groups in diffusers whatever the
config says, and the bundled one's 16. PyTorch, diffusers and transformers are needed here only. A run that was stopped
goes on where it was when the same command is given again. The result is OUT/model, a diffusers folder in float16 of
19 MB. No such model is shipped: half an hour of one CPU core is not enough by far, see docs/video.md.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.bundled.emoji_data import FONT, concepts, load_pictures, tiled
from benchmarks.bundled.train_emoji import SCALE, Trainer, to_tensor

BUNDLED = Path(__file__).resolve().parents[2] / "mlx_deepcache" / "checkpoints" / "bundled" / "emoji"
FRAMES, SIDE, BUCKET, FPS = 8, 64, 127, 7
ENCODER = 0.03  # of the minutes
DROP, AUG = 0.1, 0.02  # the share of clips without a picture; SVD's own noise on it
SIGMA = (0.5, 1.6)  # mean and deviation of the noise's logarithm in training
KIND = "SpatioTemporal"
UNET = {
    "sample_size": 16,
    "num_frames": FRAMES,
    "block_out_channels": (64, 96, 96),
    "num_attention_heads": (2, 3, 3),
    "down_block_types": (f"DownBlock{KIND}", f"CrossAttnDownBlock{KIND}", f"DownBlock{KIND}"),
    "up_block_types": (f"UpBlock{KIND}", f"CrossAttnUpBlock{KIND}", f"UpBlock{KIND}"),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 96,
}
SEES = {"hidden_size": 64, "intermediate_size": 128, "projection_dim": 64, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "image_size": 224,
    "patch_size": 32,
}
EULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1} | {
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "timestep_spacing": "leading",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
}
# What moves how, by its plain name; all others nod. Noto's vehicles and animals look to the left.
LAWS = {
    "drive": "bus|ambulance|fire engine|police car|taxi|automobile|tractor|bicycle|sailboat|elephant|rooster|turtle|"
    "whale|dolphin|tropical fish|fox|cloud|helicopter",
    "fly": "airplane|rocket|balloon|flying saucer|butterfly|honeybee|ghost|parrot",
    "turn": "soccer ball|basketball|doughnut|cookie|pizza|sunflower|four leaf clover|sun|star|yin yang|"
    "globe showing americas|lady beetle|fried egg|crescent moon",
    "beat": "red heart|green heart|blue heart|alarm clock|light bulb|fire|bomb|warning|eyes|octopus|drum|"
    "jack o lantern|face with tears of joy|angry face|smiling face with heart eyes",
    "swing": "grapes|watermelon|lemon|banana|pineapple|red apple|green apple|pear|cherries|strawberry|tomato|avocado|"
    "eggplant|carrot|ear of corn|broccoli|rose|tulip|evergreen tree|palm tree|cactus|christmas tree|key|guitar|crown|"
    "top hat|thumbs up|victory hand|trophy|beer mug",
}


def law_of(name: str) -> str:
    """What the drawing of this name does."""
    return next((law for law, names in LAWS.items() if name in names.split("|")), "nod")


def poses(law: str, speed: float) -> torch.Tensor:
    """Angle in radians, scale, and way to the right and down in pixels, of each frame: (F, 4). At speed 1 a round takes
    the 8 frames; the first one is the drawing as it is."""
    phase = torch.arange(FRAMES) * speed * 2 * math.pi / FRAMES
    angle, scale, right, down = torch.zeros(4, FRAMES).unbind()
    there_and_back = (1 - phase.cos()) / 2
    if law == "drive":
        right = -2.5 * phase * FRAMES / (2 * math.pi)
    elif law == "fly":
        right, down = (way * phase * FRAMES / (2 * math.pi) for way in (1.5, -2.0))
    elif law == "turn":
        angle = phase / 2
    elif law == "beat":
        scale = -0.35 * there_and_back
    elif law == "swing":
        angle = 0.35 * phase.sin()
    else:
        down = 6 * there_and_back
    return torch.stack([angle, 1 + scale, right, down], dim=1)


def moved(pictures: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
    """Pictures (N, 3, H, W) in [-1, 1], each by its pose of (N, 4), over white."""
    angle, scale, right, down = pose.unbind(1)
    cos, sin, half = angle.cos() / scale, angle.sin() / scale, SIDE / 2
    x, y = right / half, down / half
    matrix = torch.stack([cos, sin, -cos * x - sin * y, -sin, cos, sin * x - cos * y], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    ink = F.grid_sample(1 - pictures, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return (1 - ink).clamp(-1, 1)


def clips(pictures: torch.Tensor, laws: list[str], speeds: list[float]) -> torch.Tensor:
    """Pictures (N, 3, H, W) -> clips (N, F, 3, H, W), one in four placed and sized anew."""
    n = len(pictures)
    other = (torch.rand(n) < 0.25).float()
    size, away = 1 - other * 0.25 * torch.rand(n), other * (torch.rand(2, n) * 8 - 4)
    start = torch.stack([torch.zeros(n), size, *away], dim=1)
    pose = torch.stack([poses(law, speed) for law, speed in zip(laws, speeds, strict=True)])
    pose[:, :, 1] *= start[:, None, 1]
    pose[:, :, 2:] += start[:, None, 2:]
    return moved(pictures.repeat_interleave(FRAMES, 0), pose.reshape(-1, 4)).reshape(n, FRAMES, 3, SIDE, SIDE)


def seen(encoder: CLIPVisionModelWithProjection, x: torch.Tensor) -> torch.Tensor:
    """What the pipeline shows the U-Net of pictures (N, 3, H, W) smaller than the encoder's: (N, 1, C)."""
    x = (F.interpolate(x, (SEES["image_size"],) * 2, mode="bicubic", align_corners=True) + 1) / 2
    own = CLIPImageProcessor()
    mean, deviation = (torch.tensor(value)[:, None, None] for value in (own.image_mean, own.image_std))
    return encoder((x - mean) / deviation).image_embeds[:, None]


def build() -> dict:
    """The parts of the pipeline, in float32."""
    vae = AutoencoderKL.from_pretrained(BUNDLED, subfolder="vae", torch_dtype=torch.float32).requires_grad_(False)
    unet, encoder = UNetSpatioTemporalConditionModel(**UNET), CLIPVisionModelWithProjection(CLIPVisionConfig(**SEES))
    with torch.no_grad():
        unet.conv_in.weight[:, 4:] *= SCALE  # the pipeline does not scale the picture's latents
    return {"vae": vae, "unet": unet, "image_encoder": encoder}


def train_encoder(parts: dict, pictures: np.ndarray, minutes: float, args) -> None:
    """The encoder of pictures learns to tell the drawings apart, and is left as it is from then on."""
    encoder, head = parts["image_encoder"], torch.nn.Linear(SEES["projection_dim"], len(pictures))
    trainer, x_all = Trainer("encoder", [encoder, head], minutes, args), to_tensor(pictures, "cpu")
    while trainer.progress < 1:
        chosen = torch.randint(len(x_all), (8 * args.batch,))
        start = torch.rand(len(chosen), 4) * torch.tensor([0.4, 0.35, 12.0, 12.0]) - torch.tensor([0.2, -0.7, 6.0, 6.0])
        x = moved(x_all[chosen], start)
        x = x + 0.1 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            guess = head(seen(encoder, x)[:, 0])
        trainer.step(F.cross_entropy(guess.float(), chosen), len(chosen))
    trainer.finish()
    encoder.requires_grad_(False)


def train(parts: dict, trainer: Trainer, pictures: np.ndarray, args) -> None:
    """The U-Net, with EDM's preconditioning (Karras et al. 2022) as Euler's scheduler undoes it."""
    vae, unet, encoder = parts["vae"], parts["unet"], parts["image_encoder"]
    laws = [law_of(concept.names[0]) for concept in concepts()]
    x_all, n = to_tensor(pictures, "cpu"), args.batch
    torch.manual_seed(args.seed + trainer.samples)
    deck = torch.empty(0, dtype=torch.long)
    while trainer.progress < 1:
        if len(deck) < n:
            deck = torch.cat([deck, torch.randperm(len(x_all))])
        chosen, deck = deck[:n], deck[n:]
        plain = torch.rand(n) < 0.6  # most are as nobody asked for anything else
        bucket = torch.where(plain, BUCKET, torch.randint(0, 256, (n,)))
        fps = torch.where(plain, FPS, torch.randint(5, 13, (n,)))
        noise = torch.where(plain, AUG, 0.1 * torch.rand(n))
        speeds = (bucket / BUCKET * FPS / fps).tolist()
        x = clips(x_all[chosen], [laws[i] for i in chosen.tolist()], speeds)
        given = (torch.rand(n) >= DROP).float()
        shown = x[:, 0] + noise[:, None, None, None] * torch.randn_like(x[:, 0])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            context = seen(encoder, x[:, 0]) * given[:, None, None]
            latents = vae.encode(torch.cat([x.flatten(0, 1), shown])).latent_dist.mode().float()
        z = latents[: n * FRAMES].unflatten(0, (n, FRAMES)) * SCALE
        beside = (latents[n * FRAMES :] * given[:, None, None, None])[:, None].expand_as(z)
        # One in each of as many equal parts of the normal distribution as there are samples: less luck in the loss.
        share = (torch.randperm(n) + torch.rand(n).clamp(0.01, 0.99)) / n
        sigma = (SIGMA[0] + SIGMA[1] * math.sqrt(2) * torch.erfinv(2 * share - 1)).exp().clamp(0.002, 80)
        s = sigma.view(-1, 1, 1, 1, 1)
        noisy = z + s * torch.randn_like(z)
        told = torch.stack([fps - 1, bucket, noise], dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            out = unet(torch.cat([noisy / (s**2 + 1).sqrt(), beside], 2), 0.25 * sigma.log(), context, told).sample
        target = (noisy / (s**2 + 1) - z) * (s**2 + 1).sqrt() / s
        trainer.step((out.float() - target).square().mean(), n)


def pipeline(parts: dict) -> StableVideoDiffusionPipeline:
    return StableVideoDiffusionPipeline(
        **parts, scheduler=EulerDiscreteScheduler(**EULER), feature_extractor=CLIPImageProcessor()
    )


def sheet(parts: dict, pictures: np.ndarray, file: Path, names: list[str], **options) -> None:
    """A row of frames for each of these drawings, as the pipeline makes them."""
    pipe, table = pipeline(parts), [concept.names[0] for concept in concepts()]
    pipe.set_progress_bar_config(disable=True)
    options = {"height": SIDE, "width": SIDE, "num_frames": FRAMES, "output_type": "np", "fps": FPS} | options
    rows = []
    for name in names:
        image = Image.fromarray(pictures[table.index(name)])
        made = pipe(image, noise_aug_strength=AUG, generator=torch.Generator().manual_seed(0), **options).frames[0]
        rows += [np.asarray(image)[None], (made * 255).round().astype(np.uint8)]
    tiled(np.concatenate(rows), FRAMES + 1).resize((2 * SIDE * (FRAMES + 1), 2 * SIDE * len(names))).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: checkpoint, log, sheet, model")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=4, help="clips a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--data", type=Path, help="folder with pictures as .npz and .json, instead of the font")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf with bitmaps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16: faster where the CPU can")
    parser.add_argument("--look", action="store_true", help="only draw a sheet with what is learned so far")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    pictures = load_pictures([concept.character for concept in concepts()], args.data, args.font)
    parts = build()
    train_encoder(parts, pictures, ENCODER * args.minutes, args)
    trainer = Trainer("unet", [parts["unet"]], (1 - ENCODER) * args.minutes, args)
    if not args.look:
        train(parts, trainer, pictures, args)
    trainer.finish()
    names = ["rocket", "automobile", "soccer ball", "red heart", "red apple", "panda", "dolphin", "sunflower"]
    sheet(parts, pictures, args.out / "sheet.png", names)
    if not args.look:
        pipeline({name: part.half() for name, part in parts.items()}).save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
