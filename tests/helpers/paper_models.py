"""Build the paper's models at full size with random weights, saved in the published layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from real_sets import write_shard
from safetensors.torch import save_file
from shard_files import encode
from text_encoders import letters_tokenizer

from dmkd_fast.classifiers.loading import build_classifier, save_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec

DIT = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 256,
}
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 52,
    "eos_token_id": 53,
}
# Parameters of the published weights in millions; DiT's embedder is stored once per block.
MILLIONS = {"dit": 750, "vae": 84, "unet": 860}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def dit_xl_2(folder: Path) -> Path:
    """Build the DiT folder that configs/paper/imagenet.yaml describes."""
    _save(diffusers.DiTTransformer2DModel, DIT, folder / "transformer", MILLIONS["dit"])
    _save(diffusers.AutoencoderKL, VAE, folder / "vae", MILLIONS["vae"])
    diffusers.DDPMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    ).save_pretrained(folder / "scheduler")
    return folder


def stable_diffusion_1_5(folder: Path) -> Path:
    """Build a model of its layout and sizes; the tokenizer knows single letters only."""
    from transformers import CLIPTextConfig, CLIPTextModel

    _save(diffusers.UNet2DConditionModel, UNET, folder / "unet", MILLIONS["unet"])
    _save(diffusers.AutoencoderKL, VAE | {"sample_size": 512}, folder / "vae", MILLIONS["vae"])
    diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
    ).save_pretrained(folder / "scheduler")
    tokenizer = letters_tokenizer(folder / "tokenizer", max_length=77)
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPTextModel(CLIPTextConfig(**TEXT)).save_pretrained(folder / "text_encoder")
    return folder


def classifier(folder: Path, architecture: str, *, num_classes: int, stem: str = "own") -> Path:
    """Build a random teacher, for 224 pixels from torchvision, for 32 pixels otherwise."""
    size, crop = (224, 0.875) if architecture.startswith("torchvision:") else (32, 1.0)
    spec = ClassifierSpec(
        architecture=architecture,
        num_classes=num_classes,
        in_chans=3,
        input_size=size,
        crop_pct=crop,
        stem=stem,
        **IMAGENET,
    )
    folder.mkdir(parents=True)
    save_classifier(build_classifier(spec), spec, folder)
    return folder


def write_test_images(folder: Path, *, num_classes: int, count: int = 4) -> Path:
    """Write a shard of noise images; class folders would need an image of every class."""
    noise = torch.randint(0, 256, (count, 256, 256, 3), dtype=torch.uint8).numpy()
    members = []
    for i in range(count):
        members += [(f"{i}.png", encode(noise[i])), (f"{i}.cls", str(i % num_classes).encode())]
    folder.mkdir()
    write_shard(folder / "0.tar", members)
    return folder


def _save(kind: Any, settings: dict[str, Any], folder: Path, millions: int) -> None:
    """Save random bfloat16 weights of about 1 / sqrt(fan-in), held in memory only once."""
    with torch.device("meta"):
        model = kind(**settings)
    model.save_config(folder)
    total = sum(value.numel() for value in model.state_dict().values())
    assert round(total / 1e6) == millions, total
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in model.state_dict().items():
        scale = 0.02 if value.ndim < 2 else value[0].numel() ** -0.5
        made = torch.empty(value.shape, dtype=torch.bfloat16).normal_(generator=generator)
        is_gain = value.ndim < 2 and name.endswith("weight")
        weights[name] = made.mul_(scale).add_(float(is_gain))
    for name in weights:  # the published DiT has the same embedder in every block
        shared = re.sub(
            r"^transformer_blocks\.\d+\.norm1\.emb\.", "transformer_blocks.0.norm1.emb.", name
        )
        weights[name] = weights[shared].clone()
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
