"""What is in the ring and how it was used: counted on the device, read when a log line is due.

N slots, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 65  # use counts 0 to 63, and 64 or more: for a look at the spread; sums are exact


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A ring at one moment; tensors stay on the device until they are read."""

    uses: Tensor
    """(65,) int64: images in the ring by how often they were drawn; the last: 64 times or more."""
    total_uses: Tensor
    """() int64: draws of the images in the ring, exact."""
    retired_uses: Tensor
    """(65,) int64: the same of all images overwritten so far."""
    ages: Tensor
    """(N,) int32: blocks that came after the one of each slot; -1 if the slot is empty."""
    class_counts: Tensor | None
    """(C,) int64: images in the ring by class, if the ring knows how many classes there are."""
    fill: float
    """Share of the slots that hold an image."""
    error: float
    """Views still missing for the reuse asked for; negative when ahead of it."""
    inserted: int
    """Images committed so far."""
    sampled: int
    """Views drawn so far."""
    producer_wait_s: float
    """Seconds since the last call in which no image was being made."""
    consumer_wait_s: float
    """Seconds since the last call spent waiting for images."""

    def means(self) -> dict[str, Tensor]:
        """Figures of a log line, scalars on the device.

        Returns:
            ring_uses: mean uses of the images in the ring; ring_unused: share of them never drawn;
            ring_age_blocks: mean age; retired_uses: mean uses of the images overwritten (0 before
            there are any).
        """
        held, gone = self.uses.sum().clamp(min=1), self.retired_uses.sum().clamp(min=1)
        return {
            "ring_uses": self.total_uses / held,
            "ring_unused": self.uses[0] / held,
            "ring_age_blocks": self.ages.clamp(min=0).sum() / held,
            "retired_uses": (self.sampled - self.total_uses) / gone,
        }

    def figures(self) -> dict[str, float]:
        """Figures of a log line that the host has; of several ranks, those of the one that logs."""
        return {
            "ring_fill": self.fill,
            "reuse_error": self.error,
            "producer_wait_s": self.producer_wait_s,
            "consumer_wait_s": self.consumer_wait_s,
        }


def count_slots(
    stamps: Tensor, uses: Tensor, labels: Tensor, *, committed: int, num_classes: int | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Histogram of uses, images by class and ages of the slots that hold an image.

    Args:
        stamps: (N,) int32, number of the block that wrote each slot, -1 if none has.
        uses: (N,) int64.
        labels: (N,) int64.
        committed: Blocks committed so far.
        num_classes: C, or None.

    Returns:
        (65,) int64, (C,) int64 or None, (N,) int32; see `Statistics`.
    """
    is_filled = stamps >= 0
    ones = is_filled.long()
    histogram = torch.zeros(BINS, dtype=torch.int64, device=uses.device)
    histogram.scatter_add_(0, uses.clamp(max=BINS - 1), ones)
    by_class = None
    if num_classes is not None:
        by_class = torch.zeros(num_classes, dtype=torch.int64, device=uses.device)
        by_class.scatter_add_(0, labels, ones)
    return histogram, by_class, torch.where(is_filled, committed - 1 - stamps, -1)


def without_strays(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Labels (n,) moved into the classes, and how many had to be, () int64; nothing is read."""
    inside = labels.clamp(0, num_classes - 1)
    return inside, (labels != inside).sum()
