"""A ring buffer of images on the training device.

Producers add images in blocks; consumers draw random slots. Once the ring is full, each new block
overwrites the oldest one.

    block = ring.reserve()                       # slots to write, not drawn yet
    with ring.producing():                       # on the producer's stream, if it has one
        sampler.sample(ids, labels, out=block.images)
    ring.commit(block, ids=ids, labels=labels)   # from now on they can be drawn

    draw = ring.sample(batch_size)               # slot indices, image ids, use counts
    views = ring.images[draw.indices]
    ring.release()                               # the slots may be overwritten again

With G > 0 `guard_blocks`, the G blocks that will be overwritten next are not drawn. One of them may
be written, or aborted half written, while views are drawn from the others. On a CUDA device, both
then happen at the same time, on two streams (`ring/cuda_sync.py`). Images and draws are the same as
those of one stream.

Shapes: N slots, B drawn images, C classes, b images per block, c channels, H x W pixels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.ring.block_table import BlockTable
from dmkd_fast.ring.cuda_sync import streams_for
from dmkd_fast.ring.limiter import Limiter
from dmkd_fast.ring.orders import OrderName, check_order, make_order, occurrences
from dmkd_fast.ring.plan import MOST_USES, RingPlan
from dmkd_fast.ring.statistics import BINS, Statistics, count_slots, without_strays
from dmkd_fast.runtime import checks, tensor_checks
from dmkd_fast.runtime.device import available_bytes
from dmkd_fast.runtime.errors import invalid

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

    Images are inserted in blocks and drawn at random. Once the ring is full, each new block
    overwrites the oldest one. `must_insert` and `may_insert` say when new images are due.

    Args:
        plan: Sizes of the ring and the reuse of its images.
        order: Order of the draws. "shuffled": passes over all images, so early images are drawn
            more often than late ones. "equal": passes over the less used half of the images, so
            late images catch up. "uniform": independent draws with replacement. "balanced": the
            same number of draws for each class.
        num_classes: Number of classes C, for "balanced", and for label checks.
        device: Device of all tensors of the ring. On a CUDA device, a plan with a guard gives the
            producer a stream of its own.
        seed: Seed of the draw order.

    Raises:
        TypeError, UserError: An argument is out of range, arguments do not fit together, or the
            ring does not fit into the memory of the host.

    Examples:
        >>> import torch
        >>> from dmkd_fast import RingBuffer, RingPlan
        >>> sizes = {"capacity_images": 8, "image_shape": (1, 2, 2), "block_images": 4}
        >>> ring = RingBuffer(RingPlan(**sizes, samples_per_insert=2, min_fill_images=4))
        >>> block = ring.reserve()
        >>> block.images[:] = 255
        >>> ring.commit(block, ids=torch.arange(4), labels=torch.tensor([0, 1, 0, 1]))
        >>> draw = ring.sample(3)
        >>> ring.images[draw.indices].shape, draw.uses.tolist()
        (torch.Size([3, 1, 2, 2]), [0, 0, 0])
    """

    def __init__(
        self,
        plan: RingPlan,
        *,
        order: OrderName = "shuffled",
        num_classes: int | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        device = torch.device(device)
        checks.whole("seed", seed, high=checks.MAX_SEED)
        check_order(order, max_uses=plan.max_uses, num_classes=num_classes)
        size = sum(plan.num_bytes.values())
        # A device that runs out of memory raises an error; the host ends the process.
        if device.type == "cpu" and size > (free := available_bytes(device)):
            got = f"{plan.capacity_images}, which takes {size:,} bytes"
            raise invalid("capacity_images", got, f"at most {free:,}, what is free", "lower it")
        self.plan, self.num_classes = plan, num_classes
        self.blocks, self._limiter = BlockTable(plan), Limiter(plan)
        self.capacity, self.block_images = plan.num_slots, plan.block_images
        slots = self.capacity
        self.images = torch.zeros((slots, *plan.image_shape), dtype=torch.uint8, device=device)
        self.labels = torch.zeros(slots, dtype=torch.int64, device=device)
        self.ids = torch.full((slots,), -1, dtype=torch.int64, device=device)
        self.uses = torch.zeros(slots, dtype=torch.int64, device=device)
        self.stamps = torch.full((slots,), -1, dtype=torch.int32, device=device)
        """Number of the block that wrote each slot; -1 for an empty slot."""
        self._num_strays = torch.zeros((), dtype=torch.int64, device=device)
        self._retired = torch.zeros(BINS, dtype=torch.int64, device=device)
        self._settings = {
            "block_images": plan.block_images,
            "guard_blocks": plan.guard_blocks,
            "order": order,
            "max_uses": plan.max_uses,
            "seed": seed,
        }
        self._open: Block | None = None
        self._is_torn = False
        self._streams = streams_for(device, guard_blocks=plan.guard_blocks)
        self._order = make_order(
            order,
            self.blocks,
            labels=self.labels,
            uses=self.uses,
            num_classes=num_classes,
            max_uses=plan.max_uses,
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

    def must_insert(self, count: int) -> bool:
        """Return whether a block must be committed before `count` more views can be drawn.

        True before the first fill, when the limiter demands it, and when the images are used up.
        """
        return not self._limiter.may_sample(count) or self._is_used_up(count)

    def num_missing(self, count: int) -> int:
        """Return how many images the limiter demands before `count` more views are drawn."""
        return self._limiter.num_missing(count)

    def may_insert(self, count: int) -> bool:
        """Return whether a block may be reserved now, before draws need it.

        False while a block is open.

        Args:
            count: Views that will be drawn next.
        """
        return self._open is None and (self._limiter.may_insert() or self._is_used_up(count))

    def reserve(self) -> Block:
        """Reserve the next block of slots; in a full ring, these hold the oldest images.

        Raises:
            RuntimeError: A block is already reserved.
        """
        if self._open is not None:
            raise RuntimeError("reserve: a block is open already; commit or abort it first")
        self._streams.before_write()
        slots = self.blocks.slots(self.blocks.committed)
        self._open = Block(start=slots.start, images=self.images[slots])
        self._limiter.num_reserved += self.block_images
        return self._open

    def producing(self) -> AbstractContextManager[None]:
        """Return the context in which a reserved block is written.

        Work inside runs on the producer's stream, if the producer has one. Create the ids and
        labels for `commit` inside as well.
        """
        return self._streams.producing()

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
        self._streams.before_commit(ids, labels)
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
        self.stamps[slots] = self.blocks.committed
        self._limiter.num_inserted += self.block_images
        self.blocks.committed += 1
        self._order.on_commit()
        self._open, self._is_torn = None, False
        self._streams.after_commit()

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
        if self.blocks.num_drawable == 0:
            state = "the ring is empty"
        elif self.plan.guard_blocks == 0 and (self._open is not None or self._is_torn):
            state = "a block is half written"
        elif self._is_used_up(count):
            state = f"fewer than {count} of max_uses={self.plan.max_uses} draws per image are left"
        if state is not None:
            raise RuntimeError(f"sample: {state}; commit a block first")
        segments, before = [], []
        for segment in self._order.draw(count):
            segments.append(segment)
            before.append(self._count(segment))
        indices, uses = (s[0] if len(s) == 1 else torch.cat(s) for s in (segments, before))  # (B,)
        self._limiter.num_sampled += count
        self._streams.after_draw()
        return Draw(indices=indices, ids=self.ids[indices], uses=uses)

    def release(self) -> None:
        """Report that work queued on the current stream reads everything drawn so far.

        Call it after each gather if the producer has a stream of its own.
        """
        self._streams.after_gather()

    def statistics(self) -> Statistics:
        """Count images, uses and ages on the device; read the result when a log line is due.

        On CUDA the host waits here for the events that measure the waits.
        """
        waits = self._streams.waits_s()
        uses, ages = count_slots(self.stamps, self.uses, committed=self.blocks.committed)
        return Statistics(
            uses=uses,
            total_uses=self.uses.sum(),
            retired_uses=self._retired.clone(),
            ages=ages,
            fill=self.num_filled / self.capacity,
            error=self._limiter.error,
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
            labels = f"labels outside of 0 to {(self.num_classes or 0) - 1}"
            got = f"{count:,} {labels} or images drawn {MOST_USES:,} times"
            fix = "correct the labels, or make samples_per_insert smaller"
            raise invalid("ring", got, "none", fix)

    def state_dict(self, *, images: bool = True) -> dict[str, Any]:
        """Return everything that draws depend on, without an open block; tensors are not copied.

        Args:
            images: Whether to include the pixels. Without them, the caller of `load_state_dict`
                must write the same pixels into `images`.
        """
        self._streams.join()
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
        fix = "resume with the settings of the run"
        for name, mine in self._tensors().items():
            if name in state and state[name].shape != mine.shape:
                got = f"{name} of shape {tuple(state[name].shape)}"
                raise invalid("ring", got, str(tuple(mine.shape)), fix)
        if state["settings"] != self._settings:
            raise invalid("ring", f"a state of {state['settings']}", str(self._settings), fix)
        self._streams.join()
        for name, mine in self._tensors().items():
            if name in state:
                mine.copy_(state[name])
        self._limiter.num_inserted = self._limiter.num_reserved = state["num_inserted"]
        self._limiter.num_sampled = state["num_sampled"]
        self.blocks.committed = state["num_inserted"] // self.block_images
        self._is_torn, self._open = state["is_torn"], None
        self._order.load_state_dict(state["order"])

    def _tensors(self) -> dict[str, Tensor]:
        names = ("images", "labels", "ids", "uses", "stamps")
        counts = {"retired": self._retired, "strays": self._num_strays}
        return {name: getattr(self, name) for name in names} | counts

    def _is_used_up(self, count: int) -> bool:
        left = self._order.uses_left()
        return left is not None and left < count

    def _tears(self) -> bool:
        """Return whether giving up the open block leaves drawable slots half written."""
        is_over_old = self._open is not None and self.num_inserted >= self.capacity
        return self._is_torn or (is_over_old and self.plan.guard_blocks == 0)

    def _count(self, slots: Tensor) -> Tensor:
        """Count one use of each slot (n,), and return how often each had been used before."""
        before = self.uses[slots]
        if self._order.unique:
            self.uses[slots] = before + 1
            return before
        self.uses.index_add_(0, slots, torch.ones_like(slots))
        # A slot that occurs twice counts two uses, since each use is a different view.
        return before + occurrences(slots)
