"""Decide when images are made and when views are drawn, so that each image is reused as asked.

Reverb's rule: let x = samples_per_insert * (inserted - min_fill) - sampled. A draw must leave
x >= -error_buffer, and an insert must leave x <= error_buffer. `RingPlan.check_batch` refuses
settings that would deadlock.

Source: Cassirer et al., Reverb (arXiv 2102.04736), section 3.3.
"""

from __future__ import annotations

import math

from dmkd_fast.ring.plan import RingPlan


class Limiter:
    """Count images and views, and decide whether to insert or to draw next.

    Args:
        plan: Sizes and reuse of the ring.
    """

    def __init__(self, plan: RingPlan) -> None:
        self.min_fill_images, self.block_images = plan.first_fill_images, plan.block_images
        # Everything is scaled by one denominator, so that the hot path compares whole numbers.
        self._scale = math.lcm(plan.reuse.denominator, plan.reuse_buffer.denominator)
        self._per_image = int(plan.reuse * self._scale)
        self._band = int(plan.reuse_buffer * self._scale)
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

    def num_missing(self, count: int) -> int:
        """Return how many images, in whole blocks, must come before `count` more views."""
        views = self._scale * (self.num_sampled + count) - self._band
        needed = self.min_fill_images + max(0, -(-views // self._per_image))
        return -(-max(0, needed - self.num_inserted) // self.block_images) * self.block_images

    def may_insert(self) -> bool:
        """Return whether one more block may be reserved; an open block counts as inserted."""
        if self.num_reserved < self.min_fill_images:
            return True
        return self._distance(self.num_reserved + self.block_images) <= self._band

    def _distance(self, inserted: int) -> int:
        """Return x (see the module docstring) times the common denominator."""
        ahead = self._per_image * (inserted - self.min_fill_images)
        return ahead - self._scale * self.num_sampled
