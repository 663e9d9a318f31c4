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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmkd_fast.denoisers import attention
from dmkd_fast.denoisers.kernels import (
    fp8_linear,
    gelu_tanh,
    linear_gelu,
    modulated_norm,
    quantize_rows,
    residual_norm,
)
from dmkd_fast.runtime.errors import invalid

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
        # Whether torch.compile makes one graph for all blocks, which compiles faster.
        self.shares_block_graph = False
        # The wavelengths of the timestep's waves; DiT's own code divides by 128, diffusers by 127.
        self.wave_span = 127
        # A timestep t is embedded as 1 - t / reversed_time; reversed_time=0 leaves t unchanged.
        self.reversed_time = 0
        width = self.num_heads * self.head_dim
        bias = bool(config.get("attention_bias", True))
        self.patchify = nn.Linear(int(config["in_channels"]) * self.patch**2, width)
        self.positions = nn.Buffer(torch.zeros(1, self.num_tokens, width))
        self.time_in, self.time_out = nn.Linear(256, width), nn.Linear(width, width)
        self.labels = nn.Embedding(int(config["num_embeds_ada_norm"]) + 1, width)
        # Shift and scale of the first norm, then the rows of each block, see `DiTBlock.forward`.
        self.modulation = nn.Linear(width, (2 + 6 * self.num_layers) * width)
        block = partial(
            DiTBlock, width, self.num_heads, bias=bias, eps=float(config.get("norm_eps", 1e-5))
        )
        self.blocks = nn.ModuleList(block() for _ in range(self.num_layers))
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
        self.attention = attention.resolve(name, device=device, dtype=dtype, **self._attended())
        return self.attention

    def attention_operator(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return the attention kernel and the operator in use; see `attention.describe`."""
        return attention.describe(self.attention, device=device, dtype=dtype, **self._attended())

    def _attended(self) -> dict[str, int]:
        return {
            "num_tokens": self.num_tokens,
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
        }

    def use_fp8(self) -> None:
        """Run the products of the blocks in 8 bits from now on; see `kernels.fp8_linear`.

        The weights are rounded now, so the module is on its device already.

        Raises:
            UserError: The width is not divisible by 16.
        """
        width = self.num_heads * self.head_dim
        if width % 16:
            expected, fix = "a width divisible by 16", "set it to false"
            raise invalid("sampler.experimental_fp8", f"a DiT of width {width}", expected, fix)
        for product in self.blocks.modules():
            if isinstance(product, Product):
                product.fp8_weight = quantize_rows(product.weight)

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return the prediction; see `predict`."""
        return self.predict(latents, timesteps, labels)

    def predict(
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
        modulations = self.modulation(condition).unflatten(1, (2 + 6 * self.num_layers, -1))
        normed = modulated_norm(x, *modulations[:, :2].unbind(1), eps=1e-6)
        of_blocks = modulations[:, 2:].unflatten(1, (self.num_layers, 6)).unbind(1)
        todo = list(zip(self.blocks, of_blocks, strict=True))
        if kept is not None:
            x, normed = self._run(todo[: kept.first], x, normed)
            before, span, todo = x, todo[kept.first : kept.last], todo[kept.last :]
            if reuses:
                assert kept.total is not None
                x = x + kept.total[: len(x)]
                normed = modulated_norm(x, *span[-1][1][:, 4:].unbind(1), eps=1e-6)
            else:
                x, normed = self._run(span, x, normed)
                kept.total = x - before
        x, normed = self._run(todo, x, normed)
        patches: Tensor = self.out(normed)  # (B, T, p * p * out_channels)
        patches = patches.view(-1, g, g, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return patches.reshape(len(latents), self.out_channels, g * p, g * p)

    def _run(
        self, todo: list[tuple[nn.Module, Tensor]], x: Tensor, normed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run some blocks, each with its modulation; see `DiTBlock.forward`."""
        run: Callable[..., tuple[Tensor, Tensor]] = DiTBlock.forward
        if self.shares_block_graph:
            run = _run_region
        for block, modulation in todo:
            x, normed = run(block, x, normed, modulation, self.attention)
        return x, normed

    def _condition(self, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of timestep and label embedding, (B, D)."""
        # Computed on every call, because a buffer would be cast to the dtype of the weights.
        places = torch.arange(128, dtype=torch.float32, device=timesteps.device)
        times = timesteps.float()
        if self.reversed_time:
            times = 1 - times / self.reversed_time
        angles = times[:, None] * torch.exp(places * (-math.log(10_000) / self.wave_span))
        waves = torch.cat((angles.cos(), angles.sin()), dim=1).to(self.time_in.weight.dtype)
        condition: Tensor = self.time_out(F.silu(self.time_in(waves))) + self.labels(labels)
        return condition


class Product(nn.Linear):
    """A matrix product that leaves its bias to the caller, in 8 bits if it has such a weight."""

    fp8_weight: tuple[Tensor, Tensor] | None = None

    def forward(self, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply (..., C), and add the bias that is given."""
        # Operations are counted on the meta device, where the rounded weight is not.
        if self.fp8_weight is not None and not values.is_meta:
            return fp8_linear(values, self.fp8_weight, bias)
        return F.linear(values, self.weight, bias)


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
        return self.dit.predict(latents, timesteps, labels, self.kept, self.reuses)


class DiTBlock(nn.Module):
    """One transformer block, without the norm before its attention and with that of the next.

    Args:
        width: Width D.
        num_heads: Number of heads, H.
        bias: Whether query, key and value have a bias.
        eps: Epsilon of the norm before the MLP. In diffusers only this one can be set; the others
            use 1e-6.
    """

    def __init__(self, width: int, num_heads: int, *, bias: bool, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.qkv, self.project = Product(width, 3 * width, bias=bias), Product(width, width)
        self.up, self.down = Product(width, 4 * width), Product(4 * width, width)

    def forward(
        self, x: Tensor, normed: Tensor, modulation: Tensor, kind: attention.Attention
    ) -> tuple[Tensor, Tensor]:
        """Return the next x and its modulated norm, (B, T, D) each.

        Args:
            x: Residual stream, (B, T, D).
            normed: Modulated norm of x, (B, T, D).
            modulation: Gate of the attention; shift, scale and gate of the MLP; shift and scale of
                the norm after this block: (B, 6, D). One tensor, as a region of torch.compile takes
                no two inputs that share memory.
            kind: Attention kernel.
        """
        gate, shift, scale, gate_mlp, next_shift, next_scale = modulation.unbind(1)
        # On CUDA, a product adds its bias for free; on a CPU, the pass after it does.
        early, late = None, self.qkv.bias
        if x.device.type != "cpu":
            early, late = late, early
        qkv = self.qkv(normed, early).unflatten(2, (3, self.num_heads, -1))
        mixed = attention.attend(qkv, late, kind).flatten(2)  # (B, T, D)
        mixed = self.project(mixed)
        x, normed = residual_norm(x, mixed, self.project.bias, gate, shift, scale, eps=self.eps)
        if self.up.fp8_weight is None:
            hidden = linear_gelu(normed, self.up.weight, self.up.bias)
        else:
            hidden = gelu_tanh(self.up(normed), self.up.bias)
        hidden = self.down(hidden)
        return residual_norm(x, hidden, self.down.bias, gate_mlp, next_shift, next_scale, eps=1e-6)


@torch.compiler.nested_compile_region
def _run_region(block: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    return DiTBlock.forward(block, *arguments)


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
        or config.get("norm_elementwise_affine")
        or config.get("norm_type", "ada_norm_zero") != "ada_norm_zero"
    ):
        return None
    with torch.device("meta"):
        model = LeanDiT(config)
    embedder = "transformer_blocks.0." + EMBEDDER
    state = lean_state(weights, dit.pos_embed.pos_embed, embedder, model.num_layers)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def lean_state(
    weights: Mapping[str, Tensor], positions: Tensor, embedder: str, num_layers: int
) -> dict[str, Tensor]:
    """Return weights of diffusers' DiT under the names of `LeanDiT`.

    Args:
        weights: Weights by their names in diffusers.
        positions: Embeddings of the positions, (1, T, D).
        embedder: First part of the names of the timestep and label embedder.
        num_layers: Number of blocks, L.
    """
    layers = [f"transformer_blocks.{i}." for i in range(num_layers)]

    def both(ours: str, theirs: str) -> dict[str, Tensor]:
        kinds = [kind for kind in ("weight", "bias") if f"{theirs}.{kind}" in weights]
        return {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in kinds}

    state = {
        "patchify.weight": weights["pos_embed.proj.weight"].flatten(1),
        "patchify.bias": weights["pos_embed.proj.bias"],
        "positions": positions,
        "labels.weight": weights[embedder + "class_embedder.embedding_table.weight"],
        **both("time_in", embedder + "timestep_embedder.linear_1"),
        **both("time_out", embedder + "timestep_embedder.linear_2"),
        **both("out", "proj_out_2"),
    }
    for kind in ("weight", "bias"):
        rows = [weights[f"{layer}norm1.linear.{kind}"] for layer in layers]
        state[f"modulation.{kind}"] = torch.cat([*rows, weights[f"proj_out_1.{kind}"]])
    for i, layer in enumerate(layers):
        ours = f"blocks.{i}."
        state |= both(ours + "project", layer + "attn1.to_out.0")
        state |= both(ours + "up", layer + "ff.net.0.proj")
        state |= both(ours + "down", layer + "ff.net.2")
        for kind in ("weight", "bias"):
            names = [f"{layer}attn1.to_{part}.{kind}" for part in "qkv"]
            if names[0] in weights:
                state[f"{ours}qkv.{kind}"] = torch.cat([weights[name] for name in names])
    return state
