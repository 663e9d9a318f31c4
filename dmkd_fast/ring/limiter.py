"""Decides when images are made and when views are drawn, so that each image is reused as asked.

Reverb's rule: with x = samples_per_insert * (inserted - min_fill) - sampled, a draw must leave
x >= -error_buffer and an insert x <= error_buffer. Reuse counts as written in decimal: 0.1 is one
tenth, not the nearest binary fraction.

When it never stops. Let u = samples_per_insert * block_images and d = batch_size. x moves down by d
or up by u, so it stays on a grid of width g = gcd(u, d) through 0, where it begins. Where the band
[-e, e] holds fewer than (u + d) / g points of that grid, at most one move is possible from each of
them, no two lead to the same point, and no cycle fits, because a cycle has at least (u + d) / g
points: the loop must end. With (u + d) / g points or more, each has a move.

Source: Cassirer et al., Reverb (arXiv 2102.04736), section 3.3; the grid argument is ours.
"""

from __future__ import annotations

import math
from fractions import Fraction

from dmkd_fast.runtime import checks


class Limiter:
    """Counts images and views, and says which may come next.

    Args:
        samples_per_insert: Views per image.
        min_fill_images: Images before the first view; rounded up to whole blocks.
        block_images: Images that are inserted together.
        error_buffer: Views by which reuse may be off in either direction; None:
            samples_per_insert * min_fill_images, with which views never exceed
            samples_per_insert * images.

    Raises:
        TypeError, ValueError: A number is not positive or not finite.
    """

    def __init__(
        self, samples_per_insert: float, *, min_fill_images: int, block_images: int,
        error_buffer: float | None = None,
    ) -> None:  # fmt: skip
        for name, value in (
            ("samples_per_insert", samples_per_insert), ("min_fill_images", min_fill_images),
            ("block_images", block_images),
            ("error_buffer", 1 if error_buffer is None else error_buffer),
        ):  # fmt: skip
            checks.number(name, value)
            if value <= 0:
                raise ValueError(f"{name}: got {value}, expected a positive number; change it")
        self.min_fill_images = slots_for(min_fill_images, block_images)
        self.block_images = block_images
        self._is_default = error_buffer is None
        self.reuse = Fraction(str(samples_per_insert))
        self.buffer = (
            self.reuse * self.min_fill_images
            if error_buffer is None
            else Fraction(str(error_buffer))
        )
        # Everything times one denominator: the hot path compares whole numbers.
        scale = math.lcm(self.reuse.denominator, self.buffer.denominator)
        self._scale, self._per_image = scale, int(self.reuse * scale)
        self._band = int(self.buffer * scale)
        self.num_inserted = 0
        """Images committed."""
        self.num_reserved = 0
        """Images committed or being written."""
        self.num_sampled = 0
        """Views drawn."""

    @property
    def error(self) -> float:
        """x: views that are still missing for the reuse asked for; negative when ahead of it."""
        return self._distance(self.num_inserted) / self._scale

    def may_sample(self, count: int) -> bool:
        """Whether `count` more views may be drawn from the images committed."""
        if self.num_inserted < self.min_fill_images:
            return False
        return self._distance(self.num_inserted) - count * self._scale >= -self._band

    def may_insert(self) -> bool:
        """Whether one more block may be reserved; counts the one being written."""
        if self.num_reserved < self.min_fill_images:
            return True
        return self._distance(self.num_reserved + self.block_images) <= self._band

    def check(self, batch_size: int) -> None:
        """Refuse settings with which inserting and drawing would wait for each other for ever.

        Args:
            batch_size: Views drawn together.

        Raises:
            ValueError: They would; says what to change.
        """
        step = self.reuse * self.block_images
        grid = _gcd(step, Fraction(batch_size))
        points = 2 * (self.buffer // grid) + 1  # x begins at 0, so 0 is on the grid
        if points < (step + batch_size) / grid:
            setting = "samples_per_insert" if self._is_default else "error_buffer"
            got = float(self.reuse if self._is_default else self.buffer)
            raise ValueError(
                f"{setting}: got {got:g}, with which blocks of {self.block_images} images and "
                f"batches of {batch_size} views would wait for each other for ever (reuse may be "
                f"off by {float(self.buffer):g} views, expected {float((step + batch_size) / 2):g} "
                f"or more); raise {setting}{' or min_fill_images' if self._is_default else ''}"
            )

    def _distance(self, inserted: int) -> int:
        """x of the module's text, times the common denominator."""
        ahead = self._per_image * (inserted - self.min_fill_images)
        return ahead - self._scale * self.num_sampled


def check_ring(
    capacity_images: int, *, block_images: int, min_fill_images: int, guard_blocks: int,
    samples_per_insert: float, order: str, max_uses: int | None, num_classes: int | None,
) -> None:  # fmt: skip
    """Refuse ring settings that do not fit together; arguments as of `RingBuffer`.

    Raises:
        ValueError: One line that says what to change.
    """
    if guard_blocks < 0:
        raise ValueError(f"guard_blocks: got {guard_blocks}, expected 0 or more; raise it")
    least = (1 + max(1, guard_blocks)) * block_images
    if capacity_images < least:
        raise ValueError(
            f"capacity_images: got {capacity_images}, expected at least {least} "
            f"({least // block_images} blocks of {block_images}: one to draw from and the others "
            "to write); raise it"
        )
    most = slots_for(capacity_images, block_images) - max(1, guard_blocks) * block_images
    if min_fill_images > most:
        raise ValueError(
            f"min_fill_images: got {min_fill_images}, expected at most {most} (capacity less "
            f"{max(1, guard_blocks)} block(s) of {block_images}); lower it"
        )
    if order not in ("shuffled", "equal", "uniform", "balanced"):
        raise ValueError(
            f"order: got {order!r}, expected shuffled, equal, uniform or balanced; choose one"
        )
    if order == "balanced" and num_classes is None:
        raise ValueError("num_classes: got None with order=balanced, expected their number; set it")
    if max_uses is None:
        return
    if order not in ("shuffled", "equal"):
        raise ValueError(
            f"max_uses: got {max_uses} with order={order}, which does not draw in passes; expected "
            "order=shuffled or equal; change one of the two"
        )
    if max_uses < samples_per_insert:
        raise ValueError(
            f"max_uses: got {max_uses}, expected at least samples_per_insert="
            f"{samples_per_insert:g}, the views per image asked for; raise it"
        )


def slots_for(capacity_images: int, block_images: int) -> int:
    """Slots of a ring: the capacity in whole blocks."""
    return -(-capacity_images // block_images) * block_images


def check_loop(limiter: Limiter, *, batch_size: int, most_drawable: int) -> None:
    """Refuse settings with which a loop of inserts and draws would stop.

    Args:
        limiter: Of the ring.
        batch_size: Views drawn together.
        most_drawable: Images that can be drawn from at most: capacity less guard.

    Raises:
        ValueError: One line that says what to change.
    """
    if batch_size > most_drawable:
        raise ValueError(
            f"batch_size: got {batch_size}, expected at most {most_drawable}, the images that can "
            "be drawn from (capacity less guard); lower it or raise capacity_images"
        )
    limiter.check(batch_size)


def _gcd(a: Fraction, b: Fraction) -> Fraction:
    """Greatest number of which both are whole multiples."""
    denominator = math.lcm(a.denominator, b.denominator)
    return Fraction(math.gcd(int(a * denominator), int(b * denominator)), denominator)
