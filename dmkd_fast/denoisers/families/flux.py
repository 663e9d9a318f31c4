"""FLUX.1 schnell and dev: a flow transformer of 2 x 2 patches with CLIP and T5.

Shapes: B batch, c channels, h x w latent cells, T = h / 2 * w / 2 patches, L tokens of a prompt, D
their width, P width of a pooled prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.denoisers.config_values import whole
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.families.flow import flow_scheduler
from dmkd_fast.denoisers.families.folder import ModelFolder
from dmkd_fast.denoisers.prompts.encoders import TextEncoder
from dmkd_fast.runtime.errors import invalid

CLIP = TextEncoder(outputs=("pooled",))
# Tokens of T5 by whether guidance is an input (dev) or not (schnell).
T5_TOKENS = {True: 512, False: 256}


class Flux(nn.Module):
    """diffusers' `FluxTransformer2DModel` with prompts that are encoded once.

    Args:
        transformer: diffusers' module.
        prompts: Embeddings, (num_classes, L, D).
        pooled: Pooled embeddings, (num_classes, P).
        sides: Height and width of the latents, h and w.
    """

    def __init__(
        self, transformer: Any, prompts: Tensor, pooled: Tensor, sides: tuple[int, int]
    ) -> None:
        super().__init__()
        self.transformer, self.sides = transformer, sides
        self.prompts, self.pooled = nn.Buffer(prompts), nn.Buffer(pooled)
        # Places are whole numbers, which no cast of the module rounds.
        rows, columns = torch.arange(sides[0] // 2), torch.arange(sides[1] // 2)
        self.places = nn.Buffer(torch.cartesian_prod(torch.zeros(1).long(), rows, columns))
        self.text_places = nn.Buffer(torch.zeros(prompts.shape[1], 3, dtype=torch.int64))

    def forward(
        self, latents: Tensor, timesteps: Tensor, labels: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """Return the velocity, (B, c, h, w).

        Args:
            latents: (B, c, h, w).
            timesteps: (B,) in [0, 1000].
            labels: (B,) int64.
            guidance: Guidance scales, (B,), for guidance-distilled models; None for others.
        """
        height, width = self.sides
        patches = latents.unflatten(2, (height // 2, 2)).unflatten(4, (width // 2, 2))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, T, 4 c)
        velocity = self.transformer(
            hidden_states=patches,
            encoder_hidden_states=self.prompts[labels],
            pooled_projections=self.pooled[labels],
            timestep=timesteps / 1000,
            img_ids=self.places,
            txt_ids=self.text_places,
            guidance=guidance,
        ).sample
        velocity = velocity.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
        result: Tensor = velocity.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return result


def load(model: ModelFolder) -> Denoiser:
    """Load a `FluxTransformer2DModel`, and encode the prompts of its classes.

    The config has no size; without `image_size`, images have 128 x 128 latents, as in diffusers.
    """
    path, config = model.config_path, model.config
    packed, sides = model.channels(64), model.sides(128, multiple=2)
    if packed % 4:
        expected, fix = "a multiple of 4, for patches of 2 x 2 latents", "fetch it again"
        raise invalid(f"{path}: in_channels", packed, expected, fix)
    scheduler = flow_scheduler(model, sides[0] * sides[1] // 4)
    takes_guidance = bool(config.get("guidance_embeds"))
    t5 = TextEncoder(
        part="text_encoder_2",
        tokenizer="tokenizer_2",
        model_class="T5EncoderModel",
        tokenizer_class="T5TokenizerFast",
        max_tokens=T5_TOKENS[takes_guidance],
    )
    # Neither model was trained to be guided by an empty prompt.
    pooled, prompts = model.encode(CLIP)["pooled"][:-1], model.encode(t5)["last"][:-1]
    model.check_width(pooled, whole(path, config, "pooled_projection_dim", 768))
    model.check_width(prompts, whole(path, config, "joint_attention_dim", 4096))
    transformer = model.load(
        "FluxTransformer2DModel",
        lambda net: net(
            torch.zeros(1, 4, packed),
            torch.zeros(1, 8, prompts.shape[-1]),
            torch.zeros(1, pooled.shape[-1]),
            torch.zeros(1),
            torch.zeros(4, 3),
            torch.zeros(8, 3),
            torch.zeros(1) if takes_guidance else None,
        ),
    )
    return Denoiser(
        module=Flux(transformer, prompts, pooled, sides),
        scheduler=scheduler,
        num_classes=len(model.prompts),
        latent_shape=(packed // 4, *sides),
        takes_guidance=takes_guidance,
        num_steps=28 if takes_guidance else 4,  # as diffusers' pipeline; as schnell was distilled
        guidance_scale=3.5,
    )
