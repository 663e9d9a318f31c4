"""What a ring takes in memory, known before any of it is allocated.

N slots, c channels, H W pixels.
"""

from __future__ import annotations

import math

import torch

from dmkd_fast.ring.limiter import slots_for
from dmkd_fast.runtime import checks
from dmkd_fast.runtime.device import available_bytes as free_bytes

# Views have 24 bits for the number of an image's use; order "balanced" has 15 for its class.
MOST_USES, MOST_CLASSES = 2**24, 2**15


def check_sizes(
    capacity_images: int, *, image_shape: tuple[int, int, int], block_images: int,
    min_fill_images: int, guard_blocks: int, samples_per_insert: float, max_uses: int | None,
    num_classes: int | None, device: torch.device,
) -> None:  # fmt: skip
    """Refuse numbers out of range, and a ring that memory of the host cannot hold.

    Arguments as of `RingBuffer`. Memory of other devices is not asked for: a tensor that does not
    fit there is an error by itself, where the host's system would end the process.

    Raises:
        TypeError, ValueError: One line that names the argument.
    """
    shape = checks.image_shape(image_shape)
    for name, value, most in (
        ("capacity_images", capacity_images, 2**40), ("block_images", block_images, 2**31),
        ("min_fill_images", min_fill_images, 2**40), ("max_uses", max_uses, MOST_USES),
        ("num_classes", num_classes, MOST_CLASSES),
    ):  # fmt: skip
        if value is not None or name not in ("max_uses", "num_classes"):
            checks.whole(name, value, low=1, high=most)
    checks.whole("guard_blocks", guard_blocks)
    checks.number("samples_per_insert", samples_per_insert, low=0, high=MOST_USES, above=True)
    size = sum(
        capacity_plan(capacity_images, image_shape=shape, block_images=block_images).values()
    )
    if device.type == "cpu" and size > free_bytes(device):
        raise ValueError(
            f"capacity_images: got {capacity_images}, which takes {size:,} bytes, expected at most "
            f"{free_bytes(device):,}, what is free; lower it"
        )


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
