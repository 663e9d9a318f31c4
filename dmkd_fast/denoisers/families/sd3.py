"""Stable Diffusion 3 and 3.5: a flow transformer with two CLIP encoders and T5.

Shapes: B batch, c channels, h x w latent cells, L tokens of a prompt, D their width, P width of a
pooled prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.denoisers.config_values import number, whole
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.families.flow import flow_scheduler
from dmkd_fast.denoisers.families.folder import ModelFolder
from dmkd_fast.denoisers.prompts.encoders import TextEncoder

CLIPS = tuple(
    TextEncoder(
        part=f"text_encoder{number}",
        tokenizer=f"tokenizer{number}",
        model_class="CLIPTextModelWithProjection",
        outputs=("penultimate", "pooled"),
    )
    for number in ("", "_2")
)
T5_TOKENS = 256
T5 = TextEncoder(
    part="text_encoder_3",
    tokenizer="tokenizer_3",
    model_class="T5EncoderModel",
    tokenizer_class="T5TokenizerFast",
    max_tokens=T5_TOKENS,
)


class SD3(nn.Module):
    """diffusers' `SD3Transformer2DModel` with prompts that are encoded once.

    Args:
        transformer: diffusers' module.
        prompts: Embeddings, (num_classes + 1, L, D); the last one is the empty prompt.
        pooled: Pooled embeddings, (num_classes + 1, P).
    """

    def __init__(self, transformer: Any, prompts: Tensor, pooled: Tensor) -> None:
        super().__init__()
        self.transformer = transformer
        self.prompts, self.pooled = nn.Buffer(prompts), nn.Buffer(pooled)

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return the velocity, (B, c, h, w).

        Args:
            latents: (B, c, h, w).
            timesteps: (B,) in [0, 1000].
            labels: (B,) int64.
        """
        velocity: Tensor = self.transformer(
            latents,
            timestep=timesteps,
            encoder_hidden_states=self.prompts[labels],
            pooled_projections=self.pooled[labels],
        ).sample
        return velocity


def load(model: ModelFolder) -> Denoiser:
    """Load an `SD3Transformer2DModel`, and encode the prompts of its classes.

    A folder without `text_encoder_3/` works as in diffusers: its embeddings are zeros.
    """
    path, config = model.config_path, model.config
    patch = whole(path, config, "patch_size", 2)
    shape = (model.channels(16), *model.sides(128, multiple=patch))
    scheduler = flow_scheduler(model, shape[1] * shape[2] // patch**2)
    width = whole(path, config, "joint_attention_dim", 4096)
    first, second = (model.encode(encoder) for encoder in CLIPS)
    pooled = torch.cat((first["pooled"], second["pooled"]), dim=-1)
    model.check_width(pooled, whole(path, config, "pooled_projection_dim", 2048))
    clip = torch.cat((first["penultimate"], second["penultimate"]), dim=-1)
    if (model.path / T5.part).is_dir():
        long = model.check_width(model.encode(T5)["last"], width)
    else:
        long = torch.zeros(len(clip), T5_TOKENS, width)
    clip = nn.functional.pad(clip, (0, width - clip.shape[-1]))
    transformer = model.load(
        "SD3Transformer2DModel",
        lambda net: net(
            torch.zeros(1, *shape),
            torch.zeros(1, 8, width),
            torch.zeros(1, pooled.shape[-1]),
            torch.zeros(1),
        ),
    )
    # diffusers' pipeline lets the levels end at the lowest one that the model was trained with.
    trained = whole("scheduler", scheduler, "num_train_timesteps", 1000, high=1_000_000)
    shift, lowest = number("scheduler", scheduler, "shift", 1.0, low=1e-6, high=1e6), 1 / trained
    if not model.scheduler.get("use_dynamic_shifting"):
        lowest = shift * lowest / (1 + (shift - 1) * lowest)
    return Denoiser(
        module=SD3(transformer, torch.cat((clip, long), dim=1), pooled),
        scheduler=scheduler | {"lowest_sigma": lowest},
        num_classes=len(model.prompts),
        null_class=len(model.prompts),
        latent_shape=shape,
        num_steps=28,  # as diffusers' pipeline
        guidance_scale=7.0,
    )
