"""A small ring for tests, from the fields of its plan and the arguments of the buffer."""

from __future__ import annotations

from typing import Any

from dmkd_fast import RingBuffer, RingPlan

SIZES = {
    "capacity_images": 64,
    "image_shape": (1, 8, 8),
    "block_images": 16,
    "samples_per_insert": 4,
    "min_fill_images": 32,
}


def new_ring(
    *,
    order: Any = "shuffled",
    num_classes: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    **plan: Any,
) -> RingBuffer:
    """Build a ring of four blocks of 16 images of 8 x 8 pixels; `plan` replaces these sizes."""
    return RingBuffer(
        RingPlan(**(SIZES | plan)), order=order, num_classes=num_classes, device=device, seed=seed
    )
