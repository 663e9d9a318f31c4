"""Which class each image id gets: balanced and shuffled, a pure function of (seed, id).

Every run of `num_classes` consecutive ids holds each class once, in an order
of its own, so any window of the stream is balanced to within one image per class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmkd_fast.rng import philox
from dmkd_fast.runtime import checks

# Every label takes a permutation of all classes.
MOST_NUMBERS = 2**26


class LabelStream:
    """Hands out consecutive image ids and their classes.

    Several ranks take turns: of every `world_size` requests of one size, each gets its own.

    Args:
        num_classes: C.
        seed: Another seed gives another order.
        device: Of the tensors handed out.
        rank, world_size: Whose turn this is, of how many.
    """

    def __init__(
        self, num_classes: int, *, seed: int = 0, device: torch.device | str = "cpu",
        rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        checks.whole("num_classes", num_classes, low=1, high=2**20)
        checks.whole("seed", seed, high=checks.MAX_SEED)
        checks.whole("world_size", world_size, low=1, high=2**20)
        checks.whole("rank", rank, high=world_size - 1)
        self.num_classes, self.seed = num_classes, seed
        self.device = torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.next_id = 0  # Of all ranks together.

    is_exhausted = False
    """There is always another image; what reads from disk may run out."""

    def peek(self, count: int) -> tuple[Tensor, Tensor]:
        """The next ids and their labels, (count,) int64 each; `advance` moves past them."""
        checks.whole("count", count, low=1, high=MOST_NUMBERS // self.num_classes)
        start = self.next_id + self.rank * count
        ids = torch.arange(start, start + count, device=self.device)
        return ids, self.labels_of(ids)

    def advance(self, count: int) -> None:
        """Count the next `count` ids as made."""
        checks.whole("count", count)
        self.next_id += count * self.world_size

    def labels_of(self, ids: Tensor) -> Tensor:
        """Labels (B,) int64 of any ids (B,) int64."""
        checks.rows("ids", ids)
        checks.within("ids", ids, low=0, high=checks.MAX_SEED)
        blocks, place = ids // self.num_classes, ids % self.num_classes
        keys = philox.random_bits(
            self.seed, blocks, step=0, stream=philox.STREAM_LABELS, count=self.num_classes
        )  # (B, C)
        # The class at a place is the index of the key with that rank.
        return keys.argsort(dim=1, stable=True).gather(1, place[:, None])[:, 0]

    def state_dict(self) -> dict[str, int]:
        """The next id."""
        return {"next_id": self.next_id}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Inverse of `state_dict`."""
        self.next_id = state["next_id"]
