"""What a ring takes in memory, known before any of it is allocated.

Stands on floor 1. N slots, c channels, H W pixels.
"""

from __future__ import annotations

import math

from dmkd_fast.limiter import slots_for


def capacity_plan(
    capacity_images: int, *, image_shape: tuple[int, int, int], block_images: int
) -> dict[str, int]:
    """Bytes of each part of a `RingBuffer` made with these arguments; nothing is allocated.

    Args:
        capacity_images: N; rounded up to whole blocks, as the ring does.
        image_shape: (c, H, W).
        block_images: Images per block.

    Returns:
        Bytes by part; `order`, the pass under way, is the most it can be.
    """
    slots = slots_for(capacity_images, block_images)
    return {
        "images": slots * math.prod(image_shape),
        "labels": slots * 8, "ids": slots * 8, "uses": slots * 8, "stamps": slots * 4,
        "order": slots * 8,
    }  # fmt: skip


def largest_capacity(
    available_bytes: int, *, image_shape: tuple[int, int, int], block_images: int
) -> int:
    """Most images, in whole blocks, of a ring that fits into `available_bytes`.

    Args:
        available_bytes: Memory that the ring may take.
        image_shape, block_images: As of `capacity_plan`.
    """
    block = capacity_plan(block_images, image_shape=image_shape, block_images=block_images)
    return max(0, available_bytes) // sum(block.values()) * block_images
