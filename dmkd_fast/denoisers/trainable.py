"""Build and save the pixel DiTs that this package trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dmkd_fast.denoisers.model_folders import STEM
from dmkd_fast.denoisers.wrappers import PixelDiT, import_diffusers


def new_pixel_dit(
    *,
    num_classes: int,
    channels: int,
    image_size: int,
    patch_size: int,
    num_layers: int,
    num_heads: int,
    head_dim: int,
) -> PixelDiT:
    """Build a class-conditional `DiTTransformer2DModel` for pixels.

    In diffusers, every block has its own timestep and label embedder, and each drops labels
    independently in train mode. Here all blocks share one embedder that never drops labels; the
    caller drops a label once per example by passing class `num_classes`.
    """
    dit = import_diffusers().DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=head_dim,
        num_layers=num_layers,
        in_channels=channels,
        out_channels=channels,
        sample_size=image_size,
        patch_size=patch_size,
        num_embeds_ada_norm=num_classes,
        dropout=0.0,
    )
    share_embedder(dit)
    return PixelDiT(dit)


def share_embedder(dit: Any) -> None:
    """Make all blocks share the embedder of the first block, without dropout."""
    embedder = dit.transformer_blocks[0].norm1.emb
    embedder.class_embedder.dropout_prob = 0.0
    for block in dit.transformer_blocks:
        block.norm1.emb = embedder


@torch.no_grad()
def zero_modulations(dit: Any) -> None:
    """Zero the modulations, so that training starts from blocks that are the identity.

    This is adaLN-Zero (Peebles & Xie, arXiv 2212.09748, section 3.2). diffusers leaves them random.
    """
    for modulation in (dit.proj_out_1, *(block.norm1.linear for block in dit.transformer_blocks)):
        modulation.weight.zero_()
        modulation.bias.zero_()


def save_denoiser(dit: Any, scheduler: dict[str, Any], folder: Path) -> None:
    """Write `transformer/` (float16) and `scheduler/` for diffusers to load."""
    target = folder / "transformer"
    target.mkdir(parents=True, exist_ok=True)
    # Shared embedders are written once per block, as diffusers expects to read them.
    weights = {k: v.detach().cpu().clone().half() for k, v in dit.state_dict().items()}
    save_file(weights, target / f"{STEM}.safetensors", metadata={"format": "pt"})
    dit.save_config(target)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(scheduler, indent=2) + "\n", encoding="utf-8"
    )
