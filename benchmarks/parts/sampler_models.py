"""Models of the sampler's measurement, how diffusers samples from them, and their arithmetic."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import time_interleaved
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.trainable import share_embedder

diffusers: Any = importlib.import_module("diffusers")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Models, sizes and step counts of the measurement."""

    flow_steps: tuple[tuple[int, int], ...] = ((4, 128), (10, 128), (50, 32))
    """Steps and batch size of each measurement of the embedded model."""
    latent_steps: tuple[int, ...] = (4, 10)
    latent_batch: int = 4
    sweep: tuple[int, ...] = (4, 8, 16, 32)
    products: tuple[tuple[int, int, int], ...] = (
        (4096, 1152, 4608),
        (4096, 4608, 1152),
        (8192, 768, 768),
        (2048, 2048, 2048),
    )
    heads: int = 6
    layers: int = 12
    latent_side: int = 32
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)


# A GPU is not filled by less.
GPU = Sizes(flow_steps=((10, 128),), latent_steps=(4,), latent_batch=64, sweep=(64,))
# A rehearsal of the same lines.
TINY = Sizes(
    flow_steps=((1, 4),),
    latent_steps=(1,),
    sweep=(4,),
    products=((64, 64, 64), (64, 32, 64)),
    heads=1,
    layers=1,
    latent_side=8,
    vae_channels=(32, 32),
)


def flow_loop(
    module: Any, dtype: torch.dtype, labels: Tensor, steps: int, guidance_scale: float
) -> Tensor:
    """Return uint8 images of a pixel flow model, sampled in the way of DiTPipeline."""
    device = labels.device
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), device=device)
    x = torch.randn(len(labels), 1, 28, 28, device=device, dtype=dtype)
    return guided_loop(module, scheduler, x, labels, guidance_scale)


@torch.no_grad()
def guided_loop(
    module: Any, scheduler: Any, x: Tensor, labels: Tensor, guidance_scale: float
) -> Tensor:
    """Sample from noise x (B, c, H, W) with any scheduler whose timesteps are set."""
    both = torch.cat((labels, torch.full_like(labels, module.config.num_embeds_ada_norm)))
    for timestep in scheduler.timesteps:
        velocity = module(
            torch.cat((x, x)), timestep=timestep.expand(len(both)), class_labels=both
        ).sample
        conditional, unconditional = velocity.chunk(2)
        velocity = unconditional + guidance_scale * (conditional - unconditional)
        x = scheduler.step(velocity, timestep, x).prev_sample
    return (x.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def fastest_product(
    device: torch.device, dtype: torch.dtype, products: tuple[tuple[int, int, int], ...]
) -> tuple[Callable[[], object], float]:
    """Return the fastest of a few large products (M, K, N), and its FLOPs."""
    arms: dict[str, Callable[[], object]] = {}
    for m, k, n in products:
        a, b = (torch.randn(size, k, device=device, dtype=dtype) for size in (m, n))
        arms[f"{m}x{k}x{n}"] = partial(nn.functional.linear, a, b)
    with torch.inference_mode():
        timings = time_interleaved(arms, n=15, warmup=3)
    flops = dict(zip(arms, (2.0 * m * k * n for m, k, n in products), strict=True))
    best = max(arms, key=lambda name: flops[name] / timings[name]["p20_ms"])
    return arms[best], flops[best]


def dit_s2_config(sizes: Sizes) -> dict[str, Any]:
    """Return the config of DiT-S/2 for 256 x 256 images (latents 4 x 32 x 32)."""
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": 64,
        "num_layers": sizes.layers,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": sizes.latent_side,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    }


def dit_s2(sizes: Sizes) -> Any:
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(**dit_s2_config(sizes)).eval()
    share_embedder(dit)
    return dit


def sd_vae(sizes: Sizes) -> Any:
    torch.manual_seed(0)
    count = len(sizes.vae_channels)
    return diffusers.AutoencoderKL(
        block_out_channels=sizes.vae_channels,
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        sample_size=256,
    ).eval()


def taesd(sizes: Sizes) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny().eval()


def dit_flops(config: dict[str, Any]) -> float:
    """Return the FLOPs of one forward pass of one sample: products, attention included."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    layers, patch = config["num_layers"], config["patch_size"]
    tokens = (config["sample_size"] // patch) ** 2
    ends = config["in_channels"] + (config["out_channels"] or config["in_channels"])
    token = layers * (24 * width**2 + 4 * tokens * width) + 2 * patch**2 * ends * width
    return float(tokens * token + 2 * width * (256 + width * (6 * layers + 3)))


def forward_flops(loaded: Denoiser, device: torch.device) -> float:
    """Count the FLOPs of one forward pass of one image."""
    module: Any = loaded.module
    module.attention = "short"
    zero = torch.zeros(1, *loaded.latent_shape, device=device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        module(zero, torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64).to(device))
    return float(counter.get_total_flops())


def decoder_flops(vae: Any, size: int) -> float:
    """Count the FLOPs of decoding one image, on meta tensors."""
    meta = copy.deepcopy(vae).to("meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        meta.decode(torch.zeros(1, 4, size, size, device="meta"))
    return float(counter.get_total_flops())


def diffusers_dit(folder: Path) -> Any:
    """Load the module with diffusers."""
    return diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
