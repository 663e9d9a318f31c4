"""The class of each image id: balanced and shuffled, a pure function of (seed, id).

Each run of `num_classes` consecutive ids holds every class once, in its own random order. So the
counts of two classes differ by at most one from id 0 on, and by at most two in any window of ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmkd_fast.rng import philox
from dmkd_fast.runtime import checks, tensor_checks

# Upper bound of count * num_classes: each label is read off a permutation of all classes.
MOST_NUMBERS = 2**26


class LabelStream:
    """A stream of consecutive image ids and their classes.

    The classes are balanced and shuffled: each run of `num_classes` consecutive ids holds every
    class once. Several processes (ranks) take turns: if all of them request `count` ids, rank r
    gets the r-th run of `count` ids.

    Args:
        num_classes: Number of classes, C.
        seed: Seed of the order of the classes.
        device: Device of the returned tensors.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        checks.whole("num_classes", num_classes, low=1, high=2**20)
        checks.whole("seed", seed, high=checks.MAX_SEED)
        checks.whole("world_size", world_size, low=1, high=2**20)
        checks.whole("rank", rank, high=world_size - 1)
        self.num_classes, self.seed = num_classes, seed
        self.device = torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.next_id = 0  # first id of the next turn, shared by all ranks

    def peek(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the next ids and their labels, (count,) int64 each.

        A second call returns the same ids, until `advance` moves past them.
        """
        checks.whole("count", count, low=1, high=MOST_NUMBERS // self.num_classes)
        start = self.next_id + self.rank * count
        ids = torch.arange(start, start + count, device=self.device)
        return ids, self.labels_of(ids)

    def advance(self, count: int) -> None:
        """Move past the `count` ids that each rank got from `peek`."""
        checks.whole("count", count)
        self.next_id += count * self.world_size

    def labels_of(self, ids: Tensor) -> Tensor:
        """Return the labels, (B,) int64, of any ids, (B,) int64."""
        tensor_checks.rows("ids", ids)
        tensor_checks.within("ids", ids, low=0, high=checks.MAX_SEED)
        blocks, place = ids // self.num_classes, ids % self.num_classes
        keys = philox.random_bits(
            self.seed, blocks, step=0, stream=philox.STREAM_LABELS, count=self.num_classes
        )  # (B, C)
        # Sorting the random keys of a run of ids gives its permutation of the classes.
        return keys.argsort(dim=1, stable=True).gather(1, place[:, None])[:, 0]

    def state_dict(self) -> dict[str, int]:
        """Return the next id of all ranks together."""
        return {"next_id": self.next_id}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what `state_dict` returned."""
        self.next_id = state["next_id"]
