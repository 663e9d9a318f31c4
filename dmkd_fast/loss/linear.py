"""The loss of two linear heads, without their logits: for vocabularies of many thousands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmkd_fast.loss.divergences import DIST, terms_of
from dmkd_fast.loss.functional import kd_loss, kd_loss_and_grad
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
    if options.get("class_dim", -1) not in (-1, 1):
        raise invalid("class_dim", repr(options["class_dim"]), "-1, that of the logits made here")
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_LOGITS // max(1, len(student_weight)))
    elif type(chunk_rows) is not int or chunk_rows < 1:
        raise invalid("chunk_rows", repr(chunk_rows), "a whole number of at least 1, or None")
    options["target"], rows = target, len(student_hidden)
    for name, tensor in _by_row(options).items():
        if tensor.shape[:1] != (rows,):
            raise invalid(name, f"shape {tuple(tensor.shape)}", f"{rows} rows, as student_hidden")
    teacher = teacher_hidden.detach(), teacher_weight.detach()
    if rows == 0:
        logits = student_hidden @ student_weight.t(), teacher[0] @ teacher[1].t()
        nothing: Tensor = kd_loss(*logits, **options)
        return nothing
    if reduction != "sum" and options.get("num_items") is None:
        options["num_items"] = _counted(options, rows)
    loss: Tensor = _LinearKdLoss.apply(student_hidden, student_weight, teacher, chunk_rows, options)
    return loss


def _by_row(options: dict[str, Any]) -> dict[str, Tensor]:
    """Return the arguments of `kd_loss` that have something for each row."""
    names = ("target", "mask", "row_weight", "temperature")
    given = {name: options.get(name) for name in names}
    return {name: x for name, x in given.items() if isinstance(x, Tensor) and x.numel() != 1}


def _counted(options: dict[str, Any], rows: int) -> Any:
    """Return how many rows count; a tensor where only the device knows."""
    counts = [] if options.get("mask") is None else [options["mask"]]
    target = options["target"]
    if target is not None and target.dtype == torch.int64:
        counts.append(target != options.get("ignore_index", -100))
    return torch.stack(counts).all(0).sum().clamp(min=1) if counts else rows


def _grad_scale(options: dict[str, Any], classes: int) -> Any:
    """Return a factor that makes up for the denominators, with which float16 would underflow."""
    if options["reduction"] == "sum":
        return 1.0
    # A cross-entropy is divided by the rows alone: times the classes it could overflow.
    is_kd = options["reduction"] == "mean" and options.get("alpha") in (None, 1)
    return options["num_items"] * (classes if is_kd else 1)


class _LinearKdLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher: tuple[Tensor, Tensor],
        chunk_rows: int,
        options: dict[str, Any],
    ) -> Any:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        by_row, buffer, scale = _by_row(options), None, 1.0
        loss: Any = 0.0
        start = 0
        # The last chunk may have one row more: of a row alone, a temperature would be a number.
        for stop in (*range(chunk_rows, len(hidden) - 1, chunk_rows), len(hidden)):
            part, start = slice(start, stop), stop
            logits = hidden[part] @ weight.t()
            if buffer is None or buffer.shape != logits.shape:
                buffer = torch.empty_like(logits)
            if logits.dtype == torch.float16:
                scale = _grad_scale(options, len(weight))
            value, grad = kd_loss_and_grad(
                logits,
                teacher[0][part] @ teacher[1].t(),
                grad_scale=scale,
                out=buffer,
                **options | {name: tensor[part] for name, tensor in by_row.items()},
            )
            loss = loss + value
            if grad_hidden is not None:
                # Not `weight` itself: autocast would cache its copy without a graph.
                grad_hidden[part] = grad @ weight.detach()
            if grad_weight is not None and wide == grad.dtype:
                grad_weight.addmm_(grad.t(), hidden[part])
            elif grad_weight is not None and grad.dtype == torch.float16:
                # Smaller by a power of two, as the sum over many rows could overflow; not over all
                # of a chunk, as small hidden values would lose digits.
                for some, rows in zip(grad.split(512), hidden[part].split(512), strict=True):
                    smaller = 2.0 ** -len(some).bit_length()
                    grad_weight.add_(some.t() @ (rows * smaller), alpha=1 / smaller)
            elif grad_weight is not None:
                grad_weight += grad.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype, ctx.factor = weight.dtype, 1 / scale
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_kd_loss has no second derivative")
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = upstream * ctx.factor  # a GradScaler's own may be too large for float16
        if grad_hidden is not None:
            grad_hidden = (grad_hidden.to(factor.dtype) * factor).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * factor).to(ctx.dtype)
        return grad_hidden, grad_weight, *[None] * 3
