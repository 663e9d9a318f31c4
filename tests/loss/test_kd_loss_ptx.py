"""The PTX of the loss's kernels, executed without a GPU: values, bounds, races.

Inputs, outputs and the float64 definition are those of the interpreter's tests. The rows lie apart;
the emulator notices every access between them.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from interpreted_kd_loss import FORMS, LONG, exact, make, run
from ptx_launch import EmulatedKernel
from ptx_memory import KernelError
from ptx_mutants import mutated, without_barrier

from dmkd_fast.loss import ops, triton_launch, triton_long, triton_math, triton_tile
from dmkd_fast.loss.divergences import terms_of
from dmkd_fast.loss.ops import Problem

pytestmark = pytest.mark.slow  # run by .ci/run

VECTORS = LONG + 7  # a multiple of 8: one access is 128 bits wide


def emulate(
    patch: pytest.MonkeyPatch, tile: Any = triton_tile, long: Any = triton_long, **options: Any
) -> dict[str, EmulatedKernel]:
    """Let the launches run the PTX of the kernels of two modules."""
    kernels = {
        "tile": EmulatedKernel(tile.tile, **options),
        "two_pass": EmulatedKernel(long.two_pass, **options),
    }
    patch.setattr(triton_tile, "tile", kernels["tile"])
    patch.setattr(triton_long, "two_pass", kernels["two_pass"])
    return kernels


def check(problem: Problem, relative: float = 1e-5) -> None:
    """Compare losses and gradients, in one pass and from the backward kernel, with float64."""
    *losses, grad, again = run(problem, 3.0)
    *losses64, grad64 = exact(problem, 3.0)
    for value, expected in zip(losses, losses64, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=relative / 2, atol=1e-6)
    assert (grad.double() - grad64).norm() <= relative * grad64.norm() + 1e-7
    torch.testing.assert_close(again, grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("rows", "classes", "dtype", "target"),
    [
        (9, 1000, torch.bfloat16, "ids"),  # three programs
        (2, VECTORS, torch.float16, "probabilities"),
        (2, LONG, torch.float32, "ids"),
    ],
    ids=["tile", "long, vectors", "long"],
)
def test_ptx_agrees_with_float64(
    rows: int, classes: int, dtype: torch.dtype, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch)
    check(make(rows, classes, dtype, target))


def test_the_order_of_the_programs_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(9, 1000, torch.float32, "ids")
    results = []
    for backwards in (False, True):
        with monkeypatch.context() as patch:
            emulate(patch, backwards=backwards)
            results.append(triton_launch.forward(*problem, False)[:3])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("target", ["none", "ids", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "classes"),
    [(1, 1), (70, 7), (5, 100), (12, 2000), (2, 1003), (2, 3001), (2, 8192), (2, VECTORS)],
)
def test_ptx_agrees_with_float64_for_any_shape(
    rows: int, classes: int, dtype: torch.dtype, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch)
    check(make(rows, classes, dtype, target))


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_ptx_of_every_divergence_agrees_with_float64(
    form: str | dict, standardize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch)
    for classes, per_row in itertools.product((100, 1000, VECTORS), (False, True)):
        rows = 3
        problem = make(rows, classes, torch.float32, "ids")
        temperatures = torch.tensor([[2.0 + row, 4.0] for row in range(rows)])
        check(
            problem._replace(
                alpha=1.0 if classes == 100 else problem.alpha,
                temperatures=temperatures if per_row else None,
                terms=terms_of(form),
                standardize=standardize,
            )
        )


CASES = {
    "tile": (9, 1000, torch.bfloat16, "ids"),
    "two_pass": (5, VECTORS, torch.float16, "probabilities"),
}


@pytest.mark.parametrize("name", CASES)
def test_ptx_of_losses_per_row_agrees_with_float64(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch)
    problem = make(*CASES[name])
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in problem]
    rows, exact_rows = triton_launch.forward(*problem, True), ops._eager_forward(*wide, True)
    for got, expected in zip(rows[:3], exact_rows[:3], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def check_cases() -> None:
    for case in CASES.values():
        check(make(*case))


def check_barriers(name: str, steps: int, patch: pytest.MonkeyPatch) -> None:
    """Leave out every `steps`-th barrier, one at a time."""
    problem = make(*CASES[name])
    with patch.context() as context:
        kernels = emulate(context)
        triton_launch.forward(*problem, False)
        [program] = kernels[name].programs
    barriers = range(0, len(program.positions("bar")), steps)
    assert len(barriers) > 1
    for number in barriers:
        with patch.context() as context:
            emulate(context, change=without_barrier(number))
            with pytest.raises(KernelError, match="race"):
                triton_launch.forward(*problem, False)


def test_a_missing_barrier_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_barriers("tile", 9, monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_each_missing_barrier_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_barriers(name, 1, monkeypatch)


MUTATIONS = {
    "mask of columns": ("tile", "(cols < num_classes)[None, :]", "(cols <= num_classes)[None, :]"),
    "stored rows": ("tile", "stored = (rows < num_rows)", "stored = (rows <= num_rows)"),
    "label smoothing": ("tile", "kept + spread, spread)", "kept, spread)"),
    "row weight": ("tile", "up = factor * grad_scale", "up = grad_scale"),
    "series": ("math", "-0.166666657", "-0.156666657"),
    "ticket": ("math", "if done == programs - 1:", "if done == programs - 2:"),
    "sum over programs": ("math", "inside = index < programs", "inside = index <= programs"),
    "order of publishing": ("math", 'sem="acq_rel"', 'sem="relaxed"'),
    "long mask": ("long", "inside = (cols < num_classes) &", "inside = (cols <= num_classes) &"),
    "long store": ("long", "cols < num_classes)\n    if LOSS", "cols <= num_classes)\n    if LOSS"),
    "rescaled sum": ("long", "t_sum *= tl.exp2((t_max - t_top) * scale2)", "t_sum *= 1.0"),
    "first block": ("long", "begin = tl.program_id(1)", "begin = tl.program_id(1) + 1"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_kernel_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, old, new = MUTATIONS[name]
    modules = {"tile": triton_tile, "long": triton_long}
    if file == "math":
        mutant = mutated(triton_math, old, new, tmp_path).__name__
        old = "from dmkd_fast.loss import triton_math as loss_math"
        new = f"import {mutant} as loss_math"
        modules = {key: mutated(each, old, new, tmp_path) for key, each in modules.items()}
    else:
        modules[file] = mutated(modules[file], old, new, tmp_path)
    emulate(monkeypatch, **modules)
    with pytest.raises((AssertionError, KernelError)):
        check_cases()
