"""Wrap diffusers' networks, so that the sampler can call all of them in the same way.

Shapes: B batch, c channels, h x w latent cells, H x W pixels.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.denoisers.upsampling import double_by_phases


def import_diffusers() -> Any:
    """Import diffusers without the warnings of packages that it tries to import."""
    # An xFormers that was built for another torch logs long warnings about missing kernels.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("xformers").setLevel(logging.ERROR)
    import diffusers

    return diffusers


def resize_positions(embed: Any, height: int, width: int) -> None:
    """Compute the embeddings of positions once, which diffusers computes in each forward pass.

    Args:
        embed: diffusers' `PatchEmbed`, changed in place; one without embeddings is left alone.
        height, width: Sides of the latents.
    """
    import_diffusers()
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    rows, columns = height // embed.patch_size, width // embed.patch_size
    if embed.pos_embed is None or (embed.height, embed.width) == (rows, columns):
        return
    positions = get_2d_sincos_pos_embed(
        embed.pos_embed.shape[-1],
        (rows, columns),
        base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale,
        output_type="pt",
    )
    embed.pos_embed = positions.to(embed.pos_embed)[None]
    embed.height, embed.width = rows, columns


class PixelDiT(nn.Module):
    """diffusers' DiT with the sampler's call.

    It is the module that is trained, and the reference for `LeanDiT`.
    """

    def __init__(self, dit: Any) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return the prediction, (B, c or 2 c, h, w).

        Args:
            latents: (B, c, h, w).
            timesteps: (B,) in [0, 1000).
            labels: (B,) int64.
        """
        prediction: Tensor = self.dit(latents, timestep=timesteps, class_labels=labels).sample
        return prediction


class Autoguided(nn.Module):
    """A denoiser for guided steps whose second half of rows a weaker denoiser predicts.

    Args:
        denoiser: Module that is guided.
        weak: Module that guidance steers away from, in place of the null class.
    """

    def __init__(self, denoiser: nn.Module, weak: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.weak = denoiser, weak

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return both predictions, (2B, c or 2c, h, w).

        Args:
            latents: (2B, c, h, w), the same in both halves.
            timesteps: (2B,).
            labels: (2B,) int64, the same in both halves.
        """
        half = len(latents) // 2
        strong = self.denoiser(latents[:half], timesteps[:half], labels[:half])
        weak = self.weak(latents[half:], timesteps[half:], labels[half:])
        # Only one of the two may predict variances, and only the denoiser's are read.
        more = strong.shape[1] - weak.shape[1]
        return torch.cat((strong, nn.functional.pad(weak, (0, 0, 0, 0, 0, more))))


class Decoder(nn.Module):
    """The decoder of an autoencoder, from the sampler's latents to pixels.

    Args:
        vae: diffusers' autoencoder; its decoder is changed in place.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        double_by_phases(vae.decoder, import_diffusers().models.upsampling.Upsample2D)
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(vae.config.get("shift_factor") or 0.0)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents (B, c, h, w) to images (B, 3, H, W) in [-1, 1]."""
        images: Tensor = self.vae.decode(latents / self.scale + self.shift).sample
        return images


class Encoder(nn.Module):
    """The encoder of an autoencoder, from pixels to the latents that `Decoder` takes.

    Args:
        vae: diffusers' `AutoencoderKL`.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(vae.config.get("shift_factor") or 0.0)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, c, H, W) in [-1, 1] to the means of their latents (B, c, h, w)."""
        latents: Tensor = self.vae.encode(images).latent_dist.mode()
        return (latents - self.shift) * self.scale
