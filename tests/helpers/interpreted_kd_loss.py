"""Tests of the loss's Triton kernels on CPU tensors, by Triton's interpreter.

`tests/loss/test_kd_loss_triton.py` runs this file in a process of its own, since TRITON_INTERPRET=1
must be set before Triton is imported. The interpreter differs from a GPU in two ways. It truncates
float32 to bfloat16, so gradients are compared in float32, before rounding. It does not notice reads
out of bounds, so all inputs lie in memory full of NaN, which would spread to the result.
"""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmkd_fast.loss import ops, triton_launch
from dmkd_fast.loss.divergences import terms_of
from dmkd_fast.loss.ops import Problem

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LONG = triton_launch.MAX_TILE + 809  # two passes, three blocks


def surrounded(rows: Tensor) -> Tensor:
    """Copy rows into memory with NaN around each of them."""
    count, classes = rows.shape
    memory = torch.full((count + 2, classes + 24), float("nan"), dtype=rows.dtype)
    memory[1:-1, 8 : 8 + classes] = rows
    return memory[1:-1, 8 : 8 + classes]


def make(
    rows: int, classes: int, dtype: torch.dtype, target: str, spread: float = 3.0, seed: int = 0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(rows, classes, generator=generator)  # noqa: E731
    student, teacher = (surrounded((spread * draw()).to(dtype)) for _ in range(2))
    targets = {
        "none": None,
        "ids": torch.randint(0, classes, (rows,), generator=generator),
        "probabilities": surrounded(draw().softmax(-1).to(dtype)),
    }[target]
    weight = torch.rand(rows, generator=generator)
    weight[rows // 2] = 0
    alpha = 1.0 if targets is None else 0.3
    return Problem(student, teacher, targets, weight, 4.0, alpha, 16 / rows, 1 / rows, 0.1)


def run(problem: Problem, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Run the kernels: loss, KD and CE parts, gradients of the one-pass and backward kernels."""
    rows, classes = problem.student.shape
    memory = torch.full((rows, classes + 16), 7.0)
    grad = memory[:, :classes]
    *losses, stats = triton_launch.forward_backward(grad, None, scale, *problem)
    again = torch.empty(rows, classes)
    triton_launch.plan_backward(problem, again, torch.tensor(scale), stats).run()
    assert (memory[:, classes:] == 7).all()
    return *losses, grad, again


def wide(problem: Problem) -> list:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in problem]


def exact(problem: Problem, scale: float = 1.0) -> tuple[Tensor, ...]:
    losses = ops._eager_forward(*wide(problem), False)
    upstream = torch.tensor(scale).double()
    return *losses[:3], ops._eager_backward(upstream, losses[3], *wide(problem))


@pytest.mark.parametrize("target", ["none", "ids", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "classes"), [(1, 1), (9, 7), (5, 100), (3, 1000), (2, 1003), (2, 3001), (3, LONG)]
)
def test_kernels_agree_with_float64(
    rows: int, classes: int, dtype: torch.dtype, target: str
) -> None:
    problem = make(rows, classes, dtype, target)
    loss, kd, ce, grad, again = run(problem, 3.0)
    loss64, kd64, ce64, grad64 = exact(problem, 3.0)
    for value, expected in ((loss, loss64), (kd, kd64), (ce, ce64)):
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-7)
    error = (grad.double() - grad64).norm()
    assert error <= 1e-6 * grad64.norm() + 1e-9
    torch.testing.assert_close(again, grad, rtol=1e-5, atol=1e-9)
    skipped = problem[3] == 0
    assert (grad[skipped] == 0).all() and (again[skipped] == 0).all()


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 6),
    classes=st.sampled_from([2, 5, 16, 17, 33, 100, 129, 515]),
    dtype=st.sampled_from(DTYPES),
    target=st.sampled_from(["none", "ids", "probabilities"]),
    temperature=st.sampled_from([0.05, 1.0, 4.0, 100.0]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 100),
)
def test_kernels_agree_over_shapes_temperatures_and_spreads(
    rows: int,
    classes: int,
    dtype: torch.dtype,
    target: str,
    temperature: float,
    spread: float,
    seed: int,
) -> None:
    problem = make(rows, classes, dtype, target, spread, seed)
    problem = problem._replace(temperature=temperature)
    loss, _, _, grad, _ = run(problem)
    loss64, _, _, grad64 = exact(problem)
    size = 1 + 10 * spread / temperature  # Rounding of logits / T is multiplied by their size.
    assert abs(loss.double() - loss64) <= 2e-6 * (1 + abs(loss64)) * size
    # The rounding of the two sums, 1e-7 of p, limits the accuracy of q - p.
    allowed = 1e-6 * size * (grad64.norm() + 16 / temperature)
    assert (grad.double() - grad64).norm() <= allowed


FORMS = (
    "reverse_kl",
    "jsd",
    {"jsd": {"beta": 0.1}},
    "alpha_beta",
    "total_variation",
    "dkd",
    {"forward_kl": 0.5, "reverse_kl": 0.25},
    "forward_kl",
)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_divergences_agree_with_float64(form: str | dict, standardize: bool) -> None:
    for rows, classes, target in (
        (5, 100, "ids"),
        (3, 1003, "none"),
        (2, LONG, "ids"),
        (1, 1, "ids"),
    ):
        if form == "dkd" and target == "none":
            continue
        problem = make(rows, classes, torch.float32, target)
        if target == "ids" and classes == 100:  # dkd without a hard-label term
            problem = problem._replace(alpha=1.0)
        temperatures = torch.tensor([[2.0 + row, 4.0] for row in range(rows)])
        for each in (None, temperatures):
            problem = problem._replace(
                temperatures=each, terms=terms_of(form), standardize=standardize
            )
            loss, kd, ce, grad, again = run(problem, 3.0)
            *losses64, grad64 = exact(problem, 3.0)
            for value, expected in zip((loss, kd, ce), losses64, strict=True):
                torch.testing.assert_close(value.double(), expected, rtol=5e-6, atol=1e-6)
            assert (grad.double() - grad64).norm() <= 1e-5 * grad64.norm() + 1e-7
            torch.testing.assert_close(again, grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_divergences_stay_exact_near_the_teacher(form: str | dict) -> None:
    for classes in (1000, LONG):
        teacher = make(2, classes, torch.float32, "none")[1].contiguous()
        generator = torch.Generator().manual_seed(1)
        student = teacher + 1e-2 * torch.randn(teacher.shape, generator=generator)
        target = torch.tensor([3, 5])
        numbers = (4.0, 1.0, 1.0, 1.0, 0.0, None, terms_of(form))
        problem = Problem(student, teacher, target, torch.ones(2), *numbers)
        loss, _, _, grad, _ = run(problem)
        loss64, _, _, grad64 = exact(problem)
        torch.testing.assert_close(loss.double(), loss64, rtol=1e-3, atol=0)
        assert (grad.double() - grad64).norm() < 1e-3 * grad64.norm()
        same = run(problem._replace(student=teacher))
        assert same[0] == 0 and (same[3] == 0).all()


def test_per_row_losses_are_bitwise_those_of_the_row_alone() -> None:
    for classes in (100, LONG):
        student, teacher, _, _, *numbers = make(5, classes, torch.float32, "none")
        whole = triton_launch.forward(student, teacher, None, None, *numbers, True)[0]
        for row in range(5):
            one = slice(row, row + 1)
            alone = triton_launch.forward(student[one], teacher[one], None, None, *numbers, True)
            assert torch.equal(alone[0], whole[one])
        again = triton_launch.forward(student, teacher, None, None, *numbers, True)[0]
        assert torch.equal(again, whole)


def test_loss_and_gradient_stay_exact_as_the_student_meets_the_teacher() -> None:
    for classes in (1000, LONG):
        teacher = make(2, classes, torch.float32, "none")[1].contiguous()
        generator = torch.Generator().manual_seed(1)
        student = teacher + 1e-2 * torch.randn(teacher.shape, generator=generator)
        problem = Problem(student, teacher, None, torch.ones(2), 4.0, 1.0, 1.0, 1.0, 0.0)
        loss, _, _, grad, again = run(problem)
        loss64, _, _, grad64 = exact(problem)
        torch.testing.assert_close(loss.double(), loss64, rtol=2e-5, atol=0)
        for value in (grad, again):
            # Long rows add up their two sums block by block, which rounds more often.
            error = (value.double() - grad64).norm() / grad64.norm()
            assert error < (5e-6 if classes == 1000 else 1e-4)


def test_the_last_program_adds_what_all_have_written() -> None:
    for rows, classes in ((9, 1000), (3, LONG), (300, 2100)):
        student, teacher, _, weight, *numbers = make(rows, classes, torch.float32, "none")
        outputs = [torch.empty(()) for _ in range(3)]
        stats, ticket = torch.empty(rows, ops.NUM_STATS), torch.zeros(1, dtype=torch.int32)
        problem = Problem(student, teacher, None, weight, *numbers)
        launch = triton_launch.plan_losses(problem, None, None, 1.0, (*outputs, stats), ticket)
        partials = launch.arguments[-2]
        assert len(partials) > 1
        each = triton_launch.forward(*problem, True)[0]
        for _ in range(2):  # The ticket is zero again before the second launch.
            partials.fill_(float("nan"))
            launch.run()
            torch.testing.assert_close(outputs[0], each.sum(), rtol=2e-6, atol=0)
            assert ticket == 0


def test_infinities_and_nan_follow_the_definition() -> None:
    inf, nan = float("inf"), float("nan")
    teacher = torch.tensor([[0.0, -inf, 1.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, -inf, 1.0]])
    student = torch.tensor([[0.0, 1.0, 1.0], [0.0, -inf, 1.0], [nan, 1.0, 1.0], [0.0, -inf, 1.0]])
    for repeats in (7, LONG // 3):
        s, t = student.repeat(1, repeats), teacher.repeat(1, repeats)
        problem = Problem(s, t, None, None, 2.0, 1.0, 1.0, 1.0, 0.0)
        rows = triton_launch.forward(*problem, True)[0]
        expected = ops._eager_forward(*problem, True)[0]
        torch.testing.assert_close(rows, expected, equal_nan=True, rtol=1e-5, atol=1e-6)
        assert rows[0].isfinite() and rows[1] == inf and rows[2].isnan() and rows[3].isfinite()
        grad = torch.empty_like(s)
        triton_launch.forward_backward(grad, None, 1.0, *problem)
        assert grad[[0, 1, 3]].isfinite().all() and grad[2].isnan().all()
        nothing = torch.full_like(s[:1], -inf)
        assert triton_launch.forward(nothing, t[1:2], None, None, *problem[4:], True)[0].isnan()


def test_rows_of_dkd_with_infinite_logits_follow_the_definition() -> None:
    for classes in (8, LONG):
        student, teacher = (x.contiguous() for x in make(6, classes, torch.float32, "none")[:2])
        target = torch.arange(6)
        for logits, first in ((teacher, 0), (student, 1)):
            logits[[first, 2], [first, 2]] = -torch.inf  # the target's
            for row in (3 + first, 5):
                logits[row, torch.arange(classes) != row] = -torch.inf  # all but the target's
        numbers = (2.0, 1.0, 1.0, 1.0, 0.0, None, terms_of("dkd"))
        problem = Problem(student, teacher, target, None, *numbers)
        rows = triton_launch.forward(*problem, True)[0]
        expected = ops._eager_forward(*wide(problem), True)[0]
        assert expected.isinf().tolist() == [False, True, False, False, False, False]
        torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-5)
        grad = torch.empty_like(student)
        triton_launch.forward_backward(grad, None, 1.0, *problem)
        one = torch.ones((), dtype=torch.float64)
        expected = ops._eager_backward(one, torch.empty(0), *wide(problem))
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=5e-6)


def test_a_target_with_almost_all_of_one_probability_has_a_finite_loss() -> None:
    for classes, top in itertools.product((3, LONG), (40.0, 200.0)):
        student, teacher = torch.zeros(2, classes), torch.zeros(2, classes)
        student[0, 0] = teacher[1, 0] = top
        teacher[0, 0] = student[1, 0] = 2.0
        numbers = (1.0, 1.0, 1.0, 1.0, 0.0, None, terms_of("dkd"))
        problem = Problem(student, teacher, torch.zeros(2, dtype=torch.int64), None, *numbers)
        rows = triton_launch.forward(*problem, True)[0]
        expected = ops._eager_forward(*wide(problem), True)[0]
        torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=0)


def test_sums_and_probabilities_of_different_size_keep_their_digits() -> None:
    for classes in (8192, LONG):
        flat = make(8, classes, torch.float32, "none", 0.01)[:2]
        student, teacher = (x.contiguous() for x in flat)
        student[:, 0] += 20
        problem = Problem(student, teacher, None, None, 1.0, 1.0, 1.0, 1.0, 0.0)
        rows = triton_launch.forward(*problem, True)[0]
        expected = ops._eager_forward(*wide(problem), True)[0]
        torch.testing.assert_close(rows.double(), expected, rtol=5e-6, atol=0)
    student, teacher = torch.zeros(4, 10), torch.zeros(4, 10)
    student[:, 0] = torch.tensor([20.0, 21.5, 23.0, 30.0])
    teacher[:, 1] = 25.0
    for beta in (1e-6, 0.999999):
        terms = terms_of({"jsd": {"beta": beta}})
        problem = Problem(student, teacher, None, None, 1.0, 1.0, 1.0, 1.0, 0.0, None, terms)
        rows = triton_launch.forward(*problem, True)[0]
        expected = ops._eager_forward(*wide(problem), True)[0]
        torch.testing.assert_close(rows.double(), expected, rtol=2e-5, atol=0)


def test_class_out_of_range_gives_nan_and_reads_nothing_there() -> None:
    for classes, form in itertools.product((10, LONG), ("forward_kl", "dkd")):
        problem = make(3, classes, torch.float32, "ids")
        if form == "dkd":
            problem = problem._replace(alpha=1.0, terms=terms_of("dkd"))
        ids = torch.tensor([classes, 2**40, 1])
        problem = problem._replace(target=ids, weight=torch.ones(3))
        is_nan = [True, True, False]
        assert triton_launch.forward(*problem, True)[0].isnan().tolist() == is_nan
        for grad in run(problem)[3:]:
            assert grad.isnan().all(1).tolist() == is_nan and grad[2].isfinite().all()


def test_equal_logits_give_exactly_zero() -> None:
    for classes in (100, LONG):
        student, _, _, _, *numbers = make(3, classes, torch.float32, "none")
        grad = torch.empty(3, classes)
        loss = triton_launch.forward_backward(
            grad, None, 1.0, student, student, None, None, *numbers
        )[0]
        assert loss == 0 and (grad == 0).all()


def test_no_rows_and_no_counting_rows() -> None:
    numbers = (4.0, 1.0, float("nan"), 1.0, 0.0, None, [], False)
    empty = torch.empty(0, 10)
    assert triton_launch.forward(empty, empty, None, None, *numbers, False)[0].isnan()
    assert triton_launch.forward(empty, empty, None, None, *numbers, True)[0].shape == (0,)
    rows = torch.full((3, 10), float("nan"))
    problem = Problem(rows, rows, None, torch.zeros(3), 4.0, 1.0, 1.0, 1.0, 0.0)
    losses = triton_launch.forward(*problem, False)
    assert losses[0] == 0


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    """Four rows lie 700 million elements apart; only the memory in use is touched."""
    for classes in (1000, LONG):
        step = 700_000_000
        student, teacher, grad = (
            torch.empty(4 * step, dtype=torch.bfloat16).as_strided((4, classes), (step, 1))
            for _ in range(3)
        )
        generator = torch.Generator().manual_seed(0)
        small = torch.randn(2, 4, classes, generator=generator).bfloat16()
        student.copy_(small[0])
        teacher.copy_(small[1])
        numbers = (4.0, 1.0, 4.0, 1.0, 0.0, None, [], False)
        *_, stats = triton_launch.forward_backward(
            grad, None, 1.0, student, teacher, None, None, *numbers
        )
        expected = torch.empty(4, classes, dtype=torch.bfloat16)
        losses = triton_launch.forward_backward(expected, None, 1.0, *small, None, None, *numbers)
        assert torch.equal(grad, expected)
        assert classes <= triton_launch.MAX_TILE or torch.equal(stats, losses[3])
        again = triton_launch.backward(
            torch.tensor(1.0), stats, student, teacher, None, None, *numbers
        )
        assert torch.equal(again, expected)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
