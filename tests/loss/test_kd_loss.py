"""kd_loss: against float64, PyTorch's own chain, and its promises."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from textbook import reference_grad, reference_loss
from torch import Tensor

from dmkd_fast import DistillKL, kd_loss, kd_loss_and_grad
from dmkd_fast.runtime.native import INSTRUCTION_SET

# Half a unit in the last place of the result's type, and what p - q loses where they cancel.
ULP = {torch.float32: 2**-24, torch.float64: 2**-53, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def published(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q = F.log_softmax(student / temperature, dim=1)
    p = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def logits(rows: int, classes: int, dtype: torch.dtype, seed: int, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, classes, generator=generator) * spread).to(dtype)


def test_compiled_kernel_is_what_is_tested() -> None:
    assert INSTRUCTION_SET in ("avx512", "avx2", "scalar")


def test_equals_the_published_chain_in_float64() -> None:
    student, teacher = logits(17, 100, torch.float64, 0), logits(17, 100, torch.float64, 1)
    mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss, expected = kd_loss(mine, teacher, temperature=4.0), published(theirs, teacher, 4.0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-15)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 9),
    classes=st.sampled_from([1, 2, 7, 16, 17, 100, 1000, 1003]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    temperature=st.sampled_from([0.05, 0.5, 1.0, 4.0, 10.0, 100.0]),
    spread=st.sampled_from([0.01, 1.0, 10.0, 80.0]),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradient_are_those_of_float64(
    rows: int,
    classes: int,
    dtype: torch.dtype,
    temperature: float,
    spread: float,
    strided: bool,
    seed: int,
) -> None:
    student = logits(rows, classes, dtype, seed, spread)
    teacher = logits(rows, classes, dtype, seed + 1, spread)
    if strided:
        student = torch.cat((student, student), dim=1)[:, :classes]
        teacher = torch.cat((teacher, teacher), dim=0)[::2][: rows // 2 + 1].repeat(2, 1)[:rows]
    exact, exact_teacher = student.double(), teacher.double()
    expected = reference_loss(exact, exact_teacher, temperature=temperature)
    expected_grad = reference_grad(exact, exact_teacher, temperature=temperature)
    leaf = student.detach().requires_grad_()
    loss = kd_loss(leaf, teacher, temperature=temperature, reduction="none")
    loss.sum().backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (loss >= 0).all()
    # Rounding of logits / T reaches the loss multiplied by their size.
    size = 1 + (student.double().abs().max() + teacher.double().abs().max()).item() / temperature
    double = dtype == torch.float64
    unit = 2**-48 if double else 2**-23  # float64 is compared with float64, both rounded
    bound = 8 * unit * (expected + temperature**2 * 1e-3) * size
    assert ((loss.double() - expected).abs() <= bound + 1e-300).all()
    q = torch.softmax(exact / temperature, dim=1)
    p = torch.softmax(exact_teacher / temperature, dim=1)
    allowed = ULP[dtype] * expected_grad.abs() + 8 * unit * size * temperature * torch.maximum(p, q)
    tiny = 3e-8 if dtype == torch.float16 else 1e-37 * max(1, temperature)
    assert ((leaf.grad.double() - expected_grad).abs() <= allowed + tiny).all()


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
def test_loss_stays_exact_and_positive_as_student_meets_teacher(noise: float) -> None:
    teacher = logits(4, 32768, torch.float32, 0)
    student = teacher + noise * logits(4, 32768, torch.float32, 1, 1.0)
    exact = reference_loss(student.double(), teacher.double(), temperature=4.0)
    loss = kd_loss(student, teacher, temperature=4.0, reduction="none")
    assert (loss > 0).all()
    # The logits themselves carry 6e-8 of noise; relative to `noise` that is what can be had.
    torch.testing.assert_close(loss.double(), exact, rtol=max(1e-5, 1e-6 / noise), atol=0)


def test_equal_logits_give_exactly_zero() -> None:
    teacher = logits(5, 1000, torch.float32, 0)
    student = teacher.clone().requires_grad_()
    loss = kd_loss(student, teacher, temperature=3.0)
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


def test_infinite_and_nan_logits_follow_the_definition() -> None:
    inf, nan = float("inf"), float("nan")
    teacher = torch.tensor([[0.0, -inf, 1.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, -inf, 1.0]])
    student = torch.tensor([[0.0, 1.0, 1.0], [0.0, -inf, 1.0], [nan, 1.0, 1.0], [0.0, -inf, 1.0]])
    student = student.repeat(1, 7).requires_grad_()
    teacher = teacher.repeat(1, 7)
    loss = kd_loss(student, teacher, temperature=2.0, reduction="none")
    expected = reference_loss(student.detach(), teacher, temperature=2.0)
    torch.testing.assert_close(loss.detach(), expected, equal_nan=True)
    assert loss[0].isfinite() and loss[1] == inf and loss[2].isnan() and loss[3].isfinite()
    loss[[0, 3]].sum().backward()
    assert student.grad[[0, 3]].isfinite().all()
    all_out = kd_loss(torch.full((1, 5), -inf), torch.zeros(1, 5), temperature=1.0)
    assert all_out.isnan()
    nan_teacher = kd_loss(torch.zeros(1, 5), torch.tensor([[nan, 0, 0, 0, 0]]), temperature=1.0)
    assert nan_teacher.isnan()


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_reductions_and_leading_dimensions(reduction: str) -> None:
    student, teacher = logits(6, 10, torch.float32, 0), logits(6, 10, torch.float32, 1)
    rows = reference_loss(student, teacher, temperature=2.0)
    expected = {
        "batchmean": rows.mean(),
        "mean": rows.sum() / 60,
        "sum": rows.sum(),
        "none": rows.view(2, 3),
    }[reduction]
    loss = kd_loss(
        student.view(2, 3, 10), teacher.view(2, 3, 10), temperature=2.0, reduction=reduction
    )
    torch.testing.assert_close(loss, expected)


def test_one_pass_form_gives_the_same_loss_and_gradient() -> None:
    student, teacher = logits(33, 1003, torch.float32, 0), logits(33, 1003, torch.float32, 1)
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, temperature=10.0)
    (loss * 8).backward()
    fused_loss, grad = kd_loss_and_grad(student, teacher, temperature=10.0, grad_scale=8.0)
    torch.testing.assert_close(fused_loss, loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-9)
    module = DistillKL(10.0)
    assert torch.equal(module(student, teacher), loss)


def test_gradient_is_scaled_before_it_is_rounded_to_float16() -> None:
    teacher = logits(4096, 16, torch.float32, 0, 0.5)
    student = (teacher + 1e-3 * logits(4096, 16, torch.float32, 1, 1.0)).half()
    teacher = teacher.half()
    _, grad = kd_loss_and_grad(student, teacher, temperature=4.0, grad_scale=65536.0)
    exact = reference_grad(student.double(), teacher.double(), temperature=4.0) * 16
    error = (grad.double() - exact).norm() / exact.norm()
    assert error < 1e-3


def test_bitwise_equal_for_any_thread_count_batch_and_repetition() -> None:
    student, teacher = logits(129, 1003, torch.float32, 0), logits(129, 1003, torch.float32, 1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(kd_loss(student, teacher, reduction="none"))
    finally:
        torch.set_num_threads(threads)
    results.append(
        torch.cat(
            [
                kd_loss(student[i : i + 1], teacher[i : i + 1], reduction="none")
                for i in range(len(student))
            ]
        )
    )
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_gradcheck_in_float64() -> None:
    student = logits(3, 7, torch.float64, 0).requires_grad_()
    teacher = logits(3, 7, torch.float64, 1)
    assert torch.autograd.gradcheck(lambda s: kd_loss(s, teacher, temperature=2.0), (student,))


def test_compiles_as_a_full_graph() -> None:
    student = logits(8, 10, torch.float32, 0).requires_grad_()
    teacher = logits(8, 10, torch.float32, 1)
    compiled = torch.compile(
        lambda s, t: kd_loss(s, t, temperature=3.0),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    loss = compiled(student, teacher)
    loss.backward()
    grad, student.grad = student.grad, None
    expected = kd_loss(student, teacher, temperature=3.0)
    expected.backward()
    assert torch.equal(loss, expected) and torch.equal(grad, student.grad)


def test_inputs_stay_and_teacher_gets_no_gradient() -> None:
    student = logits(4, 10, torch.float32, 0).requires_grad_()
    teacher = logits(4, 10, torch.float32, 1).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    loss = kd_loss(student, teacher)
    loss.backward(retain_graph=True)
    first = student.grad.clone()
    loss.backward()
    assert torch.equal(student.grad, 2 * first) and teacher.grad is None
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(kd_loss(student, teacher), student, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"student_logits": torch.zeros(4, 10, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"teacher_logits": torch.zeros(4, 9)}, ValueError, r"\(4, 9\).*\(4, 10\)"),
        (
            {"teacher_logits": torch.zeros(4, 0), "student_logits": torch.zeros(4, 0)},
            ValueError,
            "C >= 1",
        ),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature: got nan"),
        ({"reduction": "average"}, ValueError, "batchmean"),
    ],
)
def test_wrong_arguments_raise(change: dict, error: type[Exception], words: str) -> None:
    arguments = {"student_logits": torch.zeros(4, 10), "teacher_logits": torch.zeros(4, 10)}
    arguments |= change
    with pytest.raises(error, match=words):
        kd_loss(arguments.pop("student_logits"), arguments.pop("teacher_logits"), **arguments)


def test_without_the_extension_it_works_and_says_so_once() -> None:
    code = """
import logging, sys
sys.modules["dmkd_fast._C"] = None
logged = []
logging.getLogger("dmkd_fast").addFilter(lambda record: logged.append(record.getMessage()))
import torch
from dmkd_fast import kd_loss, DistillKL
s, t = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
loss = kd_loss(s, t)
kd_loss(s, t)
loss.backward()
assert len(logged) == 1 and "eager" in logged[0], logged
log_q, p = (s / 4).log_softmax(1), (t / 4).softmax(1)
expected = 16 * torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
assert torch.allclose(loss, expected)
assert s.grad is not None
"""
    subprocess.run([sys.executable, "-c", code], check=True)
