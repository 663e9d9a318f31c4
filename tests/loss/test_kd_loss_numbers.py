"""kd_loss's numbers: against float64, against same-dtype eager, bit for bit among themselves."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmkd_fast import kd_loss, kd_loss_and_grad
from dmkd_fast.loss.arguments import MAX_TEMPERATURE, MIN_TEMPERATURE

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ULP = {torch.float32: 2**-23, torch.float64: 2**-52, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def logits(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, spread: float = 3.0
) -> Tensor:
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def eager(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The published chain, in the dtype of its inputs."""
    log_q = F.log_softmax(student / temperature, dim=1)
    p = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def eager_and_grad(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = eager(leaf, teacher, temperature)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def strided(rows: Tensor, how: str) -> Tensor:
    """The same numbers in other memory layouts."""
    if how == "wide rows":
        return torch.cat((rows, rows), dim=1)[:, : rows.shape[1]]
    if how == "transposed":
        return rows.t().contiguous().t()
    if how == "odd address":
        return torch.cat((rows.new_zeros(1), rows.flatten()))[1:].view(rows.shape)
    return rows


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 9),
    classes=st.integers(1, 70) | st.sampled_from([100, 1000, 1003]),
    student_dtype=st.sampled_from(DTYPES),
    teacher_dtype=st.sampled_from(DTYPES),
    temperature=st.floats(0.05, 100.0),
    spread=st.sampled_from([0.01, 1.0, 10.0]),
    noise=st.sampled_from([0.01, 0.5, 3.0]),
    layouts=st.tuples(*[st.sampled_from(["dense", "wide rows", "transposed", "odd address"])] * 2),
    kind=st.sampled_from(["none", "ids", "probabilities"]),
    seed=st.integers(0, 1000),
)
def test_numbers_hold_the_absolute_bounds(
    rows: int,
    classes: int,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    temperature: float,
    spread: float,
    noise: float,
    layouts: tuple[str, str],
    kind: str,
    seed: int,
) -> None:
    teacher = logits(rows, classes, seed=seed, spread=spread)
    student = (teacher + logits(rows, classes, seed=seed + 1, spread=noise)).to(student_dtype)
    student, teacher = strided(student, layouts[0]), strided(teacher.to(teacher_dtype), layouts[1])
    generator = torch.Generator().manual_seed(seed)
    target = {
        "none": None,
        "ids": torch.randint(0, classes, (rows,), generator=generator),
        "probabilities": logits(rows, classes, seed=seed + 2).softmax(1),
    }[kind]
    alpha = None if target is None else 0.4
    before = student.clone(), teacher.clone()
    loss, grad = kd_loss_and_grad(student, teacher, target, temperature=temperature, alpha=alpha)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])

    leaf = student.double().requires_grad_()
    q = (leaf / temperature).softmax(1)
    p = (teacher.double() / temperature).softmax(1)
    exact = (
        temperature**2
        * (
            p
            * (
                (teacher.double() - leaf) / temperature
                - (teacher.double() / temperature).logsumexp(1, True)
                + (leaf / temperature).logsumexp(1, True)
            )
        )
        .sum(1)
        .mean()
    )
    if target is not None:
        wide = target.double() if target.is_floating_point() else target
        exact = 0.4 * exact + 0.6 * F.cross_entropy(leaf, wide)
    exact.backward()
    # Rounding of logits / T is multiplied by their size; that of the two sums by T^2 or T.
    size = 1 + (spread + noise) * 4 / temperature
    assert abs(loss.double() - exact) <= 2e-6 * (1 + exact) * size
    assert loss >= 0
    scale = (temperature + 1) / rows
    allowed = ULP[student_dtype] / 2 * leaf.grad.abs() + 1e-6 * size * scale * torch.maximum(p, q)
    if target is not None:
        share = target if target.is_floating_point() else F.one_hot(target, classes)
        allowed += 1e-6 * torch.maximum(leaf.softmax(1), share) / rows
    allowed += (6e-8 if student_dtype == torch.float16 else 0) + 1e-37 * scale  # underflow
    assert ((grad.double() - leaf.grad).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 10.0, 100.0])
@pytest.mark.parametrize("noise", [0.1, 1.0, 5.0])
def test_error_is_never_above_that_of_eager(
    dtype: torch.dtype, temperature: float, noise: float
) -> None:
    for seed in range(5):
        teacher = logits(32, 200, seed=seed)
        student = (teacher + logits(32, 200, seed=seed + 10, spread=noise)).to(dtype)
        teacher = teacher.to(dtype)
        exact, exact_grad = eager_and_grad(student.double(), teacher.double(), temperature)
        theirs, their_grad = eager_and_grad(student, teacher, temperature)
        mine, my_grad = kd_loss_and_grad(student, teacher, temperature=temperature)
        ulp = 2**-23 * exact  # of a float32 loss
        assert abs(mine - exact) <= abs(theirs - exact) + 2 * ulp
        my_error = (my_grad.double() - exact_grad).norm()
        their_error = (their_grad.double() - exact_grad).norm()
        assert my_error <= their_error + ULP[dtype] * exact_grad.norm()


# Teacher logits 3 * normal, student = teacher + noise * normal, 256 x 1000; bounds leave a factor 3
# over what docs/concepts/loss.md shows.
@pytest.mark.parametrize(("temperature", "noise"), [(4, 0.5), (10, 2.0), (10, 0.5), (10, 0.1)])
def test_accuracy_table_of_the_docs(temperature: int, noise: float) -> None:
    teacher = logits(256, 1000, seed=0)
    student = teacher + logits(256, 1000, seed=1, spread=noise)
    exact, exact_grad = eager_and_grad(student.double(), teacher.double(), temperature)
    loss, grad = kd_loss_and_grad(student, teacher, temperature=temperature)
    assert abs(loss - exact) <= 2e-7 * exact
    assert (grad - exact_grad).norm() <= 1e-6 * exact_grad.norm()
    student, teacher = student.bfloat16(), teacher.bfloat16()
    exact, exact_grad = eager_and_grad(student.double(), teacher.double(), temperature)
    loss, grad = kd_loss_and_grad(student, teacher, temperature=temperature)
    assert abs(loss - exact) <= 2e-7 * exact
    rounding = (exact_grad.bfloat16().double() - exact_grad).norm()
    assert (grad.double() - exact_grad).norm() <= 1.01 * rounding
    _, theirs = eager_and_grad(student, teacher, temperature)
    assert (theirs.double() - exact_grad).norm() > 20 * rounding


def test_properties_of_a_divergence() -> None:
    student, teacher = logits(20, 50, seed=0), logits(20, 50, seed=1)
    loss = kd_loss(student, teacher, reduction="none")
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
    close(kd_loss(student[:, order], teacher[:, order], reduction="none"), loss)
    close(kd_loss(student + 100, teacher - 100, reduction="none"), loss)
    _, grad = kd_loss_and_grad(student, teacher, reduction="sum")
    assert grad.sum(1).abs().max() < 1e-5
    one, grad = kd_loss_and_grad(student[:, :1], teacher[:, :1])
    assert one == 0 and (grad == 0).all()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0, 10.0])
def test_one_class_has_loss_and_gradient_zero(temperature: float) -> None:
    student, teacher = logits(200, 1, seed=0), logits(200, 1, seed=1)
    loss, grad = kd_loss_and_grad(student, teacher, temperature=temperature, reduction="sum")
    assert loss == 0 and (grad == 0).all()
    leaf = student.requires_grad_()
    (2 * kd_loss(leaf, teacher, temperature=temperature)).backward()
    assert (leaf.grad == 0).all()


def test_layouts_give_the_same_bits() -> None:
    student, teacher = logits(9, 103, seed=0), logits(9, 103, seed=1)
    expected = kd_loss_and_grad(student, teacher)
    for how in ("wide rows", "transposed", "odd address"):
        loss, grad = kd_loss_and_grad(strided(student, how), strided(teacher, how))
        assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1]), how
    one = teacher[:1].expand(9, -1)  # stride 0
    assert torch.equal(kd_loss(student, one), kd_loss(student, one.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_to_the_gradient_gives_the_same_bits(dtype: torch.dtype) -> None:
    student, teacher = logits(33, 103, seed=0, dtype=dtype), logits(33, 103, seed=1, dtype=dtype)
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher)
    (handed_over,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (recomputed,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert handed_over.data_ptr() != recomputed.data_ptr()
    _, fused = kd_loss_and_grad(student, teacher)
    assert torch.equal(handed_over, fused) and torch.equal(recomputed, fused)
    (scaled,) = torch.autograd.grad(3 * loss, leaf)
    assert torch.equal(scaled, kd_loss_and_grad(student, teacher, grad_scale=3.0)[1])


def test_bits_do_not_depend_on_threads_or_repetition() -> None:
    student, teacher = logits(513, 103, seed=0), logits(513, 103, seed=1)
    target = torch.arange(513) % 103
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            results.append(kd_loss_and_grad(student, teacher, target, alpha=0.3))
    finally:
        torch.set_num_threads(threads)
    for one, other in pairwise(results):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("temperature", [MIN_TEMPERATURE, 1.0, MAX_TEMPERATURE])
@pytest.mark.parametrize("spread", [1.0, 100.0, 2e4])
def test_losses_and_gradients_are_accurate_over_the_whole_range_of_temperatures(
    temperature: float, spread: float
) -> None:
    noise = torch.randn(2, 64, 100, generator=torch.Generator().manual_seed(0))
    student, teacher = spread * noise
    loss, grad = kd_loss_and_grad(student, teacher, temperature=temperature)
    exact, exact_grad = kd_loss_and_grad(
        student.double(), teacher.double(), temperature=temperature
    )
    assert abs(loss.double() / exact - 1) < 1e-6
    assert (grad.double() - exact_grad).abs().max() < 5e-5 * exact_grad.abs().max() + 1e-12
