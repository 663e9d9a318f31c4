"""The PTX of the views' kernels, executed without a GPU: values, bounds, races."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from ptx_launch import EmulatedKernel
from ptx_memory import KernelError
from ptx_mutants import Change, replaced, without_barrier
from views_cases import RECIPES, TOLERANCES, problem

from dmkd_fast.views import triton
from dmkd_fast.views.reference import reference_boxes, reference_views


def boxes(
    patch: pytest.MonkeyPatch, seed: int, rows: int, recipe: tuple, *change: Change
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Draw crops and flips with the kernel's PTX; return these and the definition's, in pairs."""
    ids = torch.arange(rows) * (2**33 + 1)
    uses = torch.arange(rows) * 7919 % 2**24
    with patch.context() as context:
        context.setattr(triton, "boxes_kernel", EmulatedKernel(triton.boxes_kernel, *change))
        got = triton.view_boxes(seed, ids, uses, *recipe, 0.3)
    return list(zip(got, reference_boxes(seed, ids, uses, *recipe, 0.3), strict=True))


def check_boxes(patch: pytest.MonkeyPatch, seed: int, recipe: tuple, *change: Change) -> None:
    for got, expected in boxes(patch, seed, 150, recipe, *change):
        assert torch.equal(got, expected)


def render(
    patch: pytest.MonkeyPatch, inputs: tuple, named: dict, dtype: torch.dtype, *change: Change
) -> tuple[torch.Tensor, EmulatedKernel]:
    """Render views with the kernel's PTX; slots lie apart, and the bytes between are closed."""
    slots, *rest = inputs
    apart = torch.full((len(slots), 2, *slots.shape[1:]), 255, dtype=torch.uint8)[:, 0]
    apart.copy_(slots)
    shape = (len(rest[0]), slots.shape[1], named["size"], named["size"])
    out = torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = EmulatedKernel(triton.render_kernel, *change)
    with patch.context() as context:
        context.setattr(triton, "render_kernel", kernel)
        triton.views_out(out, apart, *rest, named["mean"], named["std"], named["pad"])
    return out, kernel


def check_views(
    patch: pytest.MonkeyPatch, inputs: tuple, named: dict, dtype: torch.dtype, *change: Change
) -> EmulatedKernel:
    exact = reference_views(*inputs, **named, dtype=torch.float64)
    out, kernel = render(patch, inputs, named, dtype, *change)
    of_range, relative = TOLERANCES[dtype]
    limit = of_range / named["std"][:, None, None] + relative * exact.abs()
    assert ((out.double() - exact).abs() <= limit).all()
    return kernel


@pytest.mark.parametrize("recipe", RECIPES[:4:3], ids=["random resized crop", "pad"])
def test_boxes_have_the_bits_of_the_definition(
    recipe: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_boxes(monkeypatch, 2**40 + 11, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_boxes_have_the_bits_of_the_definition_for_any_recipe(
    recipe: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1, 16, 2**63 - 1):
        check_boxes(monkeypatch, seed, recipe)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_views_equal_the_float64_definition(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = check_views(monkeypatch, *problem(3, 3, 20, 24, 16, 2), dtype)
    [program] = kernel.programs
    assert any("v4" in program.code[at].modifiers for at in program.positions("st"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(
    "shape",
    [(3, 256, 256, 64, 0), (3, 64, 64, 33, 0), (1, 28, 28, 28, 2), (4, 9, 13, 16, 1)]
    + [(3, 32, 32, 32, 4), (2, 90, 70, 17, 3), (1, 1, 1, 1, 0)],
)
def test_views_of_any_shape_equal_the_float64_definition(
    shape: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_views(monkeypatch, *problem(3, *shape), dtype)


def test_crops_of_the_view_size_have_the_bits_of_the_definition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, named = problem(4, 3, 16, 14, 12, 3)
    inputs[2][:, 2:] = 12
    inputs[2][:, :2] = torch.randint(-3, 6, (4, 2))
    got, _ = render(monkeypatch, inputs, named, torch.float32)
    assert torch.equal(got, reference_views(*inputs, **named, dtype=torch.float32))


def test_a_bad_index_or_box_reads_nothing_and_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, named = problem(6, 1, 12, 12, 9, 1)
    good, _ = render(monkeypatch, inputs, named, torch.float32)
    _, indices, places, _ = inputs
    indices[0], indices[1] = len(inputs[0]), -1
    places[3], places[4] = torch.tensor([-2, 0, 5, 5]), torch.tensor([2**31 - 1, 0, 2**31 - 1, 5])
    got, _ = render(monkeypatch, inputs, named, torch.float32)
    assert got[[0, 1, 3, 4]].isnan().all() and torch.equal(got[[2, 5]], good[[2, 5]])
