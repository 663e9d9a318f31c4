"""CLIP's image tower with a linear head of class prompts, as `dmkd import teacher` writes it.

The logits are the scaled cosines of an image embedding and one text embedding per class, so the
head holds the scaled text embeddings. Source: Radford et al. (arXiv 2103.00020), section 3.1.4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "clip_zero_shot"
"""Architecture name in files."""

ACTIVATIONS = ("quick_gelu", "gelu")
NORM_EPS = 1e-5
"""Epsilon of the layer norms, which timm fixes for these towers."""


class ZeroShotClassifier(nn.Module):
    """Embed images, normalize the embeddings, and apply a linear head without bias.

    Args:
        num_classes: Number of classes C.
        in_chans: Channels c of the images.
        projection_dim: Width of the embeddings.
        tower: Arguments of timm's vision transformer, such as img_size, patch_size and embed_dim.
    """

    def __init__(
        self, *, num_classes: int, in_chans: int, projection_dim: int, **tower: Any
    ) -> None:
        super().__init__()
        import timm

        vit: Any = timm.create_model(
            "vit_base_patch32_clip_224", pretrained=False, num_classes=0, in_chans=in_chans, **tower
        )
        self.tower: nn.Module = vit
        self.projection = nn.Linear(vit.num_features, projection_dim, bias=False)
        self.head = nn.Linear(projection_dim, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C) for images (B, c, S, S)."""
        logits: Tensor = self.head(F.normalize(self.projection(self.tower(images)), dim=1))
        return logits


def tower_weights(vision: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of transformers' `CLIPVisionModel` for `ZeroShotClassifier.tower`."""
    names = (
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding.weight", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("pre_layrnorm", "norm_pre"),
        ("post_layernorm", "norm"),
        ("encoder.layers", "blocks"),
        ("layer_norm", "norm"),
        ("self_attn.out_proj", "attn.proj"),
    )
    result: dict[str, Tensor] = {}
    for theirs, value in vision.items():
        name = theirs.removeprefix("vision_model.")
        for old, new in names:
            name = name.replace(old, new)
        if (
            name.endswith("position_ids")
            or "self_attn.k_proj" in name
            or "self_attn.v_proj" in name
        ):
            continue
        if "self_attn.q_proj" in name:  # timm has one matrix for queries, keys and values
            parts = [vision[theirs.replace("q_proj", f"{kind}_proj")] for kind in "qkv"]
            result[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
        elif name in ("cls_token", "pos_embed"):
            result[name] = value.reshape(1, -1, value.shape[-1])
        else:
            result[name] = value
    return result
