"""Which blocks of images are in the ring, in which slots, and which may be drawn."""

from __future__ import annotations

from dmkd_fast.ring.plan import RingPlan


class BlockTable:
    """Keep track of the blocks that are in the ring and may be drawn.

    Block q, counted from the first one ever written, lies in place q % num_blocks. The
    `guard_blocks` places that will be overwritten next are not drawn.
    """

    def __init__(self, plan: RingPlan) -> None:
        self.capacity, self.block_images = plan.num_slots, plan.block_images
        self.num_blocks, self.guard_blocks = plan.num_slots // plan.block_images, plan.guard_blocks
        self.committed = 0
        """Blocks committed so far; also the number of the next block."""

    @property
    def held(self) -> range:
        """Numbers of the blocks in the ring, oldest first."""
        return range(max(0, self.committed - self.num_blocks), self.committed)

    @property
    def drawable(self) -> range:
        """Numbers of the blocks that may be drawn, oldest first."""
        return range(max(0, self.committed - self.num_blocks + self.guard_blocks), self.committed)

    @property
    def first_slot(self) -> int:
        """Slot of the oldest drawable image; the other drawable slots follow it around the ring."""
        return self.drawable.start % self.num_blocks * self.block_images

    @property
    def num_drawable(self) -> int:
        """Images that may be drawn."""
        return len(self.drawable) * self.block_images

    def slots(self, number: int) -> slice:
        """Return the slots of block `number`."""
        start = number % self.num_blocks * self.block_images
        return slice(start, start + self.block_images)
