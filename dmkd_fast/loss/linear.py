"""The loss of two linear heads, without their logits: for vocabularies of many thousands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmkd_fast.loss.divergences import DIST, terms_of
from dmkd_fast.loss.functional import kd_loss_and_grad
from dmkd_fast.runtime.errors import invalid

CHUNK_LOGITS = 8 * 2**20  # logits of the student at a time


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    chunk_rows: int | None = None,
    **options: Any,
) -> Tensor:
    """Compute `kd_loss(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T)`.

    The logits are made in chunks of rows. The forward pass computes the gradients by
    `student_hidden` and `student_weight` too, so that the logits are made once.

    Args:
        student_hidden: Inputs (B, D) of the student's head.
        student_weight: Weights (C, D) of the student's head.
        teacher_hidden: Inputs (B, E) of the teacher's head, which get no gradient.
        teacher_weight: Weights (C, E) of the teacher's head, which get no gradient.
        target: Same as for `kd_loss`, with B rows.
        chunk_rows: Rows at a time; None: as many as make 8 million logits.
        options: Further arguments of `kd_loss`, except `reduction="none"`, dist, whose terms span
            rows, `class_dim` and `return_parts`.
    """
    sizes = []
    for who, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            expected = f"(C, D) to fit rows (B, D) of shape {tuple(hidden.shape)}"
            raise invalid(f"{who}_weight", f"shape {tuple(weight.shape)}", expected)
        sizes.append(f"{len(weight)} classes and {len(hidden)} rows")
    if sizes[0] != sizes[1]:
        raise invalid("teacher_weight, teacher_hidden", sizes[1], sizes[0])
    reduction = options.setdefault("reduction", "batchmean")
    if reduction == "none" or DIST in terms_of(options.get("divergence", "forward_kl"))[::4]:
        raise ValueError('reduction="none" and dist: need all rows at once, expected others')
    if reduction != "sum" and options.get("num_items") is None:
        counts = [] if options.get("mask") is None else [options["mask"]]
        if target is not None and target.dtype == torch.int64:
            counts.append(target != options.get("ignore_index", -100))
        counted = torch.stack(counts).all(0).sum().clamp(min=1) if counts else len(student_hidden)
        options["num_items"] = counted
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_LOGITS // max(1, len(student_weight)))
    elif type(chunk_rows) is not int or chunk_rows < 1:
        raise invalid("chunk_rows", repr(chunk_rows), "a whole number of at least 1, or None")
    teacher = teacher_hidden.detach(), teacher_weight.detach()
    arguments = student_hidden, student_weight, teacher, target, chunk_rows, options
    loss: Tensor = _LinearKdLoss.apply(*arguments)
    return loss


class _LinearKdLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher: tuple[Tensor, Tensor],
        target: Tensor | None,
        chunk_rows: int,
        options: dict[str, Any],
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        by_row = {n: options[n] for n in ("mask", "row_weight") if options.get(n) is not None}
        loss, buffer = torch.zeros((), dtype=wide, device=hidden.device), None
        for start in range(0, len(hidden), chunk_rows):
            part = slice(start, start + chunk_rows)
            logits = hidden[part] @ weight.t()
            if buffer is None or buffer.shape != logits.shape:
                buffer = torch.empty_like(logits)
            value, grad = kd_loss_and_grad(
                logits,
                teacher[0][part] @ teacher[1].t(),
                None if target is None else target[part],
                out=buffer,
                **options | {name: value[part] for name, value in by_row.items()},
            )
            loss += value
            if grad_hidden is not None:
                # Not `weight` itself: autocast would cache its copy without a graph.
                grad_hidden[part] = grad @ weight.detach()
            if grad_weight is not None and wide == grad.dtype:
                grad_weight.addmm_(grad.t(), hidden[part])
            elif grad_weight is not None:
                grad_weight += grad.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_kd_loss has no second derivative")
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * upstream.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * upstream).to(ctx.dtype)
        return grad_hidden, grad_weight, *[None] * 4
