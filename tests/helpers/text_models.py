"""Build small random text-to-image models, saved in the layout of their pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from small_models import UNET, VAE, spread
from text_encoders import clip, gemma, letters_tokenizer, t5


def vae(channels: int, **changes: Any) -> Any:
    """Build a small autoencoder that doubles the sides of latents."""
    return spread(diffusers.AutoencoderKL(**(VAE | {"latent_channels": channels} | changes)), 1)


def saved(folder: Path, kind: str, network: Any, *, seed: int = 3, **parts: Any) -> Any:
    """Build a pipeline of a network with random weights, and save it."""
    name = "unet" if "UNet" in type(network).__name__ else "transformer"
    pipeline = getattr(diffusers, kind)(**{name: spread(network, seed=seed)}, **parts)
    pipeline.save_pretrained(folder)
    return pipeline


def text_unet(**changes: Any) -> Any:
    """Build a UNet of two levels with cross-attention in one of them."""
    blocks = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    settings = {"in_channels": 4, "out_channels": 4, "attention_head_dim": 2}
    settings |= {"down_block_types": blocks[0], "up_block_types": blocks[1]}
    return diffusers.UNet2DConditionModel(**(UNET | settings | changes))


def stable_diffusion(folder: Path, scheduler: Any, *, seed: int = 3, **changes: Any) -> Any:
    """Build and save a small StableDiffusionPipeline of 16-pixel images."""
    return saved(
        folder,
        "StableDiffusionPipeline",
        text_unet(**({"cross_attention_dim": 16} | changes)),
        seed=seed,
        vae=vae(4),
        text_encoder=clip(16, projected=False, seed=2),
        tokenizer=letters_tokenizer(folder),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(
    folder: Path, scheduler: Any, *, force_zeros_for_empty_prompt: bool = True, **changes: Any
) -> Any:
    """Build and save a small StableDiffusionXLPipeline of 16-pixel images."""
    settings: dict[str, Any] = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 24,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 16,
    }
    tokenizer = letters_tokenizer(folder)
    return saved(
        folder,
        "StableDiffusionXLPipeline",
        text_unet(**(settings | changes)),
        vae=vae(4),
        text_encoder=clip(8, projected=False, seed=2),
        text_encoder_2=clip(16, projected=True, seed=4),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=scheduler,
        add_watermarker=False,
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
    )


def sd3(folder: Path, scheduler: Any, *, with_t5: bool = True, **changes: Any) -> Any:
    """Build and save a small StableDiffusion3Pipeline of 16-pixel images."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 12,
    }
    tokenizer = letters_tokenizer(folder)
    long, tokenizer_3 = t5(folder / "files", 32, seed=5) if with_t5 else (None, None)
    return saved(
        folder,
        "StableDiffusion3Pipeline",
        diffusers.SD3Transformer2DModel(**(settings | changes)),
        vae=vae(16, shift_factor=0.1, scaling_factor=1.5, use_quant_conv=False),
        text_encoder=clip(8, projected=True, seed=2),
        text_encoder_2=clip(16, projected=True, seed=4),
        text_encoder_3=long,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
        scheduler=scheduler,
    )


def flux(folder: Path, scheduler: Any, *, guidance_embeds: bool, **changes: Any) -> Any:
    """Build and save a small FluxPipeline of 16-channel latents."""
    settings: dict[str, Any] = {
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": guidance_embeds,
    }
    long, tokenizer_2 = t5(folder / "files", 32, seed=5)
    return saved(
        folder,
        "FluxPipeline",
        diffusers.FluxTransformer2DModel(**(settings | changes)),
        vae=vae(16, shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False),
        text_encoder=clip(8, projected=False, seed=2),
        text_encoder_2=long,
        tokenizer=letters_tokenizer(folder),
        tokenizer_2=tokenizer_2,
        scheduler=scheduler,
    )


def pixart(
    folder: Path, scheduler: Any, *, name: str = "PixArtAlphaPipeline", **changes: Any
) -> Any:
    """Build and save a small pipeline of PixArt, of 16-pixel images."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "cross_attention_dim": 16,
        "caption_channels": 32,
    }
    encoder, tokenizer = t5(folder / "files", 32, seed=5)
    return saved(
        folder,
        name,
        diffusers.PixArtTransformer2DModel(**(settings | changes)),
        vae=vae(4),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
    )


def sana(folder: Path, scheduler: Any, *, sprint: bool = False, **changes: Any) -> Any:
    """Build and save a small SanaPipeline or SanaSprintPipeline, with an autoencoder of DC-AE."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "guidance_embeds": sprint,
        "qk_norm": "rms_norm_across_heads" if sprint else None,
    }
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.4,
    )
    encoder, tokenizer = gemma(16, seed=5)
    return saved(
        folder,
        "SanaSprintPipeline" if sprint else "SanaPipeline",
        diffusers.SanaTransformer2DModel(**(settings | changes)),
        vae=spread(autoencoder, seed=1),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
    )


def packed(noise: torch.Tensor) -> torch.Tensor:
    """Arrange latents (B, c, h, w) in patches as FLUX does: (B, h / 2 * w / 2, 4 c)."""
    batch, channels, height, width = noise.shape
    return diffusers.FluxPipeline._pack_latents(noise, batch, channels, height, width)
