"""The views operator on CPUs: numbers against float64, PyTorch's machinery, bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from views_cases import RECIPES, TOLERANCES, problem

from dmkd_fast.runtime import native
from dmkd_fast.views.ops import DTYPES, raise_for_bad_rows, views
from dmkd_fast.views.reference import reference_boxes, reference_views

HELPERS = Path(__file__).parents[1] / "helpers"


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 7),
    channels=st.integers(1, 5),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    size=st.integers(1, 70),
    pad=st.integers(0, 6),
    dtype=st.sampled_from(DTYPES),
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
    got = views(*inputs, **named, dtype=dtype)
    exact = reference_views(*inputs, **named, dtype=torch.float64)
    assert got.dtype == dtype and got.shape == exact.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    of_range, relative = TOLERANCES[dtype]
    limit = of_range / named["std"][:, None, None] + relative * exact.abs()
    assert ((got.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_crops_of_the_view_size_have_the_bits_of_the_definition(
    channels: int, dtype: torch.dtype
) -> None:
    inputs, named = problem(60, channels, 32, 30, 28, 3)
    inputs[2][:, 2:] = 28
    inputs[2][:, :2] = torch.randint(-3, 6, (60, 2))
    expected = reference_views(*inputs, **named, dtype=dtype)
    assert torch.equal(views(*inputs, **named, dtype=dtype), expected)


def test_large_crops_that_shrink_much_are_exact_too() -> None:
    inputs, named = problem(3, 3, 700, 500, 16, 2)
    exact = reference_views(*inputs, **named, dtype=torch.float64)
    torch.testing.assert_close(views(*inputs, **named).double(), exact, rtol=0, atol=5e-6)


def test_threads_and_neighbours_change_no_bit() -> None:
    inputs, named = problem(40, 3, 60, 50, 48, 4)
    slots, *rest = inputs
    together = views(*inputs, **named)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            assert torch.equal(views(*inputs, **named), together)
    finally:
        torch.set_num_threads(threads)
    order = torch.randperm(40)
    shuffled = views(slots, *(x[order] for x in rest), **named)
    assert torch.equal(shuffled, together[order])
    for row in range(0, 40, 7):
        alone = views(slots, *(x[row : row + 1] for x in rest), **named)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_written_and_nothing_else(dtype: torch.dtype) -> None:
    inputs, named = problem(9, 3, 40, 40, 30, 2)
    memory = torch.full((11, 3, 30, 30), 7.0, dtype=dtype).to(memory_format=torch.channels_last)
    out = memory[1:-1]
    assert views(*inputs, **named, dtype=dtype, out=out) is out
    assert torch.equal(out, views(*inputs, **named, dtype=dtype))
    assert (memory[0] == 7).all() and (memory[-1] == 7).all()


def test_slots_of_a_larger_ring_and_strided_rows_are_read_in_place() -> None:
    inputs, named = problem(8, 3, 20, 20, 16, 1)
    slots, indices, boxes, flips = inputs
    ring = torch.zeros(9, 3, 20, 20, dtype=torch.uint8)
    ring[1::2] = slots
    double = lambda x: torch.stack((x, x), 1).flatten(0, 1)[::2]  # noqa: E731
    got = views(ring[1::2], double(indices), double(boxes), double(flips), **named)
    assert torch.equal(got, views(*inputs, **named))


def test_gray_slots_may_be_channels_last() -> None:
    """One channel in any memory format is the same memory."""
    inputs, named = problem(6, 1, 20, 18, 16, 1)
    slots = inputs[0].to(memory_format=torch.channels_last)
    assert slots.stride(1) == 1 and slots.is_contiguous()
    assert torch.equal(views(slots, *inputs[1:], **named), views(*inputs, **named))


def test_boxes_of_sizes_beyond_the_operators_are_refused() -> None:
    """Their products would overflow 64 bits, and boxes 32."""
    ids = torch.arange(3)
    for height, pad, spare, shape in (
        (2**40, 0, 28, 0),
        (28, 2**62, 28, 0),
        (28, 0, 29, 0),
        (28, 0, 28, 2**40),
    ):
        recipe = (height, 28, pad, 2**23, 2**24, -shape, shape, spare, 28, 10)
        with pytest.raises(RuntimeError, match="out of range"):
            torch.ops.dmkd_fast.view_boxes(0, ids, ids, *recipe, 0.5)


@pytest.mark.slow
def test_more_than_2_to_the_31_bytes_of_slots() -> None:
    """Addresses, without the memory: slots that overlap, far into one that is large enough."""
    slots = torch.zeros(2**15 + 8, 1, 256, 256, dtype=torch.uint8)  # untouched pages take none
    slots[-1] = torch.randint(0, 256, (1, 256, 256), dtype=torch.uint8)
    one = {"size": 64, "pad": 0, "mean": torch.zeros(1), "std": torch.ones(1)}
    rest = torch.tensor([[10, 20, 100, 90]], dtype=torch.int32), torch.tensor([True])
    got = views(slots, torch.tensor([len(slots) - 1]), *rest, **one)
    assert torch.equal(got, views(slots[-1:].clone(), torch.tensor([0]), *rest, **one))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", [0, 2**50 + 11])
def test_crops_and_flips_have_the_bits_of_the_definition(recipe: tuple, seed: int) -> None:
    ids, uses = torch.arange(3000) * (2**40 + 1), torch.arange(3000) * 5000
    got = torch.ops.dmkd_fast.view_boxes(seed, ids, uses, *recipe, 0.3)
    for a, b in zip(got, reference_boxes(seed, ids, uses, *recipe, 0.3), strict=True):
        assert torch.equal(a, b)
    boxes, flips = got
    height, width, pad = recipe[:3]
    assert (boxes[:, :2] >= -pad).all() and (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor([height, width]) + pad).all()
    assert abs(flips.double().mean() - 0.3) < 5 * (0.21 / 3000) ** 0.5


def test_no_rows_give_no_views() -> None:
    inputs, named = problem(0, 3, 20, 20, 16, 1)
    assert views(*inputs, **named).shape == (0, 3, 16, 16)


def test_operators_pass_opcheck() -> None:
    for rows, channels, dtype in (
        (5, 3, torch.float32),
        (0, 1, torch.float16),
        (2, 2, torch.bfloat16),
    ):
        inputs, named = problem(rows, channels, 20, 18, 16, 1)
        size, pad, mean, std = named.values()
        torch.library.opcheck(
            torch.ops.dmkd_fast.views.default, (*inputs, mean, std, size, pad, dtype)
        )
        out = torch.empty(
            (rows, channels, size, size), dtype=dtype, memory_format=torch.channels_last
        )
        torch.library.opcheck(torch.ops.dmkd_fast.views_out.default, (out, *inputs, mean, std, pad))
    recipe = (32, 32, 2, 2**23, 2**24, -1000, 1000, 32, 32, 10, 0.5)
    torch.library.opcheck(
        torch.ops.dmkd_fast.view_boxes.default, (1, torch.arange(5), torch.arange(5), *recipe)
    )


def test_compiles_as_a_full_graph() -> None:
    torch.compiler.reset()
    inputs, named = problem(6, 3, 20, 18, 16, 1)
    expected = views(*inputs, **named)
    fresh = torch.compile(lambda *x: views(*x, **named) + 0, fullgraph=True, backend="aot_eager")
    assert torch.equal(fresh(*inputs), expected)
    reused = torch.compile(
        lambda out, *x: views(*x, **named, out=out), fullgraph=True, backend="aot_eager"
    )
    out = torch.empty_like(expected)
    assert torch.equal(reused(out, *inputs), expected) and torch.equal(out, expected)


def test_fake_cuda_tensors_stay_where_they_are() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=False):
        slots = torch.empty(200_000, 3, 256, 256, dtype=torch.uint8, device="cuda")
        indices = torch.empty(8, dtype=torch.int64, device="cuda")
        boxes = torch.empty(8, 4, dtype=torch.int32, device="cuda")
        flips = torch.empty(8, dtype=torch.bool, device="cuda")
        mean, std = torch.empty(3, device="cuda"), torch.empty(3, device="cuda")
        got = views(
            slots, indices, boxes, flips, size=224, pad=0, mean=mean, std=std, dtype=torch.float16
        )
        assert got.device.type == "cuda" and got.shape == (8, 3, 224, 224)
        assert got.is_contiguous(memory_format=torch.channels_last)


BYTES = torch.zeros(4, 3, 20, 20, dtype=torch.uint8)


def boxes_of(top: int, left: int, height: int, width: int) -> Tensor:
    return torch.tensor([[top, left, height, width]] * 2, dtype=torch.int32)


# Name: which input, its value, the error, words of it.
CHANGES = {
    "index too large": (1, torch.tensor([0, 4]), IndexError, "got 4 in row 1, expected 0 to 3"),
    "index negative": (1, torch.tensor([-1, 0]), IndexError, "indices: got -1 in row 0"),
    "box above the border": (2, boxes_of(-2, 0, 5, 5), IndexError, "boxes: got top -2"),
    "box beyond the border": (2, boxes_of(0, 17, 5, 5), IndexError, "left 17"),
    "box of no size": (2, boxes_of(0, 0, 0, 5), IndexError, "height 0"),
    "box too far": (2, boxes_of(2**31 - 1, 0, 2**31 - 1, 5), IndexError, "top 2147483647"),
    "boxes of floats": (2, torch.ones(2, 4), TypeError, "got torch.float32, expected torch.int32"),
    "boxes of three": (2, torch.ones(2, 3).int(), ValueError, r"boxes: .* expected \(2, 4\)"),
    "too few flips": (3, torch.tensor([True]), ValueError, r"got shape \(1,\), expected \(2,\)"),
    "flips of numbers": (3, torch.tensor([1, 0]), TypeError, "flips: got torch.int64"),
    "indices of int32": (1, torch.tensor([1, 0]).int(), TypeError, "indices: got torch.int32"),
    "indices in a matrix": (1, torch.zeros(2, 1).long(), ValueError, r"expected \(B,\)"),
    "float slots": (0, BYTES.float(), TypeError, "slots: got torch.float32"),
    "one image as slots": (0, BYTES[0], ValueError, r"slots: .* expected \(N, c, H, W\)"),
    "channels-last slots": (
        0,
        BYTES.to(memory_format=torch.channels_last),
        ValueError,
        "strides.*contiguous",
    ),
    "no slots": (0, BYTES[:0], IndexError, "indices: got"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_bad_input_is_named_in_one_line(name: str) -> None:
    place, value, error, words = CHANGES[name]
    inputs, named = problem(2, 3, 20, 20, 16, 1)
    changed = [*inputs]
    changed[place] = value
    with pytest.raises(error, match=words) as raised:
        views(*changed, **named)
    assert "\n" not in str(raised.value)
    if error is IndexError:  # Without the extension, the same.
        with pytest.raises(IndexError) as eager:
            raise_for_bad_rows(*changed[:3], pad=1)
        assert str(eager.value) == str(raised.value)


def test_bad_settings_are_named_in_one_line() -> None:
    inputs, named = problem(2, 3, 20, 20, 16, 1)
    like = torch.empty(2, 3, 16, 16)
    shared = torch.zeros(2 * 16 * 16 * 3).view(2, 16, 16, 3).permute(0, 3, 1, 2)
    for change, error, words in (
        ({"dtype": torch.float64}, TypeError, "dtype: got torch.float64"),
        ({"size": 0}, ValueError, "size: got 0"),
        ({"pad": -1}, ValueError, "pad: got -1"),
        ({"mean": torch.zeros(1)}, ValueError, r"mean: got shape \(1,\), expected \(3,\)"),
        ({"std": torch.ones(3).double()}, TypeError, "std: got torch.float64"),
        ({"out": like}, ValueError, "channels_last"),
        ({"out": like[:1]}, ValueError, "out: got"),
        ({"out": like.half()}, ValueError, "out: got"),
        ({"out": shared, "mean": shared[0, :, 0, 0]}, ValueError, "out: shares memory with mean"),
    ):
        with pytest.raises(error, match=words):
            views(*inputs, **(named | change))


def test_the_compiled_kernel_is_what_was_tested() -> None:
    assert native.INSTRUCTION_SET in ("avx512", "avx2", "scalar"), native.WHY_MISSING


def test_without_the_extension_views_have_the_same_numbers(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['dmkd_fast._C'] = None\n"
        "import torch\n"
        "sys.path.insert(0, sys.argv[1]); from views_cases import problem\n"
        "from dmkd_fast.runtime import native; assert native.INSTRUCTION_SET == 'none'\n"
        "from dmkd_fast.views.ops import views\n"
        "inputs, named = problem(7, 3, 20, 18, 16, 1)\n"
        "torch.save(views(*inputs, **named), sys.argv[2])\n"
    )
    path = tmp_path / "views.pt"
    subprocess.run([sys.executable, "-c", program, str(HELPERS), str(path)], check=True)
    inputs, named = problem(7, 3, 20, 18, 16, 1)
    theirs = torch.load(path, weights_only=True)
    torch.testing.assert_close(theirs, views(*inputs, **named), rtol=0, atol=5e-6)


def test_one_compiled_graph_serves_all_numbers_of_views() -> None:
    counters.clear()
    compiled = torch.compile(views, backend="eager", fullgraph=True, dynamic=True)
    for rows in (5, 9):
        inputs, named = problem(rows, 1, 8, 8, 6, 1, 0)
        torch.testing.assert_close(compiled(*inputs, **named), views(*inputs, **named))
    assert counters["stats"]["unique_graphs"] == 1
