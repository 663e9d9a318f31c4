"""Class-conditional UNets: DDPM and consistency models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.denoisers.config_values import whole
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.families.folder import ModelFolder
from dmkd_fast.runtime.errors import invalid


class ClassUNet(nn.Module):
    """diffusers' `UNet2DModel` with class embeddings and the sampler's call."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return the prediction, (B, c or 2 c, h, w).

        Args:
            latents: (B, c, h, w).
            timesteps: (B,).
            labels: (B,) int64.
        """
        prediction: Tensor = self.unet(latents, timesteps, class_labels=labels).sample
        return prediction


def load(model: ModelFolder) -> Denoiser:
    """Load a `UNet2DModel` that has a table of classes."""
    path, config = model.config_path, model.config
    num_classes, kind = config.get("num_class_embeds"), config.get("class_embed_type")
    if not num_classes or kind is not None:
        got = f"num_class_embeds={num_classes!r:.60}, class_embed_type={kind!r:.60}"
        raise invalid(f"{path}", got, "a table of classes", "use a class-conditional model")
    shape = (model.channels(), *model.sides())
    unet = model.load(
        "UNet2DModel",
        lambda unet: unet(
            torch.zeros(1, *shape), torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.int64)
        ),
    )
    return Denoiser(
        module=ClassUNet(unet),
        scheduler=model.scheduler,
        num_classes=whole(path, config, "num_class_embeds"),
        latent_shape=shape,
    )
