"""Interface of the images that a run trains on, generated (`sampling`) or stored (`data`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class ImageStream(Protocol):
    """Source of numbered, labeled images, in blocks for the ring of this rank.

    Shapes: B images of a block, c channels, H x W pixels.
    """

    @property
    def is_exhausted(self) -> bool:
        """Whether the ring holds every image of the stream, so that training needs no more."""
        ...

    @property
    def may_wait(self) -> bool:
        """Whether `next_block` may wait for images, or images depend on when they are made.

        Blocks are then not made ahead of need.
        """
        ...

    @property
    def rewrites(self) -> Sequence[Callable[..., object]]:
        """Functions that make lost images again, called as `rewrite(ids, labels, out=)` in turn."""
        ...

    def next_block(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the next ids and classes, (count,) int64 each; the same until `advance`."""
        ...

    def write(self, ids: Tensor, labels: Tensor, out: Tensor, *, progress: float) -> None:
        """Write images to `out`, (B, c, H, W) uint8, at this progress of the run in [0, 1]."""
        ...

    def advance(self, count: int) -> None:
        """Move past the `count` images that each rank got from `next_block`."""
        ...

    def warm_up(self, scratch: Tensor) -> None:
        """Compile what `write` needs; `scratch` is like a block of the ring and stays unchanged."""
        ...

    def counts(self, device: torch.device) -> dict[str, Tensor]:
        """Return counts () on the device, which the host reads with the next row of statistics.

        `Metrics` reports the mean over ranks, so multiply a count of this rank by their number.
        """
        ...

    def check(self, counts: Mapping[str, int]) -> None:
        """Stop a run whose images are not usable, by what `counts` returned."""
        ...

    def totals(self) -> dict[str, float]:
        """Return figures for the summary of the run."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...
