"""The PTX of the noise kernel, executed without a GPU: bits, bounds, races."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from ptx_launch import EmulatedKernel
from ptx_memory import KernelError
from ptx_mutants import Change, replaced, without_barrier

from dmkd_fast.rng import philox
from dmkd_fast.rng import triton as kernels

IDS = torch.tensor([7, 2**40 + 1])
COUNT = 4 * kernels.BLOCKS + 6  # two programs, the second one mostly outside


def normal(
    patch: pytest.MonkeyPatch, seed: int, step: int, *change: Change, count: int = COUNT
) -> tuple[torch.Tensor, EmulatedKernel]:
    """Run the kernel's PTX, changed if wanted."""
    with patch.context() as context:
        kernel = EmulatedKernel(kernels.normal_kernel, *change)
        context.setattr(kernels, "normal_kernel", kernel)
        return kernels.normal(seed, IDS, step, count), kernel


@pytest.mark.parametrize(
    ("seed", "step", "num_constants"), [(0, 0, 0), (1, 1, 2), (1, 3, 1), (2**40 + 11, 9, 0)]
)
def test_ptx_gives_the_bits_of_the_definition(
    seed: int, step: int, num_constants: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, kernel = normal(monkeypatch, seed, step)
    assert torch.equal(got, philox.normal_reference(seed, IDS, step, COUNT))
    # The launcher compiles seed = 1 and step = 1 into the kernel.
    [program] = kernel.programs
    assert len(program.parameters) == 7 - num_constants


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 784, 1024, 3072])
def test_ptx_gives_the_bits_of_the_definition_for_any_count(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1, 2**63 - 1):
        for step in (0, 1, 2, 16, 4096):
            got, _ = normal(monkeypatch, seed, step, count=count)
            assert torch.equal(got, philox.normal_reference(seed, IDS, step, count))


def test_planted_faults_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, kernel = normal(monkeypatch, 5, 2)
    barriers = len(kernel.programs[0].positions("bar"))
    assert barriers
    for number in range(barriers):
        with pytest.raises(KernelError, match="race"):
            normal(monkeypatch, 5, 2, without_barrier(number))
