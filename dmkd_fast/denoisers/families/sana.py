"""Sana and Sana-Sprint: a transformer with linear attention, Gemma, and a deep autoencoder.

Shapes: B batch, c channels, h x w latent cells, L tokens of a prompt, D their width.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.denoisers.config_values import number, whole
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.families.folder import ModelFolder
from dmkd_fast.denoisers.prompts.encoders import TextEncoder, num_tokens
from dmkd_fast.denoisers.wrappers import import_diffusers, resize_positions
from dmkd_fast.runtime.errors import invalid

GEMMA = TextEncoder(
    model_class="Gemma2Model",
    tokenizer_class="AutoTokenizer",
    outputs=("last", "mask"),
    max_tokens=300,
)
SCHEDULERS = ("DPMSolverMultistepScheduler", "SCMScheduler")


class Sana(nn.Module):
    """diffusers' `SanaTransformer2DModel` with prompts that are encoded once.

    Args:
        transformer: diffusers' module.
        prompts: Embeddings, (num_classes, L, D), and for Sana that of the empty prompt.
        mask: 1 for tokens and 0 for padding, as many rows, L numbers each, int64.
    """

    def __init__(self, transformer: Any, prompts: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.transformer = transformer
        self.prompts, self.mask = nn.Buffer(prompts), nn.Buffer(mask)
        config = transformer.config
        self.guidance_scale = float(config.guidance_embeds_scale)
        # Sana-Sprint's pipeline does not scale its timesteps.
        self.time_scale = 1.0 if config.guidance_embeds else float(config.timestep_scale)

    def forward(
        self, latents: Tensor, timesteps: Tensor, labels: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """Return the prediction, (B, c, h, w).

        Args:
            latents: (B, c, h, w).
            timesteps: (B,).
            labels: (B,) int64.
            guidance: Guidance scales, (B,), for Sana-Sprint; None for Sana.
        """
        prediction: Tensor = self.transformer(
            latents,
            encoder_hidden_states=self.prompts[labels],
            encoder_attention_mask=self.mask[labels],
            timestep=timesteps * self.time_scale,
            guidance=None if guidance is None else guidance * self.guidance_scale,
        ).sample
        return prediction


def load(model: ModelFolder) -> Denoiser:
    """Load a `SanaTransformer2DModel`, and encode the prompts of its classes.

    The pipelines put an instruction before each prompt, but not before the empty one.
    """
    path, config = model.config_path, model.config
    shape = (model.channels(32), *model.sides(32, multiple=whole(path, config, "patch_size", 1)))
    is_sprint = bool(config.get("guidance_embeds"))
    name = model.scheduler.get("_class_name")
    if name != SCHEDULERS[is_sprint]:
        got, fix = f"a Sana{'-Sprint' * is_sprint} with {name!r:.60}", "use the model's own"
        raise invalid(f"{model.path / 'scheduler'}", got, SCHEDULERS[is_sprint], fix)
    width = whole(path, config, "caption_channels", 2304)
    instruction = _instruction()
    texts = tuple(instruction + prompt.lower().strip() for prompt in model.prompts)
    tokens = GEMMA.max_tokens or 0
    longest = num_tokens(model.path / GEMMA.tokenizer, instruction) + tokens - 2
    made = replace(model, prompts=texts).encode(replace(GEMMA, max_tokens=longest))
    # The first token and the last ones, which do not belong to the instruction.
    kept = [0, *range(longest - tokens + 1, longest)]
    rows = {key: value[:-1, kept] for key, value in made.items()}
    if not is_sprint:  # Sana-Sprint is not guided by an empty prompt
        empty = replace(model, prompts=()).encode(GEMMA)
        rows = {key: torch.cat((value, empty[key])) for key, value in rows.items()}
    prompts = model.check_width(rows["last"], width)
    transformer = model.load(
        "SanaTransformer2DModel",
        lambda net: net(
            torch.zeros(1, *shape),
            encoder_hidden_states=torch.zeros(1, 8, width),
            timestep=torch.zeros(1),
            guidance=torch.zeros(1) if is_sprint else None,
        ),
    )
    resize_positions(transformer.patch_embed, *shape[1:])
    for key in ("guidance_embeds_scale", "timestep_scale"):
        number(path, transformer.config, key)
    return Denoiser(
        module=Sana(transformer, prompts, rows["mask"]),
        scheduler=model.scheduler,
        num_classes=len(model.prompts),
        null_class=None if is_sprint else len(model.prompts),
        latent_shape=shape,
        num_steps=2 if is_sprint else 20,  # this and the scale as in diffusers' pipelines
        guidance_scale=4.5,
        takes_guidance=is_sprint,
    )


def _instruction() -> str:
    """Return the text before each prompt, which diffusers' pipeline has as a default."""
    call = inspect.signature(import_diffusers().SanaPipeline.__call__)
    return "\n".join(call.parameters["complex_human_instruction"].default)
