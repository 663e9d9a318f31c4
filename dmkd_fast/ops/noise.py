"""Counter-based random numbers: a number depends on its key and counter, on nothing else.

Stands on floor 1. Philox4x32-10 keyed by a 64-bit seed; the counter names what the number is for,
so image 7 gets the same noise in any batch, order, rank or restart.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

STREAM_NOISE, STREAM_VIEWS, STREAM_LABELS = 0, 1, 2


def random_bits(seed: int, ids: Tensor, *, step: int | Tensor, stream: int, count: int) -> Tensor:
    """32-bit random integers, `count` for each id.

    Args:
        seed: Non-negative, below 2**63.
        ids: (B,) int64, non-negative; 63 bits are used.
        step: Sub-counter below 2**24, one for all ids or (B,) int64.
        stream: What the numbers are for, below 256; streams never share numbers.
        count: Numbers per id, at most 2**34.

    Returns:
        (B, count) int64 in [0, 2**32), on the device of `ids`.
    """
    blocks = torch.arange((count + 3) // 4, device=ids.device)  # (K,)
    ids = ids[:, None]
    steps = step[:, None] if isinstance(step, Tensor) else torch.full_like(ids, step)
    shape = (ids.shape[0], blocks.shape[0])
    words = philox(
        seed,
        (ids & _MASK).expand(shape),
        (ids >> 32).expand(shape),
        (steps | (stream << 24)).expand(shape),
        blocks.expand(shape),
    )
    return torch.stack(words, dim=-1).flatten(1)[:, :count]  # (B, count)


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> list[Tensor]:
    """Philox4x32-10: four counter words (int64 tensors below 2**32) -> four random words."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap modulo 2**64, which keeps all 64 bits that the two halves need.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, \
            ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK  # fmt: skip
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return [c0, c1, c2, c3]


def uniform(seed: int, ids: Tensor, *, step: int | Tensor, stream: int, count: int) -> Tensor:
    """Numbers in (0, 1): (B, count) float32, from the top 24 bits."""
    bits = random_bits(seed, ids, step=step, stream=stream, count=count)
    return ((bits >> 8).float() + 0.5) * 2.0**-24


def normal(seed: int, ids: Tensor, *, step: int, count: int) -> Tensor:
    """Standard normal numbers (Box-Muller): (B, count) float32."""
    pairs = (count + 1) // 2
    u = uniform(seed, ids, step=step, stream=STREAM_NOISE, count=2 * pairs)
    radius = torch.sqrt(-2.0 * torch.log(u[:, 0::2]))
    angle = (2.0 * math.pi) * u[:, 1::2]
    both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return both.flatten(1)[:, :count]
