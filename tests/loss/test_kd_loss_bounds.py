"""Errors of the divergences' gradients against a bound for every row, over the whole range of rows.

The error of a row is at most 1.25 times that of the textbook's definition in float32, or 4 units of
rounding of the row's largest probability times its weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kd_loss_cases import FORMS, ids_for, logits
from textbook import rows as textbook
from torch import Tensor

from dmkd_fast import kd_loss_and_grad
from dmkd_fast.loss.divergences import NAMES, terms_of
from dmkd_fast.loss.reference import _DEFINITIONS, Rows, reference_divergence_grad

BOUNDED = [form for form in FORMS if "dist" not in form]  # columns' correlations have no scale
EDGES = {  # classes of student and teacher logits, beside noise
    "plain": lambda s, t, unit: None,
    "dominant": lambda s, t, unit: (s[:, 0].add_(8 * unit), t[:, 0].add_(8 * unit)),
    "one has it all": lambda s, t, unit: (s[:, 0].add_(30 * unit), t[:, 0].add_(30 * unit)),
    "apart": lambda s, t, unit: (s[:, 0].add_(8 * unit), t[:, -1].add_(8 * unit)),
    "shifted": lambda s, t, unit: s.add_(100),
    "equal logits": lambda s, t, unit: s.zero_(),
}


def bound_of(
    student: Tensor, teacher: Tensor, target: Tensor | None, form: str | dict, temperature: float
) -> tuple[Tensor, Tensor]:
    """The gradient of the rows' sum in float64, and 4 units of each row's largest probability.

    The probability is multiplied by its weight: the factor that it has in the gradient, at least
    that of the temperature and of the divergence.
    """
    rows = Rows(student.double(), teacher.double(), temperature, target=target)
    terms, factors = terms_of(form), torch.full((len(student),), temperature**2).double()
    grad = reference_divergence_grad(rows, terms, factors)
    largest = torch.zeros(len(student), dtype=torch.float64)
    for kind, weight, *numbers in zip(*[iter(terms or [0.0, 1.0, 0.0, 0.0])] * 4, strict=True):
        _, slopes = _DEFINITIONS[int(kind)](rows, *numbers)
        slopes = slopes(torch.ones(len(student), 1).double())
        probability, (first, second) = torch.maximum(rows.p, rows.q), numbers
        if NAMES[int(kind)] == "dkd":
            probability = probability * max(1.0, first, second)
        elif NAMES[int(kind)] == "alpha_beta":
            probability = probability ** (first + second) / first
        weighted = torch.maximum(slopes.abs(), probability)
        largest += temperature * weight * weighted.amax(1)
    return grad, 4 * 2**-24 * largest


def allowed_and_exact(
    student: Tensor, teacher: Tensor, target: Tensor | None, form: str | dict, temperature: float
) -> tuple[Tensor, Tensor]:
    """The error that each row may have, and the gradient of the rows' sum in float64."""
    expected, rounding = bound_of(student, teacher, target, form, temperature)
    leaf = student.float().requires_grad_()
    textbook(leaf, teacher.float(), target, form, temperature).sum().backward()
    theirs = (leaf.grad.double() - expected).abs().nan_to_num(nan=torch.inf).amax(1)
    return torch.maximum(1.25 * theirs, rounding) + 1e-37, expected


def pairs_of_rows(
    classes: int, temperature: float, generator: torch.Generator
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Student and teacher logits of any size, near each other and apart, with and without edges."""
    rows = 2 if classes > 100 else 8
    for scale in (0.01, 1.0, 50.0):
        for noise in (1e-3, 3.0):
            for edge in ("plain", "dominant", "one has it all", "apart", "shifted"):
                noises = torch.randn(2, rows, classes, generator=generator)
                teacher = scale * noises[0]
                student = teacher + noise * noises[1]
                EDGES[edge](student, teacher, temperature)
                yield f"{edge}, scale {scale}, noise {noise}", student, teacher


@pytest.mark.parametrize("form", BOUNDED, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_every_row_is_within_the_bound(form: str | dict, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for classes in (1, 2, 3, 10, 17, 1000):
        for case, student, teacher in pairs_of_rows(classes, temperature, generator):
            if form == "total_variation" and "noise 3" not in case:
                continue  # its slope jumps where p meets q
            target = ids_for(form, len(student), classes)
            loss, grad = kd_loss_and_grad(
                student, teacher, target, temperature=temperature, divergence=form, reduction="sum"
            )
            assert loss >= 0
            if classes == 1:
                assert loss == 0 and (grad == 0).all()
                continue
            allowed, expected = allowed_and_exact(student, teacher, target, form, temperature)
            share = ((grad.double() - expected).abs().amax(1) / allowed).max()
            assert share <= 1, f"{classes} classes, {case}: {share:.2f} of the bound"


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    form=st.sampled_from(BOUNDED),
    rows=st.integers(1, 9),
    classes=st.sampled_from([1, 2, 3, 10, 16, 17, 100, 1003]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([0.5, 1.0, 4.0, 20.0]),
    noise=st.sampled_from([1e-3, 0.1, 3.0]),
    edge=st.sampled_from(sorted(EDGES)),
    seed=st.integers(0, 1000),
)
def test_errors_are_within_rounding_or_near_eagers(
    form: str | dict,
    rows: int,
    classes: int,
    dtype: torch.dtype,
    temperature: float,
    noise: float,
    edge: str,
    seed: int,
) -> None:
    if form == "total_variation":  # its slope jumps where p meets q
        noise = 3.0
    teacher = logits(rows, classes, seed=seed)
    student = teacher + noise * logits(rows, classes, seed=seed + 1)
    EDGES[edge](student, teacher, temperature)
    student, teacher = student.to(dtype), teacher.to(dtype)
    target = ids_for(form, rows, classes)
    loss, grad = kd_loss_and_grad(
        student, teacher, target, temperature=temperature, divergence=form, reduction="sum"
    )
    assert loss >= 0 and grad.isfinite().all()
    if classes == 1:
        assert loss == 0 and (grad == 0).all()
        return
    allowed, expected = allowed_and_exact(student, teacher, target, form, temperature)
    # The result is rounded once more to the dtype of the logits.
    unit = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    stored = unit * expected.abs() + (2**-25 if dtype == torch.float16 else 1e-37)
    assert ((grad.double() - expected).abs() - stored <= allowed[:, None]).all()
