"""Check the arguments of kd_loss and convert them to those of its operators (`loss/ops.py`).

The conversion computes row weights and denominators. Every error is one line: got, expected, what
to change. An argument that would be ignored is an error. Nothing here waits for the device, except
for `temperature`, `alpha` or `label_smoothing` given as a tensor. Row counts stay on the device, as
part of the row weights.
Shapes: B rows, C classes.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dmkd_fast.loss.ops import accumulated_type
from dmkd_fast.runtime.errors import warn_once

Reduction = Literal["batchmean", "mean", "sum", "none"]
# Within these limits float32 gradients are close to float64's; at 1e6 they are not.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def problem_of(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    temperature: float,
    alpha: float | None,
    reduction: str,
    t_squared: bool,
    mask: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    num_items: float | Tensor | None,
) -> tuple[Any, ...]:
    """Check the arguments of `kd_loss` and return those of its operators.

    Logits and targets become rows. `kd_scale` contains T^2, and both scales contain the
    denominators that are not part of the row weights.
    """
    _refuse_transforms(
        student, teacher, target, row_weight, temperature, alpha, label_smoothing, num_items
    )
    _check_logits(student, teacher)
    temperature = _number("temperature", temperature)
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(
            f"temperature: got {temperature}, expected {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
        )
    label_smoothing = _number("label_smoothing", label_smoothing)
    if alpha is not None:
        alpha = _number("alpha", alpha)
    if num_items is not None and not isinstance(num_items, Tensor):
        num_items = _number("num_items", num_items)
    _one_of("reduction", reduction, get_args(Reduction))
    alpha = _check_target(student, target, alpha, ignore_index, label_smoothing)
    classes = student.shape[-1]
    rows = student.numel() // classes
    kd_scale = temperature**2 if t_squared else 1.0
    ce_scale = 1.0
    weight = _row_weights(
        student, teacher, target, reduction, mask, row_weight, ignore_index, num_items
    )
    if reduction in ("batchmean", "mean"):
        # A denominator that is counted on the device is part of the row weights.
        counted = mask is not None or (target is not None and target.dtype == torch.int64)
        if num_items is None and not counted:
            kd_scale, ce_scale = (x / rows if rows else math.nan for x in (kd_scale, ce_scale))
        elif num_items is not None and not isinstance(num_items, Tensor):
            kd_scale, ce_scale = kd_scale / num_items, ce_scale / num_items
        if reduction == "mean":
            kd_scale /= classes
    if target is not None:
        target = target.detach()
        target = target.reshape(-1) if target.dtype == torch.int64 else target.reshape(-1, classes)
    return (
        student.reshape(-1, classes),
        teacher.detach().reshape(-1, classes),
        target,
        weight,
        temperature,
        alpha,
        kd_scale,
        ce_scale,
        label_smoothing,
    )


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        _floating(name, logits)
        if logits.ndim == 0 or logits.shape[-1] == 0:
            raise ValueError(
                f"{name}: got shape {tuple(logits.shape)}, expected (..., C) with C >= 1"
            )
    _like("teacher_logits", teacher, student, student.shape)
    is_wasted = teacher.requires_grad and torch.is_grad_enabled()
    if is_wasted and not torch.compiler.is_compiling():
        warn_once(
            "teacher_logits: got a tensor that requires grad, which kd_loss does not compute for "
            "it; use torch.no_grad() to save the memory of its graph"
        )


def _check_target(
    student: Tensor,
    target: Tensor | None,
    alpha: float | None,
    ignore_index: int,
    label_smoothing: float,
) -> float:
    """Check the arguments of the hard-label term and return the weight of the KD term."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected a number in [0, 1)")
    if target is None:
        for name, is_set in (
            ("alpha", alpha is not None and alpha != 1),
            ("label_smoothing", label_smoothing != 0),
            ("ignore_index", ignore_index != -100),
        ):
            if is_set:
                raise ValueError(
                    f"{name}: set without a target, where it would be ignored; pass "
                    "target or leave it out"
                )
        return 1.0
    if alpha is None or not 0 <= alpha < 1:
        raise ValueError(
            f"alpha: got {alpha} with a target, expected a number in [0, 1); with 1 or None the "
            "target would be ignored"
        )
    if isinstance(target, Tensor) and target.dtype == torch.int64:
        _like("target", target, student, student.shape[:-1])
        return alpha
    _floating("target", target, "int64 class ids (...) or probabilities (..., C)")
    _like("target", target, student, student.shape)
    if target.requires_grad:
        raise ValueError("target: got a tensor that requires grad, expected target.detach()")
    if ignore_index != -100:
        raise ValueError("ignore_index: set with probabilities as target; use mask")
    return alpha


def _row_weights(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    reduction: str,
    mask: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int,
    num_items: float | Tensor | None,
) -> Tensor | None:
    """Return the factor of each row (B,), 0 where a row does not count; None if all are 1.

    Does not wait for the device.
    """
    leading, dtype = student.shape[:-1], accumulated_type(student, teacher)
    averages = reduction in ("batchmean", "mean")
    if num_items is not None and not averages:
        raise ValueError(f"num_items: set with reduction {reduction!r}, which divides by nothing")
    keep: Tensor | None = None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: got {got}, expected a bool tensor, True where a row counts")
        _like("mask", mask, student, leading)
        keep = mask.reshape(-1)
    if target is not None and target.dtype == torch.int64:
        labeled = target.reshape(-1) != ignore_index
        keep = labeled if keep is None else keep & labeled
    weight: Tensor | None = None
    if row_weight is not None:
        _floating("row_weight", row_weight)
        _like("row_weight", row_weight, student, leading)
        if row_weight.requires_grad:
            raise ValueError("row_weight: got a tensor that requires grad, expected a detached one")
        weight = row_weight.reshape(-1).to(dtype)
    divisor: Tensor | None = None
    if isinstance(num_items, Tensor):
        _single("num_items", num_items, student)
        divisor = num_items.detach().reshape(()).to(dtype)
    elif num_items is not None and not 0 < num_items < math.inf:
        raise ValueError(f"num_items: got {num_items}, expected a positive number")
    elif keep is not None and averages and num_items is None:
        divisor = keep.sum().to(dtype)
    if divisor is not None:
        weight = 1 / divisor if weight is None else weight / divisor
    if keep is not None:
        weight = keep.to(dtype) if weight is None else torch.where(keep, weight, 0)
    return (
        weight
        if weight is None or weight.ndim == 1
        else weight.expand(student.numel() // student.shape[-1])
    )


def grad_scale_of(
    grad_scale: float | Tensor, student: Tensor, teacher: Tensor
) -> tuple[Tensor | None, float]:
    """Return the factor on the gradient as (tensor on its device, 1.0) or (None, number)."""
    if not isinstance(grad_scale, Tensor):
        return None, _number("grad_scale", grad_scale)
    _single("grad_scale", grad_scale, student)
    return grad_scale.detach().reshape(()).to(accumulated_type(student, teacher)), 1.0


def output_rows(out: Tensor, student: Tensor) -> Tensor:
    """Check `out` and return a view of it as rows (B, C)."""
    _floating("out", out)
    _like("out", out, student, student.shape)
    if out.dtype != student.dtype:
        raise TypeError(f"out: got {out.dtype}, expected the student's {student.dtype}")
    classes = out.shape[-1]
    try:
        rows = out.detach().view(-1, classes)
    except RuntimeError:
        rows = None
    if (
        rows is None
        or (classes > 1 and rows.stride(1) != 1)
        or (len(rows) > 1 and rows.stride(0) < classes)
    ):
        raise ValueError(
            f"out: got strides {out.stride()}, expected dense classes and rows in equal steps that "
            "do not overlap"
        )
    return rows


def _like(name: str, tensor: Tensor, student: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)} to fit "
            f"student_logits {tuple(student.shape)}"
        )
    _same_device(name, tensor, student)


def _single(name: str, tensor: Tensor, student: Tensor) -> None:
    if tensor.numel() != 1:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected one element")
    _refuse_grad(name, tensor)
    _same_device(name, tensor, student)


def _same_device(name: str, tensor: Tensor, student: Tensor) -> None:
    if tensor.device != student.device:
        raise ValueError(
            f"{name}: got device {tensor.device}, expected the student's {student.device}"
        )


def _floating(name: str, tensor: Tensor, expected: str = "a floating-point tensor") -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(
            f"{name}: got {got}, expected {expected} of float32, float64, float16 or bfloat16"
        )


def _number(name: str, value: object) -> float:
    """Convert a Python number, a NumPy number or a tensor of one element to a float."""
    if isinstance(value, float):
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            per_row = (
                "; for one per row divide both logits by it and pass temperature=1, "
                "row_weight=temperature**2"
                if name == "temperature"
                else ""
            )
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected one number for all rows{per_row}"
            )
        _refuse_grad(name, value)
        value = value.item()
    if not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf  # outside the range of every argument


def _refuse_grad(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: got a tensor that requires grad, which no gradient would reach, expected "
            f"{name}.detach()"
        )


def is_temperature(value: object, student: Tensor, *, certain: bool, possible: bool) -> bool:
    """Tell whether the third argument of `DistillKL` is a temperature, not a target or None.

    A number always is. A tensor is one if `certain`, or if `possible` and its shape does not fit a
    target.
    """
    if not isinstance(value, Tensor):
        return isinstance(value, Real)
    of_target = student.shape[:-1] if value.dtype == torch.int64 else student.shape
    return certain or (possible and value.shape != of_target)


def _refuse_transforms(*arguments: object) -> None:
    """Reject transforms and forward mode: the operators would silently drop a tangent."""
    if torch._C._are_functorch_transforms_active() or (
        forward_ad._current_level >= 0
        and any(
            isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None
            for x in arguments
        )
    ):
        raise NotImplementedError(
            "kd_loss: got a forward-mode tangent or a transform of torch.func, expected a plain "
            "call; only reverse mode works: loss.backward() or torch.autograd.grad"
        )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {allowed}")
