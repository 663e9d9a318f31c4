"""A DiT written from its paper, as a reference."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def dit_reference(
    weights: dict[str, Tensor],
    config: dict[str, Any],
    x: Tensor,
    time: float,
    labels: Tensor,
    mlp_eps: float = 1e-6,
) -> Tensor:
    """All channels of a DiT, whose weights have the names of SiT's own code."""
    width, heads, p = config["hidden_size"], config["num_heads"], config["patch_size"]

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(value: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
        normed = F.layer_norm(value, (width,), eps=eps)
        return normed * (1 + scale[:, None]) + shift[:, None]

    angles = time * 10_000 ** (-torch.arange(128) / 128)
    waves = torch.cat((angles.cos(), angles.sin())).expand(len(x), -1)
    t = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))
    condition = F.silu(t + weights["y_embedder.embedding_table.weight"][labels])
    proj = weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"]
    h = F.conv2d(x, *proj, stride=p).flatten(2).transpose(1, 2) + weights["pos_embed"]
    for i in range(config["depth"]):
        parts = linear(f"blocks.{i}.adaLN_modulation.1", condition).chunk(6, dim=1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        qkv = linear(f"blocks.{i}.attn.qkv", norm(h, shift, scale))
        q, k, v = qkv.view(len(x), -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        weight = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(dim=3)
        mixed = linear(f"blocks.{i}.attn.proj", (weight @ v).transpose(1, 2).flatten(2))
        h = h + gate[:, None] * mixed
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(h, shift_mlp, scale_mlp, mlp_eps))
        hidden = linear(f"blocks.{i}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
        h = h + gate_mlp[:, None] * hidden
    h = norm(h, *linear("final_layer.adaLN_modulation.1", condition).chunk(2, dim=1))
    patches = linear("final_layer.linear", h)
    side = config["input_size"] // p
    image = patches.view(len(x), side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(len(x), -1, side * p, side * p)
