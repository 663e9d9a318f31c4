"""The views' CUDA kernels without a GPU: interpreter against float64, machine code on record.

Marked cuda: the same promises on a GPU (benchmarks/gpu.sh runs them).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import aot
import aot_views
import triton
from triton.backends.compiler import GPUTarget
from views_cases import TOLERANCES, problem

from dmkd_fast import Views, ViewSpec
from dmkd_fast.views import triton as kernels
from dmkd_fast.views.ops import views
from dmkd_fast.views.reference import reference_views

HELPERS = Path(__file__).parents[1] / "helpers"
ROOT = Path(__file__).parents[2]
GOLDEN = json.loads(aot_views.GOLDEN.read_text(encoding="utf-8"))
# What every change compiles; the whole matrix is marked slow.
QUICK = [
    c
    for c in aot_views.all_cases()
    if c[0] in (80, 100) and c[1] != "grey 28" and c[2] in ("float16", "int32")
]


@pytest.mark.slow
def test_interpreted_kernels_keep_their_promises() -> None:
    done = subprocess.run(
        [sys.executable, str(HELPERS / "interpreted_views.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def check(case: tuple[int, str, str]) -> None:
    built = aot_views.build(case)
    assert built["spills"] == 0, f"{aot_views.key(case)} spills: {built}"
    if GOLDEN["triton"] == triton.__version__:
        assert built == GOLDEN[aot_views.key(case)], aot_views.key(case)


@pytest.mark.parametrize("case", QUICK, ids=aot_views.key)
def test_machine_code_is_as_recorded(case: tuple[int, str, str]) -> None:
    check(case)


@pytest.mark.slow
def test_whole_matrix_of_machine_code_is_as_recorded() -> None:
    for case in aot_views.all_cases():
        check(case)


def test_golden_file_covers_the_matrix_without_spills_and_with_wide_stores() -> None:
    assert set(GOLDEN) == {"triton", *map(aot_views.key, aot_views.all_cases())}
    for case in aot_views.all_cases():
        recorded = GOLDEN[aot_views.key(case)]
        assert recorded["spills"] == 0
        if case[1] != "boxes":
            width, count = aot_views.expected_stores(case)
            assert recorded["STG"] == {str(width): count}, aot_views.key(case)
            assert width == 128 or case[1] == "rgb 64 to 33"


@pytest.mark.parametrize(("rows", "size"), [(70_000, 4), (1, 3345)])
def test_grids_of_many_and_of_large_views_are_within_the_limits(rows: int, size: int) -> None:
    """CUDA allows 65,535 programs along the second and the third axis."""
    out = torch.empty(rows, 3, size, size, device="meta")
    empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    launch = kernels.plan_views(
        out,
        empty(5, 3, 8, 8, dtype=torch.uint8),
        empty(rows, dtype=torch.int64),
        empty(rows, 4, dtype=torch.int32),
        empty(rows, dtype=torch.bool),
        *[empty(3, dtype=torch.float32)] * 2,
        0,
    )
    assert max(launch.grid[1:], default=1) <= 65535
    assert math.prod(launch.grid) * launch.constants["BLOCK"] >= out.numel()


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_boxes_are_drawn_with_correctly_rounded_operations(architecture: int) -> None:
    launch = aot_views.plan("boxes", "int32")
    compiled = triton.compile(
        aot._source(launch), target=GPUTarget("cuda", architecture, 32), options=launch.options
    )
    ptx = compiled.asm["ptx"]
    assert "sqrt.rn.f64" in ptx and "fma.rn" not in ptx and ".approx" not in ptx


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(
    "shape", [(3, 256, 224, 0), (3, 32, 32, 4), (1, 28, 28, 2), (2, 90, 17, 3)]
)
def test_on_a_gpu_views_equal_the_float64_definition(shape: tuple, dtype: torch.dtype) -> None:
    channels, side, size, pad = shape
    inputs, named = problem(64, channels, side, side, size, pad)
    exact = reference_views(*inputs, **named, dtype=torch.float64)
    settings = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in named.items()}
    got = views(*(x.cuda() for x in inputs), **settings, dtype=dtype).cpu()
    of_range, relative = TOLERANCES[dtype]
    limit = of_range / named["std"][:, None, None] + relative * exact.abs()
    assert ((got.double() - exact).abs() <= limit).all()


@pytest.mark.cuda
def test_on_a_gpu_crops_and_flips_are_those_of_the_cpu() -> None:
    ids, uses = torch.arange(100_000) * 7919, torch.arange(100_000)
    for crops in ({"pad": 4}, {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}):
        drawn = [
            Views(ViewSpec(size=224, mean=(0.5,), std=(0.5,), device=device), **crops).parameters(
                ids.to(device), uses.to(device), 256, 200
            )
            for device in ("cpu", "cuda")
        ]
        for here, there in zip(*drawn, strict=True):
            assert torch.equal(here, there.cpu())


@pytest.mark.cuda
def test_on_a_gpu_slots_beyond_32_bit_offsets_are_read() -> None:
    slots = torch.empty(12_000, 3, 256, 256, dtype=torch.uint8, device="cuda")
    slots[-1] = torch.randint(0, 256, slots.shape[1:], dtype=torch.uint8)
    box = torch.tensor([[0, 0, 256, 256]], dtype=torch.int32, device="cuda")
    rest = {
        "size": 64,
        "pad": 0,
        "mean": torch.zeros(3, device="cuda"),
        "std": torch.ones(3, device="cuda"),
    }
    flips = torch.tensor([False], device="cuda")
    last, first = (torch.tensor([i], device="cuda") for i in (len(slots) - 1, 0))
    got = views(slots, last, box, flips, **rest)
    assert torch.equal(got, views(slots[-1:].clone(), first, box, flips, **rest))
