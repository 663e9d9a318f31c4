"""A ring buffer of images on the training device.

Producers add images in blocks; consumers draw random slots. `reserve` returns a slice of slots, the
sampler writes into it inside `producing`, and `commit` makes it visible. Before `commit`, no image
of the block can be drawn. `sample` draws slots in the chosen order (`ring/orders.py`). `release`
reports that the drawn slots have been read. A limiter holds the number of views per image at its
target (`ring/limiter.py`).

With `guard_blocks` G > 0, the G blocks that will be overwritten next are not drawn. One of them may
be written, or aborted half written, while views are drawn from the others. If the producer has a
CUDA stream of its own (`ring/cuda_sync.py`), both happen at the same time. Images and draws are the
same with and without that stream.

Shapes: N slots, B drawn images, C classes, b images per block, c channels, H x W pixels.
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
from dmkd_fast.runtime import checks, tensor_checks
from dmkd_fast.runtime.errors import UserError

MOST_PASSES = 1024  # upper bound for the passes over the ring in one draw


@dataclass(frozen=True, kw_only=True)
class Block:
    """Reserved slots `start` to `start + len(images) - 1`, to be written and committed."""

    start: int
    images: Tensor
    """(b, c, H, W) uint8, a slice of the ring."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Slots drawn from the ring; each field is a (B,) int64 tensor."""

    indices: Tensor
    ids: Tensor
    """Image ids in those slots."""
    uses: Tensor
    """How often each image had been drawn before."""


class RingBuffer:
    """Hold images with labels, ids and use counts in a ring of slots on one device.

    Args:
        capacity_images: Number of slots N; rounded up to whole blocks.
        image_shape: Shape of one image, (c, H, W).
        block_images: Images per block b, the batch size of the sampler.
        samples_per_insert: Views per image that the limiter aims at.
        min_fill_images: Images before the first view; rounded up to whole blocks.
        error_buffer: Views by which reuse may be off; see `Limiter`.
        order: Order of the draws. "shuffled": passes over all images, so early images are drawn
            more often than late ones. "equal": passes over the less used half of the images, so
            late images catch up. "uniform": independent draws with replacement. "balanced": the
            same number of draws for each class.
        max_uses: Draws of an image after which it is not drawn again; with "shuffled" and "equal"
            only. An image that is committed during a pass may get one draw fewer.
        guard_blocks: Number G of blocks that will be overwritten next and are not drawn.
        own_stream: Whether the producer has a CUDA stream of its own; needs a guard.
        num_classes: Number of classes C, for "balanced", statistics by class, and label checks.
        device: Device of all tensors of the ring.
        seed: Seed of the draw order.

    Raises:
        TypeError, UserError: An argument is out of range, sizes do not fit together, or a setting
            would be ignored.
    """

    def __init__(
        self,
        capacity_images: int,
        *,
        image_shape: tuple[int, int, int],
        block_images: int,
        samples_per_insert: float,
        min_fill_images: int,
        error_buffer: float | None = None,
        order: OrderName = "shuffled",
        max_uses: int | None = None,
        guard_blocks: int = 0,
        own_stream: bool = False,
        num_classes: int | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        device = torch.device(device)
        check_sizes(
            capacity_images,
            image_shape=image_shape,
            block_images=block_images,
            device=device,
            min_fill_images=min_fill_images,
            guard_blocks=guard_blocks,
            max_uses=max_uses,
            num_classes=num_classes,
            samples_per_insert=samples_per_insert,
        )
        checks.whole("seed", seed, high=checks.MAX_SEED)
        self._limiter = Limiter(
            samples_per_insert,
            min_fill_images=min_fill_images,
            block_images=block_images,
            error_buffer=error_buffer,
        )
        check_ring(
            capacity_images,
            block_images=block_images,
            min_fill_images=min_fill_images,
            guard_blocks=guard_blocks,
            samples_per_insert=samples_per_insert,
            order=order,
            max_uses=max_uses,
            num_classes=num_classes,
        )
        if own_stream and (device.type != "cuda" or guard_blocks == 0):
            raise UserError(
                f"own_stream: got device {device.type} and guard_blocks={guard_blocks}, expected "
                "cuda and at least 1; set guard_blocks=1 or own_stream=False"
            )
        self._blocks = BlockTable(
            -(-capacity_images // block_images),
            block_images=block_images,
            guard_blocks=guard_blocks,
        )
        self.capacity, self.block_images = self._blocks.capacity, block_images
        self.max_uses, self.num_classes = max_uses, num_classes
        slots = self.capacity
        self.images = torch.zeros((slots, *image_shape), dtype=torch.uint8, device=device)
        self.labels = torch.zeros(slots, dtype=torch.int64, device=device)
        self.ids = torch.full((slots,), -1, dtype=torch.int64, device=device)
        self.uses = torch.zeros(slots, dtype=torch.int64, device=device)
        self.stamps = torch.full((slots,), -1, dtype=torch.int32, device=device)
        """Number of the block that wrote each slot; -1 for an empty slot."""
        self._num_strays = torch.zeros((), dtype=torch.int64, device=device)
        self._retired = torch.zeros(BINS, dtype=torch.int64, device=device)
        self._settings = {
            "block_images": block_images,
            "guard_blocks": guard_blocks,
            "order": order,
            "max_uses": max_uses,
            "seed": seed,
        }
        self._open: Block | None = None
        self._is_torn = False
        self._fences = Fences(device, guard_blocks=guard_blocks) if own_stream else Turns()
        self._order = make_order(
            order,
            self._blocks,
            labels=self.labels,
            uses=self.uses,
            num_classes=num_classes,
            max_uses=max_uses,
            seed=seed,
        )

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
        """Number G of guard blocks; only with G > 0 may views be drawn while a block is open."""
        return self._blocks.guard_blocks

    def check(self, batch_size: int) -> None:
        """Refuse settings that would stop a loop that draws `batch_size` views at a time.

        Raises:
            UserError: The loop would stop; the message says what to change.
        """
        check_loop(
            self._limiter,
            batch_size=batch_size,
            most_drawable=self.capacity - self.guard_blocks * self.block_images,
        )

    def must_insert(self, count: int) -> bool:
        """Return whether a block must be committed before `count` more views can be drawn.

        True before the first fill, when the limiter demands it, and when the images are used up.
        """
        return not self._limiter.may_sample(count) or self._is_used_up(count)

    def may_insert(self, count: int) -> bool:
        """Return whether a block may be reserved now, before draws need it.

        False while a block is open.

        Args:
            count: Views that will be drawn next.
        """
        if self._open is not None:
            return False
        return self._limiter.may_insert() or self._is_used_up(count)

    def reserve(self) -> Block:
        """Reserve the next block of slots; in a full ring, these hold the oldest images.

        Raises:
            RuntimeError: A block is already reserved.
        """
        if self._open is not None:
            raise RuntimeError("reserve: a block is open already; commit or abort it first")
        self._fences.before_write()
        start = self._blocks.committed % self._blocks.num_blocks * self.block_images
        self._open = Block(start=start, images=self.images[start : start + self.block_images])
        self._limiter.num_reserved += self.block_images
        return self._open

    def producing(self) -> AbstractContextManager[None]:
        """Return the context in which a reserved block is written.

        Work inside runs on the producer's stream, if the producer has one. Create the ids and
        labels for `commit` inside as well.
        """
        return self._fences.producing()

    def commit(self, block: Block, *, ids: Tensor, labels: Tensor) -> None:
        """Make a written block visible.

        Args:
            block: Block that `reserve` returned.
            ids: (b,) int64 image ids.
            labels: (b,) int64 classes.

        Raises:
            RuntimeError: The block is not open, or draws have not been released.
            TypeError, UserError: Ids or labels have a wrong type, shape, dtype or device, or
                labels on a CPU are not classes.
        """
        if block is not self._open:
            raise RuntimeError("commit: got a block that is not reserved; reserve it first")
        for name, values in (("ids", ids), ("labels", labels)):
            tensor_checks.rows(name, values, count=self.block_images, device=self.images.device)
        if self.num_classes is not None:
            tensor_checks.within("labels", labels, low=0, high=self.num_classes - 1)
        self._fences.before_commit(ids, labels)
        if self.num_classes is not None and labels.device.type != "cpu":
            # Reading labels would wait for the device: clamp and count those out of range, which
            # would crash a kernel. `num_faults` reports the count.
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

        Without a guard, the block may have overwritten older images in part. Then no image can be
        drawn until the same slots have been reserved and committed again.
        """
        self._is_torn = self._tears()
        if self._open is not None:
            self._limiter.num_reserved -= self.block_images
        self._open = None

    def sample(self, count: int) -> Draw:
        """Draw `count` images.

        Raises:
            TypeError, UserError: `count` is not a whole number from 1 to 1,024 times the capacity
                (at most 2**24).
            RuntimeError: The ring is empty, its images are used up, or, without a guard, a block
                is open or was aborted over older images.
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
        """Report that work queued on the current stream reads everything drawn so far.

        Call it after each gather if the producer has a stream of its own.
        """
        self._fences.after_gather()

    def statistics(self) -> Statistics:
        """Count images, uses and ages on the device; read the result when a log line is due."""
        waits = self._fences.waits_s()
        uses, class_counts, ages = count_slots(
            self.stamps,
            self.uses,
            self.labels,
            committed=self._blocks.committed,
            num_classes=self.num_classes,
        )
        return Statistics(
            uses=uses,
            total_uses=self.uses.sum(),
            retired_uses=self._retired.clone(),
            class_counts=class_counts,
            ages=ages,
            fill=self.num_filled / self.capacity,
            error=self._limiter.error,
            inserted=self.num_inserted,
            sampled=self.num_sampled,
            producer_wait_s=waits["producer"],
            consumer_wait_s=waits["consumer"],
        )

    def num_faults(self) -> Tensor:
        """Count the labels and use counts out of range, () int64 on the device.

        Use counts of 2**24 and more would repeat earlier views of an image. Give the number to
        `check_faults`.
        """
        return self._num_strays + (self.uses >= MOST_USES).sum()

    def check_faults(self, count: int) -> None:
        """Raise an error if there were faults on the device.

        Args:
            count: Result of `num_faults`, read by the host.

        Raises:
            UserError: `count` is not 0.
        """
        if count:
            raise UserError(
                f"ring: got {count:,} labels outside of 0 to {(self.num_classes or 0) - 1} or "
                f"images drawn {MOST_USES:,} times, expected none; correct the labels, or make "
                "samples_per_insert smaller"
            )

    def state_dict(self, *, images: bool = True) -> dict[str, Any]:
        """Return everything that draws depend on, without an open block; tensors are not copied.

        Args:
            images: Whether to include the pixels. Without them, the caller of `load_state_dict`
                must write the same pixels into `images`.
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
        """Load the result of `state_dict`; a state without pixels leaves `images` unchanged.

        Raises:
            UserError: The state belongs to a ring of another shape or with other settings.
        """
        for name, mine in self._tensors().items():
            if name in state and state[name].shape != mine.shape:
                raise UserError(
                    f"ring: got {name} of shape {tuple(state[name].shape)}, expected "
                    f"{tuple(mine.shape)}; resume with the settings of the run"
                )
        if state["settings"] != self._settings:
            raise UserError(
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
        """Return whether giving up the open block leaves drawable slots half written."""
        is_over_old = self._open is not None and self.num_inserted >= self.capacity
        return self._is_torn or (is_over_old and self.guard_blocks == 0)

    def _count(self, part: Tensor) -> Tensor:
        """Count one use of each slot (n,), and return how often each had been used before."""
        before = self.uses[part]
        if self._order.unique:
            self.uses[part] = before + 1
            return before
        self.uses.index_add_(0, part, torch.ones_like(part))
        # A slot that occurs twice counts two uses, since each use is a different view.
        return before + occurrences(part)
