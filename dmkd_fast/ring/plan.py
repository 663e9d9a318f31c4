"""Check the sizes of a ring and plan its memory before any of it is allocated.

Shapes: N slots, c channels, H x W pixels.
"""

from __future__ import annotations

import math

import torch

from dmkd_fast.ring.limiter import slots_for
from dmkd_fast.runtime import checks
from dmkd_fast.runtime.device import available_bytes as free_bytes
from dmkd_fast.runtime.errors import UserError

# Views have 24 bits for the use count of an image; order "balanced" has 15 bits for its class.
MOST_USES, MOST_CLASSES = 2**24, 2**15


def check_sizes(
    capacity_images: int,
    *,
    image_shape: tuple[int, int, int],
    block_images: int,
    min_fill_images: int,
    guard_blocks: int,
    samples_per_insert: float,
    max_uses: int | None,
    num_classes: int | None,
    device: torch.device,
) -> None:
    """Refuse numbers out of range, and a ring that does not fit into the memory of the host.

    The arguments are those of `RingBuffer`. Only host memory is checked: if it runs out, the
    operating system ends the process, while other devices raise an error.

    Raises:
        TypeError, UserError: An argument is wrong; the message is one line that names it.
    """
    shape = checks.image_shape(image_shape)
    for name, value, most in (
        ("capacity_images", capacity_images, 2**40),
        ("block_images", block_images, 2**31),
        ("min_fill_images", min_fill_images, 2**40),
        ("max_uses", max_uses, MOST_USES),
        ("num_classes", num_classes, MOST_CLASSES),
    ):
        if value is not None or name not in ("max_uses", "num_classes"):
            checks.whole(name, value, low=1, high=most)
    checks.whole("guard_blocks", guard_blocks)
    checks.number("samples_per_insert", samples_per_insert, low=0, high=MOST_USES, above=True)
    size = sum(
        capacity_plan(capacity_images, image_shape=shape, block_images=block_images).values()
    )
    if device.type == "cpu" and size > free_bytes(device):
        raise UserError(
            f"capacity_images: got {capacity_images}, which takes {size:,} bytes, expected at most "
            f"{free_bytes(device):,}, what is free; lower it"
        )


def capacity_plan(
    capacity_images: int, *, image_shape: tuple[int, int, int], block_images: int
) -> dict[str, int]:
    """Return the bytes of each part of a `RingBuffer` with these arguments, without allocating it.

    Args:
        capacity_images: Number of slots N; rounded up to whole blocks, as in the ring.
        image_shape: Shape of one image, (c, H, W).
        block_images: Images per block.

    Returns:
        Bytes by part; `order` is the largest possible size of the current pass.
    """
    slots = slots_for(capacity_images, block_images)
    return {
        "images": slots * math.prod(image_shape),
        "labels": slots * 8,
        "ids": slots * 8,
        "uses": slots * 8,
        "stamps": slots * 4,
        "order": slots * 8,
    }


def largest_capacity(
    available_bytes: int, *, image_shape: tuple[int, int, int], block_images: int
) -> int:
    """Return the largest capacity, in whole blocks, of a ring that fits into `available_bytes`.

    Args:
        available_bytes: Memory that the ring may take.
        image_shape, block_images: Shape of one image and images per block, as in `capacity_plan`.
    """
    block = capacity_plan(block_images, image_shape=image_shape, block_images=block_images)
    return max(0, available_bytes) // sum(block.values()) * block_images
