"""PixArt-alpha and PixArt-Sigma: a transformer of latents with T5.

Shapes: B batch, c channels, h x w latent cells, L tokens of a prompt, D their width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.denoisers.config_values import whole
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.families.folder import ModelFolder
from dmkd_fast.denoisers.prompts.encoders import TextEncoder
from dmkd_fast.denoisers.wrappers import resize_positions

# Tokens of a prompt, by the name of the pipeline.
TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
# Side of the latents of the models that take the size of the image as a condition.
SIZED_SIDE = 128


class PixArt(nn.Module):
    """diffusers' `PixArtTransformer2DModel` with prompts that are encoded once.

    Args:
        transformer: diffusers' module.
        prompts: Embeddings, (num_classes + 1, L, D); the last one is the empty prompt.
        mask: 1 for tokens and 0 for padding, (num_classes + 1, L) int64.
        pixels: Height and width of the images, for a model that takes them as a condition; None
            for others.
    """

    def __init__(
        self, transformer: Any, prompts: Tensor, mask: Tensor, pixels: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.transformer, self.pixels = transformer, pixels
        self.prompts, self.mask = nn.Buffer(prompts), nn.Buffer(mask)

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return the prediction, (B, c or 2 c, h, w).

        Args:
            latents: (B, c, h, w).
            timesteps: (B,).
            labels: (B,) int64.
        """
        conditions: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.pixels is not None:
            sides = [torch.full_like(timesteps, side, dtype=latents.dtype) for side in self.pixels]
            resolution, ratio = torch.stack(sides, dim=1), self.pixels[0] / self.pixels[1]
            conditions = {
                "resolution": resolution,
                "aspect_ratio": torch.full_like(resolution[:, :1], ratio),
            }
        prediction: Tensor = self.transformer(
            latents,
            encoder_hidden_states=self.prompts[labels],
            encoder_attention_mask=self.mask[labels],
            timestep=timesteps,
            added_cond_kwargs=conditions,
        ).sample
        return prediction


def load(model: ModelFolder) -> Denoiser:
    """Load a `PixArtTransformer2DModel`, and encode the prompts of its classes.

    Images have the size of the config, or `image_size`; both pipelines lower the prompts' case.
    """
    path, config = model.config_path, model.config
    shape = (model.channels(4), *model.sides(128, multiple=whole(path, config, "patch_size", 2)))
    takes_size = config.get("use_additional_conditions")
    if takes_size is None:
        takes_size = config.get("sample_size", SIZED_SIDE) == SIZED_SIDE
    name = model.pipeline.get("_class_name")
    tokens = TOKENS.get(
        str(name), TOKENS["PixArtAlphaPipeline" if takes_size else "PixArtSigmaPipeline"]
    )
    t5 = TextEncoder(
        model_class="T5EncoderModel",
        tokenizer_class="T5TokenizerFast",
        outputs=("last", "mask"),
        max_tokens=tokens,
    )
    lowered = replace(model, prompts=tuple(p.lower().strip() for p in model.prompts))
    encoded = lowered.encode(t5)
    width = whole(path, config, "caption_channels", 4096)
    prompts = model.check_width(encoded["last"], width)
    transformer = model.load(
        "PixArtTransformer2DModel",
        lambda net: net(
            torch.zeros(1, *shape),
            encoder_hidden_states=torch.zeros(1, 8, width),
            timestep=torch.zeros(1),
            added_cond_kwargs={"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(1, 1)},
        ),
    )
    resize_positions(transformer.pos_embed, *shape[1:])
    side = model.pixels_per_latent()
    return Denoiser(
        module=PixArt(
            transformer,
            prompts,
            encoded["mask"],
            (shape[1] * side, shape[2] * side) if takes_size else None,
        ),
        scheduler=model.scheduler,
        num_classes=len(model.prompts),
        null_class=len(model.prompts),
        latent_shape=shape,
        num_steps=20,  # this and the scale as in diffusers' pipelines
        guidance_scale=4.5,
    )
