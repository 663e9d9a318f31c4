"""kd_loss's arguments: targets, reductions and their denominators, masks, errors, DistillKL."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmkd_fast import DistillKL, kd_loss, kd_loss_and_grad
from dmkd_fast.loss import ops
from dmkd_fast.loss.functional import KdLossParts
from dmkd_fast.runtime import errors, operators


def logits(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def kd_rows(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL per row by PyTorch's own functions."""
    log_q = F.log_softmax(student / temperature, dim=-1)
    p = F.softmax(teacher / temperature, dim=-1)
    return F.kl_div(log_q, p, reduction="none").sum(-1) * temperature**2


def targets(kind: str) -> Tensor:
    ids = torch.tensor([3, 0, -100, 9, 1, 5])
    return ids if kind == "ids" else logits(6, 10, seed=2).softmax(-1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["ids", "probabilities"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_hard_labels_mix_in_as_two_torch_losses(
    kind: str, label_smoothing: float, reduction: str
) -> None:
    student, teacher, target = logits(6, 10, seed=0), logits(6, 10, seed=1), targets(kind)
    keep = target != -100 if kind == "ids" else torch.ones(6, dtype=torch.bool)
    mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    ce = F.cross_entropy(theirs, target, label_smoothing=label_smoothing, reduction="none")
    kd = kd_rows(theirs, teacher) * keep
    divisors = {
        "batchmean": (keep.sum(),) * 2,
        "mean": (10 * keep.sum(), keep.sum()),
        "sum": (1, 1),
        "none": (1, 1),
    }[reduction]
    kd, ce = (rows if reduction == "none" else rows.sum() for rows in (kd, ce))
    expected = 0.3 * kd / divisors[0] + 0.7 * ce / divisors[1]
    loss = kd_loss(
        mine, teacher, target, alpha=0.3, reduction=reduction, label_smoothing=label_smoothing
    )
    close(loss, expected)
    expected.sum().backward()
    loss.sum().backward()
    close(mine.grad, theirs.grad)


def test_a_mistyped_option_names_the_function_of_the_caller() -> None:
    logits = torch.zeros(2, 3)
    for function in (kd_loss, kd_loss_and_grad):
        with pytest.raises(TypeError, match=r"^kd_loss\(\) got .* 'temprature'"):
            function(logits, logits, temprature=3.0)  # type: ignore[call-arg]


def test_mean_and_batchmean_are_those_of_torch() -> None:
    student, teacher, target = logits(6, 10, seed=0), logits(6, 10, seed=1), torch.arange(6)
    log_q, p = (student / 2).log_softmax(-1), (teacher / 2).softmax(-1)
    for reduction in ("mean", "batchmean", "sum"):
        expected = 4 * F.kl_div(log_q, p, reduction=reduction)
        close(kd_loss(student, teacher, temperature=2.0, reduction=reduction), expected)
    _, _, ce = kd_loss(student, teacher, target, alpha=0.5, reduction="mean", return_parts=True)
    close(ce, F.cross_entropy(student, target))


def test_denominators_under_mask_and_num_items() -> None:
    student, teacher = logits(2, 3, 10, seed=0), logits(2, 3, 10, seed=1)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    rows = kd_rows(student, teacher) * mask
    close(kd_loss(student, teacher, mask=mask), rows.sum() / 4)
    close(kd_loss(student, teacher, mask=mask, reduction="mean"), rows.sum() / 40)
    close(kd_loss(student, teacher, mask=mask, reduction="sum"), rows.sum())
    close(kd_loss(student, teacher, mask=mask, reduction="none"), rows)
    for items in (7, torch.tensor(7), torch.tensor([7.0])):
        close(kd_loss(student, teacher, mask=mask, num_items=items), rows.sum() / 7)
        close(kd_loss(student, teacher, num_items=items), kd_rows(student, teacher).sum() / 7)
        close(
            kd_loss(student, teacher, num_items=items, reduction="mean"),
            kd_rows(student, teacher).sum() / 70,
        )
    weight = torch.rand(2, 3)
    close(kd_loss(student, teacher, mask=mask, row_weight=weight), (rows * weight).sum() / 4)
    close(kd_loss(student, teacher, row_weight=weight), (kd_rows(student, teacher) * weight).mean())


def test_parts_of_a_batch_add_up_with_num_items() -> None:
    student, teacher, target = logits(6, 10, seed=0), logits(6, 10, seed=1), targets("ids")
    whole = kd_loss(student, teacher, target, alpha=0.5)
    count = (target != -100).sum()
    parts = [
        kd_loss(
            student[i : i + 2], teacher[i : i + 2], target[i : i + 2], alpha=0.5, num_items=count
        )
        for i in (0, 2, 4)
    ]
    close(sum(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_rows_that_do_not_count_may_hold_anything(dtype: torch.dtype) -> None:
    student, teacher = logits(4, 10, seed=0, dtype=dtype), logits(4, 10, seed=1, dtype=dtype)
    clean = kd_loss(student[:2], teacher[:2])
    student[2:], teacher[3:] = float("nan"), float("inf")
    student.requires_grad_()
    mask = torch.tensor([True, True, False, False])
    loss = kd_loss(student, teacher, mask=mask)
    loss.backward()
    assert torch.equal(loss, clean)
    assert (student.grad[2:] == 0).all() and student.grad[:2].abs().min() > 0
    none = kd_loss(student, teacher, mask=torch.zeros(4, dtype=torch.bool))
    none.backward()
    assert none == 0
    _, grad = kd_loss_and_grad(student, teacher, mask=mask)
    assert (grad[2:] == 0).all()


def test_parts_are_the_terms_and_carry_no_gradient() -> None:
    student, teacher = logits(6, 10, seed=0).requires_grad_(), logits(6, 10, seed=1)
    target = targets("ids")
    result = kd_loss(student, teacher, target, alpha=0.25, return_parts=True)
    assert isinstance(result, KdLossParts) and result.ce is not None
    close(result.loss, 0.25 * result.kd + 0.75 * result.ce)
    close(result.ce.detach(), F.cross_entropy(student, target).detach())
    assert result.loss.requires_grad and not result.kd.requires_grad
    assert kd_loss(student, teacher, return_parts=True).ce is None


def test_t_squared_keeps_or_drops_the_factor() -> None:
    student, teacher = logits(6, 10, seed=0), logits(6, 10, seed=1)
    plain = kd_loss(student, teacher, temperature=3.0, t_squared=False)
    close(plain * 9, kd_loss(student, teacher, temperature=3.0))
    _, grad = kd_loss_and_grad(student, teacher, temperature=3.0, t_squared=False)
    close(grad * 9, kd_loss_and_grad(student, teacher, temperature=3.0)[1])


def test_an_infinite_term_with_no_share_is_dropped() -> None:
    student, teacher = logits(2, 5, seed=0), logits(2, 5, seed=1)
    student[:, 1] = -torch.inf
    target = torch.tensor([0, 2])
    assert kd_loss(student, teacher).isinf()
    close(kd_loss(student, teacher, target, alpha=0.0), F.cross_entropy(student, target))


def test_one_pass_form_takes_the_same_arguments() -> None:
    student, teacher, target = logits(6, 10, seed=0), logits(6, 10, seed=1), targets("ids")
    shared = {
        "temperature": 2.0,
        "alpha": 0.4,
        "label_smoothing": 0.1,
        "reduction": "mean",
        "row_weight": torch.rand(6),
    }
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, target, **shared)
    (8 * loss).backward()
    for scale in (8.0, torch.tensor(8.0), torch.tensor([8])):
        fused, grad = kd_loss_and_grad(student, teacher, target, grad_scale=scale, **shared)
        close(fused, loss.detach())
        close(grad, leaf.grad)


def test_gradient_is_written_where_asked() -> None:
    student, teacher = logits(2, 3, 10, seed=0), logits(2, 3, 10, seed=1)
    _, expected = kd_loss_and_grad(student, teacher)
    out = torch.full((2, 3, 10), 7.0, dtype=torch.float64)
    _, grad = kd_loss_and_grad(student, teacher, out=out)
    assert grad is out and torch.equal(out, expected)
    wide = torch.full((2, 3, 16), 7.0, dtype=torch.float64)
    kd_loss_and_grad(student, teacher, out=wide[..., :10])
    assert torch.equal(wide[..., :10], expected) and (wide[..., 10:] == 7).all()
    for bad, error, words in (
        (student, ValueError, "shares memory with student_logits"),
        (torch.empty(2, 3, 9, dtype=torch.float64), ValueError, "shape"),
        (torch.empty(2, 3, 10), TypeError, "student's torch.float64"),
        (torch.empty(2, 3, 20, dtype=torch.float64)[..., ::2], ValueError, "dense classes"),
    ):
        with pytest.raises(error, match=words):
            kd_loss_and_grad(student, teacher, out=bad)
    empty = student[:0]
    assert kd_loss_and_grad(empty, teacher[:0], out=torch.empty_like(empty))[1].shape == (0, 3, 10)


def test_gradient_is_never_written_over_an_input() -> None:
    memory = torch.zeros(80)
    rows = lambda start: memory[start : start + 20].view(4, 5)  # noqa: E731
    plain = {"student_logits": torch.zeros(4, 5), "teacher_logits": torch.ones(4, 5)}
    soft = {"target": torch.full((4, 5), 0.2), "alpha": 0.5}
    for name, given in (
        ("student_logits", {"student_logits": rows(0)}),
        ("teacher_logits", {"teacher_logits": rows(0)}),
        ("target", {"target": rows(0), "alpha": 0.5}),
        ("row_weight", {"row_weight": memory[19:23], "reduction": "sum"}),
        ("grad_scale", {"grad_scale": memory[19]}),
    ):
        with pytest.raises(ValueError, match=f"out: shares memory with {name}"):
            kd_loss_and_grad(**(plain | given), out=rows(0))
    # Another part of the same memory is fine, and so is what is read before anything is written.
    expected = kd_loss_and_grad(**plain, **soft)[1]
    given = {"teacher_logits": rows(20).fill_(1), "target": rows(40).fill_(0.2), "alpha": 0.5}
    assert torch.equal(kd_loss_and_grad(**(plain | given), out=rows(0))[1], expected)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(1, 5).expand(4, 5),
        torch.empty(8).as_strided((4, 5), (1, 1)),
        torch.empty(17).as_strided((4, 5), (4, 1)),
    ],
    ids=["expanded", "one apart", "four apart"],
)
def test_rows_of_the_gradient_may_not_overlap(out: Tensor) -> None:
    with pytest.raises(ValueError, match=r"out: got strides .* do not overlap"):
        kd_loss_and_grad(torch.zeros(4, 5), torch.ones(4, 5), out=out)


def test_module_is_the_function_and_takes_the_papers_call() -> None:
    student, teacher, target = logits(6, 10, seed=0), logits(6, 10, seed=1), targets("ids")
    expected = kd_loss(student, teacher, temperature=10.0)
    assert torch.equal(DistillKL(10.0)(student, teacher), expected)
    assert torch.equal(DistillKL()(student, teacher, 10, SimpleNamespace(alpha=0.3)), expected)
    assert torch.equal(DistillKL()(student, teacher), kd_loss(student, teacher))
    settings = {"alpha": 0.3, "reduction": "sum", "label_smoothing": 0.1, "t_squared": False}
    module = DistillKL(2.0, **settings)
    assert torch.equal(
        module(student, teacher, target),
        kd_loss(student, teacher, target, temperature=2.0, **settings),
    )
    with pytest.raises(ValueError, match=r"10.*4\.0"):
        DistillKL(4.0)(student, teacher, 10, None)
    with pytest.raises(ValueError, match="opt"):
        DistillKL()(student, teacher, None, SimpleNamespace())
    assert "temperature=2.0, alpha=0.3" in repr(module)


FORMS = [
    4,
    4.0,
    np.float64(4),
    np.float32(4),
    np.int64(4),
    torch.tensor(4.0),
    torch.tensor([4.0]),
    torch.tensor([[4]]),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{type(form).__name__} {form}")
def test_numbers_come_in_any_form(form: float) -> None:
    student, teacher, target = logits(6, 10, seed=0), logits(6, 10, seed=1), targets("ids")
    expected = kd_loss(student, teacher, temperature=4.0)
    assert torch.equal(kd_loss(student, teacher, temperature=form), expected)
    assert torch.equal(kd_loss_and_grad(student, teacher, temperature=form)[0], expected)
    assert torch.equal(DistillKL(form)(student, teacher), expected)
    assert torch.equal(DistillKL()(student, teacher, form, SimpleNamespace()), expected)
    assert torch.equal(DistillKL()(student, teacher, form), expected)
    shared = {"temperature": 3.0, "label_smoothing": form / 16}
    got = kd_loss(student, teacher, target, alpha=form / 8, **shared)
    assert torch.equal(got, kd_loss(student, teacher, target, alpha=0.5, **shared))


def test_third_place_takes_what_cannot_be_a_target_for_a_temperature() -> None:
    one = torch.zeros(1, 10), torch.ones(1, 10)
    label = torch.tensor([3])
    assert torch.equal(DistillKL(alpha=0.5)(*one, label), kd_loss(*one, label, alpha=0.5))
    with pytest.raises(ValueError, match="alpha: got None with a target"):
        DistillKL()(*one, label)
    assert torch.equal(DistillKL()(*one, label, object()), kd_loss(*one, temperature=3))
    with pytest.raises(ValueError, match=r"temperature: got shape \(4, 2\)"):
        DistillKL()(torch.zeros(4, 10), torch.zeros(4, 10), torch.ones(4, 2))


@pytest.mark.parametrize("name", ["temperature", "alpha", "label_smoothing", "num_items"])
def test_a_number_that_requires_grad_is_refused(name: str) -> None:
    learned = torch.tensor(0.5, requires_grad=True)
    target = torch.zeros(4, dtype=torch.int64)
    arguments = {"temperature": 4.0, "alpha": 0.3, name: learned}
    with pytest.raises(ValueError, match=f"{name}: got a tensor that requires grad"):
        kd_loss(torch.zeros(4, 10), torch.ones(4, 10), target, **arguments)
    with torch.no_grad():
        kd_loss(torch.zeros(4, 10), torch.ones(4, 10), target, **arguments)
    assert kd_loss(
        torch.zeros(4, 10), torch.ones(4, 10), target, **(arguments | {name: learned.detach()})
    ).isfinite()


def test_teacher_that_requires_grad_is_warned_about_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = logits(6, 10, seed=0).requires_grad_(), logits(6, 10, seed=1)
    teacher.requires_grad_()
    monkeypatch.setattr(errors, "_warned", set())
    kd_loss(student, teacher).backward()
    DistillKL()(student, teacher, 4.0, None).backward()
    (record,) = caplog.records
    assert record.name == "dmkd_fast" and "no_grad" in record.getMessage()
    assert teacher.grad is None


ROW = torch.ones(4, dtype=torch.bool)
IDS = torch.zeros(4, dtype=torch.int64)
SOFT = torch.full((4, 10), 0.1)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"teacher_logits": torch.zeros(4, 10, dtype=torch.bool)}, TypeError, "teacher_logits"),
        ({"student_logits": [1.0]}, TypeError, "got list"),
        ({"teacher_logits": torch.zeros(4, 10, device="meta")}, ValueError, "device meta"),
        ({"alpha": 0.5}, ValueError, "alpha: set without a target"),
        ({"label_smoothing": 0.1}, ValueError, "label_smoothing: set without"),
        ({"ignore_index": 0}, ValueError, "ignore_index: set without"),
        ({"target": IDS}, ValueError, r"alpha: got None with a target"),
        ({"target": IDS, "alpha": 1.0}, ValueError, r"alpha: got 1.0 with a target"),
        ({"target": IDS, "alpha": -0.1}, ValueError, "alpha: got -0.1"),
        ({"target": IDS[:3], "alpha": 0.5}, ValueError, r"target: got shape \(3,\)"),
        ({"target": IDS.int(), "alpha": 0.5}, TypeError, "target: got torch.int32"),
        ({"target": SOFT[:, :9], "alpha": 0.5}, ValueError, r"target: got shape \(4, 9\)"),
        ({"target": SOFT, "alpha": 0.5, "ignore_index": 0}, ValueError, "use mask"),
        ({"target": IDS + 10, "alpha": 0.5}, RuntimeError, "got class 10 in row 0"),
        ({"target": IDS - 1, "alpha": 0.5}, RuntimeError, "got class -1"),
        ({"target": SOFT, "alpha": 0.5, "label_smoothing": 1.0}, ValueError, r"\[0, 1\)"),
        ({"mask": ROW.int()}, TypeError, "mask: got torch.int32"),
        ({"mask": ROW[:2]}, ValueError, r"mask: got shape \(2,\)"),
        ({"row_weight": ROW}, TypeError, "row_weight"),
        ({"row_weight": torch.ones(4, requires_grad=True)}, ValueError, "row_weight.detach"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "divides by nothing"),
        ({"num_items": 0}, ValueError, "num_items: got 0"),
        ({"num_items": float("inf")}, ValueError, "num_items: got inf"),
        ({"num_items": "3"}, TypeError, "num_items: got str"),
        ({"temperature": "4"}, TypeError, "temperature: got str, expected a number"),
        ({"temperature": None}, TypeError, "temperature: got NoneType"),
        ({"temperature": torch.tensor(4j)}, TypeError, "temperature: got complex"),
        ({"temperature": 0.99e-4}, ValueError, r"temperature: got 9.9e-05, expected 0.0001 to"),
        ({"temperature": 10001}, ValueError, "temperature: got 10001.0, expected 0.0001 to 10000"),
        ({"temperature": 10**400}, ValueError, "temperature: got inf"),
        ({"temperature": float("nan")}, ValueError, "temperature: got nan"),
        ({"temperature": -4}, ValueError, "temperature: got -4"),
        ({"target": IDS, "alpha": float("nan")}, ValueError, "alpha: got nan"),
        ({"target": IDS, "alpha": "0.5"}, TypeError, "alpha: got str"),
        ({"num_items": torch.ones(2)}, ValueError, "one element"),
    ],
)
def test_wrong_arguments_say_what_to_change(
    change: dict, error: type[Exception], words: str
) -> None:
    arguments = {"student_logits": torch.zeros(4, 10), "teacher_logits": torch.zeros(4, 10)}
    with pytest.raises(error, match=words) as raised:
        kd_loss(**(arguments | change))
    assert "\n" not in str(raised.value).split("\nException raised from")[0]


def test_grad_form_refuses_rows() -> None:
    with pytest.raises(ValueError, match='got "none"'):
        kd_loss_and_grad(torch.zeros(4, 10), torch.zeros(4, 10), reduction="none")


def test_fallback_equals_the_kernel() -> None:
    """Without the extension: the same numbers from the eager definition, one warning."""
    student, teacher, target = logits(6, 10, seed=0), logits(6, 10, seed=1), targets("ids")
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, target, alpha=0.3, label_smoothing=0.1)
    (3 * loss).backward()
    code = """
import logging, sys
sys.modules["dmkd_fast._C"] = sys.modules["triton"] = None
logged = []
logging.getLogger("dmkd_fast").addFilter(lambda record: logged.append(record.getMessage()))
import torch
from dmkd_fast import kd_loss, kd_loss_and_grad, DistillKL
student, teacher, target, loss, expected = torch.load(sys.argv[1])
student.requires_grad_()
mine = kd_loss(student, teacher, target, alpha=0.3, label_smoothing=0.1)
(3 * mine).backward()
fused, grad = kd_loss_and_grad(student, teacher, target, alpha=0.3, label_smoothing=0.1)
rows = kd_loss(student, teacher, reduction="none", mask=target != 3)
assert len(logged) == 1 and "eager" in logged[0], logged
for a, b in ((mine, loss), (fused, loss), (student.grad, expected), (3 * grad, expected)):
    torch.testing.assert_close(a.detach(), b, rtol=1e-12, atol=1e-15)
assert rows[0] == 0 and (rows[1:] > 0).all()
"""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save((student, teacher, target, loss.detach(), leaf.grad), file.name)
        subprocess.run([sys.executable, "-c", code, file.name], check=True)


def test_without_triton_cuda_says_so_once_and_uses_the_definition(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the dispatcher calls for CUDA tensors, on CPU ones: only its choice is looked at."""
    monkeypatch.setitem(sys.modules, "dmkd_fast.loss.triton_launch", None)
    monkeypatch.setattr(errors, "_warned", set())
    run = operators.cuda_kernel("dmkd_fast.loss.triton_launch", "forward", ops._eager_forward)
    logits = torch.randn(3, 5), torch.randn(3, 5)
    problem = ops.Problem(*logits, None, None, 4.0, 1.0, 16.0, 1.0, 0.0)
    loss = run(*problem, False)[0]
    assert torch.equal(run(*problem, False)[0], loss)
    (message,) = (record.getMessage() for record in caplog.records)
    assert re.search(r"no CUDA kernels .*; install triton", message)
    torch.testing.assert_close(loss, kd_loss(*logits, reduction="sum"))
