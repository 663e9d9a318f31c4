"""Build small random diffusion models, saved in the layout of their pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

from dmkd_fast.denoisers.trainable import share_embedder

VAE = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def spread(model: torch.nn.Module, seed: int = 0) -> Any:
    """Set random weights, large enough that every part of the model affects its output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim < 2 else 1 / parameter[0].numel() ** 0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + (parameter.ndim < 2) * 0.2)
    return model.eval()


def small_dit(*, shared: bool = True, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    } | changes
    dit = spread(diffusers.DiTTransformer2DModel(**settings))
    if shared:
        share_embedder(dit)
    for block in dit.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.1  # as published; eval mode ignores it
    return dit


def dit_folder(folder: Path, *, shared: bool = True, scheduler: Any = None, **changes: Any) -> Path:
    """Save a small DiT in the layout of facebook/DiT-XL-2-256: transformer, vae, scheduler."""
    pipeline = diffusers.DiTPipeline(
        transformer=small_dit(shared=False, **changes),
        vae=spread(diffusers.AutoencoderKL(**VAE), seed=1),
        scheduler=scheduler or diffusers.DDIMScheduler(clip_sample=False),
        id2label={i: f"class {i}" for i in range(1000)},
    )
    if shared:  # Every block saves a copy, as in the published weights.
        first = pipeline.transformer.transformer_blocks[0].norm1.emb.state_dict()
        for block in pipeline.transformer.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    pipeline.save_pretrained(folder)
    return folder


def class_unet_folder(folder: Path, scheduler: Any, **changes: Any) -> Path:
    """Save a small UNet in the layout of openai/diffusers-cd_imagenet64_l2: unet, scheduler."""
    unet = diffusers.UNet2DModel(
        in_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **(UNET | {"num_class_embeds": 10, "out_channels": 3} | changes),
    )
    spread(unet).save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


SIT: dict[str, Any] = {
    "_class_name": "SiTTransformer2DModel",
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 5,
    "learn_sigma": True,
    "norm_type": "ln",
}


def sit_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights under the names of SiT's own code."""
    d, p, c = (config[key] for key in ("hidden_size", "patch_size", "in_channels"))
    made = 2 * c if config["learn_sigma"] else c
    tokens = (config["input_size"] // p) ** 2
    linear = {
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
        "final_layer.linear": (p * p * made, d),
    }
    for i in range(config["depth"]):
        linear[f"blocks.{i}.adaLN_modulation.1"] = (6 * d, d)
        linear[f"blocks.{i}.attn.qkv"] = (3 * d, d)
        linear[f"blocks.{i}.attn.proj"] = (d, d)
        linear[f"blocks.{i}.mlp.fc1"] = (4 * d, d)
        linear[f"blocks.{i}.mlp.fc2"] = (d, 4 * d)
    torch.manual_seed(0)
    labels = config["num_classes"] + (config["class_dropout_prob"] > 0)
    weights = {
        "pos_embed": torch.randn(1, tokens, d),
        "x_embedder.proj.weight": torch.randn(d, c, p, p) / 4,
        "x_embedder.proj.bias": torch.randn(d) / 4,
        "y_embedder.embedding_table.weight": torch.randn(labels, d),
    }
    for name, shape in linear.items():
        weights[f"{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
        weights[f"{name}.bias"] = torch.randn(shape[0]) / 4
    return weights


def sit_folder(folder: Path, **changes: Any) -> Path:
    config = SIT | changes
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    save_file(sit_weights(config), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    spread(diffusers.AutoencoderKL(**VAE), seed=1).save_pretrained(folder / "vae")
    return folder


def gm_dit_folder(folder: Path, **changes: Any) -> Path:
    """Save a small model in the layout of pi-Flow's own code, with the parts beside it."""
    config: dict[str, Any] = {
        "_class_name": "GMDiTTransformer2DModelV2",
        "num_gaussians": 3,
        "logstd_inner_dim": 8,
        "gm_num_logstd_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 5,
    } | changes
    d = config["num_attention_heads"] * config["attention_head_dim"]
    p, c, count = config["patch_size"], config["in_channels"], config["num_gaussians"]
    linear = {
        "emb.timestep_embedder.linear_1": (d, 256),
        "emb.timestep_embedder.linear_2": (d, d),
        "proj_out_1": (2 * d, d),
        "proj_out_means": (p * p * count * c, d),
        "proj_out_logweights": (p * p * count, d),
        "proj_out_logstds.1": (config["logstd_inner_dim"], d),
        "proj_out_logstds.3": (1, config["logstd_inner_dim"]),
    }
    for i in range(config["num_layers"]):
        block = f"transformer_blocks.{i}"
        linear |= {f"{block}.attn1.to_{part}": (d, d) for part in ("q", "k", "v", "out.0")}
        linear |= {f"{block}.norm1.linear": (6 * d, d), f"{block}.ff.net.0.proj": (4 * d, d)}
        linear |= {f"{block}.ff.net.2": (d, 4 * d)}
    torch.manual_seed(0)
    weights = {
        "pos_embed.proj.weight": torch.randn(d, c, p, p) / 4,
        "pos_embed.proj.bias": torch.randn(d) / 4,
        "emb.class_embedder.embedding_table.weight": torch.randn(
            config["num_embeds_ada_norm"] + 1, d
        ),
    }
    for name, shape in linear.items():
        weights[f"{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
        weights[f"{name}.bias"] = torch.randn(shape[0]) / 4
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    spread(diffusers.AutoencoderKL(**VAE), seed=1).save_pretrained(folder / "vae")
    return folder
