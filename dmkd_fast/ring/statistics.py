"""Count the images in the ring, their uses and ages on the device, for log lines.

The host reads the counts only when a log line is due.
Shapes: N slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 65  # one bin for each use count from 0 to 63, and one for 64 and more


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """State of a ring at one moment; the tensors stay on the device until they are read."""

    uses: Tensor
    """(65,) int64: images in the ring by use count; the last bin holds 64 uses and more."""
    total_uses: Tensor
    """() int64: exact number of draws of the images in the ring."""
    retired_uses: Tensor
    """(65,) int64: all images overwritten so far, by use count, in the bins of `uses`."""
    ages: Tensor
    """(N,) int32: blocks committed after the block of each slot; -1 for an empty slot."""
    fill: float
    """Fraction of the slots that hold an image."""
    error: float
    """Views still missing for the target reuse; negative when ahead of the target."""
    sampled: int
    """Views drawn so far."""
    producer_wait_s: float
    """Seconds since the previous statistics in which no image was being made."""
    consumer_wait_s: float
    """Seconds since the previous statistics in which the consumer waited for images."""

    def means(self) -> dict[str, Tensor]:
        """Return the means for a log line, as scalars on the device.

        Returns:
            ring_uses: mean uses of the images in the ring. ring_unused: fraction of these images
            that was never drawn. ring_age_blocks: their mean age. retired_uses: mean uses of the
            overwritten images (0 before any image is overwritten).
        """
        held, gone = self.uses.sum().clamp(min=1), self.retired_uses.sum().clamp(min=1)
        return {
            "ring_uses": self.total_uses / held,
            "ring_unused": self.uses[0] / held,
            "ring_age_blocks": self.ages.clamp(min=0).sum() / held,
            "retired_uses": (self.sampled - self.total_uses) / gone,
        }

    def figures(self) -> dict[str, float]:
        """Return the figures for a log line that the host already has.

        With several ranks, these are the figures of the rank that logs.
        """
        return {
            "ring_fill": self.fill,
            "reuse_error": self.error,
            "producer_wait_s": self.producer_wait_s,
            "consumer_wait_s": self.consumer_wait_s,
        }


def count_slots(stamps: Tensor, uses: Tensor, *, committed: int) -> tuple[Tensor, Tensor]:
    """Count the filled slots by use count, and return the age of each slot.

    Args:
        stamps: (N,) int32, number of the block that wrote each slot; -1 for an empty slot.
        uses: (N,) int64, use count of each slot.
        committed: Blocks committed so far.

    Returns:
        `uses` (65,) int64 and `ages` (N,) int32; see `Statistics`.
    """
    is_filled = stamps >= 0
    histogram = torch.zeros(BINS, dtype=torch.int64, device=uses.device)
    histogram.scatter_add_(0, uses.clamp(max=BINS - 1), is_filled.long())
    return histogram, torch.where(is_filled, committed - 1 - stamps, -1)


def without_strays(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Clamp labels (n,) to valid classes, and count the changed ones, () int64 on the device."""
    inside = labels.clamp(0, num_classes - 1)
    return inside, (labels != inside).sum()
