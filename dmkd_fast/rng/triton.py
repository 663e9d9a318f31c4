"""The CUDA kernel of `normal` (`rng/philox.py`).

One program makes a section of the numbers of one image. The bits equal those of `normal_reference`:
the kernel is compiled without fused multiply-add and uses correctly rounded square roots.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmkd_fast.rng import philox

BLOCKS = 256  # Philox blocks of four numbers per program
MOST = 65535  # programs along the second and the third axis of a grid

LOG0, LOG1, LOG2, LOG3, LOG4, LOG5, LOG6, LOG7, LOG8 = map(tl.constexpr, philox.LOG)
SIN0, SIN1, SIN2, SIN3 = map(tl.constexpr, philox.SIN)
COS0, COS1, COS2, COS3, COS4 = map(tl.constexpr, philox.COS)
LN2 = tl.constexpr(philox.LN2)


@triton.jit
def _log_unit(u):
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    poly = LOG7 + f * LOG8
    poly = LOG6 + f * poly
    poly = LOG5 + f * poly
    poly = LOG4 + f * poly
    poly = LOG3 + f * poly
    poly = LOG2 + f * poly
    poly = LOG1 + f * poly
    poly = LOG0 + f * poly
    return (f + (f * f) * poly) + exponent.to(tl.float32) * LN2


@triton.jit
def _box_muller(first, second):
    u = ((first >> 8).to(tl.int32).to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2^-24
    radius = tl.sqrt_rn(-2.0 * _log_unit(u))
    angle = (second >> 8).to(tl.int32)
    quadrant = (angle + 2097152) >> 22
    r = ((angle - (quadrant << 22)).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    z = r * r
    sine = r * (SIN0 + z * (SIN1 + z * (SIN2 + z * SIN3)))
    cosine = COS0 + z * (COS1 + z * (COS2 + z * (COS3 + z * COS4)))
    odd = (quadrant & 1) != 0
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    c = tl.where(((quadrant + 1) & 2) != 0, -c, c)
    s = tl.where((quadrant & 2) != 0, -s, s)
    return radius * c, radius * s


@triton.jit
def normal_kernel(out, ids, count, seed, step, BLOCKS: tl.constexpr):
    """Make 4 * BLOCKS numbers of one image per program.

    Grid: (B, ...), whose second and third axis together count the sections of an image.
    """
    row = tl.program_id(0).to(tl.int64)
    section = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    block = section * BLOCKS + tl.arange(0, BLOCKS)
    id = tl.load(ids + row).to(tl.uint64)
    zero = tl.zeros((BLOCKS,), tl.uint32)
    low, high = zero + id.to(tl.uint32), zero + (id >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + step, block.to(tl.uint32))
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    values = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # (BLOCKS, 2, 2): order z0, z1, z2, z3
    values = tl.reshape(values, (4 * BLOCKS,))
    column = section * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    tl.store(out + row * count + column, values, mask=column < count)


def normal(seed: int, ids: Tensor, step: int, count: int) -> Tensor:
    """Draw normal numbers on CUDA, ids (B,) int64 -> (B, count) float32; see `rng/philox.py`."""
    out = ids.new_empty((len(ids), count), dtype=torch.float32)
    sections = triton.cdiv(count, 4 * BLOCKS)
    grid: Any = (len(ids), min(sections, MOST), triton.cdiv(sections, MOST))
    normal_kernel[grid](
        out, ids.contiguous(), count, seed, step, BLOCKS=BLOCKS, enable_fp_fusion=False
    )
    return out
