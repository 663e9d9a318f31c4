"""The images that teacher and student learn from: a pre-allocated ring of uint8 slots.

Stands on floor 2, between sampler and views. Images are written in blocks: `reserve` gives a slice
of slots, the sampler writes into it, `commit` makes it visible; until then nothing of it can be
drawn. `sample` draws slots in shuffled passes, so every image of a pass is used exactly once. A
limiter keeps (views drawn) <= samples_per_insert * (images committed).
N capacity, c channels, H W pixels.

Source of the limiter: Cassirer et al., Reverb (arXiv 2102.04736), section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Block:
    """Reserved slots `start` .. `start + len(images)`, to be written and committed."""

    start: int
    images: Tensor
    """(n, c, H, W) uint8, a slice of the ring."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Slots drawn from the ring, (B,) int64 each."""

    indices: Tensor
    ids: Tensor
    """Image ids in those slots."""
    uses: Tensor
    """How often each image had been drawn before."""


class RingBuffer:
    """Ring of images with labels, ids and use counts, all on one device.

    Args:
        capacity_images: N; rounded up to whole blocks.
        image_shape: (c, H, W).
        block_images: Images per block: the sampler's batch.
        samples_per_insert: Views per image that the limiter allows.
        min_fill_images: Images before the first view.
        device: Where the ring lives.
        seed: Of the order of drawing.

    Raises:
        ValueError: Fewer than two blocks fit, or the ring could never hold `min_fill_images`.
    """

    def __init__(
        self, capacity_images: int, *, image_shape: tuple[int, int, int], block_images: int,
        samples_per_insert: float, min_fill_images: int, device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:  # fmt: skip
        if capacity_images < 2 * block_images:
            raise ValueError(
                f"capacity_images: got {capacity_images}, expected at least two blocks of "
                f"{block_images}; raise it"
            )
        self.capacity = -(-capacity_images // block_images) * block_images
        if min_fill_images > self.capacity - block_images:
            raise ValueError(
                f"min_fill_images: got {min_fill_images}, expected at most "
                f"{self.capacity - block_images} (capacity less one block); lower it"
            )
        self.block_images = block_images
        self.samples_per_insert, self.min_fill_images = samples_per_insert, min_fill_images
        self.images = torch.zeros((self.capacity, *image_shape), dtype=torch.uint8, device=device)
        self.labels = torch.zeros(self.capacity, dtype=torch.int64, device=device)
        self.ids = torch.full((self.capacity,), -1, dtype=torch.int64, device=device)
        self.uses = torch.zeros(self.capacity, dtype=torch.int64, device=device)
        self.num_inserted = 0
        self.num_sampled = 0
        self._reserved: Block | None = None
        self._is_torn = False
        self._pass = torch.empty(0, dtype=torch.int64, device=device)
        self._pass_position = 0
        self._generator = torch.Generator(device).manual_seed(seed)

    @property
    def num_filled(self) -> int:
        """Images in the ring now."""
        return min(self.num_inserted, self.capacity)

    def reserve(self) -> Block:
        """The next block of slots, the oldest images first once the ring is full.

        Raises:
            RuntimeError: A block is reserved already.
        """
        if self._reserved is not None:
            raise RuntimeError("reserve: a block is open already; commit or abort it first")
        start = self.num_inserted % self.capacity
        self._reserved = Block(start=start, images=self.images[start : start + self.block_images])
        return self._reserved

    def commit(self, block: Block, *, ids: Tensor, labels: Tensor) -> None:
        """Make a written block visible.

        Args:
            block: What `reserve` returned.
            ids: (block_images,) int64 image ids.
            labels: (block_images,) int64 classes.
        """
        if block is not self._reserved:
            raise RuntimeError("commit: got a block that is not reserved; reserve it first")
        slots = slice(block.start, block.start + self.block_images)
        self.ids[slots], self.labels[slots], self.uses[slots] = ids, labels, 0
        self.num_inserted += self.block_images
        self._reserved, self._is_torn = None, False

    def abort(self) -> None:
        """Give up the reserved block, if any.

        If it lay over older images, those may be overwritten in part: nothing can be drawn until
        the same slots have been reserved and committed again.
        """
        self._is_torn |= self._reserved is not None and self.num_inserted >= self.capacity
        self._reserved = None

    def must_insert(self, count: int) -> bool:
        """Whether the limiter wants another block before `count` more views are drawn."""
        allowed = self.samples_per_insert * self.num_inserted
        return self.num_inserted < self.min_fill_images or self.num_sampled + count > allowed

    def sample(self, count: int) -> Draw:
        """Draw `count` images in shuffled passes over what the ring holds.

        Raises:
            RuntimeError: The ring is empty, a block is open, or one was aborted over old images.
        """
        if self._reserved is not None or self._is_torn or self.num_inserted == 0:
            state = "the ring is empty" if self.num_inserted == 0 else "a block is half written"
            raise RuntimeError(f"sample: {state}; commit a block first")
        parts, missing = [], count
        while missing:
            if self._pass_position == len(self._pass):
                self._pass = torch.randperm(
                    self.num_filled, generator=self._generator, device=self.images.device
                )
                self._pass_position = 0
            part = self._pass[self._pass_position : self._pass_position + missing]
            self._pass_position += len(part)
            missing -= len(part)
            parts.append(part)
        indices = torch.cat(parts)  # (B,)
        draw = Draw(indices=indices, ids=self.ids[indices], uses=self.uses[indices])
        self.uses.index_add_(0, indices, torch.ones_like(indices))
        self.num_sampled += count
        return draw

    def state_dict(self) -> dict[str, Any]:
        """Images, counters, the pass under way and the generator: all that drawing depends on."""
        names = ("images", "labels", "ids", "uses", "num_inserted", "num_sampled", "_is_torn")
        state = {name: getattr(self, name) for name in names}
        return state | {
            "pass": self._pass,
            "pass_position": self._pass_position,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            ValueError: The state belongs to a ring of another shape.
        """
        if state["images"].shape != self.images.shape:
            raise ValueError(
                f"ring: got a state of shape {tuple(state['images'].shape)}, expected "
                f"{tuple(self.images.shape)}; resume with the settings of the run"
            )
        for name in ("images", "labels", "ids", "uses"):
            getattr(self, name).copy_(state[name])
        self.num_inserted, self.num_sampled = state["num_inserted"], state["num_sampled"]
        self._is_torn = state["_is_torn"]
        self._pass = state["pass"].to(self.images.device)
        self._pass_position = state["pass_position"]
        self._generator.set_state(state["generator"])
        self._reserved = None
