"""The PTX of the loss's kernels, executed without a GPU: values, bounds, races.

Inputs, outputs and the float64 definition are those of the interpreter's tests. The rows lie apart;
the emulator notices every access between them.
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")
from interpreted_kd_loss import FORMS, LONG, exact, make, run
from ptx_launch import EmulatedKernel
from ptx_memory import KernelError
from ptx_mutants import Change, replaced, without_barrier

from dmkd_fast.loss import triton_launch, triton_long, triton_tile
from dmkd_fast.loss.divergences import terms_of
from dmkd_fast.loss.ops import Problem

VECTORS = LONG + 7  # a multiple of 8: one access is 128 bits wide


def emulate(
    patch: pytest.MonkeyPatch, *change: Change, backwards: bool = False
) -> dict[str, EmulatedKernel]:
    """Let the launches run the kernels' PTX, changed if wanted."""
    kernels = {}
    for module, name in ((triton_tile, "tile"), (triton_long, "two_pass")):
        kernel = getattr(module, name)
        kernels[name] = EmulatedKernel(kernel, *change, backwards=backwards)
        patch.setattr(module, name, kernels[name])
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


@pytest.mark.slow
@pytest.mark.parametrize("target", ["none", "ids", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "classes"),
    [(1, 1), (70, 7), (5, 100), (300, 2000), (2, 1003), (2, 3001), (2, 8192), (2, VECTORS)],
)
def test_ptx_agrees_with_float64_for_any_shape(
    rows: int, classes: int, dtype: torch.dtype, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch)
    check(make(rows, classes, dtype, target))


@pytest.mark.slow
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
