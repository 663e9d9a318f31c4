"""kd_loss's raw operators on CUDA: which Triton kernel, what tile, how launched.

py imports it when the first CUDA tensor comes. The kernels are in
kd_loss_kernels.py. Rows of up to MAX_TILE classes are read once and stay in registers (several rows
per program where they are short); longer ones are read twice (maxima and sums, then loss and
gradient), their backward pass once, by blocks of columns. Nothing waits for the device, so all of
it can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from dmkd_fast.loss import triton_kernels as kernels
from dmkd_fast.loss.ops import NUM_STATS
from dmkd_fast.runtime.operators import Launch

# The widest row and block of columns whose kernels need no spills: tests/golden/.
MAX_TILE = 8192
BLOCK = 4096
PACKED_TILE = 4096  # logits per program where rows are short

Problem = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float, float, float, float, float]


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator `kd_loss_forward`."""
    *problem, per_row = arguments
    return _losses(tuple(problem), None, None, 1.0, per_row)


def backward(upstream: Tensor, stats: Tensor, *problem: Any) -> Tensor:
    """The operator `kd_loss_backward`."""
    grad = torch.empty_like(problem[0], memory_format=torch.contiguous_format)
    if len(grad):
        plan_backward(problem, grad, upstream, stats).run()
    return grad


def forward_backward(
    grad: Tensor, upstream: Tensor | None, grad_scale: float, *problem: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator `kd_loss_forward_backward`."""
    return _losses(problem, grad, upstream, grad_scale, False)


def plan_losses(
    problem: Problem, grad: Tensor | None, upstream: Tensor | None, grad_scale: float,
    outputs: list[Tensor], stats: Tensor, ticket: Tensor, per_row: bool,
) -> Launch:  # fmt: skip
    """Loss, KD and CE into `outputs`, statistics of long rows, and the gradient if wanted."""
    student, *_ = problem
    num_rows, num_classes = student.shape
    one_tile = num_classes <= MAX_TILE
    rows, block, num_warps = _tile(num_classes) if one_tile else (1, BLOCK, 8)
    programs = triton.cdiv(num_rows, rows)
    partials = student.new_empty((programs, 2), dtype=torch.float32)
    arguments, constants = _shared(problem, grad, upstream, grad_scale)
    kernel = kernels.tile if one_tile else kernels.two_pass
    if one_tile:
        constants["ROWS"] = rows
    constants |= {"BLOCK": block, "WITH_LOSS": True, "PER_ROW": per_row}
    return Launch(
        kernel, (*arguments, *outputs, stats, partials, ticket), constants, (programs,), num_warps
    )


def plan_backward(problem: Problem, grad: Tensor, upstream: Tensor, stats: Tensor) -> Launch:
    """The gradient alone: from the logits, and from the statistics where rows are long."""
    num_rows, num_classes = problem[0].shape
    arguments, constants = _shared(problem, grad, upstream, 1.0)
    if num_classes <= MAX_TILE:
        rows, block, num_warps = _tile(num_classes)
        constants |= {"ROWS": rows, "BLOCK": block, "WITH_LOSS": False, "PER_ROW": False}
        arguments = (*arguments, *[stats] * 6)  # The last six stay untouched.
        return Launch(kernels.tile, arguments, constants, (triton.cdiv(num_rows, rows),), num_warps)
    del constants["WITH_GRAD"]
    constants["BLOCK"] = BLOCK
    grid = (num_rows, triton.cdiv(num_classes, BLOCK))
    return Launch(kernels.columns, (*arguments, stats), constants, grid, 8)


def _losses(
    problem: Problem, grad: Tensor | None, upstream: Tensor | None, grad_scale: float, per_row: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student = problem[0]
    num_rows = len(student)
    shape = (num_rows,) if per_row else ()
    outputs = [student.new_empty(shape, dtype=torch.float32) for _ in range(3)]
    stats = student.new_empty((num_rows, NUM_STATS), dtype=torch.float32)
    if num_rows:
        plan_losses(problem, grad, upstream, grad_scale, outputs, stats, _ticket(student.device),
                    per_row).run()  # fmt: skip
    else:
        for output in outputs:
            output.fill_(problem[6] * 0)  # The factor of no rows is nan.
    loss, kd, ce = outputs
    return loss, kd, ce, stats


def _shared(
    problem: Problem, grad: Tensor | None, upstream: Tensor | None, grad_scale: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and constants that all kernels have in common."""
    student, teacher, target, weight, temperature, alpha, kd_scale, ce_scale, smoothing = problem
    num_rows, num_classes = student.shape
    has_classes = target is not None and target.dtype == torch.int64
    kind = 0 if target is None else 1 if has_classes else 2
    student, teacher = _dense(student), _dense(teacher)
    if target is not None and kind == 2:
        target = _dense(target)
    output = student if grad is None else grad  # A kernel that writes none needs a pointer too.
    third = student if target is None else target
    vec = _vector(num_classes, [student, teacher, output, *([third] if kind == 2 else [])])
    arguments = (
        student, teacher, third, student if weight is None else weight,
        student if upstream is None else upstream, output,
        num_rows, num_classes // vec, student.stride(0) // vec, teacher.stride(0) // vec,
        third.stride(0) if kind == 1 else third.stride(0) // vec, output.stride(0) // vec,
        0 if weight is None else weight.stride(0),
        0 if upstream is None or upstream.ndim == 0 else upstream.stride(0),
        1 / temperature, alpha, kd_scale, ce_scale, smoothing, grad_scale,
    )  # fmt: skip
    constants = {
        "WITH_GRAD": grad is not None, "TARGET": kind, "HAS_WEIGHT": weight is not None,
        "HAS_UPSTREAM": upstream is not None, "VEC": vec,
    }  # fmt: skip
    return arguments, constants


def _dense(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _vector(num_classes: int, matrices: list[Tensor]) -> int:
    """Logits that one 128-bit access can hold, given sizes, strides and addresses.

    The compiler is shown rows and strides as multiples of it: it sees only whether an argument
    divides by 16, and 1000 does not, though eight 16-bit logits at a time fit it.
    """
    vec = num_classes
    for matrix in matrices:
        size = matrix.element_size()
        vec = math.gcd(vec, 16 // size, matrix.stride(0), matrix.data_ptr() // size)
    return vec


def _tile(num_classes: int) -> tuple[int, int, int]:
    """Rows per program, columns (a power of two), warps."""
    block = max(16, triton.next_power_of_2(num_classes))
    rows = max(1, PACKED_TILE // block) if block <= 2048 else 1
    return rows, block, 16 if block > 4096 else 8


_tickets: dict[tuple[torch.device, int], Tensor] = {}


def _ticket(device: torch.device) -> Tensor:
    """A zero that the last program of a launch puts back to zero; one per stream.

    During capture it is part of the graph, which then zeroes it itself: memory from outside would
    have to outlive the graph.
    """
    if device.type != "cuda":  # the interpreter
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _tickets[key]
