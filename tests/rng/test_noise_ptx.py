"""The PTX of the noise kernel, executed without a GPU: bits, bounds, races."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from ptx_launch import EmulatedKernel
from ptx_memory import KernelError
from ptx_mutants import mutated, without_barrier

from dmkd_fast.rng import philox
from dmkd_fast.rng import triton as kernels

IDS = torch.tensor([7, 2**40 + 1])
COUNT = 4 * kernels.BLOCKS + 6  # two programs, the second one mostly outside


def check(
    patch: pytest.MonkeyPatch,
    seed: int,
    step: int,
    *,
    count: int = COUNT,
    kernel: Any = kernels.normal_kernel,
    **options: Any,
) -> EmulatedKernel:
    """Compare the bits that the kernel's PTX makes with those of the definition."""
    with patch.context() as context:
        emulated = EmulatedKernel(kernel, **options)
        context.setattr(kernels, "normal_kernel", emulated)
        got = kernels.normal(seed, IDS, step, count)
    assert torch.equal(got, philox.normal_reference(seed, IDS, step, count))
    return emulated


@pytest.mark.parametrize(
    ("seed", "step", "num_constants"), [(0, 0, 0), (1, 1, 2), (1, 3, 1), (2**40 + 11, 9, 0)]
)
def test_ptx_gives_the_bits_of_the_definition(
    seed: int, step: int, num_constants: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    [program] = check(monkeypatch, seed, step).programs
    # The launcher compiles seed = 1 and step = 1 into the kernel.
    assert len(program.parameters) == 7 - num_constants


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 784, 1024, 3072])
def test_ptx_gives_the_bits_of_the_definition_for_any_count(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1, 2**63 - 1):
        for step in (0, 1, 2, 16, 4096):
            check(monkeypatch, seed, step, count=count)


def test_a_missing_barrier_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    [program] = check(monkeypatch, 5, 2).programs
    barriers = len(program.positions("bar"))
    assert barriers
    for number in range(barriers):
        with pytest.raises(KernelError, match="race"):
            check(monkeypatch, 5, 2, change=without_barrier(number))


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("mask=column < count", "mask=column <= count", KernelError),
        pytest.param("SIN0 + z", "SIN1 + z", AssertionError, marks=pytest.mark.slow),
        pytest.param("zero + step", "step + zero + 1", AssertionError, marks=pytest.mark.slow),
        pytest.param("tl.join(z0, z2)", "tl.join(z2, z0)", AssertionError, marks=pytest.mark.slow),
    ],
)
def test_a_changed_kernel_is_noticed(
    old: str, new: str, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = mutated(kernels, old, new, tmp_path)
    with pytest.raises(error):
        check(monkeypatch, 5, 2, kernel=mutant.normal_kernel)
