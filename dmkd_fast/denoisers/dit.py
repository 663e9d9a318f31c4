"""A fast DiT for sampling, with the weights of diffusers' `DiTTransformer2DModel`.

It computes the same function as diffusers' module up to rounding, with less work around the matrix
products. All blocks share one timestep and label embedder. One product computes the modulations of
all blocks, and one product computes query, key and value. Attention is chosen once. Biases,
residual sums and norms take as few passes as possible. For inference only: no gradients.

Shapes: B batch, c channels, T tokens, D width, H heads, L blocks, p patch size.

Source: Peebles & Xie, DiT (arXiv 2212.09748), section 3 (adaLN-Zero).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmkd_fast.denoisers import attention
from dmkd_fast.denoisers.kernels import gelu_tanh, modulated_norm, residual_norm

EMBEDDER = "norm1.emb."


class LeanDiT(nn.Module):
    """A class-conditional DiT for inference; see `forward` for the shapes.

    Args:
        config: Config of a diffusers `DiTTransformer2DModel`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.num_heads = int(config["num_attention_heads"])
        self.head_dim = int(config["attention_head_dim"])
        self.num_layers, self.patch = int(config["num_layers"]), int(config["patch_size"])
        self.out_channels = int(config.get("out_channels") or config["in_channels"])
        self.grid = int(config["sample_size"]) // self.patch
        self.num_tokens = self.grid**2
        self.attention: attention.Attention = "sdpa"
        # In diffusers only the second norm of a block can be set; the others use 1e-6.
        self.mlp_norm_eps = float(config.get("norm_eps", 1e-5))
        width = self.num_heads * self.head_dim
        bias = bool(config.get("attention_bias", True))
        self.patchify = nn.Linear(int(config["in_channels"]) * self.patch**2, width)
        self.positions = nn.Buffer(torch.zeros(1, self.num_tokens, width))
        self.time_in, self.time_out = nn.Linear(256, width), nn.Linear(width, width)
        self.labels = nn.Embedding(int(config["num_embeds_ada_norm"]) + 1, width)
        self.modulation = nn.Linear(width, self.num_layers * 6 * width)
        self.blocks = nn.ModuleList(DiTBlock(width, bias=bias) for _ in range(self.num_layers))
        self.modulation_out = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, self.patch**2 * self.out_channels)

    def choose_attention(
        self, name: attention.Attention, *, device: torch.device, dtype: torch.dtype
    ) -> attention.Attention:
        """Choose the attention kernel for all blocks and return its name.

        Args:
            name: Kernel name or "auto", see `attention.resolve`.
            device: Device of the module.
            dtype: Dtype of the module.

        Raises:
            UserError: The named kernel cannot run here.
        """
        self.attention = attention.resolve(
            name,
            device=device,
            dtype=dtype,
            num_tokens=self.num_tokens,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
        )
        return self.attention

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        labels: Tensor,
        kept: KeptBlocks | None = None,
        reuses: bool = False,
    ) -> Tensor:
        """Return the prediction, (B, out_channels, h, w).

        Args:
            latents: (B, c, h, w).
            timesteps: (B,).
            labels: (B,) int64.
            kept: Blocks whose sum this call keeps, or reuses; None: no block.
            reuses: Whether to reuse the kept sum, whose first B rows are these images'.
        """
        p, g = self.patch, self.grid
        x = latents.unflatten(3, (g, p)).unflatten(2, (g, p))  # (B, c, g, p, g, p)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(len(latents), self.num_tokens, -1)
        x = (self.patchify(x) + self.positions).to(latents.dtype)  # (B, T, D)
        condition = F.silu(self._condition(timesteps, labels))  # (B, D)
        modulations = self.modulation(condition).unflatten(1, (self.num_layers, 6, -1))
        # Shift and scale of the norm after each block; the last pair belongs to the output layer.
        ends = [m[:, :2].unbind(1) for m in modulations.unbind(1)[1:]]
        ends.append(self.modulation_out(condition).chunk(2, dim=1))
        normed = modulated_norm(x, *modulations[:, 0, :2].unbind(1), eps=1e-6)
        todo = list(zip(self.blocks, modulations.unbind(1), ends, strict=True))
        if kept is not None:
            for block, modulation, end in todo[: kept.first]:
                x, normed = self._block(block, x, normed, modulation[:, 2:], end)
            before, span, todo = x, todo[kept.first : kept.last], todo[kept.last :]
            if reuses:
                assert kept.total is not None
                x = x + kept.total[: len(x)]
                normed = modulated_norm(x, *span[-1][2], eps=1e-6)
            else:
                for block, modulation, end in span:
                    x, normed = self._block(block, x, normed, modulation[:, 2:], end)
                kept.total = x - before
        for block, modulation, end in todo:
            x, normed = self._block(block, x, normed, modulation[:, 2:], end)
        patches: Tensor = self.out(normed)  # (B, T, p * p * out_channels)
        patches = patches.view(-1, g, g, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return patches.reshape(len(latents), self.out_channels, g * p, g * p)

    def _condition(self, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of timestep and label embedding, (B, D)."""
        # Computed on every call, because a buffer would be cast to the dtype of the weights.
        places = torch.arange(128, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float()[:, None] * torch.exp(places * (-math.log(10_000) / 127))
        waves = torch.cat((angles.cos(), angles.sin()), dim=1).to(self.time_in.weight.dtype)
        condition: Tensor = self.time_out(F.silu(self.time_in(waves))) + self.labels(labels)
        return condition

    def _block(
        self, block: Any, x: Tensor, normed: Tensor, modulation: Tensor, end: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Run one transformer block.

        Args:
            block: Matrix products of the block, a `DiTBlock`.
            x: Residual stream, (B, T, D).
            normed: Modulated norm of x, (B, T, D).
            modulation: Gate of the attention; shift, scale and gate of the MLP: (B, 4, D).
            end: Shift and scale of the norm after this block, (B, D) each.

        Returns:
            The next x and its modulated norm, (B, T, D) each.
        """
        gate, shift, scale, gate_mlp = modulation.unbind(1)
        qkv = F.linear(normed, block.qkv.weight).unflatten(2, (3, self.num_heads, self.head_dim))
        mixed = attention.attend(qkv, block.qkv.bias, self.attention).flatten(2)  # (B, T, D)
        mixed = F.linear(mixed, block.project.weight)
        x, normed = residual_norm(
            x, mixed, block.project.bias, gate, shift, scale, eps=self.mlp_norm_eps
        )
        hidden = gelu_tanh(F.linear(normed, block.up.weight), block.up.bias)
        hidden = F.linear(hidden, block.down.weight)
        return residual_norm(x, hidden, block.down.bias, gate_mlp, *end, eps=1e-6)


@dataclass
class KeptBlocks:
    """The blocks `first` to `last - 1` of a DiT, whose sum later calls can reuse."""

    first: int
    last: int
    total: Tensor | None = None
    """What the blocks added to the residual stream when last computed, (B, T, D)."""


class CachedDiT(nn.Module):
    """A DiT whose call keeps the sum of some blocks, or reuses the one that was kept.

    Args:
        dit: DiT with all blocks.
        kept: Blocks, and their last sum; shared by the modules that keep and reuse it.
        reuses: Whether this module reuses the sum.
    """

    def __init__(self, dit: LeanDiT, kept: KeptBlocks, *, reuses: bool) -> None:
        super().__init__()
        self.dit, self.kept, self.reuses = dit, kept, reuses

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return the prediction; see `LeanDiT.forward`."""
        prediction: Tensor = self.dit(latents, timesteps, labels, self.kept, self.reuses)
        return prediction


class DiTBlock(nn.Module):
    """The matrix products of one transformer block."""

    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


def lean_dit(dit: Any) -> LeanDiT | None:
    """Build a `LeanDiT` from diffusers' DiT, sharing weights where possible.

    Args:
        dit: diffusers' `DiTTransformer2DModel`.

    Returns:
        The module, or None if the embedders of the blocks differ or `LeanDiT` does not implement a
        setting of the model. Such a model needs diffusers' module.
    """
    config, weights = dict(dit.config), dit.state_dict()
    shared = [name for name in weights if EMBEDDER in name]
    first = "transformer_blocks.0."
    for name in shared:
        _, _, rest = name.split(".", 2)
        if not torch.equal(weights[name], weights[first + rest]):
            return None
    if config.get("activation_fn", "gelu-approximate") != "gelu-approximate":
        return None
    if (
        config.get("upcast_attention")
        or config.get("norm_type", "ada_norm_zero") != "ada_norm_zero"
    ):
        return None
    with torch.device("meta"):
        model = LeanDiT(config)
    layers = [f"transformer_blocks.{i}." for i in range(model.num_layers)]

    def both(ours: str, theirs: str) -> dict[str, Tensor]:
        kinds = [kind for kind in ("weight", "bias") if f"{theirs}.{kind}" in weights]
        return {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in kinds}

    state = {
        "patchify.weight": weights["pos_embed.proj.weight"].flatten(1),
        "patchify.bias": weights["pos_embed.proj.bias"],
        "positions": dit.pos_embed.pos_embed,
        "labels.weight": weights[first + EMBEDDER + "class_embedder.embedding_table.weight"],
        **both("time_in", first + EMBEDDER + "timestep_embedder.linear_1"),
        **both("time_out", first + EMBEDDER + "timestep_embedder.linear_2"),
        **both("modulation_out", "proj_out_1"),
        **both("out", "proj_out_2"),
    }
    for kind in ("weight", "bias"):
        rows = [weights[f"{layer}norm1.linear.{kind}"] for layer in layers]
        state[f"modulation.{kind}"] = torch.cat(rows)
    for i, layer in enumerate(layers):
        ours = f"blocks.{i}."
        state |= both(ours + "project", layer + "attn1.to_out.0")
        state |= both(ours + "up", layer + "ff.net.0.proj")
        state |= both(ours + "down", layer + "ff.net.2")
        for kind in ("weight", "bias"):
            names = [f"{layer}attn1.to_{part}.{kind}" for part in "qkv"]
            if names[0] in weights:
                state[f"{ours}qkv.{kind}"] = torch.cat([weights[name] for name in names])
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
