"""Reuse some blocks of a DiT at some steps, by a schedule that is fixed before sampling.

The middle blocks of a transformer compute almost the same at neighboring steps. At a step that
reuses them, the sum of these blocks at the last step that computed them is added to the residual
stream in their place.

Sources: Selvaraju et al., FORA (arXiv 2407.01425), reuse at fixed steps; Chen et al., Delta-DiT
(arXiv 2406.01125), reuse of what a range of blocks adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import CachedDiT, KeptBlocks, LeanDiT
from dmkd_fast.denoisers.wrappers import Autoguided
from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import invalid

Kind = Literal["plain", "keep", "reuse"]


@dataclass(frozen=True, kw_only=True)
class BlockCache:
    """Which blocks of a DiT are reused at which steps.

    Raises:
        TypeError, UserError: A field is of a wrong type or out of range.
    """

    every: int = 2
    """The blocks are computed at every `every`-th step and reused at the others."""
    blocks: tuple[float, float] = (0.2, 0.8)
    """Fractions (start, stop) of the L blocks: blocks int(start * L) to int(stop * L) - 1 are
    reused."""
    steps: tuple[float, float] = (0.0, 1.0)
    """Fractions (start, stop) of the K steps, outside of which all blocks are computed."""

    def __post_init__(self) -> None:
        checks.whole("block_cache.every", self.every, low=2)
        checks.fractions("block_cache.blocks", self.blocks)
        checks.fractions("block_cache.steps", self.steps)

    def kinds(self, rows: list[int]) -> list[Kind]:
        """Return what each step does: compute all blocks, also keep their sum, or reuse it.

        Args:
            rows: Rows per image of each step: 2 where it is guided by the null class, otherwise 1.
        """
        first, last = (int(end * len(rows)) for end in self.steps)
        kinds: list[Kind] = ["plain"] * len(rows)
        kept = None  # the last step that computed the blocks
        for k in range(first, last):
            # A sum that was kept without guidance has no rows for the null class.
            if kept is None or k - kept >= self.every or rows[k] > rows[kept]:
                kept = k
            else:
                kinds[k], kinds[kept] = "reuse", "keep"
        return kinds


def modules_by_step(
    denoiser: Denoiser, cache: BlockCache | None, guided: Sequence[bool]
) -> list[nn.Module]:
    """Return the module that each step calls.

    Args:
        denoiser: Model; its modules are on their device already.
        cache: Which blocks are reused at which steps; None: no block.
        guided: Whether each step is guided.

    Raises:
        UserError: The denoiser has no blocks to reuse, or no step would reuse one.
    """
    weak = denoiser.weak
    modules = _cached(denoiser.module, cache, [1 + (g and weak is None) for g in guided])
    if weak is None:
        return modules
    pairs = {module: Autoguided(module, weak) for module in modules}
    return [pairs[m] if g else m for m, g in zip(modules, guided, strict=True)]


def _cached(module: nn.Module, cache: BlockCache | None, rows: list[int]) -> list[nn.Module]:
    """Return the module of each step, which evaluates the denoiser on this many rows an image."""
    if cache is None:
        return [module] * len(rows)
    if not isinstance(module, LeanDiT):
        got = f"some for a {type(module).__name__}"
        raise invalid("steps.block_cache", got, "a DiT with shared embedders", "turn it off")
    first, last = (int(end * module.num_layers) for end in cache.blocks)
    kinds = cache.kinds(rows)
    if first == last or "reuse" not in kinds:
        got = f"no block of {module.num_layers} or no step of {len(rows)} to reuse"
        raise invalid("steps.block_cache", got, "at least one of both", "widen it or turn it off")
    kept = KeptBlocks(first, last)
    by_kind: dict[Kind, nn.Module] = {
        "plain": module,
        "keep": CachedDiT(module, kept, reuses=False),
        "reuse": CachedDiT(module, kept, reuses=True),
    }
    return [by_kind[kind] for kind in kinds]
