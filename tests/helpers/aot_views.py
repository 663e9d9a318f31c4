"""Compile the views' Triton kernels for GPUs that are absent, and inspect the machine code.

After a deliberate change of a kernel or of Triton's version, write the golden file again with

    python tests/helpers/aot_views.py
"""

from __future__ import annotations

from typing import Any

try:  # pytest and a run as a script both have this folder on the path
    import aot
except ImportError:
    from tests import aot
import torch

from dmkd_fast.loss import triton_launch
from dmkd_fast.views import triton

GOLDEN = aot.GOLDEN.with_name("views_kernels.json")
# (channels, side of the images, side of the views) by name.
SHAPES = {
    "rgb 256 to 224": (3, 256, 224),
    "rgb 32": (3, 32, 32),
    "grey 28": (1, 28, 28),
    "rgb 64 to 33": (3, 64, 33),
}
BATCH = 128
CAPACITY = 200_000


def all_cases() -> list[tuple[int, str, str]]:
    """List all cases: (architecture, name of a shape or "boxes", dtype)."""
    shapes = [(shape, dtype) for shape in SHAPES for dtype in aot.DTYPES]
    return [(a, *rest) for a in aot.ARCHITECTURES for rest in [*shapes, ("boxes", "int32")]]


def key(case: tuple[int, str, str]) -> str:
    return f"sm_{case[0]} {case[1]} {case[2]}"


def plan(shape: str, dtype: str) -> triton_launch.Launch:
    """Plan the launch for a batch from a ring of 200,000 images, more than 2^31 bytes."""
    indices = torch.zeros(BATCH, dtype=torch.int64)
    boxes = torch.zeros(BATCH, 4, dtype=torch.int32)
    flips = torch.zeros(BATCH, dtype=torch.bool)
    if shape == "boxes":
        recipe = (256, 256, 0, 1342177, 2**24, -3481732, 3481732, 256, 256, 10, 0.5)
        return triton.plan_boxes(boxes, flips, 2**40, indices, indices, *recipe)
    channels, side, size = SHAPES[shape]
    # All slots share the memory of one, since nothing is launched.
    slots = torch.zeros(1, channels, side, side, dtype=torch.uint8).expand(CAPACITY, -1, -1, -1)
    out = torch.empty(BATCH, channels, size, size, dtype=aot.DTYPES[dtype])
    mean = torch.zeros(channels)
    launch = triton.plan_views(out, slots, indices, boxes, flips, mean, mean, 0)
    arguments = list(launch.arguments)
    arguments[triton.render_kernel.arg_names.index("slot_stride")] = channels * side**2
    return launch._replace(arguments=tuple(arguments))


def build(case: tuple[int, str, str]) -> dict[str, Any]:
    """Compile one case; return registers, spills, shared memory, and accesses by bit width."""
    architecture, *rest = case
    return aot.inspect(plan(*rest), architecture)


def expected_stores(case: tuple[int, str, str]) -> tuple[int, int]:
    """Return the width in bits of the stores of a view, and their number per thread."""
    _, shape, dtype = case
    channels, _, size = SHAPES[shape]
    launch, bits = plan(shape, dtype), 8 * aot.DTYPES[dtype].itemsize
    per_thread = launch.constants["BLOCK"] // (32 * launch.num_warps)
    # Views follow one another without gaps, so their size limits the alignment.
    vector = min(128 // bits, per_thread, (numbers := channels * size**2) & -numbers)
    return bits * vector, per_thread // vector


def main() -> None:
    aot.write(GOLDEN, {key(case): build(case) for case in all_cases()})


if __name__ == "__main__":
    main()
