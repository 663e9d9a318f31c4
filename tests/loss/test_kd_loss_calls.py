"""Calls of kd_loss as users make them: images of classes, padded vocabularies, inference mode."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmkd_fast import DistillKL, kd_loss, kd_loss_and_grad, linear_kd_loss
from dmkd_fast.loss import ops


def logits(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def eager(
    student: Tensor, teacher: Tensor, temperature: float | Tensor = 4.0, dim: int = -1
) -> Tensor:
    """The published loss of each row."""
    log_q, p = (student / temperature).log_softmax(dim), (teacher / temperature).softmax(dim)
    scale = temperature**2
    scale = scale.squeeze(-1) if isinstance(scale, Tensor) and scale.ndim else scale
    return F.kl_div(log_q, p, reduction="none").sum(dim) * scale


def with_labels(student: Tensor, teacher: Tensor) -> Tensor:
    kd = eager(student, teacher).mean()
    return 0.25 * kd + 0.75 * F.cross_entropy(student, LABELS)


def inference(teacher: Tensor) -> Tensor:
    with torch.inference_mode():
        return teacher.clone()


LABELS, EACH = torch.tensor([3, 0, 9, 1]), torch.tensor([[1.0], [2.0], [4.0], [8.0]])
QUARTERS = (0.25, np.float64(0.25), np.array([0.25]), torch.tensor(0.25), torch.tensor([0.25]))
CALLS = {  # what users write, and the eager loss that it stands for
    **{
        f"temperature {type(x).__name__} {x!r}": (
            lambda s, t, x=x: kd_loss(s, t, temperature=12 * x),
            lambda s, t: eager(s, t, 3.0).mean(),
        )
        for x in QUARTERS
    },
    **{
        f"alpha {type(x).__name__} {x!r}": (
            lambda s, t, x=x: kd_loss(s, t, LABELS, alpha=x),
            with_labels,
        )
        for x in QUARTERS
    },
    **{
        f"published call, temperature {x!r}": (
            lambda s, t, x=x: DistillKL()(s, t, x, object()),
            lambda s, t: eager(s, t, 3.0).mean(),
        )
        for x in (3, 3.0, np.float32(3), torch.tensor(3.0), torch.tensor([3]))
    },
    "a temperature for each row": (
        lambda s, t: kd_loss(s, t, temperature=EACH),
        lambda s, t: eager(s, t, EACH).mean(),
    ),
    "teacher from inference mode": (
        lambda s, t: kd_loss(s, inference(t)),
        lambda s, t: eager(s, t).mean(),
    ),
    "images of classes": (
        lambda s, t: kd_loss(s.view(2, 10, 2, 1), t.view(2, 10, 2, 1), class_dim=1),
        lambda s, t: eager(s.view(2, 10, 2, 1), t.view(2, 10, 2, 1), dim=1).mean(),
    ),
    "padded vocabularies": (
        lambda s, t: kd_loss(s, torch.cat((t, t), 1), num_classes=8),
        lambda s, t: eager(s[:, :8], t[:, :8]).mean(),
    ),
    "a loss for each sample": (
        lambda s, t: kd_loss(s, t, reduction="none") @ EACH[:, 0].to(s.dtype),
        lambda s, t: eager(s, t) @ EACH[:, 0].to(s.dtype),
    ),
    "compiled as a full graph": (
        torch.compile(kd_loss, fullgraph=True, backend="aot_eager"),
        lambda s, t: eager(s, t).mean(),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_as_users_make_them_equal_eager(name: str) -> None:
    mine, theirs = (logits(4, 10, seed=0, dtype=torch.float64).requires_grad_() for _ in range(2))
    teacher = logits(4, 10, seed=1, dtype=torch.float64)
    call, definition = CALLS[name]
    loss, expected = call(mine, teacher), definition(theirs, teacher)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-13)


def test_classes_may_be_in_any_dimension() -> None:
    student, teacher = logits(2, 5, 3, 4, seed=0), logits(2, 5, 3, 4, seed=1)
    target = torch.randint(5, (2, 3, 4))
    last = [x.movedim(1, -1).contiguous() for x in (student, teacher)]
    for hard in (target, torch.nn.functional.one_hot(target, 5).movedim(-1, 1).float()):
        moved = hard if hard.dtype == torch.int64 else hard.movedim(1, -1)
        expected, expected_grad = kd_loss_and_grad(*last, moved, alpha=0.5)
        loss, grad = kd_loss_and_grad(student, teacher, hard, alpha=0.5, class_dim=1)
        assert torch.equal(loss, expected)
        assert torch.equal(grad.movedim(1, -1), expected_grad) and grad.is_contiguous()
        leaf = student.clone().requires_grad_()
        DistillKL(alpha=0.5, class_dim=1)(leaf, teacher, hard).backward()
        assert torch.equal(leaf.grad, grad)
        out = torch.empty_like(student)
        assert kd_loss_and_grad(student, teacher, hard, alpha=0.5, class_dim=1, out=out)[1] is out
        assert torch.equal(out, grad)
    rows = kd_loss(student, teacher, class_dim=1, reduction="none")
    assert rows.shape == (2, 3, 4)
    for module in (DistillKL(divergence="dkd", class_dim=1), DistillKL(divergence="dkd")):
        options = {} if "class_dim" in module.settings else {"class_dim": 1}
        decoupled = module(student, teacher, target, **options)
        assert torch.equal(decoupled, kd_loss(*last, target, divergence="dkd"))
    for name, given in (("student_logits", student), ("teacher_logits", teacher)):
        with pytest.raises(ValueError, match=f"out: shares memory with {name}"):
            kd_loss_and_grad(student, teacher, class_dim=1, out=given)
    with pytest.raises(ValueError, match="class_dim: got 4"):
        kd_loss(student, teacher, class_dim=4)


def test_vocabularies_may_be_padded_to_different_sizes() -> None:
    student, teacher = logits(2, 3, 12, seed=0), logits(2, 3, 16, seed=1)
    target = torch.randint(10, (2, 3))
    expected, expected_grad = kd_loss_and_grad(
        student[..., :10].contiguous(), teacher[..., :10].contiguous(), target, alpha=0.5
    )
    for out in (None, torch.full_like(student, 7)):
        loss, grad = kd_loss_and_grad(student, teacher, target, alpha=0.5, num_classes=10, out=out)
        assert torch.equal(loss, expected) and torch.equal(grad[..., :10], expected_grad)
        assert (grad[..., 10:] == 0).all() and grad.shape == student.shape
    leaf = student.clone().requires_grad_()
    kd_loss(leaf, teacher, target, alpha=0.5, num_classes=10).backward()
    assert torch.equal(leaf.grad, grad)
    with pytest.raises(ValueError, match="num_classes: got 13, expected 1 to 12"):
        kd_loss(student, teacher, num_classes=13)
    with pytest.raises(ValueError, match="num_classes leaves padding out"):
        kd_loss(student, teacher)


@pytest.mark.parametrize("count", [np.int64(10), np.uint8(10)])
def test_a_number_of_classes_may_be_one_of_numpy(count: np.integer) -> None:
    student, teacher = logits(6, 12, seed=0), logits(6, 16, seed=1)
    expected = kd_loss_and_grad(student, teacher, num_classes=10)
    for mine, theirs in zip(
        kd_loss_and_grad(student, teacher, num_classes=count), expected, strict=True
    ):
        assert torch.equal(mine, theirs)
    images = [x[:, None].movedim(-1, 1) for x in (student, teacher)]
    loss = kd_loss(*images, num_classes=count, class_dim=np.int64(1))
    assert torch.equal(loss, expected[0])
    for named, got in (({"num_classes": True}, "True"), ({"num_classes": 2.0}, "2.0")):
        with pytest.raises(ValueError, match=f"num_classes: got {got}, expected 1 to 12, the cl"):
            kd_loss(student, teacher, **named)
    with pytest.raises(ValueError, match="class_dim: got True, expected one of the dimensions"):
        kd_loss(*images, class_dim=True)


@pytest.mark.parametrize("call", [kd_loss, kd_loss_and_grad])
def test_logits_that_are_no_tensor_are_named(call: Callable[..., Any]) -> None:
    tensor = logits(1, 1, seed=0)
    for given, name in (([[1.0]], "list"), (np.ones((1, 1)), "ndarray"), (None, "NoneType")):
        for options in ({}, {"num_classes": 1}):
            with pytest.raises(TypeError, match=f"^student_logits: got {name}, expected a float"):
                call(given, tensor, **options)
            with pytest.raises(TypeError, match=f"^teacher_logits: got {name}, expected a float"):
                call(tensor, given, **options)


def test_teacher_logits_may_come_from_inference_mode() -> None:
    model, images = nn.Linear(6, 10), logits(5, 6, seed=0)
    with torch.inference_mode():
        teacher = nn.Linear(6, 10)(images)
        target = torch.zeros(5, dtype=torch.int64)
        weight = torch.rand(5)
    for named in (
        {},
        {"target": target, "alpha": 0.5},
        {"row_weight": weight, "reduction": "sum"},  # no copy of the weights is made
    ):
        loss = kd_loss(model(images), teacher, **named)
        loss.backward(retain_graph=True)
        first = model.weight.grad.clone()
        (3 * loss).backward()
        torch.testing.assert_close(model.weight.grad, 4 * first)
        model.weight.grad = None
    with torch.inference_mode():
        assert kd_loss(model(images), teacher).isfinite()
        assert kd_loss_and_grad(model(images), teacher)[1].isfinite().all()


@pytest.mark.parametrize("ignored", [0, 255, -1])
def test_any_class_id_may_be_the_one_to_ignore(ignored: int) -> None:
    hidden, weight = logits(6, 4, seed=0), logits(10, 4, seed=2)
    student, teacher = hidden @ weight.t(), logits(6, 10, seed=1)
    target = torch.tensor([3, ignored, 1, 9, ignored, 5])
    keep = target != ignored
    ce = F.cross_entropy(student, target, ignore_index=ignored)
    expected = 0.25 * eager(student, teacher)[keep].mean() + 0.75 * ce
    named = {"alpha": 0.25, "ignore_index": ignored}
    loss, grad = kd_loss_and_grad(student, teacher, target, **named)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert (grad[~keep] == 0).all() and (grad[keep] != 0).any(1).all()
    heads = hidden, weight, teacher, torch.eye(10)
    for chunk_rows in (2, 6):
        loss = linear_kd_loss(*heads, target, chunk_rows=chunk_rows, **named)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    weights = ops._eager_row_weights(student, teacher, target, None, None, None, ignored, True)
    assert torch.equal(weights, keep / keep.sum())


@pytest.mark.parametrize("form", [np.array(4.0), np.array([4.0]), np.float16(4), torch.tensor([4])])
def test_a_temperature_may_be_an_array_of_one_number(form: object) -> None:
    student, teacher = logits(6, 10, seed=0), logits(6, 10, seed=1)
    expected = kd_loss(student, teacher, temperature=4.0)
    assert torch.equal(kd_loss(student, teacher, temperature=form), expected)
    assert torch.equal(DistillKL()(student, teacher, form, object()), expected)
    assert torch.equal(DistillKL()(student, teacher, form), expected)


def test_each_row_may_have_its_own_temperature() -> None:
    student = logits(6, 10, seed=0, dtype=torch.float64).requires_grad_()
    teacher = logits(6, 10, seed=1, dtype=torch.float64)
    each = torch.rand(6, 1, dtype=torch.float64) + 1
    target = torch.arange(6)
    for named in ({}, {"divergence": "jsd"}, {"target": target, "alpha": 0.3}):
        rows = [
            kd_loss(student[i], teacher[i], temperature=each[i], **single)
            for i in range(6)
            for single in [named | ({"target": target[i]} if "target" in named else {})]
        ]
        expected = torch.stack(rows).mean()
        for given in (each, each[:, 0]):
            mine = kd_loss(student, teacher, temperature=given, **named)
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=0)
            a, b = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (mine, expected))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    published = DistillKL()(student, teacher, each, object())
    assert torch.equal(published, kd_loss(student, teacher, temperature=each))
    with pytest.raises(ValueError, match=r"temperature: got shape \(5,\)"):
        kd_loss(student, teacher, temperature=torch.ones(5))
    with pytest.raises(ValueError, match="temperature: got 0 in a row"):
        kd_loss(student, teacher, temperature=torch.arange(6.0))
    with pytest.raises(ValueError, match="temperature: got a tensor that requires grad"):
        kd_loss(student, teacher, temperature=torch.ones(6, requires_grad=True))


EXPORT = """
import torch
from torch import nn
from dmkd_fast import DistillKL

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.loss = nn.Linear(6, 10), DistillKL(2.0)
    def forward(self, images, teacher):
        return self.loss(self.head(images), teacher)

model, images, teacher = Both(), torch.randn(5, 6), torch.randn(5, 10)
for strict in (False, True):
    exported = torch.export.export(model, (images, teacher), strict=strict)
    assert torch.equal(exported.module()(images, teacher), model(images, teacher))
"""


def test_exports() -> None:
    # In a process of its own: export refuses some settings of cuDNN that other tests make.
    subprocess.run([sys.executable, "-c", EXPORT], check=True)


def test_every_divergence_compiles_as_a_full_graph() -> None:
    student, teacher, target = logits(8, 10, seed=0), logits(8, 10, seed=1), torch.arange(8)
    for named in (
        {"divergence": "dkd"},
        {"divergence": {"jsd": {"beta": 0.2}}, "alpha": 0.5, "standardize_logits": True},
    ):
        torch.compiler.reset()
        compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
        mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
        loss, expected = (
            compiled(mine, teacher, target, **named),
            kd_loss(theirs, teacher, target, **named),
        )
        loss.backward()
        expected.backward()
        assert torch.equal(loss, expected) and torch.equal(mine.grad, theirs.grad)


def test_losses_of_rows_pass_their_gradients_back() -> None:
    student, teacher = logits(4, 10, seed=0).requires_grad_(), logits(4, 10, seed=1)
    rows = kd_loss(student, teacher, reduction="none", divergence="reverse_kl")
    (rows * torch.tensor([1.0, 0.0, 2.0, 3.0])).sum().backward()
    parts = [
        kd_loss_and_grad(student[i], teacher[i], divergence="reverse_kl", grad_scale=factor)[1]
        for i, factor in enumerate((1.0, 0.0, 2.0, 3.0))
    ]
    torch.testing.assert_close(student.grad, torch.stack(parts), rtol=1e-6, atol=1e-8)


def test_no_images_of_classes_give_an_empty_gradient() -> None:
    empty = torch.zeros(0, 10, 4, 4)
    assert kd_loss_and_grad(empty, empty.clone(), class_dim=1)[1].shape == empty.shape
