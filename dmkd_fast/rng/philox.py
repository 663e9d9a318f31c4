"""Counter-based random numbers: a number depends only on its key and its counter.

The generator is Philox4x32-10. The key is a 64-bit seed; the counter says what the number is for.
So image 7 gets the same noise in any batch, order, rank or restart. Normal numbers also have the
same bits on every device: they are defined here and repeated by csrc/noise_cpu.cpp and
`rng/triton.py`.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box & Muller 1958.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmkd_fast.runtime.operators import cuda_kernel

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

STREAM_NOISE, STREAM_VIEWS, STREAM_LABELS, STREAM_MIX, STREAM_DRAWS = 0, 1, 2, 3, 4
STREAM_PROMPTS = 5  # prompts of a class
STREAM_PRIORS = 6  # procedural images
STREAM_ORDER = 16  # order of the passes over images on disk

# Coefficients fitted at Chebyshev points, as float32; lowest degree first.
# log(1 + f) = f + f^2 * LOG(f); sin(2 pi r) = r * SIN(r^2); cos(2 pi r) = COS(r^2).
LOG = (
    -0.4999999701976776,
    0.3333333134651184,
    -0.2500078082084656,
    0.20001234114170074,
    -0.16626645624637604,
    0.14204855263233185,
    -0.13127556443214417,
    0.12722674012184143,
    -0.07673642784357071,
)
SIN = (6.2831854820251465, -41.3416633605957, 81.59254455566406, -75.401611328125)
COS = (1.0, -19.739208221435547, 64.93931579589844, -85.4428482055664, 59.22016906738281)
LN2 = 0.6931471805599453
MOST_STEPS = 2**24  # the counter has 24 bits for the step


def random_bits(seed: int, ids: Tensor, *, step: int | Tensor, stream: int, count: int) -> Tensor:
    """Draw 32-bit random integers, `count` for each id.

    Args:
        seed: Seed, non-negative, below 2**63.
        ids: (B,) int64, non-negative; 63 bits are used.
        step: Sub-counter below `MOST_STEPS`, one for all ids or (B,) int64.
        stream: Purpose of the numbers, below 256; streams never share numbers.
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
    """Compute Philox4x32-10, four counter words (int64 below 2**32) -> four random words."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap modulo 2**64, which keeps all bits of the two 32-bit halves.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return [c0, c1, c2, c3]


def uniform(seed: int, ids: Tensor, *, step: int | Tensor, stream: int, count: int) -> Tensor:
    """Draw numbers in (0, 1), (B, count) float32, from the top 24 bits of `random_bits`."""
    bits = random_bits(seed, ids, step=step, stream=stream, count=count)
    return ((bits >> 8).float() + 0.5) * 2.0**-24


def normal(seed: int, ids: Tensor, *, step: int, count: int) -> Tensor:
    """Draw standard normal numbers, the same bits on every device.

    Args:
        seed: Seed, non-negative, below 2**63.
        ids: (B,) int64, non-negative.
        step: Number of the draw of an image, below 2**24.
        count: Numbers per id, at most 2**34.

    Returns:
        (B, count) float32.
    """
    words = step | (STREAM_NOISE << 24)
    result: Tensor = torch.ops.dmkd_fast.normal(seed, ids, words, count)
    return result


def normal_reference(seed: int, ids: Tensor, step: int, count: int) -> Tensor:
    """Define `normal`: Box-Muller with logarithm, sine and cosine as polynomials.

    Every product and sum is rounded separately, and square roots are correctly rounded, so that all
    devices agree. The log and cos of different libraries differ in the last bit.
    """
    padded = 2 * ((count + 1) // 2)
    bits = random_bits(seed, ids, step=step & 0xFFFFFF, stream=step >> 24, count=padded) >> 8
    square = -2.0 * _log_unit((bits[:, 0::2].float() + 0.5) * 2.0**-24)
    # In float64, since float32 square roots may use a library that is sometimes off by one bit.
    radius = square.double().sqrt().float()
    # The angle in turns is quadrant / 4 + r with |r| <= 1/8.
    angle = bits[:, 1::2]
    quadrant = (angle + (1 << 21)) >> 22
    r = ((angle - (quadrant << 22)).float() + 0.5) * 2.0**-24
    sine, cosine = r * _polynomial(SIN, r * r), _polynomial(COS, r * r)
    odd = (quadrant & 1).bool()
    c, s = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    c = torch.where(((quadrant + 1) & 2).bool(), -c, c)
    s = torch.where((quadrant & 2).bool(), -s, s)
    return torch.stack((radius * c, radius * s), dim=-1).flatten(1)[:, :count]


def _log_unit(u: Tensor) -> Tensor:
    """Return log(u) for float32 u in (0, 1], from the exponent and a polynomial in mantissa - 1."""
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # mantissa in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    return (f + (f * f) * _polynomial(LOG, f)) + exponent.float() * LN2


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Evaluate a polynomial by Horner's rule; coefficients are given lowest degree first."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


_LIBRARY = torch.library.Library("dmkd_fast", "FRAGMENT")
_LIBRARY.define("normal(int seed, Tensor ids, int step, int count) -> Tensor")
_LIBRARY.impl("normal", normal_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("normal", cuda_kernel("dmkd_fast.rng.triton", "normal", normal_reference), "CUDA")
torch.library.register_fake(
    "dmkd_fast::normal",
    lambda seed, ids, step, count: ids.new_empty((len(ids), count), dtype=torch.float32),
    lib=_LIBRARY,
)
