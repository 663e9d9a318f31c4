"""The raw operators behind kd_loss: schemas, shapes, and the implementation of each device.

`loss/functional.py` calls them with checked arguments and adds autograd. Implementations:

    CPU     C++ (csrc/register.cpp)
    CUDA    Triton (`loss/triton_launch.py`), imported on first use; float64 is eager
    other   the eager definition in `loss/reference.py`

The eager definition is also used where the C++ or Triton implementation is missing; a warning says
so once. The operators return the loss, the KL and CE parts (summed, or (B,) with per_row) and
statistics of each row for the backward pass. Sums are accumulated in float32, or in float64 if
student or teacher logits are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmkd_fast.loss.divergences import DIST, DKD
from dmkd_fast.loss.reference import (
    Rows,
    reference_cross_entropy,
    reference_divergence,
    reference_divergence_grad,
)
from dmkd_fast.runtime import native
from dmkd_fast.runtime.operators import cuda_kernel, warn_if_eager


class Problem(NamedTuple):
    """The arguments that the operators share, in the order of their schemas.

    A row adds alpha * kd_scale * KL + (1 - alpha) * ce_scale * CE to the loss.
    """

    student: Tensor  # logits (B, C) of any float dtype and strides
    teacher: Tensor  # the same
    target: Tensor | None  # class ids (B,) int64, or probabilities (B, C)
    weight: Tensor | None  # factors (B,) on the rows; 0 skips a row
    temperature: float
    alpha: float
    kd_scale: float  # T^2 divided by the reduction's denominator
    ce_scale: float  # 1 divided by the reduction's denominator
    label_smoothing: float
    temperatures: Tensor | None = None  # each row's T and factor on KL (B, 2), not `temperature`
    terms: list[float] = []  # noqa: RUF012 - divergences in place of KL, from `terms_of`
    standardize: bool = False  # whether rows get mean 0 and standard deviation 1 before T


# Per row: maximum and sum of exponentials of s / T, the same of t / T, the common part of
# log p - log q, the sum of exponentials of s, and the sum of the target; on the CPU also what is
# lost in rounding the first two sums.
NUM_STATS, NUM_CPU_STATS = 7, 9

_PROBLEM = (
    "Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, "
    "float alpha, float kd_scale, float ce_scale, float label_smoothing, Tensor? temperatures, "
    "float[] terms, bool standardize"
)
_LOSSES = "(Tensor loss, Tensor kd, Tensor ce, Tensor stats)"
_LIBRARY = torch.library.Library("dmkd_fast", "DEF")
_LIBRARY.define(f"kd_loss_forward({_PROBLEM}, bool per_row) -> {_LOSSES}")
_LIBRARY.define(f"kd_loss_backward(Tensor upstream, Tensor stats, {_PROBLEM}) -> Tensor")
_LIBRARY.define(
    "kd_loss_forward_backward(Tensor(a!) grad, Tensor? upstream, float grad_scale, "
    f"{_PROBLEM}) -> {_LOSSES}"
)
_LIBRARY.define(
    "kd_loss_row_weights(Tensor student, Tensor teacher, Tensor? ids, Tensor? mask, "
    "Tensor? row_weight, Tensor? num_items, int ignore_index, bool is_counted) -> Tensor"
)

forward = torch.ops.dmkd_fast.kd_loss_forward.default
backward = torch.ops.dmkd_fast.kd_loss_backward.default
forward_backward = torch.ops.dmkd_fast.kd_loss_forward_backward.default

_Losses = tuple[Tensor, Tensor, Tensor, Tensor]


# What a plain tensor on the CPU dispatches to, outside and inside of torch.inference_mode(): no
# subclass, no lazy negation, nothing that a transform has wrapped.
with torch.inference_mode():
    _INFERENCE = torch.empty(0)
_PLAIN = {torch._C._dispatch_keys(x).raw_repr() for x in (torch.empty(0), _INFERENCE)}


def _are_plain(*tensors: Tensor | None) -> bool:
    """Return whether these are plain tensors on the CPU, and no mode or profiler is active."""
    if torch._C._len_torch_dispatch_stack() or torch._C._autograd._profiler_enabled():
        return False
    for tensor in tensors:
        if tensor is not None and torch._C._dispatch_keys(tensor).raw_repr() not in _PLAIN:
            return False
    return True


def loss_and_gradient(problem: Problem, parts: bool = False) -> tuple[Tensor, ...]:
    """Return the loss on the CPU, with `parts` also KD and CE; statistics; the gradient, allocated.

    The same as `forward_backward`. Where no tensor, mode or profiler wants to see the operator, the
    call goes past the dispatcher, which costs more than the loss of a small batch.
    """
    direct = native.loss_and_gradient
    if not parts and direct is not None and _are_plain(*problem[:4], problem.temperatures):
        return direct(problem)
    student = problem.student
    grad = torch.empty_like(student, memory_format=torch.contiguous_format)
    # Detached, because operators are called faster with tensors that need no gradient.
    loss, kd, ce, stats = forward_backward(grad, None, 1.0, student.detach(), *problem[1:])
    return (loss, kd, ce, stats, grad) if parts else (loss, stats, grad)


def row_weights(student: Tensor, teacher: Tensor, *arguments: Any) -> Tensor:
    """Return the factor of each row (B,), past the dispatcher as above."""
    direct = native.row_weights
    if direct is not None and not torch.compiler.is_compiling():
        tensors = arguments[:4]
        if _are_plain(student, teacher, *tensors):
            return direct(student, teacher, *arguments)
    # Detached for the reason above.
    operator = torch.ops.dmkd_fast.kd_loss_row_weights.default
    weights: Tensor = operator(student.detach(), teacher, *arguments)
    return weights


def accumulated_type(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Return the dtype of sums and losses."""
    double = torch.float64 in (student.dtype, teacher.dtype)
    return torch.float64 if double else torch.float32


def _definition(p: Problem) -> tuple[Rows, Tensor, Tensor | None]:
    """Return the distributions, and student and target of the cross-entropy."""
    dtype = accumulated_type(p.student, p.teacher)
    student, target = p.student.to(dtype), p.target
    if p.weight is not None and target is not None and target.dtype == torch.int64:
        target = torch.where(p.weight == 0, 0, target)  # ignore_index is no class
    rows = Rows(
        student,
        p.teacher.to(dtype),
        p.temperature if p.temperatures is None else p.temperatures[:, :1],
        target=target,
        counted=None if p.weight is None else p.weight != 0,
        standardize=p.standardize,
    )
    return rows, student, None if p.alpha == 1 else target


def _eager_forward(*arguments: Any) -> _Losses:
    p, per_row = Problem(*arguments[:-1]), arguments[-1]
    warn_if_eager(p.student)
    rows, student, target = _definition(p)
    kd = reference_divergence(rows, p.terms)  # (B,)
    kd = kd if p.temperatures is None else kd * p.temperatures[:, 1]
    ce = torch.zeros_like(kd)
    if target is not None:
        ce, _ = reference_cross_entropy(student, target, p.label_smoothing)
    if p.weight is not None:
        kd, ce = (torch.where(p.weight == 0, 0, p.weight * each) for each in (kd, ce))
    kd, ce = kd * p.kd_scale, ce * p.ce_scale
    if not per_row:
        kd, ce = kd.sum(), ce.sum()
    # A term with factor 0 is left out, because it may be infinite.
    loss = (kd * p.alpha if p.alpha != 0 else 0) + (ce * (1 - p.alpha) if p.alpha != 1 else 0)
    assert isinstance(loss, Tensor)  # alpha is not both 0 and 1
    return loss, kd, ce, student.new_zeros(len(student), NUM_STATS)


def _eager_backward(upstream: Tensor, stats: Tensor, *arguments: Any) -> Tensor:
    p = Problem(*arguments)
    rows, student, target = _definition(p)
    factors = upstream.reshape(-1).to(student.dtype).expand(len(student))
    factors = factors if p.weight is None else factors * p.weight
    by_row = 1 if p.temperatures is None else p.temperatures[:, 1]
    grad = reference_divergence_grad(rows, p.terms, factors * (p.alpha * p.kd_scale) * by_row)
    if target is not None:
        _, ce = reference_cross_entropy(student, target, p.label_smoothing)
        grad = grad + ce * (factors * ((1 - p.alpha) * p.ce_scale))[:, None]
    if p.weight is not None:
        grad = torch.where(p.weight[:, None] == 0, 0, grad)
    return grad.to(p.student.dtype, memory_format=torch.contiguous_format)


def _eager_forward_backward(
    grad: Tensor, upstream: Tensor | None, grad_scale: float, *problem: Any
) -> _Losses:
    losses = _eager_forward(*problem, False)
    scale = losses[0].new_full((), grad_scale) if upstream is None else upstream * grad_scale
    grad.copy_(_eager_backward(scale, losses[3], *problem))
    return losses


def _eager_row_weights(*arguments: Any) -> Tensor:
    """Return the factor of each row (B,), divided by `num_items` or the number that count."""
    student, teacher, ids, mask, row_weight, num_items, ignore_index, is_counted = arguments
    ones = student.new_ones(len(student), dtype=accumulated_type(student, teacher))
    keep = ones != 0 if ids is None else ids != ignore_index
    keep = keep if mask is None else keep & mask
    weight = ones if row_weight is None else row_weight
    if num_items is not None or is_counted:
        weight = weight / (keep.sum().to(ones.dtype) if num_items is None else num_items)
    return torch.where(keep, weight, 0)


def _fake_forward(*arguments: Any) -> _Losses:
    student, teacher, per_row = *arguments[:2], arguments[-1]
    dtype = accumulated_type(student, teacher)
    shape = student.shape[:1] if per_row else ()
    loss, kd, ce = (student.new_empty(shape, dtype=dtype) for _ in range(3))
    num_stats = NUM_CPU_STATS if student.device.type == "cpu" else NUM_STATS
    return loss, kd, ce, student.new_empty((student.shape[0], num_stats), dtype=dtype)


def _fake_backward(upstream: Tensor, stats: Tensor, student: Tensor, *_: object) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _fake_forward_backward(*arguments: Any) -> _Losses:
    return _fake_forward(*arguments[3:], False)


def _fake_row_weights(student: Tensor, teacher: Tensor, *_: object) -> Tensor:
    return student.new_empty(student.shape[:1], dtype=accumulated_type(student, teacher))


def _cuda(name: str, eager: Callable[..., Any]) -> Callable[..., Any]:
    """Return the Triton implementation; `dist` and a sum with `dkd` stay eager."""
    fused = cuda_kernel("dmkd_fast.loss.triton_launch", name, eager)

    def run(*arguments: Any) -> Any:
        kinds = next(a[::4] for a in arguments if isinstance(a, list))
        is_eager = DIST in kinds or (DKD in kinds and len(kinds) > 1)
        return (eager if is_eager else fused)(*arguments)

    return run


for _name, _eager, _fake in (
    ("forward", _eager_forward, _fake_forward),
    ("backward", _eager_backward, _fake_backward),
    ("forward_backward", _eager_forward_backward, _fake_forward_backward),
    ("row_weights", _eager_row_weights, _fake_row_weights),
):
    _LIBRARY.impl(f"kd_loss_{_name}", _eager, "CompositeExplicitAutograd")
    if _name != "row_weights":
        _LIBRARY.impl(f"kd_loss_{_name}", _cuda(_name, _eager), "CUDA")
    torch.library.register_fake(f"dmkd_fast::kd_loss_{_name}", _fake, lib=_LIBRARY)
