"""The loss in autograd: which gradient is kept, and which is computed in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmkd_fast.loss import ops


def differentiable(
    per_row: bool, parts: bool, problem: tuple[Any, ...], extra: tuple[Any, ...]
) -> Any:
    """Return the loss with its graph, or loss, KD and CE parts; only the loss has a gradient.

    On a CPU the forward pass computes the gradient for an upstream gradient of 1 too, except for
    rows, whose upstream gradients differ, and in float16, whose stored gradient would underflow. On
    other devices, reading the upstream gradient would wait for the device.
    """
    student = problem[0]
    if (
        per_row
        or student.device.type != "cpu"
        or student.dtype == torch.float16
        or torch.compiler.is_compiling()
    ):
        return _Recomputed.apply(per_row, parts, *problem, *extra)
    return _HandedOver.apply(student, parts, problem, extra)


class _HandedOver(torch.autograd.Function):
    """Loss whose forward pass also computes the gradient, while the row is in cache.

    The first backward pass returns it if the upstream gradient is 1. Otherwise the gradient is
    recomputed as in `_Recomputed`. The problem is passed as a tuple, because each argument costs
    time.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, parts: bool, problem: tuple[Any, ...], extra: tuple[Any, ...]
    ) -> Any:
        ctx.grad = torch.empty_like(student, memory_format=torch.contiguous_format)
        # Detached, because operators are called faster with tensors that need no gradient.
        loss, kd, ce, stats = ops.forward_backward(
            ctx.grad, None, 1.0, student.detach(), *problem[1:], *extra
        )
        _save(ctx, stats, problem, extra)
        if not parts:
            return loss
        ctx.mark_non_differentiable(kd, ce)
        return loss, kd, ce

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        grad, ctx.grad = ctx.grad, None
        if grad is None or upstream.item() != 1:
            del grad  # Free its memory before the new gradient is allocated.
            grad = ops.backward(upstream, *_saved(ctx))
        return grad, None, None, None


class _Recomputed(torch.autograd.Function):
    """Loss whose backward pass recomputes the gradient from the logits and each row's statistics.

    The upstream gradient is multiplied in before rounding. `kd` and `ce` are not differentiable.
    """

    @staticmethod
    def forward(ctx: Any, per_row: bool, parts: bool, *arguments: Any) -> Any:
        problem, extra = arguments[:9], arguments[9:]
        loss, kd, ce, stats = ops.forward(*problem, per_row, *extra)
        _save(ctx, stats, problem, extra)
        ctx.num_arguments = len(arguments)
        if not parts:
            return loss
        ctx.mark_non_differentiable(kd, ce)
        return loss, kd, ce

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        grad = ops.backward(upstream, *_saved(ctx))
        return None, None, grad, *[None] * (ctx.num_arguments - 1)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("kd_loss has no second derivative; do not pass create_graph=True")


def _save(ctx: Any, stats: Tensor, problem: tuple[Any, ...], extra: tuple[Any, ...]) -> None:
    """Save the arguments of `ops.backward` but the first."""
    tensors: Any = (stats, *problem[:4])
    ctx.numbers, ctx.extra = problem[4:], extra
    if extra and extra[0] is not None:
        tensors, ctx.extra = (*tensors, extra[0]), (None, *extra[1:])
    # Tensors of torch.inference_mode() cannot be saved for backward; nothing can change them.
    ctx.untracked = None
    if not torch.compiler.is_compiling() and any(
        t is not None and t.is_inference() for t in tensors
    ):
        ctx.untracked = [t if t is not None and t.is_inference() else None for t in tensors]
        tensors = tuple(
            t if u is None else None for t, u in zip(tensors, ctx.untracked, strict=True)
        )
    ctx.save_for_backward(*tensors)


def _saved(ctx: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    if ctx.untracked is not None:
        tensors = [t if u is None else u for t, u in zip(tensors, ctx.untracked, strict=True)]
    extra = ctx.extra if len(tensors) == 5 else (tensors[5], *ctx.extra[1:])
    return (*tensors[:5], *ctx.numbers, *extra)
