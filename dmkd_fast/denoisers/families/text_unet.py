"""Stable Diffusion 1 and 2: a UNet with one CLIP encoder.

Shapes: B batch, c channels, h x w latent cells, L tokens of a prompt, D their width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.denoisers.config_values import whole
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.families.folder import ModelFolder
from dmkd_fast.denoisers.prompts.encoders import TextEncoder


class TextUNet(nn.Module):
    """diffusers' `UNet2DConditionModel` with prompts that are encoded once.

    Args:
        unet: diffusers' module.
        prompts: Embeddings, (num_classes + 1, L, D); the last one is the empty prompt.
    """

    def __init__(self, unet: Any, prompts: Tensor) -> None:
        super().__init__()
        self.unet, self.prompts = unet, nn.Buffer(prompts)
        self.guidance_width = int(unet.config.time_cond_proj_dim or 0)

    def forward(
        self, latents: Tensor, timesteps: Tensor, labels: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """Return the prediction, (B, c, h, w).

        Args:
            latents: (B, c, h, w).
            timesteps: (B,).
            labels: (B,) int64.
            guidance: Guidance scales, (B,), for guidance-distilled models; None for others.
        """
        condition = None
        if guidance is not None:
            condition = _guidance_waves(guidance - 1, self.guidance_width).to(latents.dtype)
        prediction: Tensor = self.unet(
            latents,
            timesteps,
            encoder_hidden_states=self.prompts[labels],
            timestep_cond=condition,
            added_cond_kwargs=self.added(labels),
        ).sample
        return prediction

    def added(self, labels: Tensor) -> dict[str, Tensor] | None:
        """Return conditions beside the prompts, one row a label; there are none."""
        del labels
        return None


def load(model: ModelFolder) -> Denoiser:
    """Load a `UNet2DConditionModel`, and encode the prompts of its classes."""
    path, config = model.config_path, model.config
    shape = (model.channels(), *model.sides())
    width = whole(path, config, "cross_attention_dim")
    guidance = guidance_width(model)
    prompts = model.check_width(model.encode(TextEncoder())["last"], width)
    unet = model.load(
        "UNet2DConditionModel",
        lambda unet: unet(
            torch.zeros(1, *shape),
            torch.zeros(1),
            torch.zeros(1, 8, width),
            timestep_cond=None if guidance is None else torch.zeros(1, guidance),
        ),
    )
    return Denoiser(
        module=TextUNet(unet, prompts),
        scheduler=model.scheduler,
        num_classes=len(model.prompts),
        null_class=len(model.prompts),
        latent_shape=shape,
        takes_guidance=guidance is not None,
        **own_settings(model, 7.5),
    )


def own_settings(model: ModelFolder, guidance_scale: float) -> dict[str, Any]:
    """Return `num_steps` and `guidance_scale` of a UNet with prompts.

    Models distilled to few steps (SD-Turbo, SDXL-Turbo) are published with Euler steps of trailing
    timesteps. Their guidance is folded in. For others, diffusers' pipelines take 50 steps.

    Args:
        model: Folder of the model.
        guidance_scale: Scale of a model that is not distilled.
    """
    config = model.scheduler
    is_euler = str(config.get("_class_name")).startswith("Euler")
    is_noise = config.get("prediction_type", "epsilon") == "epsilon"
    if is_euler and is_noise and config.get("timestep_spacing") == "trailing":
        return {"num_steps": 4, "guidance_scale": 1.0}
    return {"num_steps": 50, "guidance_scale": guidance_scale}


def guidance_width(model: ModelFolder) -> int | None:
    """Return the width of a UNet's guidance embedding; None if guidance is no input."""
    if model.config.get("time_cond_proj_dim") is None:
        return None
    return whole(model.config_path, model.config, "time_cond_proj_dim")


def _guidance_waves(guidance: Tensor, width: int) -> Tensor:
    """Embed guidance values as sinusoids, for guidance-distilled UNets.

    Args:
        guidance: Guidance scale - 1, (B,).
        width: Width of the embedding.

    Returns:
        (B, width).
    """
    half = width // 2
    places = torch.arange(half, dtype=torch.float32, device=guidance.device)
    angles = 1000 * guidance[:, None] * torch.exp(places * (-math.log(10_000) / (half - 1)))
    return nn.functional.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, width % 2))
