"""The loss in autograd: which gradient is kept, and which is computed in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmkd_fast.loss import ops
from dmkd_fast.loss.ops import Problem


def differentiable(per_row: bool, parts: bool, problem: Problem) -> Any:
    """Return the loss with its graph, or loss, KD and CE parts; only the loss has a gradient.

    On a CPU the forward pass computes the gradient for an upstream gradient of 1 too, except for
    rows, whose upstream gradients differ, and in float16, whose stored gradient would underflow. On
    other devices, reading the upstream gradient would wait for the device.
    """
    student = problem.student
    if (
        per_row
        or not student.is_cpu
        or student.dtype == torch.float16
        or torch.compiler.is_compiling()
    ):
        return _Recomputed.apply(per_row, parts, *problem)
    return _HandedOver.apply(student, parts, problem)


class _HandedOver(torch.autograd.Function):
    """Loss whose forward pass also computes the gradient, while the row is in cache.

    The first backward pass returns it if the upstream gradient is 1. Otherwise the gradient is
    recomputed as in `_Recomputed`. The problem is passed as a tuple, because each argument costs
    time.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, parts: bool, problem: Problem) -> Any:
        *losses, stats, ctx.grad = ops.loss_and_gradient(problem, parts)
        return _save(ctx, problem, stats, losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        grad, ctx.grad = ctx.grad, None
        if grad is None or upstream.item() != 1:
            del grad  # Free its memory before the new gradient is allocated.
            grad = ops.backward(upstream, *_saved(ctx))
        return grad, None, None


class _Recomputed(torch.autograd.Function):
    """Loss whose backward pass recomputes the gradient from the logits and each row's statistics.

    The upstream gradient is multiplied in before rounding. `kd` and `ce` are not differentiable.
    """

    @staticmethod
    def forward(ctx: Any, per_row: bool, parts: bool, *arguments: Any) -> Any:
        *losses, stats = ops.forward(*arguments, per_row)
        return _save(ctx, Problem(*arguments), stats, losses if parts else losses[:1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        grad = ops.backward(upstream, *_saved(ctx))
        return None, None, grad, *[None] * (len(Problem._fields) - 1)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("kd_loss has no second derivative; do not pass create_graph=True")


def _save(ctx: Any, problem: Problem, stats: Tensor, losses: list[Tensor]) -> Any:
    """Save the arguments of `ops.backward` but the first; return the outputs of the function."""
    tensors = [stats, *problem[:4], problem.temperatures]
    ctx.numbers = problem[4:9], problem[10:]
    # Tensors of torch.inference_mode() cannot be saved for backward. They have no version by which
    # autograd would notice a change in place.
    ctx.fixed = {}
    if not torch.compiler.is_compiling():
        for i in _GIVEN:
            tensor = tensors[i]
            if tensor is not None and tensor.is_inference():
                ctx.fixed[i], tensors[i] = tensor, None
    ctx.save_for_backward(*tensors)
    if len(losses) == 1:
        return losses[0]
    ctx.mark_non_differentiable(*losses[1:])
    return tuple(losses)


_GIVEN = (2, 3, 4)  # teacher, target and weight


def _saved(ctx: Any) -> tuple[Any, ...]:
    tensors = [ctx.fixed.get(i, t) for i, t in enumerate(ctx.saved_tensors)]
    before, after = ctx.numbers
    return (*tensors[:5], *before, tensors[5], *after)
