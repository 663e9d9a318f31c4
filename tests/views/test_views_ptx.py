"""The PTX of the views' kernels, executed without a GPU: values, bounds, races."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from ptx_launch import EmulatedKernel
from ptx_memory import KernelError
from ptx_mutants import mutated, without_barrier
from views_cases import RECIPES, TOLERANCES, problem

from dmkd_fast.views import triton
from dmkd_fast.views.reference import reference_boxes, reference_views

pytestmark = pytest.mark.slow  # run by .ci/run

SHAPE = (3, 20, 24, 16, 2)  # channels, height, width, side of the views, border


def check_boxes(
    patch: pytest.MonkeyPatch, seed: int, recipe: tuple, *, kernel: Any = triton.boxes_kernel
) -> None:
    """Compare crops and flips of the kernel's PTX with those of the definition."""
    rows = 150
    ids = torch.arange(rows) * (2**33 + 1)
    uses = torch.arange(rows) * 7919 % 2**24
    with patch.context() as context:
        context.setattr(triton, "boxes_kernel", EmulatedKernel(kernel))
        got = triton.view_boxes(seed, ids, uses, *recipe, 0.3)
    for mine, expected in zip(got, reference_boxes(seed, ids, uses, *recipe, 0.3), strict=True):
        assert torch.equal(mine, expected)


def drawn(rows: int, channels: int, height: int, width: int, size: int, pad: int) -> tuple:
    """Draw inputs of `views`; the first box is the whole image with its border."""
    inputs, named = problem(rows, channels, height, width, size, pad)
    inputs[2][0] = torch.tensor([-pad, -pad, height + 2 * pad, width + 2 * pad])
    return inputs, named


def render(
    patch: pytest.MonkeyPatch,
    inputs: tuple,
    named: dict,
    dtype: torch.dtype = torch.float32,
    *,
    kernel: Any = triton.render_kernel,
    **options: Any,
) -> tuple[Tensor, EmulatedKernel]:
    """Render views with the kernel's PTX; slots lie apart, and the bytes between are closed."""
    slots, *rest = inputs
    apart = torch.full((len(slots), 2, *slots.shape[1:]), 255, dtype=torch.uint8)[:, 0]
    apart.copy_(slots)
    shape = (len(rest[0]), slots.shape[1], named["size"], named["size"])
    out = torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)
    emulated = EmulatedKernel(kernel, **options)
    with patch.context() as context:
        context.setattr(triton, "render_kernel", emulated)
        triton.views_out(out, apart, *rest, named["mean"], named["std"], named["pad"])
    return out, emulated


def check_views(
    patch: pytest.MonkeyPatch,
    inputs: tuple,
    named: dict,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> EmulatedKernel:
    """Compare views of the kernel's PTX with the float64 definition."""
    exact = reference_views(*inputs, **named, dtype=torch.float64)
    out, kernel = render(patch, inputs, named, dtype, **options)
    of_range, relative = TOLERANCES[dtype]
    limit = of_range / named["std"][:, None, None] + relative * exact.abs()
    assert ((out.double() - exact).abs() <= limit).all()
    return kernel


@pytest.mark.parametrize("recipe", RECIPES[:4:3], ids=["random resized crop", "pad"])
def test_boxes_have_the_bits_of_the_definition(
    recipe: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_boxes(monkeypatch, 2**40 + 11, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_boxes_have_the_bits_of_the_definition_for_any_recipe(
    recipe: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1, 16, 2**63 - 1):
        check_boxes(monkeypatch, seed, recipe)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_views_equal_the_float64_definition(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    [program] = check_views(monkeypatch, *drawn(3, *SHAPE), dtype).programs
    assert any("v4" in program.code[at].modifiers for at in program.positions("st"))


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(
    "shape",
    [
        (3, 256, 256, 64, 0),
        (3, 64, 64, 33, 0),
        (1, 28, 28, 28, 2),
        (4, 9, 13, 16, 1),
        (3, 32, 32, 32, 4),
        (2, 90, 70, 17, 3),
        (1, 1, 1, 1, 0),
    ],
)
def test_views_of_any_shape_equal_the_float64_definition(
    shape: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_views(monkeypatch, *drawn(3, *shape), dtype)


def test_crops_of_the_view_size_have_the_bits_of_the_definition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, named = problem(4, 3, 16, 14, 12, 3)
    inputs[2][:, 2:] = 12
    inputs[2][:, :2] = torch.randint(-3, 6, (4, 2))
    got, _ = render(monkeypatch, inputs, named)
    assert torch.equal(got, reference_views(*inputs, **named, dtype=torch.float32))


def check_bad_rows(patch: pytest.MonkeyPatch, **options: Any) -> None:
    inputs, named = problem(7, 1, 12, 12, 9, 1)
    good, _ = render(patch, inputs, named)
    _, indices, places, _ = inputs
    indices[0], indices[1] = len(inputs[0]), -1
    places[3], places[4] = torch.tensor([-2, 0, 5, 5]), torch.tensor([2**31 - 1, 0, 2**31 - 1, 5])
    places[6] = torch.tensor([0, 9, 3, 5])
    got, _ = render(patch, inputs, named, **options)
    assert got[[0, 1, 3, 4, 6]].isnan().all() and torch.equal(got[[2, 5]], good[[2, 5]])


def test_a_bad_index_or_box_reads_nothing_and_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    check_bad_rows(monkeypatch)


def test_a_missing_barrier_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, named = drawn(1, *SHAPE)
    [program] = check_views(monkeypatch, inputs, named, torch.float16).programs
    barriers = len(program.positions("bar"))
    assert barriers
    for number in range(barriers):
        with pytest.raises(KernelError, match="race"):
            render(monkeypatch, inputs, named, torch.float16, change=without_barrier(number))


MUTATIONS = {
    "end of a view": ("inside = element < SIZE", "inside = element <= SIZE"),
    "index": ("(index < num_slots)", "(index <= num_slots)"),
    "right edge of a box": ("(left <= width + pad - columns)", "(left < width + pad - columns)"),
    "border above": ("(y >= 0)", "(y >= -1)"),
    "border below": ("(y < height)", "(y <= height)"),
    "border on the left": ("(x >= 0)", "(x >= -1)"),
    "border on the right": ("(x < width)", "(x <= width)"),
    "taps": ("2 * rows // SIZE + 2)", "2 * rows // SIZE)"),
    "levels": ("tl.div_rn(value, 255.0)", "tl.div_rn(value, 256.0)"),
    "flips": ("tl.load(flips + row) != 0", "tl.load(flips + row) > 1"),
    "support": ("20 * rows > 23 * SIZE", "20 * rows > 33 * SIZE"),
}


def check_rows(patch: pytest.MonkeyPatch, kernel: Any) -> None:
    check_bad_rows(patch, kernel=kernel)
    check_views(patch, *drawn(3, *SHAPE), kernel=kernel)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_kernel_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = mutated(triton, *MUTATIONS[name], tmp_path).render_kernel
    with pytest.raises((AssertionError, KernelError)):
        check_rows(monkeypatch, kernel)


def check_recipes(patch: pytest.MonkeyPatch, kernel: Any) -> None:
    for recipe in RECIPES:
        check_boxes(patch, 5, recipe, kernel=kernel)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("inside = row < count", "inside = row <= count"),
        ("(room + 1).to", "room.to"),
        ("1 + i // 2", "i // 2"),
        ("8.881784197001252e-16 + 0.5", "8.881784197001252e-16"),
        ("(new_rows <= height)", "(new_rows < height)"),
    ],
)
def test_changed_crops_are_noticed(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = mutated(triton, old, new, tmp_path).boxes_kernel
    with pytest.raises((AssertionError, KernelError)):
        check_recipes(monkeypatch, kernel)
