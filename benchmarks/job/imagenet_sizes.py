"""Shapes and counts of the measurement at ImageNet size, and of its rehearsal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every shape and count of this measurement."""

    heads: int = 16
    head_dim: int = 72
    layers: int = 28
    latent_side: int = 32
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    vae_groups: int = 32
    num_classes: int = 1000
    steps: tuple[int, int] = (4, 20)
    guidance_scale: float = 2.0
    sampler_batch: int = 64
    n_sampler: int = 5
    view_size: int = 224
    teacher: str = "resnet18"
    students: tuple[str, ...] = ("resnet18",)
    batch: int = 256
    capacity: int = 8192
    half_views: bool = True  # as `dmkd` renders them on CUDA
    n_training: int = 20
    at_least_s: float = 10.0  # of each arm, all its timings together
    # The published recipe, DDPM with learned variances; 20 of its 100 steps, which all cost alike.
    recipe_batch: int = 160
    recipe_steps: int = 20
    gemm: int = 8192
    """Side of the matrices whose product is the ceiling of the others."""
    # The job of the paper: 200,000 images at 100 steps, each seen 100 times.
    job_images: int = 200_000
    job_steps: int = 100
    job_reuse: int = 100

    @property
    def image_side(self) -> int:
        """Pixels after decoding."""
        return self.latent_side << (len(self.vae_channels) - 1)

    @property
    def dit(self) -> dict[str, Any]:
        """Arguments of a `DiTTransformer2DModel`."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "num_layers": self.layers,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": self.latent_side,
            "patch_size": 2,
            "num_embeds_ada_norm": self.num_classes,
        }

    @property
    def vae(self) -> dict[str, Any]:
        """Arguments of an `AutoencoderKL`."""
        count = len(self.vae_channels)
        return {
            "block_out_channels": self.vae_channels,
            "layers_per_block": 2,
            "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * count,
            "sample_size": self.image_side,
            "up_block_types": ("UpDecoderBlock2D",) * count,
            "norm_num_groups": self.vae_groups,
        }


# The same lines in seconds on a CPU.
TINY = Settings(
    heads=2,
    head_dim=8,
    layers=1,
    latent_side=8,
    vae_channels=(8, 16),
    vae_groups=4,
    steps=(1, 2),
    sampler_batch=4,
    n_sampler=1,
    view_size=32,
    batch=4,
    teacher="resnet10t",
    students=("resnet10t",),
    capacity=16,
    n_training=1,
    at_least_s=0.0,
    half_views=False,  # the stand-in for CUDA has no autocast
    recipe_batch=2,
    recipe_steps=2,
    gemm=64,
)
