"""The raw operators of kd_loss on CUDA: choose a Triton kernel and its tile, and launch it.

`loss/ops.py` imports this module at the first call with CUDA tensors. Rows of up to MAX_TILE
classes are read once and stay in registers (`loss/triton_tile.py`); several short rows share a
program. Longer rows (`loss/triton_long.py`) are read in several sweeps. Nothing waits for the
device, so all operators can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from dmkd_fast.loss import triton_long, triton_tile
from dmkd_fast.loss.ops import NUM_STATS, Problem
from dmkd_fast.runtime.operators import Launch

# The widest row and block of columns whose kernels do not spill registers: tests/golden/.
MAX_TILE = 8192
BLOCK = 4096
PACKED_TILE = 4096  # logits per program for short rows

Losses = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(*arguments: Any) -> Losses:
    """Run the operator `kd_loss_forward`."""
    return _losses(Problem(*arguments[:-1]), None, None, 1.0, arguments[-1])


def backward(upstream: Tensor, stats: Tensor, *problem: Any) -> Tensor:
    """Run the operator `kd_loss_backward`."""
    grad = torch.empty_like(problem[0], memory_format=torch.contiguous_format)
    if len(grad):
        plan_backward(Problem(*problem), grad, upstream, stats).run()
    return grad


def forward_backward(
    grad: Tensor, upstream: Tensor | None, grad_scale: float, *problem: Any
) -> Losses:
    """Run the operator `kd_loss_forward_backward`."""
    return _losses(Problem(*problem), grad, upstream, grad_scale, False)


def plan_losses(
    problem: Problem,
    grad: Tensor | None,
    upstream: Tensor | None,
    grad_scale: float,
    results: Losses,
    ticket: Tensor,
) -> Launch:
    """Plan the launch that writes loss, KD and CE parts, and statistics of long rows to `results`.

    It also writes the gradient if `grad` is given. Losses of one dimension are those of the rows.
    """
    launch = _plan(problem, grad, upstream, grad_scale, 1 + results[0].ndim)
    partials = problem.student.new_empty((launch.grid[0], 2), dtype=torch.float32)
    return launch._replace(arguments=(*launch.arguments, *results, partials, ticket))


def plan_backward(problem: Problem, grad: Tensor, upstream: Tensor, stats: Tensor) -> Launch:
    """Plan the launch that writes the gradient alone; for long rows it reads `stats`."""
    launch = _plan(problem, grad, upstream, 1.0, 0)
    return launch._replace(arguments=(*launch.arguments, *[stats] * 6))


def _losses(
    problem: Problem, grad: Tensor | None, upstream: Tensor | None, grad_scale: float, per_row: bool
) -> Losses:
    student = problem.student
    shape = (len(student),) if per_row else ()
    shapes = (shape, shape, shape, (len(student), NUM_STATS))
    loss, kd, ce, stats = (student.new_empty(shape, dtype=torch.float32) for shape in shapes)
    results = loss, kd, ce, stats
    if len(student):
        ticket = _ticket(student.device)
        plan_losses(problem, grad, upstream, grad_scale, results, ticket).run()
    for output in results[:3] if len(student) == 0 else ():
        output.fill_(problem.kd_scale * 0)  # nan for the means, whose factor is nan
    return results


def _plan(
    p: Problem, grad: Tensor | None, upstream: Tensor | None, grad_scale: float, loss: int
) -> Launch:
    """Plan a launch with the arguments that both kernels share."""
    num_rows, num_classes = p.student.shape
    has_classes = p.target is not None and p.target.dtype == torch.int64
    kind = 0 if p.target is None else 1 if has_classes else 2
    kind = 3 if kind == 1 and p.alpha == 1 else kind  # for dkd alone
    student, teacher = _dense(p.student), _dense(p.teacher)
    target = student if p.target is None else _dense(p.target) if kind == 2 else p.target
    output = student if grad is None else grad  # Kernels need a pointer even without gradient.
    vec = _vector(num_classes, [student, teacher, output, *([target] if kind == 2 else [])])
    arguments = (
        student,
        teacher,
        target,
        student if p.weight is None else p.weight.contiguous(),
        student if upstream is None else upstream.contiguous(),
        student if p.temperatures is None else p.temperatures.contiguous(),
        output,
        num_rows,
        num_classes // vec,
        student.stride(0) // vec,
        teacher.stride(0) // vec,
        target.stride(0) if has_classes else target.stride(0) // vec,
        output.stride(0) // vec,
        1 / p.temperature,
        p.alpha,
        p.kd_scale,
        p.ce_scale,
        p.label_smoothing,
        grad_scale,
    )
    constants = {
        "LOSS": loss,
        "WITH_GRAD": grad is not None,
        "TARGET": kind,
        "HAS_WEIGHT": p.weight is not None,
        "UPSTREAM": 0 if upstream is None else 1 + (upstream.ndim > 0),
        "TERMS": tuple(p.terms),
        "STANDARDIZE": p.standardize,
        "HAS_TEMPERATURES": p.temperatures is not None,
        "VEC": vec,
    }
    # Sums of two divergences hold twice as much in registers.
    if num_classes <= (MAX_TILE // 2 if len(p.terms) > 4 else MAX_TILE):
        block = max(16, triton.next_power_of_2(num_classes))
        rows = max(1, PACKED_TILE // block) if block <= 2048 else 1
        grid: tuple[int, ...] = (triton.cdiv(num_rows, rows),)
        constants |= {"ROWS": rows, "BLOCK": block}
        return Launch(triton_tile.tile, arguments, constants, grid, 16 if block > 4096 else 8)
    grid = (num_rows,)
    if loss == 0 and not p.terms and not p.standardize:
        grid = (num_rows, triton.cdiv(num_classes, BLOCK))
    return Launch(triton_long.two_pass, arguments, constants | {"BLOCK": BLOCK}, grid, 8)


def _dense(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _vector(num_classes: int, matrices: list[Tensor]) -> int:
    """Return how many logits one 128-bit access can hold, given sizes, strides and addresses.

    Kernels get sizes and strides divided by this number, because Triton would not vectorize 1000
    classes, which 16 does not divide.
    """
    vec = num_classes
    for matrix in matrices:
        size = matrix.element_size()
        vec = math.gcd(vec, 16 // size, matrix.stride(0), matrix.data_ptr() // size)
    return vec


@functools.cache
def _counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def _ticket(device: torch.device) -> Tensor:
    """Return a counter with value 0, which the last program of a launch resets; one per stream.

    During capture a new counter becomes part of the graph, which sets it to zero itself; a counter
    from outside would have to outlive the graph. Triton's interpreter runs on CPU tensors.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return _counter.__wrapped__(device, 0)
    return _counter(device, torch.cuda.current_stream(device).cuda_stream)
