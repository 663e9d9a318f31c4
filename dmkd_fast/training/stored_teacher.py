"""Teacher logits that were stored with the images, for the images that are in the ring.

View v of V stored views of an image has the crop of its use v. Use u of the image in pass k over
the set is given view (u + k) mod V, with the crop and the logits of that view.

Shapes: N slots of the ring, B drawn views, V stored views an image, C classes, K largest logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dmkd_fast.data.listing import SourceError
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.training.objective import TopLogits

if TYPE_CHECKING:
    from dmkd_fast.data.sources import ShardSource

_HELD = {"<f2": torch.float16, "<f4": torch.float32, "<u2": torch.int16, "<i4": torch.int32}


class StoredTeacher:
    """Hold the stored logits of the images in the ring, on the device of the ring.

    Args:
        source: Shards with teacher logits.
        num_slots: Number of slots of the ring.
        device: Device of the ring.
        ranks: Processes of the run. An error of one stops all.
    """

    def __init__(
        self,
        source: ShardSource,
        num_slots: int,
        device: torch.device | str = "cpu",
        *,
        ranks: Ranks = ALONE,
    ) -> None:
        assert source.plan.teacher_logits is not None
        self._source, self._ranks = source, ranks
        self.num_views = source.plan.teacher_logits.views_per_image
        arrays = source.plan.teacher_logits.arrays(source.plan.num_classes)
        self._held = {
            name: torch.zeros((num_slots, *shape), dtype=_HELD[dtype], device=device)
            for name, (dtype, shape) in arrays.items()
        }

    def insert(self, slots: slice, ids: Tensor) -> None:
        """Read the logits of the images that enter some slots; all ranks call this together.

        Args:
            slots: Slots of the images.
            ids: Image ids of those slots, int64.

        Raises:
            SourceError: The logits of an image on some rank cannot be read, or are damaged.
        """
        with self._ranks.agreed(SourceError):
            rows = [self._source.read_logits(i % self._source.num_images) for i in ids.tolist()]
        if not rows:  # A ring may be restored before its first block.
            return
        for name, held in self._held.items():
            array = np.stack([row[name] for row in rows])
            # PyTorch has few operations for uint16, whose bits are held as int16.
            array = array.view(np.int16) if array.dtype == np.uint16 else array
            held[slots] = torch.from_numpy(array).to(held.device)

    def replayed(self, ids: Tensor, uses: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image numbers and views (B,) of image ids and use counts (B,)."""
        count = self._source.num_images
        return ids % count, (uses + ids // count) % self.num_views

    def logits(self, indices: Tensor, views: Tensor) -> Tensor | TopLogits:
        """Return the logits (B, C), or the largest ones, of views (B,) of slots (B,)."""
        held = {name: values[indices, views] for name, values in self._held.items()}
        if "logits" in held:
            return held["logits"]
        indices = held["indices"].long()
        if held["indices"].dtype == torch.int16:
            indices &= 0xFFFF
        return TopLogits(held["values"], indices, held["logsumexp"])
