"""Draw random sizes and tensors with random memory layouts, and compare results."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
MOST = 2**16


class Draw(random.Random):
    """A random generator of sizes, tensors and choices."""

    room = MOST  # most elements in a tensor
    fills_room = False  # whether tensors are nearly that large, or mostly small

    def sizes(self, count: int, low: int = 0) -> list[int]:
        """Draw sizes whose product is at most `room`; about every 20th is 0 if `low` allows it."""
        sizes, room = [], float(self.room)
        for _ in range(count):
            most = max(1, int(room))
            power = self.random() ** 2 * self.choice((0.3, 0.6, 1.0))
            size = round(most ** (0.4 + 0.6 * self.random() if self.fills_room else power))
            if self.random() < 0.3:  # around whole vectors
                size = max(1, min(most, size // 16 * 16 + self.choice((-1, 0, 1))))
            sizes.append(low if low == 0 and self.random() < 0.05 else max(1, low, size))
            room /= sizes[-1] or 1
        self.shuffle(sizes)
        return sizes

    def place(self, values: Tensor, *, dense: bool = False) -> Tensor:
        """Copy values to memory of their own, with random strides unless `dense`."""
        order = list(range(values.ndim))
        step = 1
        if not dense:
            if self.random() < 0.5:
                self.shuffle(order)
            step = self.choice((1, 1, 2, 3))
            if values.ndim and self.random() < 0.15:  # a dimension that repeats
                axis = self.randrange(values.ndim)
                values = values.narrow(axis, 0, min(1, values.shape[axis])).expand(values.shape)
        strides, extent = [0] * values.ndim, step
        for axis in order[::-1]:
            if values.ndim and values.stride(axis) == 0 and values.shape[axis] > 1:
                continue
            strides[axis] = extent
            gap = 0 if dense or self.random() < 0.7 else self.choice((1, 5))
            extent = extent * max(1, values.shape[axis]) + gap
        last = sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
        offset = self.choice((0, 0, 1, 2, 3))
        numel = offset + (last + 1 if values.numel() else 0)
        memory = torch.full((numel,), 77, dtype=values.dtype)
        placed = memory.as_strided(values.shape, strides, offset)
        if values.numel():
            # Write the elements of a repeated dimension once.
            once = tuple(
                slice(0, 1) if s == 0 and n > 1 else slice(None)
                for n, s in zip(values.shape, strides, strict=True)
            )
            placed[once].copy_(values[once])
        return placed

    def floats(self, shape: Any, dtype: torch.dtype, *, dense: bool = False) -> Tensor:
        spread = self.choice((0.1, 1.0, 3.0))
        return self.place((spread * torch.randn(tuple(shape))).to(dtype), dense=dense)


Call = tuple[Callable[[], Any], Callable[[Any], None]]


def check(got: Tensor, expected: Tensor, relative: float, absolute: float | Tensor) -> None:
    assert got.shape == expected.shape, (got.shape, expected.shape)
    error = (got.double() - expected.double()).abs()
    bad = error > absolute + relative * expected.double().abs()
    assert not bad.any(), f"error {error.max().item():.3g}, {int(bad.sum())} of {bad.numel()}"
