"""Tests of the views' Triton kernels on CPU tensors, by Triton's interpreter.

`tests/views/test_views_triton.py` runs this file in a process of its own, since TRITON_INTERPRET=1
must be set before Triton is imported. The interpreter truncates float32 to bfloat16 where a GPU
rounds. It does not notice reads out of bounds, so slots lie in memory whose other bytes are 255,
which would show in the views.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from views_cases import RECIPES, TOLERANCES, problem

from dmkd_fast.views import triton
from dmkd_fast.views.reference import reference_boxes, reference_views


def surrounded(slots: torch.Tensor) -> torch.Tensor:
    """Copy slots into memory with bytes of 255 before, between and after them."""
    count, *shape = slots.shape
    numbers = math.prod(shape)
    memory = torch.full((count + 2, 2 * numbers), 255, dtype=torch.uint8)
    memory[1:-1, :numbers] = slots.flatten(1)
    return memory[1:-1].as_strided(
        slots.shape, (2 * numbers, *slots[0].contiguous().stride()), 2 * numbers
    )


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 2),
    channels=st.integers(1, 4),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    size=st.integers(1, 30),
    pad=st.integers(0, 4),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 1000),
)
def test_equals_the_float64_definition(
    rows: int,
    channels: int,
    height: int,
    width: int,
    size: int,
    pad: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    inputs, named = problem(rows, channels, height, width, size, pad, seed)
    exact = reference_views(*inputs, **named, dtype=torch.float64)
    slots, *rest = inputs
    memory = torch.full((rows + 2, channels, size, size), 7.0, dtype=dtype)
    memory = memory.to(memory_format=torch.channels_last)
    out = memory[1:-1]
    triton.views_out(out, surrounded(slots), *rest, named["mean"], named["std"], named["pad"])
    of_range, relative = TOLERANCES[dtype]
    if dtype == torch.bfloat16:
        relative *= 2
    limit = of_range / named["std"][:, None, None] + relative * exact.abs()
    assert ((out.double() - exact).abs() <= limit).all()
    assert (memory[0] == 7).all() and (memory[-1] == 7).all()


def test_crops_of_the_view_size_have_the_bits_of_the_definition() -> None:
    inputs, named = problem(12, 3, 16, 14, 12, 3)
    inputs[2][:, 2:] = 12
    inputs[2][:, :2] = torch.randint(-3, 6, (12, 2))
    size, pad, mean, std = named.values()
    for dtype in (torch.float32, torch.float16):
        got = triton.views(*inputs, mean, std, size, pad, dtype)
        assert torch.equal(got, reference_views(*inputs, **named, dtype=dtype))


def test_a_bad_index_or_box_gives_nan_and_its_neighbours_stay() -> None:
    inputs, named = problem(8, 1, 12, 12, 9, 1)
    size, pad, mean, std = named.values()
    good = triton.views(*inputs, mean, std, size, pad, torch.float32)
    _, indices, boxes, _ = inputs
    indices[0], indices[1] = len(inputs[0]), -1
    boxes[3], boxes[4] = torch.tensor([-2, 0, 5, 5]), torch.tensor([0, 0, 3, 14])
    boxes[6], boxes[7] = torch.tensor([3, 3, 0, 3]), torch.tensor([2**31 - 1, 0, 2**31 - 1, 5])
    got = triton.views(*inputs, mean, std, size, pad, torch.float32)
    for row in range(8):
        if row in (2, 5):
            assert torch.equal(got[row], good[row])
        else:
            assert got[row].isnan().all()


@pytest.mark.parametrize(("recipe", "seed"), zip(RECIPES, [0, 1, 5, 2**40 + 11, 7], strict=True))
def test_boxes_have_the_bits_of_the_definition(recipe: tuple, seed: int) -> None:
    ids = torch.arange(300) * (2**33 + 1)
    uses = torch.arange(300) * 7919 % 2**24
    got = triton.view_boxes(seed, ids, uses, *recipe, 0.3)
    for a, b in zip(got, reference_boxes(seed, ids, uses, *recipe, 0.3), strict=True):
        assert torch.equal(a, b)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
