"""A tiny random Stable Video Diffusion checkpoint in the diffusers layout, as lively as those of tiny.py."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from tiny import enliven, write_json
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.24.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "trained_betas": None,
    "use_karras_sigmas": True,
}
PREPROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
}
INDEX = {
    "_class_name": "StableVideoDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
    "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
}


def build(folder: Path, widths=(32, 64, 96, 96), heads=(2, 4, 6, 6), seeing=(32, 4)) -> Path:
    """Write it to `folder`, in float32, and return the folder. widths: of the U-Net, multiples of 32, as groups have 32
    channels in diffusers; seeing: width and heads of CLIP's encoder of pictures."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2000)
        unet = UNetSpatioTemporalConditionModel(
            sample_size=16,
            block_out_channels=widths,
            num_attention_heads=heads,
            cross_attention_dim=24,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            num_frames=5,
        )
        enlivened(unet).save_pretrained(folder / "unet")
        vae = AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(32, 32, 32, 64), layers_per_block=2
        )
        enlivened(vae)
        vae.quant_conv.weight.div_(0.18215)
        vae.decoder.conv_in.weight.mul_(0.18215)
        vae.save_pretrained(folder / "vae")
        config = CLIPVisionConfig(
            hidden_size=seeing[0],
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=seeing[1],
            image_size=224,
            patch_size=56,
            hidden_act="gelu",
            projection_dim=24,
        )
        encoder = enlivened(CLIPVisionModelWithProjection(config))
        encoder.save_pretrained(folder / "image_encoder")
    write_json(folder / "scheduler" / "scheduler_config.json", EULER)
    write_json(folder / "feature_extractor" / "preprocessor_config.json", PREPROCESSOR)
    write_json(folder / "model_index.json", INDEX)
    return folder


def enlivened(model):
    """`tiny.enliven`, and the parameters that only these nets have: shares are anything between 0 and 1."""
    enliven(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv3d):
            gain = 1.5 if "conv1" in name or "conv2" in name else 1.0
            module.weight.normal_(std=gain * module.weight[0].numel() ** -0.5)
            module.bias.normal_(std=0.2)
    for name, parameter in model.named_parameters():
        if name.endswith(("mix_factor", "class_embedding")):
            parameter.normal_()
    return model
