"""Temperature-scaled KL distillation loss on logits, fused: T^2 * KL(softmax(t/T) || softmax(s/T)).

Stands on floor 1: schema, shape function and autograd here, the CPU kernel in
csrc/kd_loss_cpu.cpp, the definition in reference.py (also what runs where there is no kernel).
Gradient by the student's logits: T * (softmax(s/T) - softmax(t/T)), times what the reduction gives.
B rows, C classes.

Source: Hinton et al., "Distilling the knowledge in a neural network" (arXiv 1503.02531), section 2.
"""

from __future__ import annotations

import importlib
import math
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dmkd_fast.ops import reference

Reduction = Literal["batchmean", "mean", "sum", "none"]

_LIBRARY = torch.library.Library("dmkd_fast", "DEF")
_LIBRARY.define("kd_loss_forward(Tensor student, Tensor teacher, float temperature) -> Tensor")
_LIBRARY.define(
    "kd_loss_backward(Tensor row_grad, Tensor student, Tensor teacher, float temperature) -> Tensor"
)
_LIBRARY.define(
    "kd_loss_forward_backward(Tensor row_grad, Tensor student, Tensor teacher, float temperature) "
    "-> (Tensor, Tensor)"
)

try:
    # Importing the extension registers the CPU kernels.
    INSTRUCTION_SET: str = importlib.import_module("dmkd_fast._C").instruction_set()
except ImportError as error:
    INSTRUCTION_SET = "none"
    _WHY_EAGER = str(error)


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0,
    reduction: Reduction = "batchmean",
) -> Tensor:  # fmt: skip
    """Distillation loss, in one pass over the logits.

    Equals, but exact and never negative as the two distributions meet::

        log_q = (student_logits.float() / T).log_softmax(-1)
        p = (teacher_logits.float() / T).softmax(-1)
        F.kl_div(log_q, p, reduction="batchmean") * T**2

    Args:
        student_logits: (..., C) float32, float64, float16 or bfloat16; gradients flow into it.
        teacher_logits: Same shape; never gets a gradient.
        temperature: T, positive.
        reduction: "batchmean" divides by the number of rows, "mean" by the number of logits,
            "sum" adds the rows, "none" keeps one value per row.

    Returns:
        float32 (float64 for float64 logits): a scalar, or (...) for "none".

    Raises:
        TypeError: Logits are not floating-point tensors.
        ValueError: Shapes or devices differ, or an argument is out of range.
    """
    student, teacher = _rows(student_logits, teacher_logits, temperature)
    rows: Tensor = _KdLoss.apply(student, teacher, float(temperature))
    if reduction == "none":
        return rows.view(student_logits.shape[:-1])
    return rows.sum() * _row_weight(reduction, student)


def kd_loss_and_grad(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient in one pass: two reads and one write, without an autograd graph.

    Use it as `loss, grad = kd_loss_and_grad(...)`, then `student_logits.backward(grad)`.

    Args:
        student_logits, teacher_logits, temperature: As for `kd_loss`.
        grad_scale: Factor on the gradient alone, applied in float32 before rounding.

    Returns:
        The batchmean loss (scalar float32), and grad_scale times its gradient by
        `student_logits` (same shape and dtype).
    """
    student, teacher = _rows(student_logits.detach(), teacher_logits, temperature)
    weight = _row_weight("batchmean", student)
    row_grad = torch.full(
        (1,), weight * grad_scale, dtype=_loss_dtype(student), device=student.device
    )
    rows, grad = torch.ops.dmkd_fast.kd_loss_forward_backward(
        row_grad.expand(len(student)), student, teacher, float(temperature)
    )
    return rows.sum() * weight, grad.view(student_logits.shape).to(student_logits.dtype)


class DistillKL(nn.Module):
    """`kd_loss` as a module.

    Args:
        temperature: T.
        reduction: As for `kd_loss`.
    """

    def __init__(self, temperature: float = 4.0, *, reduction: Reduction = "batchmean") -> None:
        super().__init__()
        self.temperature, self.reduction = temperature, reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """See `kd_loss`."""
        return kd_loss(
            student_logits, teacher_logits, temperature=self.temperature, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


class _KdLoss(torch.autograd.Function):
    """Per-row losses; the backward pass recomputes both softmaxes from the saved logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.temperature = temperature
        return torch.ops.dmkd_fast.kd_loss_forward(student, teacher, temperature)

    @staticmethod
    def backward(ctx: Any, row_grad: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("kd_loss has no second derivative; do not pass create_graph=True")
        student, teacher = ctx.saved_tensors
        # The upstream gradient is multiplied in before rounding: float16 underflows otherwise.
        grad = torch.ops.dmkd_fast.kd_loss_backward(row_grad, student, teacher, ctx.temperature)
        return grad, None, None


def _rows(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Check the arguments; both logits as (B, C) of one dtype, the teacher's detached."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"{name}: got {got}, expected a floating-point tensor")
        if logits.ndim == 0 or logits.shape[-1] == 0:
            raise ValueError(
                f"{name}: got shape {tuple(logits.shape)}, expected (..., C) with C >= 1"
            )
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_logits: got shape {tuple(teacher.shape)}, expected the student's "
            f"{tuple(student.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher_logits: got device {teacher.device}, expected the student's {student.device}"
        )
    if not temperature > 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature: got {temperature}, expected a positive number")
    if INSTRUCTION_SET == "none" and student.device.type == "cpu":
        _say_eager_once()
    if student.dtype != teacher.dtype:
        common = torch.promote_types(student.dtype, teacher.dtype)
        student, teacher = student.to(common), teacher.to(common)
    classes = student.shape[-1]
    return student.reshape(-1, classes), teacher.detach().reshape(-1, classes)


def _row_weight(reduction: str, rows: Tensor) -> float:
    """What each row's loss is multiplied with; an empty batch gives 0 * nan = nan, as in torch."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: got {reduction!r}, expected one of {get_args(Reduction)}")
    count = {"batchmean": rows.shape[0], "mean": rows.numel(), "sum": 1}[reduction]
    return 1.0 / count if count else math.nan


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


_said_eager = False


def _say_eager_once() -> None:
    global _said_eager
    if not _said_eager:
        _said_eager = True
        warnings.warn(
            f"dmkd_fast has no compiled CPU kernels ({_WHY_EAGER}); kd_loss uses its eager "
            "definition, several times slower. Install again where there is a C++ compiler; "
            "torch.compile on the CPU needs one too.",
            stacklevel=4,
        )


def _eager_forward(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return reference.kd_loss(student, teacher, temperature=temperature)


def _eager_backward(
    row_grad: Tensor, student: Tensor, teacher: Tensor, temperature: float
) -> Tensor:
    grad = reference.kd_grad(student, teacher, temperature=temperature)
    return (grad * row_grad[:, None]).to(student.dtype)


def _eager_forward_backward(
    row_grad: Tensor, student: Tensor, teacher: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    rows = _eager_forward(student, teacher, temperature)
    return rows, _eager_backward(row_grad, student, teacher, temperature)


def _fake_forward(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return student.new_empty(student.shape[0], dtype=_loss_dtype(student))


def _fake_backward(
    row_grad: Tensor, student: Tensor, teacher: Tensor, temperature: float
) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _fake_forward_backward(
    row_grad: Tensor, student: Tensor, teacher: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    return (
        _fake_forward(student, teacher, temperature),
        _fake_backward(row_grad, student, teacher, temperature),
    )


# Every device without a kernel of its own computes the definition.
for _name, _eager, _fake in (
    ("kd_loss_forward", _eager_forward, _fake_forward),
    ("kd_loss_backward", _eager_backward, _fake_backward),
    ("kd_loss_forward_backward", _eager_forward_backward, _fake_forward_backward),
):
    _LIBRARY.impl(_name, _eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dmkd_fast::{_name}", _fake, lib=_LIBRARY)
