"""A ring buffer of images on the training device.

Producers add images in blocks; consumers draw random slots. `reserve` returns a slice of slots, the
sampler writes into it inside `producing`, and `commit` makes it visible. Nothing of a block can be
drawn before that. `sample` draws slots in the chosen order (`ring/orders.py`), and `release` says
that they have been read. A limiter keeps the number of views per image (`ring/limiter.py`).

With `guard_blocks` G > 0, the G blocks that will be overwritten next are not drawn. One of them may
be written, or dropped half written, while views are drawn from the others. If the producer has a
CUDA stream of its own (`ring/cuda_sync.py`), both happen at the same time. Images and draws are the
same with and without that stream.

N capacity, B views drawn, C classes, b images per block, c channels, H W pixels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.ring.cuda_sync import Fences, Turns
from dmkd_fast.ring.limiter import Limiter, check_loop, check_ring
from dmkd_fast.ring.orders import BlockTable, OrderName, make_order, occurrences
from dmkd_fast.ring.plan import MOST_USES, check_sizes
from dmkd_fast.ring.statistics import BINS, Statistics, count_slots, without_strays
from dmkd_fast.runtime import checks

MOST_PASSES = 1024  # in one draw


@dataclass(frozen=True, kw_only=True)
class Block:
    """Reserved slots `start` .. `start + len(images)`, to be written and committed."""

    start: int
    images: Tensor
    """(b, c, H, W) uint8, a slice of the ring."""


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
        block_images: b, the sampler's batch.
        samples_per_insert: Views per image that the limiter aims at.
        min_fill_images: Images before the first view; rounded up to whole blocks.
        error_buffer: Views by which reuse may be off; see `Limiter`.
        order: "shuffled": passes over all images, so early images are drawn more often than late
            ones; "equal": passes over the less used half, so late ones catch up; "uniform": each
            draw by itself, with replacement; "balanced": as many draws for each class.
        max_uses: Draws of an image after which it is not drawn again; with "shuffled" and "equal"
            only. An image that comes in the middle of a pass may get one draw fewer.
        guard_blocks: G, blocks ahead of the writing that are not drawn.
        own_stream: Give the producer a CUDA stream of its own; needs a guard.
        num_classes: C, for "balanced", for statistics by class, and to check labels.
        device: Where the ring lives.
        seed: Of the order of drawing.

    Raises:
        ValueError: Sizes do not fit together, or a setting would be ignored.
    """

    def __init__(
        self, capacity_images: int, *, image_shape: tuple[int, int, int], block_images: int,
        samples_per_insert: float, min_fill_images: int, error_buffer: float | None = None,
        order: OrderName = "shuffled", max_uses: int | None = None, guard_blocks: int = 0,
        own_stream: bool = False, num_classes: int | None = None,
        device: torch.device | str = "cpu", seed: int = 0,
    ) -> None:  # fmt: skip
        device = torch.device(device)
        check_sizes(
            capacity_images, image_shape=image_shape, block_images=block_images, device=device,
            min_fill_images=min_fill_images, guard_blocks=guard_blocks, max_uses=max_uses,
            num_classes=num_classes, samples_per_insert=samples_per_insert,
        )  # fmt: skip
        checks.whole("seed", seed, high=checks.MAX_SEED)
        self._limiter = Limiter(
            samples_per_insert, min_fill_images=min_fill_images, block_images=block_images,
            error_buffer=error_buffer,
        )  # fmt: skip
        check_ring(
            capacity_images, block_images=block_images, min_fill_images=min_fill_images,
            guard_blocks=guard_blocks, samples_per_insert=samples_per_insert, order=order,
            max_uses=max_uses, num_classes=num_classes,
        )  # fmt: skip
        if own_stream and (device.type != "cuda" or guard_blocks == 0):
            raise ValueError(
                f"own_stream: got device {device.type} and guard_blocks={guard_blocks}, expected "
                "cuda and at least 1; set guard_blocks=1 or own_stream=False"
            )
        self._blocks = BlockTable(
            -(-capacity_images // block_images), block_images=block_images,
            guard_blocks=guard_blocks,
        )  # fmt: skip
        self.capacity, self.block_images = self._blocks.capacity, block_images
        self.max_uses, self.num_classes = max_uses, num_classes
        slots = self.capacity
        self.images = torch.zeros((slots, *image_shape), dtype=torch.uint8, device=device)
        self.labels = torch.zeros(slots, dtype=torch.int64, device=device)
        self.ids = torch.full((slots,), -1, dtype=torch.int64, device=device)
        self.uses = torch.zeros(slots, dtype=torch.int64, device=device)
        self.stamps = torch.full((slots,), -1, dtype=torch.int32, device=device)
        """Number of the block that wrote each slot; -1 if none has."""
        self._num_strays = torch.zeros((), dtype=torch.int64, device=device)
        self._retired = torch.zeros(BINS, dtype=torch.int64, device=device)
        self._settings = {
            "block_images": block_images, "guard_blocks": guard_blocks, "order": order,
            "max_uses": max_uses, "seed": seed,
        }  # fmt: skip
        self._open: Block | None = None
        self._is_torn = False
        self._fences = Fences(device, guard_blocks=guard_blocks) if own_stream else Turns()
        self._order = make_order(
            order, self._blocks, labels=self.labels, uses=self.uses, num_classes=num_classes,
            max_uses=max_uses, seed=seed,
        )  # fmt: skip

    @property
    def num_inserted(self) -> int:
        """Images committed so far."""
        return self._limiter.num_inserted

    @property
    def num_sampled(self) -> int:
        """Views drawn so far."""
        return self._limiter.num_sampled

    @property
    def num_filled(self) -> int:
        """Images in the ring now."""
        return min(self.num_inserted, self.capacity)

    @property
    def guard_blocks(self) -> int:
        """G: with 0, blocks and views take turns; with more, a block may stay open."""
        return self._blocks.guard_blocks

    def check(self, batch_size: int) -> None:
        """Refuse settings with which a loop that draws `batch_size` views at a time would stop.

        Raises:
            ValueError: One that says what to change.
        """
        check_loop(
            self._limiter, batch_size=batch_size,
            most_drawable=self.capacity - self.guard_blocks * self.block_images,
        )  # fmt: skip

    def must_insert(self, count: int) -> bool:
        """Whether another block has to be committed before `count` more views are drawn.

        True before the first fill, when the limiter says so, and when images are used up.
        """
        return not self._limiter.may_sample(count) or self._is_used_up(count)

    def may_insert(self, count: int) -> bool:
        """Whether a block may be reserved now, ahead of need; counts one that is open.

        Args:
            count: Views that will be drawn next.
        """
        if self._open is not None:
            return False
        return self._limiter.may_insert() or self._is_used_up(count)

    def reserve(self) -> Block:
        """The next block of slots, the oldest images first once the ring is full.

        Raises:
            RuntimeError: A block is reserved already.
        """
        if self._open is not None:
            raise RuntimeError("reserve: a block is open already; commit or abort it first")
        self._fences.before_write()
        start = self._blocks.committed % self._blocks.num_blocks * self.block_images
        self._open = Block(start=start, images=self.images[start : start + self.block_images])
        self._limiter.num_reserved += self.block_images
        return self._open

    def producing(self) -> AbstractContextManager[None]:
        """Where a reserved block is written: on the producer's stream, if it has one.

        Ids and labels given to `commit` are made inside as well.
        """
        return self._fences.producing()

    def commit(self, block: Block, *, ids: Tensor, labels: Tensor) -> None:
        """Make a written block visible.

        Args:
            block: What `reserve` returned.
            ids: (b,) int64 image ids.
            labels: (b,) int64 classes.

        Raises:
            RuntimeError: The block is not open, or draws have not been released.
            ValueError: Ids or labels have another shape, dtype or device.
        """
        if block is not self._open:
            raise RuntimeError("commit: got a block that is not reserved; reserve it first")
        for name, values in (("ids", ids), ("labels", labels)):
            checks.rows(name, values, count=self.block_images, device=self.images.device)
        if self.num_classes is not None:
            checks.within("labels", labels, low=0, high=self.num_classes - 1)
        self._fences.before_commit(ids, labels)
        if self.num_classes is not None and labels.device.type != "cpu":
            # Not read here. Statistics count them; until then they must not crash a kernel.
            labels, strays = without_strays(labels, self.num_classes)
            self._num_strays += strays
        slots = slice(block.start, block.start + self.block_images)
        if self.num_inserted >= self.capacity:
            old = self.uses[slots].clamp(max=BINS - 1)
            self._retired.scatter_add_(0, old, torch.ones_like(old))
        self.ids[slots], self.labels[slots], self.uses[slots] = ids, labels, 0
        self.stamps[slots] = self._blocks.committed
        self._limiter.num_inserted += self.block_images
        self._blocks.committed += 1
        self._order.on_commit()
        self._open, self._is_torn = None, False
        self._fences.after_commit()

    def abort(self) -> None:
        """Give up the reserved block, if any.

        Without a guard, if it lay over older images, those may be overwritten in part: nothing can
        be drawn until the same slots have been reserved and committed again.
        """
        self._is_torn = self._tears()
        if self._open is not None:
            self._limiter.num_reserved -= self.block_images
        self._open = None

    def sample(self, count: int) -> Draw:
        """Draw `count` images.

        Raises:
            TypeError, ValueError: `count` is not a whole number from 1 to 1,024 times the capacity.
            RuntimeError: The ring is empty or its images are used up, or, without a guard, a block
                is open or was aborted over old images.
        """
        checks.whole("count", count, low=1, high=min(MOST_PASSES * self.capacity, MOST_USES))
        state = None
        if self._blocks.num_drawable == 0:
            state = "the ring is empty"
        elif self.guard_blocks == 0 and (self._open is not None or self._is_torn):
            state = "a block is half written"
        elif self._is_used_up(count):
            state = f"fewer than {count} of max_uses={self.max_uses} draws per image are left"
        if state is not None:
            raise RuntimeError(f"sample: {state}; commit a block first")
        parts, before = [], []
        for part in self._order.draw(count):
            parts.append(part)
            before.append(self._count(part))
        indices, uses = (p[0] if len(p) == 1 else torch.cat(p) for p in (parts, before))  # (B,)
        self._limiter.num_sampled += count
        self._fences.after_draw()
        return Draw(indices=indices, ids=self.ids[indices], uses=uses)

    def release(self) -> None:
        """Everything drawn so far has been read by work on the current stream.

        Needed after each gather where the producer has a stream of its own.
        """
        self._fences.after_gather()

    def statistics(self) -> Statistics:
        """Counts on the device, to be read when a log line is due."""
        waits = self._fences.waits_s()
        uses, class_counts, ages = count_slots(
            self.stamps, self.uses, self.labels, committed=self._blocks.committed,
            num_classes=self.num_classes,
        )  # fmt: skip
        return Statistics(
            uses=uses, total_uses=self.uses.sum(), retired_uses=self._retired.clone(),
            class_counts=class_counts, ages=ages,
            fill=self.num_filled / self.capacity, error=self._limiter.error,
            inserted=self.num_inserted, sampled=self.num_sampled,
            producer_wait_s=waits["producer"], consumer_wait_s=waits["consumer"],
        )  # fmt: skip

    def num_faults(self) -> Tensor:
        """Labels and use counts that are out of range, () int64 on the device; see `check_faults`.

        Use counts above 2**24 would give an image the same views again.
        """
        return self._num_strays + (self.uses >= MOST_USES).sum()

    def check_faults(self, count: int) -> None:
        """Refuse to go on after faults on the device.

        Args:
            count: What `num_faults` returned, read by the host.

        Raises:
            ValueError: There were some.
        """
        if count:
            raise ValueError(
                f"ring: got {count:,} labels outside of 0 to {(self.num_classes or 0) - 1} or "
                f"images drawn {MOST_USES:,} times, expected none; correct the labels, or make "
                "samples_per_insert smaller"
            )

    def state_dict(self, *, images: bool = True) -> dict[str, Any]:
        """All that drawing depends on; tensors are the ring's own. An open block is left out.

        Args:
            images: Whether to include the pixels; without them, whoever loads the state writes
                the same pixels into `images`.
        """
        self._fences.join()
        tensors = self._tensors()
        if not images:
            del tensors["images"]
        rest: dict[str, Any] = {
            "settings": self._settings,
            "num_inserted": self.num_inserted,
            "num_sampled": self.num_sampled,
            "is_torn": self._tears(),
            "order": self._order.state_dict(),
        }
        return tensors | rest

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; pixels stay as they are where the state has none.

        Raises:
            ValueError: The state belongs to a ring of another shape or with other settings.
        """
        for name, mine in self._tensors().items():
            if name in state and state[name].shape != mine.shape:
                raise ValueError(
                    f"ring: got {name} of shape {tuple(state[name].shape)}, expected "
                    f"{tuple(mine.shape)}; resume with the settings of the run"
                )
        if state["settings"] != self._settings:
            raise ValueError(
                f"ring: got a state of {state['settings']}, expected {self._settings}; resume with "
                "the settings of the run"
            )
        self._fences.join()
        for name, mine in self._tensors().items():
            if name in state:
                mine.copy_(state[name])
        self._limiter.num_inserted = self._limiter.num_reserved = state["num_inserted"]
        self._limiter.num_sampled = state["num_sampled"]
        self._blocks.committed = state["num_inserted"] // self.block_images
        self._is_torn, self._open = state["is_torn"], None
        self._order.load_state_dict(state["order"])

    def _tensors(self) -> dict[str, Tensor]:
        names = ("images", "labels", "ids", "uses", "stamps")
        return {name: getattr(self, name) for name in names} | {"retired": self._retired}

    def _is_used_up(self, count: int) -> bool:
        left = self._order.uses_left()
        return left is not None and left < count

    def _tears(self) -> bool:
        """Whether slots that may be drawn are half written unless the open block is committed."""
        is_over_old = self._open is not None and self.num_inserted >= self.capacity
        return self._is_torn or (is_over_old and self.guard_blocks == 0)

    def _count(self, part: Tensor) -> Tensor:
        """Count one use of each slot (n,); returns how often each had been used before."""
        before = self.uses[part]
        if self._order.unique:
            self.uses[part] = before + 1
            return before
        self.uses.index_add_(0, part, torch.ones_like(part))
        # A slot that comes twice is used twice: the second time is another view of it.
        return before + occurrences(part)
