"""Decide when images are made and when views are drawn, so that each image is reused as asked.

Reverb's rule: let x = samples_per_insert * (inserted - min_fill) - sampled. A draw must leave
x >= -error_buffer, and an insert must leave x <= error_buffer. `samples_per_insert` is read as a
decimal number: 0.1 is exactly one tenth, not the nearest binary fraction.

Settings that never block: let u = samples_per_insert * block_images, d = batch_size and
e = error_buffer. Each move lowers x by d or raises it by u. x begins at 0, so it stays on the grid
of the multiples of g = gcd(u, d). If the band [-e, e] holds fewer than (u + d) / g grid points,
each point has at most one possible move, and no two moves lead to the same point. A cycle has at
least (u + d) / g points and does not fit, so the loop must stop. With (u + d) / g points or more,
each point has a move, and the loop never stops.

Source: Cassirer et al., Reverb (arXiv 2102.04736), section 3.3; the grid argument is ours.
"""

from __future__ import annotations

import math
from fractions import Fraction

from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import UserError


class Limiter:
    """Count images and views, and decide whether to insert or to draw next.

    Args:
        samples_per_insert: Views per image.
        min_fill_images: Images before the first view; rounded up to whole blocks.
        block_images: Images that are inserted together.
        error_buffer: Views by which reuse may be off in either direction. None means
            samples_per_insert * min_fill_images; then the number of views never exceeds
            samples_per_insert * images.

    Raises:
        TypeError, UserError: A number is not positive or not finite.
    """

    def __init__(
        self,
        samples_per_insert: float,
        *,
        min_fill_images: int,
        block_images: int,
        error_buffer: float | None = None,
    ) -> None:
        for name, value in (
            ("samples_per_insert", samples_per_insert),
            ("min_fill_images", min_fill_images),
            ("block_images", block_images),
            ("error_buffer", 1 if error_buffer is None else error_buffer),
        ):
            checks.number(name, value)
            if value <= 0:
                raise UserError(f"{name}: got {value}, expected a positive number; change it")
        self.min_fill_images = slots_for(min_fill_images, block_images)
        self.block_images = block_images
        self._is_default = error_buffer is None
        self.reuse = Fraction(str(samples_per_insert))
        self.buffer = (
            self.reuse * self.min_fill_images
            if error_buffer is None
            else Fraction(str(error_buffer))
        )
        # Everything is scaled by one denominator, so that the hot path compares whole numbers.
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
        """Views still missing for the target reuse, x; negative when ahead of the target."""
        return self._distance(self.num_inserted) / self._scale

    def may_sample(self, count: int) -> bool:
        """Return whether `count` more views may be drawn from the committed images."""
        if self.num_inserted < self.min_fill_images:
            return False
        return self._distance(self.num_inserted) - count * self._scale >= -self._band

    def may_insert(self) -> bool:
        """Return whether one more block may be reserved; an open block counts as inserted."""
        if self.num_reserved < self.min_fill_images:
            return True
        return self._distance(self.num_reserved + self.block_images) <= self._band

    def check(self, batch_size: int) -> None:
        """Refuse settings with which inserts and draws would deadlock.

        Args:
            batch_size: Views drawn together.

        Raises:
            UserError: They would deadlock; the message says what to change.
        """
        step = self.reuse * self.block_images
        grid = _gcd(step, Fraction(batch_size))
        points = 2 * (self.buffer // grid) + 1  # x begins at 0, so 0 is a grid point
        if points < (step + batch_size) / grid:
            setting = "samples_per_insert" if self._is_default else "error_buffer"
            got = float(self.reuse if self._is_default else self.buffer)
            raise UserError(
                f"{setting}: got {got:g}, with which blocks of {self.block_images} images and "
                f"batches of {batch_size} views would wait for each other for ever (reuse may be "
                f"off by {float(self.buffer):g} views, expected {float((step + batch_size) / 2):g} "
                f"or more); raise {setting}{' or min_fill_images' if self._is_default else ''}"
            )

    def _distance(self, inserted: int) -> int:
        """Return x (see the module docstring) times the common denominator."""
        ahead = self._per_image * (inserted - self.min_fill_images)
        return ahead - self._scale * self.num_sampled


def check_ring(
    capacity_images: int,
    *,
    block_images: int,
    min_fill_images: int,
    guard_blocks: int,
    samples_per_insert: float,
    order: str,
    max_uses: int | None,
    num_classes: int | None,
) -> None:
    """Refuse ring settings that do not fit together; the arguments are those of `RingBuffer`.

    Raises:
        UserError: Settings do not fit together; the message says what to change.
    """
    if guard_blocks < 0:
        raise UserError(f"guard_blocks: got {guard_blocks}, expected 0 or more; raise it")
    least = (1 + max(1, guard_blocks)) * block_images
    if capacity_images < least:
        raise UserError(
            f"capacity_images: got {capacity_images}, expected at least {least} "
            f"({least // block_images} blocks of {block_images}: one to draw from and the others "
            "to write); raise it"
        )
    most = slots_for(capacity_images, block_images) - max(1, guard_blocks) * block_images
    if min_fill_images > most:
        raise UserError(
            f"min_fill_images: got {min_fill_images}, expected at most {most} (capacity less "
            f"{max(1, guard_blocks)} block(s) of {block_images}); lower it"
        )
    if order not in ("shuffled", "equal", "uniform", "balanced"):
        raise UserError(
            f"order: got {order!r}, expected shuffled, equal, uniform or balanced; choose one"
        )
    if order == "balanced" and num_classes is None:
        raise UserError("num_classes: got None with order=balanced, expected their number; set it")
    if max_uses is None:
        return
    if order not in ("shuffled", "equal"):
        raise UserError(
            f"max_uses: got {max_uses} with order={order}, which does not draw in passes; expected "
            "order=shuffled or equal; change one of the two"
        )
    if max_uses < samples_per_insert:
        raise UserError(
            f"max_uses: got {max_uses}, expected at least samples_per_insert="
            f"{samples_per_insert:g}, the views per image asked for; raise it"
        )


def slots_for(capacity_images: int, block_images: int) -> int:
    """Round a capacity up to whole blocks, and return the number of slots."""
    return -(-capacity_images // block_images) * block_images


def check_loop(limiter: Limiter, *, batch_size: int, most_drawable: int) -> None:
    """Refuse settings with which a loop of inserts and draws would stop.

    Args:
        limiter: Limiter of the ring.
        batch_size: Views drawn together.
        most_drawable: Largest number of images that can be drawn from: capacity less guard.

    Raises:
        UserError: The loop would stop; the message says what to change.
    """
    if batch_size > most_drawable:
        raise UserError(
            f"batch_size: got {batch_size}, expected at most {most_drawable}, the images that can "
            "be drawn from (capacity less guard); lower it or raise capacity_images"
        )
    limiter.check(batch_size)


def _gcd(a: Fraction, b: Fraction) -> Fraction:
    """Return the greatest number of which both are whole multiples."""
    denominator = math.lcm(a.denominator, b.denominator)
    return Fraction(math.gcd(int(a * denominator), int(b * denominator)), denominator)
