"""Distillation loss on logits, fused: alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE.

py, the
operators underneath and who computes them in kd_loss_ops.py. Gradient by the student's logits, with
softmaxes p (teacher) and q (student) at T: alpha * T * (q - p) + (1 - alpha) * (softmax(s) -
target), times the reduction's factor. B rows, C classes.

Source: Hinton et al., "Distilling the knowledge in a neural network" (arXiv 1503.02531), section 2.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor, nn

from dmkd_fast.loss import ops
from dmkd_fast.loss.arguments import (
    Reduction,
    grad_scale_of,
    is_temperature,
    output_rows,
    problem_of,
)
from dmkd_fast.runtime.operators import check_own_memory


class KdLossParts(NamedTuple):
    """What `kd_loss(..., return_parts=True)` returns: loss = alpha * kd + (1 - alpha) * ce.

    `kd` and `ce` (None without a target) are reduced like the loss and carry no gradient.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor | None


@overload
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, *,
    temperature: float = ..., alpha: float | None = ..., reduction: Reduction = ...,
    t_squared: bool = ..., mask: Tensor | None = ..., row_weight: Tensor | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., num_items: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, *,
    temperature: float = ..., alpha: float | None = ..., reduction: Reduction = ...,
    t_squared: bool = ..., mask: Tensor | None = ..., row_weight: Tensor | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., num_items: float | Tensor | None = ...,
    return_parts: bool,
) -> Tensor | KdLossParts: ...  # fmt: skip
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, *,
    temperature: float = 4.0, alpha: float | None = None, reduction: Reduction = "batchmean",
    t_squared: bool = True, mask: Tensor | None = None, row_weight: Tensor | None = None,
    ignore_index: int = -100, label_smoothing: float = 0.0,
    num_items: float | Tensor | None = None, return_parts: bool = False,
) -> Tensor | KdLossParts:  # fmt: skip
    """Distillation loss, in one pass over the logits.

    Equals, but exact and never negative as the two distributions meet::

        log_q = (student_logits.float() / T).log_softmax(-1)
        p = (teacher_logits.float() / T).softmax(-1)
        kd = F.kl_div(log_q, p, reduction=reduction) * T**2
        ce = F.cross_entropy(student_logits.float(), target)
        loss = alpha * kd + (1 - alpha) * ce

    A row counts unless `mask` is False there or its class id is `ignore_index`; one that does not
    count adds nothing to either term and gets a zero gradient, whatever its logits are. With n
    the number of rows that count, or `num_items` where given, the sums are divided by:

    ===========  ==========  ==========
    reduction    KD term     CE term
    ===========  ==========  ==========
    "batchmean"  n           n
    "mean"       n * C       n
    "sum"        1           1
    "none"       one value per row, 0 where a row does not count
    ===========  ==========  ==========

    `row_weight` changes no denominator. Leading dimensions count as rows: (B, L, C) has B * L of
    them, where `F.kl_div` divides "batchmean" by B. No rows at all give nan, as in torch; rows of
    which none counts give 0.

    Args:
        student_logits: (..., C) float32, float64, float16 or bfloat16, any strides; gradients flow
            into it.
        teacher_logits: Same shape, any of these dtypes; never gets a gradient.
        target: Class ids (...) int64, or probabilities (..., C) of any of these dtypes.
        temperature: T of the KD term, 1e-4 to 1e4; the CE term is at T = 1. One number for all
            rows: a Python or NumPy number, or a tensor of one element (on a GPU, reading it waits
            for the GPU). No gradient reaches it. The same holds for alpha and label_smoothing.
        alpha: Share of the KD term, in [0, 1). None, the only choice without a target, means 1.
        reduction: See above.
        t_squared: Multiply the KD term with T^2, which keeps its gradient's size as T changes.
        mask: (...) bool, True where a row counts.
        row_weight: (...) factors on the rows' losses.
        ignore_index: Class id of rows that do not count.
        label_smoothing: In [0, 1): this share of the target is spread over all classes.
        num_items: Number of rows to divide by, for batches that are parts of a larger one (gradient
            accumulation, data parallelism): a number, or a tensor of one on the logits' device.
        return_parts: Return `KdLossParts(loss, kd, ce)`.

    Returns:
        float32 (float64 if any logits are): a scalar, or (...) for "none".

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes or devices differ, an argument is out of range or would be ignored.
        NotImplementedError: A forward-mode derivative or a transform of torch.func is asked for.
        RuntimeError: A class id is out of range (on CUDA, where raising would mean waiting, the
            loss is nan instead).
    """
    problem = problem_of(
        student_logits, teacher_logits, target, temperature, alpha, reduction, t_squared, mask,
        row_weight, ignore_index, label_smoothing, num_items,
    )  # fmt: skip
    per_row = reduction == "none"
    if torch.is_grad_enabled() and student_logits.requires_grad:
        loss, kd, ce = _KdLoss.apply(per_row, *problem)
    else:
        loss, kd, ce, _ = ops.forward(*problem, per_row)
    if per_row:
        shape = student_logits.shape[:-1]
        loss, kd, ce = loss.view(shape), kd.view(shape), ce.view(shape)
    return KdLossParts(loss, kd, None if target is None else ce) if return_parts else loss


def kd_loss_and_grad(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, *,
    temperature: float = 4.0, alpha: float | None = None,
    reduction: Literal["batchmean", "mean", "sum"] = "batchmean",
    t_squared: bool = True, mask: Tensor | None = None, row_weight: Tensor | None = None,
    ignore_index: int = -100, label_smoothing: float = 0.0,
    num_items: float | Tensor | None = None, grad_scale: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient in one pass: two reads and one write, without an autograd graph.

    Use it as `loss, grad = kd_loss_and_grad(...)`, then `student_logits.backward(grad)`.

    Args:
        student_logits, teacher_logits, target, temperature, alpha, reduction, t_squared, mask,
            row_weight, ignore_index, label_smoothing, num_items: As for `kd_loss`, without "none".
        grad_scale: Factor on the gradient alone, applied in float32 before rounding: a number, or a
            tensor of one on the logits' device, such as a GradScaler's scale.
        out: Where to write the gradient: shape, dtype and device of `student_logits`, classes
            dense, rows in equal steps that do not overlap, in memory that no input uses.

    Returns:
        The loss (a scalar as from `kd_loss`), and grad_scale times its gradient by
        `student_logits` (same shape and dtype).

    Raises:
        TypeError, ValueError, NotImplementedError: As `kd_loss`.
    """
    problem = problem_of(
        student_logits.detach(), teacher_logits, target, temperature, alpha, reduction, t_squared,
        mask, row_weight, ignore_index, label_smoothing, num_items,
    )  # fmt: skip
    if reduction == "none":
        raise ValueError('reduction: got "none", expected "batchmean", "mean" or "sum"')
    student, teacher = problem[:2]
    upstream, factor = grad_scale_of(grad_scale, student, teacher)
    if out is None:
        grad = torch.empty_like(student, memory_format=torch.contiguous_format)
        out = grad.view(student_logits.shape)
    else:
        grad = output_rows(out, student_logits)
        check_own_memory(grad, {
            "student_logits": student, "teacher_logits": teacher, "target": problem[2],
            "row_weight": problem[3], "grad_scale": upstream,
        })  # fmt: skip
        torch.autograd.graph.increment_version(out)
    loss = ops.forward_backward(grad, upstream, factor, *problem)[0]
    return loss, out


class DistillKL(nn.Module):
    """`kd_loss` as a module.

    Also callable as the published DM-KD code does, `DistillKL()(y_s, y_t, temp, opt)`: temperature
    with the call, and options of which that code reads no field, and neither does this.

    Args:
        temperature: T; None means `kd_loss`'s default, or that each call gives it.
        alpha, reduction, t_squared, ignore_index, label_smoothing: As for `kd_loss`.
    """

    def __init__(
        self, temperature: float | None = None, *, alpha: float | None = None,
        reduction: Reduction = "batchmean", t_squared: bool = True, ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.temperature, self.alpha, self.reduction = temperature, alpha, reduction
        self.t_squared, self.ignore_index = t_squared, ignore_index
        self.label_smoothing = label_smoothing

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor,
        target: Tensor | float | None = None, opt: object = None, *,
        mask: Tensor | None = None, row_weight: Tensor | None = None,
        num_items: float | Tensor | None = None, return_parts: bool = False,
    ) -> Tensor | KdLossParts:  # fmt: skip
        """See `kd_loss`; a number in third place is the temperature, as in the published code.

        So is a tensor there that is followed by `opt` or, where neither temperature nor alpha were
        set, cannot be a target.
        """
        temperature = self.temperature
        is_free = temperature is None and self.alpha is None
        if is_temperature(target, student_logits, certain=opt is not None, possible=is_free):
            if temperature is not None:
                raise ValueError(
                    f"temperature: got {target} with the call and {temperature} before, expected "
                    "one; write DistillKL() to give it with each call"
                )
            temperature, target = cast(float, target), None
        elif opt is not None:
            raise ValueError(
                "opt: expected after a temperature, as in DistillKL()(s, t, temp, opt)"
            )
        given = {} if temperature is None else {"temperature": temperature}
        return kd_loss(
            student_logits, teacher_logits, cast("Tensor | None", target), alpha=self.alpha,
            reduction=self.reduction,
            t_squared=self.t_squared, mask=mask, row_weight=row_weight,
            ignore_index=self.ignore_index, label_smoothing=self.label_smoothing,
            num_items=num_items, return_parts=return_parts, **given,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"temperature={self.temperature}, alpha={self.alpha}, reduction={self.reduction!r}"


class _KdLoss(torch.autograd.Function):
    """Loss, KD and CE parts of which the loss is differentiable.

    On a CPU the forward pass computes the gradient too, while the row is in cache, for an upstream
    gradient of 1: it then is handed over, once. Every other case (another upstream gradient, a
    second backward pass, rows, float16, which would underflow, other devices, where looking at the
    upstream gradient would wait for them) recomputes it from the logits and each row's statistics,
    with the upstream gradient multiplied in before rounding.
    """

    @staticmethod
    def forward(ctx: Any, per_row: bool, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
        student, teacher, target, weight, *numbers = problem
        ctx.grad = None
        if (
            per_row
            or student.device.type != "cpu"
            or student.dtype == torch.float16
            or torch.compiler.is_compiling()
        ):
            loss, kd, ce, stats = ops.forward(*problem, per_row)
        else:
            ctx.grad = torch.empty_like(student, memory_format=torch.contiguous_format)
            loss, kd, ce, stats = ops.forward_backward(ctx.grad, None, 1.0, *problem)
        ctx.save_for_backward(stats, student, teacher, target, weight)
        ctx.numbers = numbers
        ctx.mark_non_differentiable(kd, ce)
        return loss, kd, ce

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError("kd_loss has no second derivative; do not pass create_graph=True")
        grad, ctx.grad = ctx.grad, None
        if grad is None or upstream.item() != 1:
            del grad  # before its successor is allocated
            grad = ops.backward(upstream, *ctx.saved_tensors, *ctx.numbers)
        return None, grad, *[None] * (3 + len(ctx.numbers))
