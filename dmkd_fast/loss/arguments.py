"""Check the arguments of kd_loss and convert them to those of its operators (`loss/ops.py`).

An argument that would be ignored is an error. Nothing here waits for the device, except for
`temperature`, `alpha` or `label_smoothing` given as a tensor. Shapes: B rows, C classes.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dmkd_fast.loss import ops
from dmkd_fast.loss.divergences import DKD, Divergence, terms_of
from dmkd_fast.runtime.errors import invalid, warn_once

Reduction = Literal["batchmean", "mean", "sum", "none"]
REDUCTIONS = get_args(Reduction)
# Within these limits float32 gradients are close to float64's; at 1e6 they are not.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
IN_RANGE = f"{MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LISTED = "of float32, float64, float16 or bfloat16"
# Dtypes of the tensors that are not of DTYPES, and how an error describes them.
_TARGET = f"int64 class ids (...) or probabilities (..., C) {_LISTED}"
_EXPECTED = {
    "mask": ((torch.bool,), "a bool tensor, True where a row counts"),
    "target": ((torch.int64, *DTYPES), _TARGET),
}


class Settings(TypedDict, total=False):
    """Options of `kd_loss` that stay the same for a whole training."""

    alpha: float | None
    reduction: Reduction
    t_squared: bool
    ignore_index: int
    label_smoothing: float
    divergence: Divergence
    standardize_logits: bool
    class_dim: int
    num_classes: int | None


class Options(Settings, total=False):
    """Options of `kd_loss`; `problem_of` has their default values."""

    temperature: float | Tensor
    mask: Tensor | None
    row_weight: Tensor | None
    num_items: float | Tensor | None


def problem_of(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    temperature: float | Tensor = 4.0,
    alpha: float | None = None,
    reduction: str = "batchmean",
    t_squared: bool = True,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_items: float | Tensor | None = None,
    divergence: Divergence = "forward_kl",
    standardize_logits: bool = False,
    class_dim: int = -1,
    num_classes: int | None = None,
) -> tuple[ops.Problem, torch.Size]:
    """Check the arguments of `kd_loss`; return those of its operators, and the shape of the rows.

    Both scales contain the denominators that are not part of the row weights.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        _refuse_transforms(
            student, teacher, target, row_weight, temperature, alpha, label_smoothing, num_items
        )
    if class_dim != -1 or num_classes is not None:
        student = arranged("student_logits", student, class_dim, num_classes)
        teacher = arranged("teacher_logits", teacher, class_dim, num_classes)
        if target is not None and target.is_floating_point():
            target = arranged("target", target, class_dim, None)
    shape = _check_logits(student, teacher)
    leading, classes = shape[:-1], shape[-1]
    rows = student.numel() // classes
    terms = [] if divergence == "forward_kl" else terms_of(divergence)
    if standardize_logits is not False and standardize_logits is not True:
        got = type(standardize_logits).__name__
        raise TypeError(f"standardize_logits: got {got}, expected a bool")
    temperatures = None
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        temperatures = _temperatures(temperature, student, teacher, t_squared)
        temperature = 1.0
    temperature = _number("temperature", temperature)
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise invalid("temperature", temperature, IN_RANGE)
    label_smoothing = _number("label_smoothing", label_smoothing)
    if alpha is not None:
        alpha = _number("alpha", alpha)
    if reduction not in REDUCTIONS:
        raise invalid("reduction", repr(reduction), f"one of {REDUCTIONS}")
    alpha = _check_target(student, target, alpha, ignore_index, label_smoothing, DKD in terms[::4])
    if mask is not None:
        _check("mask", mask, student, leading)
    if row_weight is not None:
        _check("row_weight", row_weight, student, leading)
    if teacher.requires_grad:
        teacher = teacher.detach()
    if len(leading) != 1:
        student, teacher = student.reshape(rows, classes), teacher.reshape(rows, classes)
    has_ids = target is not None and target.dtype == torch.int64
    if target is not None and not has_ids:
        target = target.detach().reshape(rows, classes)
    elif target is not None and len(leading) != 1:
        target = target.reshape(rows)
    if target is None and mask is None and row_weight is None and num_items is None:
        is_counted = reduction in ("batchmean", "mean")
        weight, divisor = None, (float(rows) or math.nan) if is_counted else 1.0
    else:
        weight, divisor = _row_weights(
            student, teacher, target, reduction, mask, row_weight, ignore_index, num_items
        )
    kd_scale = (temperature**2 if t_squared else 1.0) / divisor
    if reduction == "mean":
        kd_scale /= classes
    numbers = temperature, alpha, kd_scale, 1.0 / divisor, label_smoothing
    rest: Any = (*numbers, temperatures, terms, standardize_logits)
    return ops.Problem(student, teacher, target, weight, *rest), leading


def arranged(name: str, tensor: Tensor, class_dim: int, num_classes: int | None) -> Tensor:
    """Return a view of a tensor with the first `num_classes` classes in the last dimension."""
    _check(name, tensor)
    if class_dim != -1:
        if not _is_whole(class_dim) or not -tensor.ndim <= class_dim < tensor.ndim:
            expected = f"one of the dimensions of {name} {tuple(tensor.shape)}"
            raise invalid("class_dim", repr(class_dim), expected)
        tensor = tensor.movedim(class_dim, -1)
    if num_classes is not None:
        most = tensor.shape[-1] if tensor.ndim else 0
        if not _is_whole(num_classes) or not 1 <= num_classes <= most:
            expected = f"1 to {most}, the classes of {name}"
            raise invalid("num_classes", repr(num_classes), expected)
        tensor = tensor[..., :num_classes]
    return tensor


def _is_whole(value: object) -> bool:
    """Return whether a value is an integer of Python or NumPy."""
    return isinstance(value, int | Integral) and not isinstance(value, bool)


def _temperatures(temperature: Tensor, student: Tensor, teacher: Tensor, t_squared: bool) -> Tensor:
    """Check the temperatures of all rows; return them and the factors on their KD terms (B, 2)."""
    leading = student.shape[:-1]
    _check("temperature", temperature)
    if temperature.shape not in (leading, (*leading, 1)):
        expected = f"one number, or one of each row: {tuple(leading)}"
        raise invalid("temperature", f"shape {tuple(temperature.shape)}", expected)
    _check("temperature", temperature, student, temperature.shape)
    each = temperature.detach().reshape(-1).to(ops.accumulated_type(student, teacher))
    inside = (each >= MIN_TEMPERATURE) & (each <= MAX_TEMPERATURE)
    if each.device.type == "cpu" and not torch.compiler.is_compiling() and not inside.all():
        raise invalid("temperature", f"{each[~inside][0].item():g} in a row", IN_RANGE)
    # Elsewhere an error would wait for the device: the loss of the row is nan.
    each = torch.where(inside, each, math.nan)
    return torch.stack((each, each**2 if t_squared else torch.ones_like(each)), 1)


def _check_logits(student: Tensor, teacher: Tensor) -> torch.Size:
    """Check both logits and return their shape."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, Tensor) or logits.dtype not in DTYPES:
            _check(name, logits)
    shape = student.shape
    if not shape or shape[-1] == 0:
        raise invalid("student_logits", f"shape {tuple(shape)}", "(..., C) with C >= 1")
    _fits("teacher_logits", teacher, student, shape)
    is_wasted = teacher.requires_grad and torch.is_grad_enabled()
    if is_wasted and not torch.compiler.is_compiling():
        why = "kd_loss computes none for it; torch.no_grad() saves the memory of its graph"
        warn_once(f"teacher_logits: got a tensor that requires grad; {why}")
    return shape


def _check_target(
    student: Tensor,
    target: Tensor | None,
    alpha: float | None,
    ignore_index: int,
    label_smoothing: float,
    is_dkd: bool,
) -> float:
    """Check the arguments of the hard-label term and return the weight of the KD term."""
    if not 0 <= label_smoothing < 1:
        raise invalid("label_smoothing", label_smoothing, "a number in [0, 1)")
    has_ids = isinstance(target, Tensor) and target.dtype == torch.int64
    if is_dkd and not has_ids:
        got = "None" if target is None else getattr(target, "dtype", type(target).__name__)
        raise invalid("target", got, "int64 class ids, which dkd needs")
    if target is None or (is_dkd and (alpha is None or alpha == 1)):
        missing = "a target" if target is None else "alpha"
        for name, is_set in (
            ("alpha", alpha is not None and alpha != 1),
            ("label_smoothing", label_smoothing != 0),
            ("ignore_index", ignore_index != -100 and target is None),
        ):
            if is_set:
                raise ValueError(f"{name}: set without {missing}, so it would be ignored")
        alpha = 1.0
    elif alpha is None or not 0 <= alpha < 1:
        fix = "with 1 or None the target would be ignored"
        raise invalid("alpha", f"{alpha} with a target", "a number in [0, 1)", fix)
    if target is not None and has_ids:
        _fits("target", target, student, student.shape[:-1])
    elif target is not None:
        _check("target", target, student, student.shape)
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
) -> tuple[Tensor | None, float]:
    """Return the factor of each row (B,), 0 where it does not count, and the number to divide by.

    A denominator that is counted on the device, or given there, is part of the factors.
    """
    is_counted = num_items is None and reduction in ("batchmean", "mean")
    if num_items is not None and reduction in ("sum", "none"):
        raise ValueError(f"num_items: set with reduction {reduction!r}, which divides by nothing")
    dtype, divisor, items = ops.accumulated_type(student, teacher), 1.0, None
    if isinstance(num_items, Tensor):
        items = _single("num_items", num_items, student).to(dtype)
    elif num_items is not None:
        divisor = _number("num_items", num_items)
        if not 0 < divisor < math.inf:
            raise invalid("num_items", num_items, "a positive number")
    ids = target if target is not None and target.dtype == torch.int64 else None
    weight = None if row_weight is None else row_weight.detach().reshape(-1).to(dtype)
    if ids is not None or mask is not None or items is not None:
        mask = None if mask is None else mask.reshape(-1)
        numbers = ignore_index, is_counted
        return ops.row_weights(student, teacher, ids, mask, weight, items, *numbers), divisor
    return weight, (float(len(student)) or math.nan) if is_counted else divisor


def output_rows(out: Tensor, student: Tensor) -> Tensor:
    """Check `out` and return a view of it as rows (B, C)."""
    _check("out", out)
    _fits("out", out, student, student.shape)
    if out.dtype != student.dtype:
        raise TypeError(f"out: got {out.dtype}, expected the student's {student.dtype}")
    classes = out.shape[-1]
    try:
        rows = out.detach().view(-1, classes)
        are_rows = classes == 1 or rows.stride(1) == 1
        are_rows = are_rows and (len(rows) <= 1 or rows.stride(0) >= classes)
    except RuntimeError:
        are_rows = False
    if not are_rows:
        expected = "dense classes and rows in equal steps that do not overlap"
        raise invalid("out", f"strides {out.stride()}", expected)
    return rows


def _single(name: str, tensor: Tensor, student: Tensor) -> Tensor:
    """Check a tensor of one element, and return it without dimensions."""
    if tensor.numel() != 1:
        raise invalid(name, f"shape {tuple(tensor.shape)}", "one element")
    _refuse_grad(name, tensor)
    _fits(name, tensor, student, tensor.shape)
    return tensor.detach().reshape(())


def _check(
    name: str, value: object, student: Tensor | None = None, shape: torch.Size | None = None
) -> None:
    """Check the dtype of a tensor; with `shape` also that it fits the student's logits."""
    dtypes, expected = _EXPECTED.get(name, (DTYPES, f"a floating-point tensor {_LISTED}"))
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: got {got}, expected {expected}")
    if student is not None and shape is not None:
        _refuse_grad(name, value)
        _fits(name, value, student, shape)


def _fits(name: str, tensor: Tensor, student: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        expected = f"{tuple(shape)} to fit student_logits {tuple(student.shape)}"
        fix = "num_classes leaves padding out" if name == "teacher_logits" else ""
        raise invalid(name, f"shape {tuple(tensor.shape)}", expected, fix)
    if tensor.device != student.device:
        raise invalid(name, f"device {tensor.device}", f"the student's {student.device}")


def _number(name: str, value: object) -> float:
    """Convert a Python number, a NumPy number or a tensor of one element to a float."""
    if isinstance(value, float):
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise invalid(name, f"shape {tuple(value.shape)}", "one number for all rows")
        _refuse_grad(name, value)
        value = value.item()
    elif getattr(value, "size", None) == 1 and hasattr(value, "item"):
        value = value.item()  # a NumPy array
    if not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf  # outside the range of every argument


def grad_scale_of(
    grad_scale: float | Tensor, student: Tensor, teacher: Tensor
) -> tuple[Tensor | None, float]:
    """Return the factor on the gradient as (tensor on its device, 1.0) or (None, number)."""
    if not isinstance(grad_scale, Tensor):
        return None, _number("grad_scale", grad_scale)
    scale = _single("grad_scale", grad_scale, student)
    return scale.to(ops.accumulated_type(student, teacher)), 1.0


def _refuse_grad(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        got = "a tensor that requires grad, which no gradient would reach"
        raise invalid(name, got, f"{name}.detach()")


def _refuse_transforms(*arguments: object) -> None:
    """Reject a transform or a tangent among the arguments, which the operators would drop."""
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
