"""The three raw operators behind kd_loss: schemas, shapes, and the implementation of each device.

`loss/functional.py` calls them with checked arguments and adds autograd. Implementations:

    CPU     C++ (csrc/register.cpp)
    CUDA    Triton (`loss/triton_launch.py`), imported on first use; float64 is eager
    other   the eager definition in `loss/reference.py`

The eager definition is also used where the C++ or Triton implementation is missing; a warning says
so once.

Arguments: student and teacher logits (B, C) of any float dtype and strides; target, class ids (B,)
int64 or probabilities (B, C); weight, factors (B,), where 0 skips a row. A row adds
alpha * kd_scale * KL + (1 - alpha) * ce_scale * CE to the loss. kd_scale and ce_scale contain the
reduction's denominator, and kd_scale also T^2. temperatures (B, 2), if given, are each row's T and
factor on KL, in place of `temperature`. divergences, from `divergences.terms_of`, replace KL.
standardize gives the rows of both logits mean 0 and standard deviation 1 before they are divided
by T. The operators return the loss, the KL and CE parts (summed, or (B,) with per_row) and
statistics of each row for the backward pass. Sums are accumulated in float32, or in float64 if
student or teacher logits are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.loss.divergences import DIST, DKD
from dmkd_fast.loss.reference import (
    reference_cross_entropy,
    reference_cross_entropy_grad,
    reference_divergence,
    reference_divergence_grad,
)
from dmkd_fast.runtime.operators import cuda_kernel, warn_if_eager

# Per row: maximum and sum of exponentials of s / T, the same of t / T, the common part of
# log p - log q, the sum of exponentials of s, and the sum of the target.
NUM_STATS = 7

_PROBLEM = (
    "Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, "
    "float alpha, float kd_scale, float ce_scale, float label_smoothing"
)
_EXTRA = "Tensor? temperatures=None, float[] divergences=[], bool standardize=False"
_LOSSES = "(Tensor loss, Tensor kd, Tensor ce, Tensor stats)"
_LIBRARY = torch.library.Library("dmkd_fast", "DEF")
_LIBRARY.define(f"kd_loss_forward({_PROBLEM}, bool per_row, {_EXTRA}) -> {_LOSSES}")
_LIBRARY.define(f"kd_loss_backward(Tensor upstream, Tensor stats, {_PROBLEM}, {_EXTRA}) -> Tensor")
_LIBRARY.define(
    "kd_loss_forward_backward(Tensor(a!) grad, Tensor? upstream, float grad_scale, "
    f"{_PROBLEM}, {_EXTRA}) -> {_LOSSES}"
)

forward = torch.ops.dmkd_fast.kd_loss_forward.default
backward = torch.ops.dmkd_fast.kd_loss_backward.default
forward_backward = torch.ops.dmkd_fast.kd_loss_forward_backward.default


def accumulated_type(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Return the dtype of sums and losses."""
    double = torch.float64 in (student.dtype, teacher.dtype)
    return torch.float64 if double else torch.float32


def with_defaults(extra: Sequence[Any]) -> tuple[Any, ...]:
    """Return temperatures, divergences and standardize; the dispatcher drops trailing defaults."""
    return (*extra, *(None, (), False)[len(extra) :])


def _eager_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher, target, weight, temperature, alpha, kd_scale, ce_scale, smoothing = arguments[
        :9
    ]
    per_row, (temperatures, terms, standardize) = arguments[9], with_defaults(arguments[10:])
    warn_if_eager(student)
    dtype = accumulated_type(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    ids = None if target is None else _valid(target, weight)
    kd = reference_divergence(  # (B,)
        student,
        teacher,
        temperature=temperature if temperatures is None else temperatures[:, :1],
        terms=terms,
        target=ids,
        counted=None if weight is None else weight != 0,
        standardize=standardize,
    )
    kd = kd if temperatures is None else kd * temperatures[:, 1]
    ce = torch.zeros_like(kd)
    if ids is not None and alpha != 1:
        ce = reference_cross_entropy(student, ids, label_smoothing=smoothing)
    if weight is not None:
        kd, ce = (torch.where(weight == 0, 0, weight * rows) for rows in (kd, ce))
    kd, ce = kd * kd_scale, ce * ce_scale
    if not per_row:
        kd, ce = kd.sum(), ce.sum()
    # A term with factor 0 is left out, because it may be infinite.
    loss = (kd * alpha if alpha != 0 else 0) + (ce * (1 - alpha) if alpha != 1 else 0)
    assert isinstance(loss, Tensor)  # alpha is not both 0 and 1
    return loss, kd, ce, student.new_zeros(len(student), NUM_STATS)


def _eager_backward(upstream: Tensor, stats: Tensor, *arguments: Any) -> Tensor:
    student, teacher, target, weight, temperature, alpha, kd_scale, ce_scale, smoothing = arguments[
        :9
    ]
    temperatures, terms, standardize = with_defaults(arguments[9:])
    dtype = accumulated_type(student, teacher)
    wide, teacher = student.to(dtype), teacher.to(dtype)
    factors = upstream.reshape(-1).to(dtype).expand(len(wide))
    factors = factors if weight is None else factors * weight
    ids = None if target is None else _valid(target, weight)
    grad = reference_divergence_grad(
        wide,
        teacher,
        factors * (alpha * kd_scale) * (1 if temperatures is None else temperatures[:, 1]),
        temperature=temperature if temperatures is None else temperatures[:, :1],
        terms=terms,
        target=ids,
        counted=None if weight is None else weight != 0,
        standardize=standardize,
    )
    if ids is not None and alpha != 1:
        ce = reference_cross_entropy_grad(wide, ids, label_smoothing=smoothing)
        grad = grad + ce * (factors * ((1 - alpha) * ce_scale))[:, None]
    if weight is not None:
        grad = torch.where(weight[:, None] == 0, 0, grad)
    return grad.to(student.dtype, memory_format=torch.contiguous_format)


def _eager_forward_backward(
    grad: Tensor, upstream: Tensor | None, grad_scale: float, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem, extra = arguments[:9], arguments[9:]
    losses = _eager_forward(*problem, False, *extra)
    scale = losses[0].new_tensor(grad_scale) if upstream is None else upstream * grad_scale
    grad.copy_(_eager_backward(scale, losses[3], *problem, *extra))
    return losses


def _valid(target: Tensor, weight: Tensor | None) -> Tensor:
    """Return class ids with those of skipped rows (ignore_index) replaced by 0."""
    if weight is None or target.dtype != torch.int64:
        return target
    return torch.where(weight == 0, 0, target)


def _fake_forward(
    student: Tensor, teacher: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    per_row = arguments[7]
    dtype = accumulated_type(student, teacher)
    shape = student.shape[:1] if per_row else ()
    loss, kd, ce = (student.new_empty(shape, dtype=dtype) for _ in range(3))
    return loss, kd, ce, student.new_empty((student.shape[0], NUM_STATS), dtype=dtype)


def _fake_backward(upstream: Tensor, stats: Tensor, student: Tensor, *_: object) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _fake_forward_backward(
    grad: Tensor,
    upstream: Tensor | None,
    grad_scale: float,
    student: Tensor,
    teacher: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_forward(student, teacher, *[None] * 7, False)


def _cuda(name: str, eager: Callable[..., Any]) -> Callable[..., Any]:
    """Return the Triton implementation; `dist` and a sum with `dkd` stay eager."""
    fused = cuda_kernel("dmkd_fast.loss.triton_launch", name, eager)

    def run(*arguments: Any) -> Any:
        kinds = next((a[::4] for a in arguments if isinstance(a, list)), [])
        is_eager = DIST in kinds or (DKD in kinds and len(kinds) > 1)
        return (eager if is_eager else fused)(*arguments)

    return run


for _name, _eager, _fake in (
    ("forward", _eager_forward, _fake_forward),
    ("backward", _eager_backward, _fake_backward),
    ("forward_backward", _eager_forward_backward, _fake_forward_backward),
):
    _LIBRARY.impl(f"kd_loss_{_name}", _eager, "CompositeExplicitAutograd")
    _LIBRARY.impl(f"kd_loss_{_name}", _cuda(_name, _eager), "CUDA")
    torch.library.register_fake(f"dmkd_fast::kd_loss_{_name}", _fake, lib=_LIBRARY)
