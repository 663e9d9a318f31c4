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

from dmkd_fast.loss.divergences import DKD, Divergence, terms_of
from dmkd_fast.loss.ops import accumulated_type
from dmkd_fast.runtime.errors import warn_once

Reduction = Literal["batchmean", "mean", "sum", "none"]
REDUCTIONS = get_args(Reduction)
# Within these limits float32 gradients are close to float64's; at 1e6 they are not.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def problem_of(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    temperature: float | Tensor,
    alpha: float | None,
    reduction: str,
    t_squared: bool,
    mask: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    num_items: float | Tensor | None,
    divergence: Divergence = "forward_kl",
    standardize: bool = False,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Check the arguments of `kd_loss` and return those of its operators: nine, and the extra ones.

    Logits and targets become rows. `kd_scale` contains T^2, and both scales contain the
    denominators that are not part of the row weights. The extra arguments are left out where they
    have their defaults.
    """
    _refuse_transforms(
        student, teacher, target, row_weight, temperature, alpha, label_smoothing, num_items
    )
    _check_logits(student, teacher)
    shape = student.shape
    classes = shape[-1]
    terms = [] if divergence == "forward_kl" else terms_of(divergence)
    if standardize is not False and standardize is not True:
        raise TypeError(f"standardize_logits: got {type(standardize).__name__}, expected a bool")
    temperatures = None
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        temperatures = _temperatures(temperature, student, teacher, t_squared)
        temperature = 1.0
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
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {REDUCTIONS}")
    alpha = _check_target(student, target, alpha, ignore_index, label_smoothing, DKD in terms[::4])
    rows = student.numel() // classes
    kd_scale = temperature**2 if t_squared else 1.0
    ce_scale = 1.0
    weight = _row_weights(
        student, teacher, target, reduction, mask, row_weight, ignore_index, num_items
    )
    if reduction == "batchmean" or reduction == "mean":
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
    if teacher.requires_grad:
        teacher = teacher.detach()
    if len(shape) != 2:
        student, teacher = student.reshape(-1, classes), teacher.reshape(-1, classes)
    extra: tuple[Any, ...] = ()
    if terms or standardize or temperatures is not None:
        extra = (temperatures, terms, standardize)
    return (
        student,
        teacher,
        target,
        weight,
        temperature,
        alpha,
        kd_scale,
        ce_scale,
        label_smoothing,
    ), extra


def arranged(
    tensor: Tensor, class_dim: int, num_classes: int | None, name: str = "student_logits"
) -> Tensor:
    """Return a view of logits with the classes last, and the first `num_classes` of them alone."""
    _floating(name, tensor)
    if class_dim != -1:
        if not isinstance(class_dim, int) or not -tensor.ndim <= class_dim < tensor.ndim:
            raise ValueError(
                f"class_dim: got {class_dim!r}, expected one of the dimensions of {name} "
                f"{tuple(tensor.shape)}"
            )
        tensor = tensor.movedim(class_dim, -1)
    if num_classes is not None:
        most = tensor.shape[-1] if tensor.ndim else 0
        if not isinstance(num_classes, int) or not 1 <= num_classes <= most:
            raise ValueError(
                f"num_classes: got {num_classes!r}, expected 1 to {most}, the classes of {name}"
            )
        tensor = tensor[..., :num_classes]
    return tensor


def _temperatures(temperature: Tensor, student: Tensor, teacher: Tensor, t_squared: bool) -> Tensor:
    """Check the temperatures of all rows; return them and the factors on their KD terms (B, 2)."""
    leading = student.shape[:-1]
    _floating("temperature", temperature)
    _refuse_grad("temperature", temperature)
    if temperature.shape not in (leading, (*leading, 1)):
        raise ValueError(
            f"temperature: got shape {tuple(temperature.shape)}, expected one number, or one of "
            f"each row: {tuple(leading)}"
        )
    _same_device("temperature", temperature, student)
    each = temperature.detach().reshape(-1).to(accumulated_type(student, teacher))
    inside = (each >= MIN_TEMPERATURE) & (each <= MAX_TEMPERATURE)
    if each.device.type == "cpu" and not torch.compiler.is_compiling() and not inside.all():
        wrong = each[~inside][0].item()
        raise ValueError(
            f"temperature: got {wrong:g} in a row, expected {MIN_TEMPERATURE:g} to "
            f"{MAX_TEMPERATURE:g}"
        )
    # Elsewhere an error would wait for the device: the loss of the row is nan.
    each = torch.where(inside, each, math.nan)
    return torch.stack((each, each**2 if t_squared else torch.ones_like(each)), 1)


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
    is_dkd: bool,
) -> float:
    """Check the arguments of the hard-label term and return the weight of the KD term."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected a number in [0, 1)")
    has_ids = isinstance(target, Tensor) and target.dtype == torch.int64
    if is_dkd and not has_ids:
        got = "None" if target is None else getattr(target, "dtype", type(target).__name__)
        raise ValueError(f"target: got {got}, expected int64 class ids, which dkd needs")
    without = "a target" if target is None else "a hard-label term"
    if target is None or (is_dkd and (alpha is None or alpha == 1)):
        for name, is_set in (
            ("alpha", alpha is not None and alpha != 1),
            ("label_smoothing", label_smoothing != 0),
            ("ignore_index", ignore_index != -100 and target is None),
        ):
            if is_set:
                raise ValueError(
                    f"{name}: set without {without}, where it would be ignored; pass "
                    f"{'target' if target is None else 'alpha'} or leave it out"
                )
        if target is not None:
            _like("target", target, student, student.shape[:-1])
        return 1.0
    if alpha is None or not 0 <= alpha < 1:
        raise ValueError(
            f"alpha: got {alpha} with a target, expected a number in [0, 1); with 1 or None the "
            "target would be ignored"
        )
    if has_ids:
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
    if target is None and mask is None and row_weight is None and num_items is None:
        return None
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
        fix = "; num_classes leaves padding out" if name == "teacher_logits" else ""
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)} to fit "
            f"student_logits {tuple(student.shape)}{fix}"
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
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected one number for all rows"
            )
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


def _refuse_grad(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: got a tensor that requires grad, which no gradient would reach, expected "
            f"{name}.detach()"
        )


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
