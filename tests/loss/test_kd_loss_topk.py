"""kd_loss_topk and linear_kd_loss against the loss of the full logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmkd_fast import Objective, kd_loss, kd_loss_and_grad, kd_loss_topk, linear_kd_loss
from dmkd_fast.training.objective import TopLogits


def logits(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_all_classes_give_the_full_loss_bit_for_bit() -> None:
    student = logits(6, 10, seed=0, dtype=torch.float32).requires_grad_()
    teacher = logits(6, 10, seed=1, dtype=torch.float32)
    values, indices = teacher.topk(10)
    expected = kd_loss(student, teacher, temperature=3.0)
    for rest in ("bucket", "renormalize"):
        loss = kd_loss_topk(student, values, indices, rest=rest, temperature=3.0)
        assert torch.equal(loss, expected)
        a, b = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected))
        assert torch.equal(a, b)


@pytest.mark.parametrize("rest", ["bucket", "renormalize"])
def test_the_rest_is_one_bucket_or_left_out(rest: str) -> None:
    student, teacher = logits(2, 3, 10, seed=0).requires_grad_(), logits(2, 3, 10, seed=1)
    values, indices = teacher.topk(4)
    temperature = 2.0
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    p, q = p.gather(-1, indices), q.gather(-1, indices)
    if rest == "bucket":
        p, q = (torch.cat((x, 1 - x.sum(-1, keepdim=True)), -1) for x in (p, q))
    else:
        p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))
    expected = F.kl_div(q.log(), p, reduction="none").sum(-1).mean() * temperature**2
    named = {"rest": rest, "temperature": temperature}
    if rest == "bucket":
        named["teacher_logsumexp"] = (teacher / temperature).logsumexp(-1)
    loss = kd_loss_topk(student, values, indices, **named)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    a, b = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    stored = kd_loss_topk(student, values.half(), indices, **named)
    torch.testing.assert_close(stored, expected, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("count", [4, 10])
@pytest.mark.parametrize("rest", ["bucket", "renormalize"])
def test_without_the_square_the_loss_is_that_of_kd_loss_too(rest: str, count: int) -> None:
    student, teacher = logits(6, 10, seed=0), logits(6, 10, seed=1)
    values, indices = teacher.topk(count)
    named = {"rest": rest, "temperature": 2.0}
    if rest == "bucket" and count < 10:
        named["teacher_logsumexp"] = (teacher / 2).logsumexp(-1)
    loss = kd_loss_topk(student, values, indices, **named)
    assert torch.equal(4 * kd_loss_topk(student, values, indices, t_squared=False, **named), loss)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({}, ValueError, "teacher_logsumexp: got None"),
        ({"rest": "drop"}, ValueError, "rest: got 'drop'"),
        ({"teacher_logsumexp": torch.zeros(3)}, ValueError, r"got \(3,\)"),
        (
            {"rest": "renormalize", "teacher_logsumexp": torch.zeros(4)},
            ValueError,
            "would be ignored",
        ),
        ({"teacher_indices": torch.zeros(4, 3)}, TypeError, "teacher_indices: got torch.float32"),
        ({"teacher_values": torch.zeros(3, 3)}, ValueError, r"teacher_values: got shape \(3, 3\)"),
        (
            {"teacher_values": torch.zeros(4, 10)},
            ValueError,
            r"teacher_indices: got shape \(4, 3\), expected \(4, 10\)",
        ),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, "target"),
        (
            {"num_classes": 2},
            ValueError,
            "^num_classes: got 2, expected None for 3 of 10 classes; ",
        ),
        ({"class_dim": 0}, ValueError, "^class_dim: got 0, expected -1; "),
        (
            {"standardize_logits": True},
            ValueError,
            "^standardize_logits: got True, expected False for 3 of 10 classes; ",
        ),
        (
            {"divergence": "dist", "rest": "renormalize"},
            ValueError,
            "^divergence: got dist, expected one other than dist for 3 of 10 classes; ",
        ),
        ({"divergence": {"jsd": 1, "dist": 1}}, ValueError, "^divergence: got {'jsd': 1, 'dist'"),
    ],
)
def test_wrong_calls_say_what_to_change(change: dict, error: type[Exception], words: str) -> None:
    plain = {
        "student_logits": torch.zeros(4, 10),
        "teacher_values": torch.zeros(4, 3),
        "teacher_indices": torch.arange(3).expand(4, 3),
    }
    with pytest.raises(error, match=words):
        kd_loss_topk(**(plain | change))


@pytest.mark.parametrize("option", [{"standardize_logits": True}, {"divergence": "dist"}])
def test_options_that_need_all_classes_are_refused_for_top_logits(option: dict) -> None:
    values, indices = logits(4, 10, seed=1).topk(3)
    top = TopLogits(values, indices, torch.zeros(4))
    student = logits(4, 10, seed=0).requires_grad_()
    with pytest.raises(ValueError, match=f"^{next(iter(option))}: got .* for 3 of 10 classes; "):
        Objective(**option).backward(student, top, torch.zeros(0), num_items=4)


def test_a_class_given_twice_makes_the_loss_nan() -> None:
    values, indices = logits(2, 10, seed=1).topk(10)
    indices[1, 3] = indices[1, 4]
    rows = kd_loss_topk(logits(2, 10, seed=0), values, indices, reduction="none")
    assert rows.isnan().tolist() == [False, True]


def heads(dtype: torch.dtype) -> list[Tensor]:
    shapes = ((20, 6), (33, 6), (20, 4), (33, 4))
    return [logits(*shape, seed=i, dtype=dtype) / 3 for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("kind", ["none", "ids", "probabilities", "mask", "temperatures"])
def test_heads_without_logits_give_the_loss_of_the_logits(reduction: str, kind: str) -> None:
    hidden, weight, teacher_hidden, teacher_weight = heads(torch.float64)
    target = {
        "ids": torch.where(torch.arange(20) % 5 == 0, -100, torch.arange(20)),
        "probabilities": logits(20, 33, seed=9).softmax(1),
    }.get(kind)
    named = {"reduction": reduction, "temperature": 2.0, "row_weight": torch.arange(20.0)}
    named |= {} if target is None else {"alpha": 0.4, "label_smoothing": 0.1}
    named |= {"mask": torch.arange(20) % 3 > 0} if kind == "mask" else {}
    named |= {"temperature": torch.arange(1.0, 21.0)[:, None]} if kind == "temperatures" else {}
    results = []
    for chunk_rows in (None, 7, 19, 100):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunk_rows is None:
            student, teacher = leaves[0] @ leaves[1].t(), teacher_hidden @ teacher_weight.t()
            loss = kd_loss(student, teacher, target, **named)
        else:
            loss = linear_kd_loss(
                *leaves, teacher_hidden, teacher_weight, target, chunk_rows=chunk_rows, **named
            )
        (3 * loss).backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_heads_in_bfloat16_and_their_errors() -> None:
    tensors = heads(torch.bfloat16)
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    loss = linear_kd_loss(*tensors, divergence="reverse_kl", chunk_rows=6)
    loss.backward(retain_graph=True)
    first = tensors[1].grad.clone()
    loss.backward()
    torch.testing.assert_close(tensors[1].grad, 2 * first)
    student, teacher = (tensors[i].detach() @ tensors[i + 1].detach().t() for i in (0, 2))
    expected, grad = kd_loss_and_grad(student, teacher, divergence="reverse_kl")
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(
        first.float(), (grad.t() @ tensors[0].detach()).float(), rtol=5e-2, atol=2e-2
    )
    with pytest.raises(ValueError, match="need all rows"):
        linear_kd_loss(*tensors, divergence="dist")
    with pytest.raises(ValueError, match="student_weight: got shape"):
        linear_kd_loss(tensors[0], tensors[3], *tensors[2:])
    with pytest.raises(
        ValueError, match="got 32 classes and 20 rows, expected 33 classes and 20 rows"
    ):
        linear_kd_loss(*tensors[:3], tensors[3][:32])


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_gradients_of_heads_in_float16_neither_vanish_nor_overflow(reduction: str) -> None:
    named = {"reduction": reduction, "num_items": 2**20, "chunk_rows": 7}
    results = []
    for dtype in (torch.float16, torch.float64):
        tensors = [tensor.half().to(dtype) for tensor in heads(torch.float32)]
        leaves = [tensor.requires_grad_() for tensor in tensors[:2]]
        (65536 * linear_kd_loss(*tensors, **named)).backward()
        results.append([leaf.grad.double() for leaf in leaves])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_sums_over_many_rows_in_float16_do_not_overflow() -> None:
    ones = torch.ones(4096, 1, dtype=torch.float16)
    weight = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    linear_kd_loss(32 * ones, weight, ones, torch.tensor([[99.0], [-99.0]]).half()).backward()
    expected = torch.tensor([[-64.0], [64.0]], dtype=torch.float16)  # 4 * (1/2 - 1) * 32
    torch.testing.assert_close(weight.grad, expected)


def test_heads_without_rows_and_of_two_dtypes_give_what_kd_loss_gives() -> None:
    hidden, weight, *teacher = heads(torch.float32)
    ids = torch.arange(20)
    for rows in (0, 20):
        wide = teacher[0][:rows].double(), teacher[1].double()
        student = hidden[:rows].clone().requires_grad_()
        for named in ({}, {"target": ids[:rows], "alpha": 0.5}, {"reduction": "sum"}):
            loss = linear_kd_loss(student, weight, *wide, **named)
            expected = kd_loss(student @ weight.t(), wide[0] @ wide[1].t(), **named)
            assert loss.dtype == expected.dtype == torch.float64
            torch.testing.assert_close(loss, expected, equal_nan=True)
            assert loss.isnan() == (rows == 0 and not named)
            loss.backward()
            assert student.grad.shape == student.shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_dim": 0}, "class_dim: got 0, expected -1"),
        ({"mask": torch.ones(21, dtype=torch.bool)}, r"mask: got shape \(21,\), expected 20 rows"),
        ({"temperature": torch.ones(21)}, r"temperature: got shape \(21,\), expected 20 rows"),
        ({"target": torch.zeros(21).long(), "alpha": 0.5}, r"target: got shape \(21,\)"),
    ],
)
def test_arguments_that_do_not_fit_the_rows_of_the_heads_are_refused(
    change: dict, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        linear_kd_loss(*heads(torch.float32), chunk_rows=7, **change)


def test_heads_under_autocast_keep_the_dtype_of_their_gradients() -> None:
    hidden, weight, *teacher = heads(torch.float32)
    grads = []
    for enabled in (False, True):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = linear_kd_loss(*leaves, *teacher, chunk_rows=7)
        loss.backward()
        grads.append([leaf.grad for leaf in leaves])
    for exact, rounded in zip(*grads, strict=True):
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("chunk_rows", [0, -1, 1.5])
def test_chunks_of_no_whole_number_of_rows_are_refused(chunk_rows: Any) -> None:
    with pytest.raises(ValueError, match=f"^chunk_rows: got {chunk_rows}, expected a whole number"):
        linear_kd_loss(*heads(torch.float32), chunk_rows=chunk_rows)


def test_stored_values_whose_probabilities_exceed_1_give_a_finite_loss() -> None:
    student = logits(6, 10, seed=0, dtype=torch.float32).requires_grad_()
    values, indices = logits(6, 10, seed=1, dtype=torch.float32).topk(4)
    named = {"teacher_logsumexp": (values / 4).logsumexp(-1) - 0.01, "divergence": "reverse_kl"}
    loss = kd_loss_topk(student, values.half(), indices, temperature=4.0, **named)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
