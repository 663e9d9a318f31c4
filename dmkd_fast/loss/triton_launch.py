"""The raw operators of kd_loss on CUDA: choose a Triton kernel and its tile, and launch it.

`loss/ops.py` imports this module at the first call with CUDA tensors. Rows of up to MAX_TILE
classes are read once and stay in registers (`loss/triton_tile.py`); several short rows share a
program. Longer rows (`loss/triton_long.py`) are read twice for forward KL, first for maxima and
sums, then for loss and gradient, and once more for other divergences and for standardized logits;
the backward pass of forward KL reads them once, in blocks of columns. Nothing waits for the device,
so all operators can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from dmkd_fast.loss import triton_long, triton_tile
from dmkd_fast.loss.ops import NUM_STATS, with_defaults
from dmkd_fast.runtime.operators import Launch

# The widest row and block of columns whose kernels do not spill registers: tests/golden/.
MAX_TILE = 8192
BLOCK = 4096
PACKED_TILE = 4096  # logits per program for short rows

# The arguments that all operators share; the last three of `loss/ops.py` may be left out.
Problem = tuple[Any, ...]


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator `kd_loss_forward`."""
    problem, per_row, extra = arguments[:9], arguments[9], arguments[10:]
    return _losses((*problem, *extra), None, None, 1.0, per_row)


def backward(upstream: Tensor, stats: Tensor, *problem: Any) -> Tensor:
    """Run the operator `kd_loss_backward`."""
    grad = torch.empty_like(problem[0], memory_format=torch.contiguous_format)
    if len(grad):
        plan_backward(problem, grad, upstream, stats).run()
    return grad


def forward_backward(
    grad: Tensor, upstream: Tensor | None, grad_scale: float, *problem: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator `kd_loss_forward_backward`."""
    return _losses(problem, grad, upstream, grad_scale, False)


def plan_losses(
    problem: Problem,
    grad: Tensor | None,
    upstream: Tensor | None,
    grad_scale: float,
    outputs: list[Tensor],
    stats: Tensor,
    ticket: Tensor,
    per_row: bool,
) -> Launch:
    """Plan the launch that writes loss, KD and CE parts to `outputs`.

    It also writes `stats` for long rows, and the gradient if `grad` is given.
    """
    student, *_ = problem
    num_rows, num_classes = student.shape
    one_tile = num_classes <= _widest_tile(problem)
    rows, block, num_warps = _tile(num_classes) if one_tile else (1, BLOCK, 8)
    programs = triton.cdiv(num_rows, rows)
    partials = student.new_empty((programs, 2), dtype=torch.float32)
    arguments, constants = _shared(problem, grad, upstream, grad_scale)
    kernel = triton_tile.tile if one_tile else triton_long.two_pass
    if one_tile:
        constants["ROWS"] = rows
    constants |= {"BLOCK": block, "WITH_LOSS": True, "PER_ROW": per_row}
    return Launch(
        kernel, (*arguments, *outputs, stats, partials, ticket), constants, (programs,), num_warps
    )


def plan_backward(problem: Problem, grad: Tensor, upstream: Tensor, stats: Tensor) -> Launch:
    """Plan the launch that writes the gradient alone; for long rows it reads `stats`."""
    num_rows, num_classes = problem[0].shape
    arguments, constants = _shared(problem, grad, upstream, 1.0)
    unused = [stats] * 6
    if num_classes <= _widest_tile(problem):
        rows, block, num_warps = _tile(num_classes)
        constants |= {"ROWS": rows, "BLOCK": block, "WITH_LOSS": False, "PER_ROW": False}
        programs = triton.cdiv(num_rows, rows)
        return Launch(triton_tile.tile, (*arguments, *unused), constants, (programs,), num_warps)
    constants["BLOCK"] = BLOCK
    if len(problem) > 9:
        constants |= {"WITH_LOSS": False, "PER_ROW": False}
        return Launch(triton_long.two_pass, (*arguments, *unused), constants, (num_rows,), 8)
    for name in ("WITH_GRAD", "TERMS", "STANDARDIZE", "HAS_TEMPERATURES"):
        del constants[name]
    grid = (num_rows, triton.cdiv(num_classes, BLOCK))
    return Launch(triton_long.columns, (*arguments, stats), constants, grid, 8)


def _losses(
    problem: Problem, grad: Tensor | None, upstream: Tensor | None, grad_scale: float, per_row: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student = problem[0]
    num_rows = len(student)
    shape = (num_rows,) if per_row else ()
    outputs = [student.new_empty(shape, dtype=torch.float32) for _ in range(3)]
    stats = student.new_empty((num_rows, NUM_STATS), dtype=torch.float32)
    if num_rows:
        plan_losses(
            problem, grad, upstream, grad_scale, outputs, stats, _ticket(student.device), per_row
        ).run()
    else:
        for output in outputs:
            output.fill_(problem[6] * 0)  # nan for the means, whose factor is nan without rows
    loss, kd, ce = outputs
    return loss, kd, ce, stats


def _shared(
    problem: Problem, grad: Tensor | None, upstream: Tensor | None, grad_scale: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments and constants that all kernels share."""
    student, teacher, target, weight, temperature, alpha, kd_scale, ce_scale, smoothing = problem[
        :9
    ]
    temperatures, terms, standardize = with_defaults(problem[9:])
    num_rows, num_classes = student.shape
    has_classes = target is not None and target.dtype == torch.int64
    kind = 0 if target is None else 1 if has_classes else 2
    kind = 3 if kind == 1 and alpha == 1 else kind  # for dkd alone
    student, teacher = _dense(student), _dense(teacher)
    if target is not None and kind == 2:
        target = _dense(target)
    output = student if grad is None else grad  # Kernels need a pointer even without gradient.
    third = student if target is None else target
    vec = _vector(num_classes, [student, teacher, output, *([third] if kind == 2 else [])])
    arguments = (
        student,
        teacher,
        third,
        student if weight is None else weight,
        student if upstream is None else upstream,
        student if temperatures is None else temperatures.contiguous(),
        output,
        num_rows,
        num_classes // vec,
        student.stride(0) // vec,
        teacher.stride(0) // vec,
        third.stride(0) if has_classes else third.stride(0) // vec,
        output.stride(0) // vec,
        0 if weight is None else weight.stride(0),
        0 if upstream is None or upstream.ndim == 0 else upstream.stride(0),
        # With one class, d is 0, which the rounding of its two parts would hide.
        1 / temperature if num_classes > 1 else 0.0,
        alpha,
        kd_scale,
        ce_scale,
        smoothing,
        grad_scale,
    )
    constants = {
        "WITH_GRAD": grad is not None,
        "TARGET": kind,
        "HAS_WEIGHT": weight is not None,
        "HAS_UPSTREAM": upstream is not None,
        "TERMS": tuple(terms),
        "STANDARDIZE": standardize,
        "HAS_TEMPERATURES": temperatures is not None,
        "VEC": vec,
    }
    return arguments, constants


def _dense(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _vector(num_classes: int, matrices: list[Tensor]) -> int:
    """Return how many logits one 128-bit access can hold, given sizes, strides and addresses.

    Kernels get sizes and strides divided by this number. Triton only knows whether an argument is
    divisible by 16, so it would not vectorize 1000 classes, although 1000 is divisible by 8 and
    eight 16-bit logits fill an access.
    """
    vec = num_classes
    for matrix in matrices:
        size = matrix.element_size()
        vec = math.gcd(vec, 16 // size, matrix.stride(0), matrix.data_ptr() // size)
    return vec


def _widest_tile(problem: Problem) -> int:
    """Return the most classes of a row in registers; sums of two divergences hold twice as much."""
    return MAX_TILE // 2 if len(with_defaults(problem[9:])[1]) > 4 else MAX_TILE


def _tile(num_classes: int) -> tuple[int, int, int]:
    """Return rows per program, columns (a power of two) and warps."""
    block = max(16, triton.next_power_of_2(num_classes))
    rows = max(1, PACKED_TILE // block) if block <= 2048 else 1
    return rows, block, 16 if block > 4096 else 8


_tickets: dict[tuple[torch.device, int], Tensor] = {}


def _ticket(device: torch.device) -> Tensor:
    """Return a counter with value 0, which the last program of a launch resets; one per stream.

    During capture a new counter becomes part of the graph, which sets it to zero itself; a counter
    from outside would have to outlive the graph.
    """
    if device.type != "cuda":  # Triton's interpreter runs on CPU tensors.
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _tickets[key]
