"""Check the sizes of a ring and the reuse of its images before any memory is allocated.

Sizes that never block: let u = samples_per_insert * block_images, d = batch_size and
e = error_buffer. The limiter (`ring/limiter.py`) keeps a number x in [-e, e]; each draw lowers it
by d, and each insert raises it by u. x begins at 0, so it stays on the grid of the multiples of
g = gcd(u, d). If the band [-e, e] holds fewer than (u + d) / g grid points, each point has at most
one possible move, and no two moves lead to the same point. A cycle has at least (u + d) / g points
and does not fit, so the loop must stop. With (u + d) / g points or more, each point has a move, and
the loop never stops. This argument has no published source.

Shapes: N slots, c channels, H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from dmkd_fast.rng import philox
from dmkd_fast.runtime import checks
from dmkd_fast.runtime.distributed import Ranks
from dmkd_fast.runtime.errors import UserError, invalid

MOST_USES = philox.MOST_STEPS  # the use count of an image is the step of its random views


@dataclass(frozen=True, kw_only=True)
class RingPlan:
    """Sizes of a ring buffer and the reuse of its images, checked against each other.

    Raises:
        TypeError, UserError: A field is out of range, or fields do not fit together.
    """

    capacity_images: int
    """Number of images that the ring holds; rounded up to whole blocks."""
    image_shape: tuple[int, int, int]
    """Shape of one image, (c, H, W)."""
    block_images: int
    """Images that enter the ring together, for example the batch size of the sampler."""
    samples_per_insert: float
    """Reuse: views drawn per inserted image, on average. The ring asks for new images, and does not
    ask too early, so that the reuse comes out. Read as a decimal number: 0.1 is one tenth."""
    min_fill_images: int
    """Images in the ring before the first draw; rounded up to whole blocks."""
    error_buffer: float | None = None
    """Views by which the draws may be ahead of the intended reuse, or behind it. None means
    samples_per_insert * min_fill_images; then the number of views never exceeds samples_per_insert
    * images."""
    max_uses: int | None = None
    """Draws of an image after which it is not drawn again; only for orders that draw in passes. An
    image that is committed during a pass may get one draw fewer."""
    guard_blocks: int = 0
    """Blocks that will be overwritten next and are not drawn. On a CUDA device, a guard lets the
    producer write them on a stream of its own."""

    def __post_init__(self) -> None:
        checks.image_shape(self.image_shape)
        for name, value, low, high in (
            ("capacity_images", self.capacity_images, 1, 2**40),
            ("block_images", self.block_images, 1, 2**31),
            ("min_fill_images", self.min_fill_images, 1, 2**40),
            ("max_uses", 1 if self.max_uses is None else self.max_uses, 1, MOST_USES),
            ("guard_blocks", self.guard_blocks, 0, 2**31),
        ):
            checks.whole(name, value, low=low, high=high)
        checks.number(
            "samples_per_insert", self.samples_per_insert, low=0, high=MOST_USES, above=True
        )
        if self.error_buffer is not None:
            checks.number("error_buffer", self.error_buffer, low=0, above=True)
        block, guard = self.block_images, max(1, self.guard_blocks)
        least, most = (1 + guard) * block, self.num_slots - guard * block
        if self.capacity_images < least:
            expected = f"at least {least} ({1 + guard} blocks of {block}, one to draw from)"
            raise invalid("capacity_images", self.capacity_images, expected, "raise it")
        if self.min_fill_images > most:
            expected = f"at most {most} (capacity less {guard} block(s) of {block})"
            raise invalid("min_fill_images", self.min_fill_images, expected, "lower it")
        if self.max_uses is not None and self.max_uses < self.samples_per_insert:
            expected = f"at least samples_per_insert={self.samples_per_insert:g}, the reuse"
            raise invalid("max_uses", self.max_uses, expected, "raise it")

    @property
    def num_slots(self) -> int:
        """Number of slots N: the capacity in whole blocks."""
        return _rounded_up(self.capacity_images, self.block_images)

    @property
    def first_fill_images(self) -> int:
        """Images before the first view, in whole blocks."""
        return _rounded_up(self.min_fill_images, self.block_images)

    @property
    def drawable_images(self) -> int:
        """Images of a full ring that can be drawn: all but those of the guard."""
        return self.num_slots - self.guard_blocks * self.block_images

    @property
    def reuse(self) -> Fraction:
        """Exact number of views per image."""
        return Fraction(str(self.samples_per_insert))

    @property
    def reuse_buffer(self) -> Fraction:
        """Exact number of views by which reuse may be off in either direction."""
        if self.error_buffer is None:
            return self.reuse * self.first_fill_images
        return Fraction(str(self.error_buffer))

    @property
    def num_bytes(self) -> dict[str, int]:
        """Bytes of a `RingBuffer` by part; `order` is the largest size of the current pass."""
        slots = self.num_slots
        return {
            "images": slots * math.prod(self.image_shape),
            "labels": slots * 8,
            "ids": slots * 8,
            "uses": slots * 8,
            "stamps": slots * 4,
            "order": slots * 8,
        }

    def images_for(self, views: int) -> int:
        """Return the number of images, in whole blocks, after which `views` views can be drawn.

        Args:
            views: Views drawn from the ring in all.
        """
        behind = (views - self.reuse_buffer) / self.reuse  # images after the first fill
        wanted = self.first_fill_images + math.ceil(max(Fraction(0), behind))
        return _rounded_up(wanted, self.block_images)

    def largest_capacity(self, available_bytes: int) -> int:
        """Return the largest capacity, in whole blocks, of a ring that fits into some memory.

        Args:
            available_bytes: Memory that the ring may take.
        """
        per_block = sum(self.num_bytes.values()) // self.num_slots * self.block_images
        return max(0, available_bytes) // per_block * self.block_images

    def check_batch(self, batch_size: int) -> None:
        """Refuse a batch size with which a loop of inserts and draws would stop.

        Args:
            batch_size: Views drawn together.

        Raises:
            TypeError, UserError: The loop would stop; the message says what to change.
        """
        checks.whole("batch_size", batch_size, low=1)
        if batch_size > self.drawable_images:
            expected = f"at most {self.drawable_images}, the images that can be drawn"
            raise invalid("batch_size", batch_size, expected, "lower it or raise capacity_images")
        step = self.reuse * self.block_images
        grid = _gcd(step, Fraction(batch_size))
        points = 2 * (self.reuse_buffer // grid) + 1  # x begins at 0, so 0 is a grid point
        if points < (step + batch_size) / grid:
            is_default = self.error_buffer is None
            name = "samples_per_insert" if is_default else "error_buffer"
            off_by, least = float(self.reuse_buffer), float((step + batch_size) / 2)
            got = f"{getattr(self, name):g}, which lets reuse be off by {off_by:g} views"
            expected = (
                f"{least:g} views or more, as inserts of block_images={self.block_images} and "
                f"draws of batch_size={batch_size} would deadlock"
            )
            fix = f"raise {name}{' or min_fill_images' if is_default else ''}"
            raise invalid(name, got, expected, fix)

    def per_rank(self, ranks: Ranks) -> RingPlan:
        """Return the plan of one rank: the same reuse, and its part of all sizes.

        Args:
            ranks: Processes that divide the ring.

        Raises:
            UserError: The ring cannot be divided into whole blocks, or the parts are too small.
        """
        count, block = ranks.world_size, self.block_images
        if count == 1:
            return self
        capacity = ranks.per_rank("capacity_images", self.num_slots, unit=block)
        try:
            return replace(
                self,
                capacity_images=capacity,
                # Only the start of training depends on the first fill, so it is rounded down.
                min_fill_images=max(1, self.min_fill_images // (count * block)) * block,
                error_buffer=None if self.error_buffer is None else self.error_buffer / count,
            )
        except UserError as error:
            raise UserError(f"{error} (of each of {count} ranks)") from None


def _rounded_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _gcd(a: Fraction, b: Fraction) -> Fraction:
    """Return the greatest number of which both are whole multiples."""
    denominator = math.lcm(a.denominator, b.denominator)
    return Fraction(math.gcd(int(a * denominator), int(b * denominator)), denominator)
