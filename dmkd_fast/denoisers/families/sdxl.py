"""Stable Diffusion XL and SDXL-Turbo: a UNet with two CLIP encoders and the size as a condition.

Shapes: L tokens of a prompt, D their width, P width of a pooled prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.denoisers.config_values import whole
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.families.folder import ModelFolder
from dmkd_fast.denoisers.families.text_unet import TextUNet, guidance_width, own_settings
from dmkd_fast.denoisers.prompts.encoders import TextEncoder

ENCODERS = (
    TextEncoder(outputs=("penultimate",)),
    TextEncoder(
        part="text_encoder_2",
        tokenizer="tokenizer_2",
        model_class="CLIPTextModelWithProjection",
        outputs=("penultimate", "pooled"),
    ),
)


class SDXLUNet(TextUNet):
    """diffusers' `UNet2DConditionModel` with prompts, pooled prompts and sizes.

    Args:
        unet: diffusers' module.
        prompts: Embeddings, (num_classes + 1, L, D); the last one is the empty prompt.
        pooled: Pooled embeddings, (num_classes + 1, P).
        height, width: Size of the images in pixels.
    """

    def __init__(self, unet: Any, prompts: Tensor, pooled: Tensor, height: int, width: int) -> None:
        super().__init__(unet, prompts)
        self.pooled = nn.Buffer(pooled)
        # Size before a crop, corner of the crop, size of the image. bfloat16 would round them.
        self.sizes = nn.Buffer(torch.tensor([height, width, 0, 0, height, width]))

    def added(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the conditions beside the prompts, one row a label."""
        sizes = self.sizes.expand(len(labels), -1)
        return {"text_embeds": self.pooled[labels], "time_ids": sizes}


def load(model: ModelFolder) -> Denoiser:
    """Load the `UNet2DConditionModel` of SDXL, and encode the prompts of its classes."""
    path, config = model.config_path, model.config
    height, width = model.sides()
    shape = (model.channels(), height, width)
    pixels = model.pixels_per_latent()
    first, second = (model.encode(encoder) for encoder in ENCODERS)
    prompts = torch.cat((first["penultimate"], second["penultimate"]), dim=-1)
    model.check_width(prompts, whole(path, config, "cross_attention_dim"))
    pooled = second["pooled"]
    added = whole(path, config, "projection_class_embeddings_input_dim")
    model.check_width(pooled, added - 6 * whole(path, config, "addition_time_embed_dim"))
    if model.pipeline.get("force_zeros_for_empty_prompt", True):
        prompts[-1], pooled[-1] = 0, 0
    guidance = guidance_width(model)
    conditions = {"text_embeds": torch.zeros(1, pooled.shape[-1]), "time_ids": torch.zeros(1, 6)}
    unet = model.load(
        "UNet2DConditionModel",
        lambda unet: unet(
            torch.zeros(1, *shape),
            torch.zeros(1),
            torch.zeros(1, 8, prompts.shape[-1]),
            timestep_cond=None if guidance is None else torch.zeros(1, guidance),
            added_cond_kwargs={name: value.to("meta") for name, value in conditions.items()},
        ),
    )
    return Denoiser(
        module=SDXLUNet(unet, prompts, pooled, height * pixels, width * pixels),
        scheduler=model.scheduler,
        num_classes=len(model.prompts),
        null_class=len(model.prompts),
        latent_shape=shape,
        takes_guidance=guidance is not None,
        **own_settings(model, 5.0),
    )
