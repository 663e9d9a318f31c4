"""Build small random text-to-image models, saved in the layout of their pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from small_models import UNET, VAE, letters_tokenizer, spread

PROMPTS = ["a cat", "some dog", "the car", "no"]
# Tokens of a prompt for CLIP.
TOKENS = 16


def clip(width: int, *, projected: bool, seed: int) -> Any:
    """Build a small CLIP text encoder; `projected` adds the projection to a pooled vector."""
    import transformers

    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=52,
        eos_token_id=53,
    )
    return spread(getattr(transformers, name)(config), seed=seed)


def t5(folder: Path, width: int, *, seed: int) -> tuple[Any, Any]:
    """Build a small T5 encoder, and a tokenizer of single letters with its files in `folder`."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = [chr(c) for c in range(97, 123)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(letter, -3.0) for letter in letters]
    fast = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(vocabulary),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    tokenizer = transformers.T5TokenizerFast.from_pretrained(folder, local_files_only=True)
    return spread(encoder, seed=seed), tokenizer


def vae(channels: int, **changes: Any) -> Any:
    """Build a small autoencoder that doubles the sides of latents."""
    return spread(diffusers.AutoencoderKL(**(VAE | {"latent_channels": channels} | changes)), 1)


def sdxl(folder: Path, scheduler: Any, **changes: Any) -> Any:
    """Build and save a small StableDiffusionXLPipeline of 16-pixel images."""
    index = {"force_zeros_for_empty_prompt": changes.pop("force_zeros_for_empty_prompt", True)}
    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 16,
    }
    tokenizer = letters_tokenizer(folder, max_length=TOKENS)
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=clip(8, projected=False, seed=2),
        text_encoder_2=clip(16, projected=True, seed=4),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=spread(diffusers.UNet2DConditionModel(**(UNET | settings | changes)), seed=3),
        scheduler=scheduler,
        add_watermarker=False,
        **index,
    )
    pipeline.save_pretrained(folder)
    return pipeline


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
    tokenizer = letters_tokenizer(folder, max_length=TOKENS)
    long, tokenizer_3 = t5(folder / "files", 32, seed=5) if with_t5 else (None, None)
    transformer = diffusers.SD3Transformer2DModel(**(settings | changes))
    pipeline = diffusers.StableDiffusion3Pipeline(
        vae=vae(16, shift_factor=0.1, scaling_factor=1.5, use_quant_conv=False),
        text_encoder=clip(8, projected=True, seed=2),
        text_encoder_2=clip(16, projected=True, seed=4),
        text_encoder_3=long,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
        transformer=spread(transformer, seed=3),
        scheduler=scheduler,
    )
    pipeline.save_pretrained(folder)
    return pipeline


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
    }
    long, tokenizer_2 = t5(folder / "files", 32, seed=5)
    transformer = diffusers.FluxTransformer2DModel(
        guidance_embeds=guidance_embeds, **(settings | changes)
    )
    pipeline = diffusers.FluxPipeline(
        vae=vae(16, shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False),
        text_encoder=clip(8, projected=False, seed=2),
        text_encoder_2=long,
        tokenizer=letters_tokenizer(folder, max_length=TOKENS),
        tokenizer_2=tokenizer_2,
        transformer=spread(transformer, seed=3),
        scheduler=scheduler,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def packed(noise: torch.Tensor) -> torch.Tensor:
    """Arrange latents (B, c, h, w) in patches as FLUX does: (B, h / 2 * w / 2, 4 c)."""
    batch, channels, height, width = noise.shape
    return diffusers.FluxPipeline._pack_latents(noise, batch, channels, height, width)
