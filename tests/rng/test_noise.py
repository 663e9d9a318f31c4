"""Counter-based numbers: right generator, right distribution, no dependence on the batch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from dmkd_fast.rng import philox


def test_philox_gives_the_published_vectors() -> None:
    # Known answers of Random123 for Philox4x32-10.
    ones = torch.full((1,), 0xFFFFFFFF)
    zeros = torch.zeros(1, dtype=torch.int64)
    got = philox.philox(0, zeros, zeros, zeros, zeros)
    assert [int(w) for w in got] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    got = philox.philox(2**64 - 1, ones, ones, ones, ones)
    assert [int(w) for w in got] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [torch.tensor([w]) for w in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    got = philox.philox(0x299F31D0A4093822, *pi)
    assert [int(w) for w in got] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_noise_of_an_image_does_not_depend_on_the_others() -> None:
    ids = torch.tensor([7, 2**40 + 1, 0, 99])
    together = philox.normal(11, ids, step=3, count=50)
    for row, image in enumerate(ids):
        assert torch.equal(philox.normal(11, image[None], step=3, count=50)[0], together[row])
    longer = philox.normal(11, ids, step=3, count=784)
    assert torch.equal(longer[:, :50], together)


def test_seed_step_stream_and_id_all_change_the_numbers() -> None:
    ids = torch.arange(4)
    base = philox.random_bits(1, ids, step=0, stream=0, count=8)
    others = [
        philox.random_bits(2, ids, step=0, stream=0, count=8),
        philox.random_bits(1, ids, step=1, stream=0, count=8),
        philox.random_bits(1, ids, step=0, stream=1, count=8),
        philox.random_bits(1, ids + 4, step=0, stream=0, count=8),
        philox.random_bits(1 + 2**40, ids, step=0, stream=0, count=8),
    ]
    for other in others:
        assert (other != base).all()


def test_each_purpose_has_numbers_of_its_own() -> None:
    streams = {name: value for name, value in vars(philox).items() if name.startswith("STREAM_")}
    assert len(streams) >= 8 and len({*streams.values()}) == len(streams)
    assert all(0 <= value < 256 for value in streams.values())


def test_normal_numbers_have_the_moments_of_a_normal() -> None:
    x = philox.normal(5, torch.arange(1000), step=0, count=1000).double()
    n = x.numel()
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 5 / n**0.5
    assert abs((x[1:] * x[:-1]).mean()) < 5 / n**0.5
    assert x.isfinite().all()


@pytest.mark.parametrize("count", [1, 3, 63, 64, 65, 784, 3072])
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 11])
def test_the_cpu_kernel_gives_the_bits_of_the_definition(seed: int, count: int) -> None:
    ids = torch.tensor([7, 2**40 + 1, 0, 99, 2**62])
    for step in (0, 1, 4096):
        expected = philox.normal_reference(seed, ids, step, count)
        assert torch.equal(philox.normal(seed, ids, step=step, count=count), expected)


def test_logarithm_sine_and_cosine_are_accurate() -> None:
    u = (torch.arange(2**20).float() * 16 + 0.5) * 2.0**-24
    error = (philox._log_unit(u).double() - u.double().log()).abs()
    assert (error / u.double().log().abs()).max() < 3e-7
    r = torch.linspace(-0.125, 0.125, 10001)
    sine = r * philox._polynomial(philox.SIN, r * r)
    cosine = philox._polynomial(philox.COS, r * r)
    turns = 2 * torch.pi * r.double()
    assert (sine.double() - turns.sin()).abs().max() < 1.5e-7
    assert (cosine.double() - turns.cos()).abs().max() < 1.5e-7


INTERPRETED = """
import torch
from dmkd_fast.rng import philox
from dmkd_fast.rng import triton as kernel
ids = torch.tensor([7, 2**40 + 1, 0, 99])
for seed in (0, 1, 2**40 + 11):
    for count in (1, 5, 784, 3000):
        for step in (0, 3):
            got = kernel.normal(seed, ids, step, count)
            assert torch.equal(got, philox.normal_reference(seed, ids, step, count)), (seed, count)
kernel.MOST = 2  # five sections along two axes of the grid
assert torch.equal(kernel.normal(5, ids, 3, 5000), philox.normal_reference(5, ids, 3, 5000))
print("equal")
"""


def test_the_triton_kernel_gives_the_bits_of_the_definition() -> None:
    """Under Triton's interpreter, in a process of its own: it is chosen on import."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize(("images", "count"), [(70_000, 1), (3, 2**27 + 1), (1, 2**34)])
def test_the_grid_of_the_triton_kernel_is_within_the_limits(
    images: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA allows 65,535 programs along the second and the third axis."""
    from dmkd_fast.rng import triton

    grids: list[tuple[int, int, int]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            grids.append(grid)
            return lambda *arguments, **constants: None

    monkeypatch.setattr(triton, "normal_kernel", Kernel())
    triton.normal(0, torch.zeros(images, dtype=torch.int64, device="meta"), 0, count)
    ((rows, *sections),) = grids
    assert rows == images and max(sections) <= 65535
    assert 4 * triton.BLOCKS * math.prod(sections) >= count


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_the_triton_kernel_builds_without_fused_products(capability: int) -> None:
    """A fused product would change bits; a square root must be the correctly rounded one."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from dmkd_fast.rng import triton

    source = ASTSource(
        fn=triton.normal_kernel,
        signature={
            "out": "*fp32",
            "ids": "*i64",
            "count": "i32",
            "seed": "i64",
            "step": "i32",
            "BLOCKS": "constexpr",
        },
        constexprs={(5,): triton.BLOCKS},
    )
    kernel = compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False}
    )
    assert "fma.rn" not in kernel.asm["ptx"] and "sqrt.rn.f32" in kernel.asm["ptx"]
    assert kernel.asm["cubin"]
