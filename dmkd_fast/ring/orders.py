"""The orders in which slots are drawn: shuffled or equal passes, uniform, balanced by class.

How many slots there are to
draw from is known on the host, which slots those are only on the device, and nothing waits for it.
N capacity, B views drawn, C classes, b images per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dmkd_fast.rng import philox

OrderName = Literal["shuffled", "equal", "uniform", "balanced"]


class BlockTable:
    """Which blocks are in the ring and may be drawn.

    Block q, counted from the first ever written, lies in place q % num_blocks. The `guard_blocks`
    places that will be overwritten next are not drawn.
    """

    def __init__(self, num_blocks: int, *, block_images: int, guard_blocks: int) -> None:
        self.num_blocks, self.block_images = num_blocks, block_images
        self.guard_blocks = guard_blocks
        self.committed = 0

    @property
    def drawable(self) -> range:
        """Numbers of the blocks that may be drawn, oldest first."""
        return range(max(0, self.committed - self.num_blocks + self.guard_blocks), self.committed)

    @property
    def first_slot(self) -> int:
        """Slot of the oldest drawable image; the others follow it round the ring."""
        return self.drawable.start % self.num_blocks * self.block_images

    @property
    def num_drawable(self) -> int:
        """Images that may be drawn."""
        return len(self.drawable) * self.block_images

    @property
    def capacity(self) -> int:
        """N."""
        return self.num_blocks * self.block_images


class Order(Protocol):
    """What decides which slots are drawn next."""

    unique: bool
    """Whether no slot comes twice within one part of a draw."""

    def uses_left(self) -> int | None:
        """Views that may still be drawn before another block comes; None: any number."""
        ...

    def on_commit(self) -> None:
        """Block `blocks.committed - 1` has come, and the oldest may have left."""
        ...

    def draw(self, count: int) -> Iterator[Tensor]:
        """`count` slots, int64, in one or more parts; each is counted before the next is asked."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next draws depend on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; the ring's blocks and labels are restored before."""
        ...


class Passes:
    """Shuffled passes in which every image comes exactly once.

    An image that leaves during a pass is replaced in what is left of it by the one that comes into
    the ring instead. An image that comes without another leaving waits for the next pass.

    Args:
        blocks: What there is.
        equal: Pass over the less used half of the blocks only, so that late images catch up.
        max_uses: Passes that an image may take part in; None: any number.
        seed: Of the order.
        device: Where slots are counted.
    """

    unique = True

    def __init__(
        self,
        blocks: BlockTable,
        *,
        equal: bool,
        max_uses: int | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self._blocks, self._equal, self._max_uses = blocks, equal, max_uses
        self._seed, self._device = seed, device
        self._slots = torch.empty(0, dtype=torch.int64, device=device)
        self._places = torch.arange(blocks.num_blocks, device=device)
        self._position = 0
        self._members: set[int] = set()
        """Places in the pass under way."""
        self._passes = [0] * blocks.num_blocks
        """Passes that the block in each place has taken part in."""
        self._num_passes = 0
        self._generator = None if equal else torch.Generator(device).manual_seed(seed)

    def uses_left(self) -> int | None:
        """What is left of this pass and of those to come."""
        if self._max_uses is None:
            return None
        blocks = self._blocks
        later = sum(self._max_uses - self._passes[q % blocks.num_blocks] for q in blocks.drawable)
        return len(self._slots) - self._position + later * blocks.block_images

    def on_commit(self) -> None:
        """Put the new block in the place of the one that leaves."""
        blocks, newest = self._blocks, self._blocks.committed - 1
        left = newest - blocks.num_blocks + blocks.guard_blocks
        new, old = newest % blocks.num_blocks, left % blocks.num_blocks
        rest = self._slots[self._position :]
        self._passes[new] = 0
        if left < 0 or old not in self._members or len(rest) == 0:
            return
        if old != new:
            size = blocks.block_images
            moved = torch.where(rest // size == old, rest + (new - old) * size, rest)
            self._slots, self._position = moved, 0
            self._members = self._members - {old} | {new}
        self._passes[new] = 1

    def draw(self, count: int) -> Iterator[Tensor]:
        """The next `count` slots; one part for each pass they come from."""
        while count:
            if self._position == len(self._slots):
                self._begin()
            part = self._slots[self._position : self._position + count]  # a view
            self._position += len(part)
            count -= len(part)
            yield part

    def _begin(self) -> None:
        """Shuffle the slots of the next pass."""
        blocks, passes = self._blocks, self._passes
        chosen = [q % blocks.num_blocks for q in blocks.drawable]
        if self._max_uses is not None:
            chosen = [place for place in chosen if passes[place] < self._max_uses]
        if self._equal:
            chosen = sorted(chosen, key=passes.__getitem__)[: -(-len(chosen) // 2)]
        for place in chosen:
            passes[place] += 1
        chosen.sort()
        size, order = blocks.block_images, self._permutation(len(chosen) * blocks.block_images)
        if chosen != list(range(len(chosen))):
            # Put together on the device: a copy from the host would make the host wait.
            places = torch.cat([self._places[place : place + 1] for place in chosen])
            order = places[order // size] * size + order % size
        self._slots, self._position, self._members = order, 0, set(chosen)
        self._num_passes += 1

    def _permutation(self, count: int) -> Tensor:
        if self._generator is not None:
            return torch.randperm(count, generator=self._generator, device=self._device)
        return _shuffle_keys(self._seed, self._num_passes, count, self._device).argsort(stable=True)

    def state_dict(self) -> dict[str, Any]:
        """The pass under way and the counts and generator of those to come."""
        return {
            "slots": self._slots[self._position :],
            "members": sorted(self._members),
            "passes": list(self._passes),
            "num_passes": self._num_passes,
            "generator": None if self._generator is None else self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._slots, self._position = state["slots"].to(self._device), 0
        self._members, self._passes = set(state["members"]), list(state["passes"])
        self._num_passes = state["num_passes"]
        if self._generator is not None:
            self._generator.set_state(state["generator"].cpu())


class Uniform:
    """Each draw takes any image with the same probability, whatever was drawn before.

    Draw number n depends on (seed, n) and on what is in the ring, on nothing else.
    """

    unique = False
    # Numbers made at a time: Philox in PyTorch costs 300 us for one as for a thousand (CPU).
    CHUNK = 4096

    def __init__(self, blocks: BlockTable, *, seed: int, device: torch.device) -> None:
        self._blocks, self._seed, self._device = blocks, seed, device
        self._num_drawn, self._chunk = 0, -1
        self._bits = torch.empty(0, dtype=torch.int64, device=device)

    def uses_left(self) -> int | None:
        """Any number."""
        return None

    def on_commit(self) -> None:
        """Nothing: what there is to draw is looked up at each draw."""

    def draw(self, count: int) -> Iterator[Tensor]:
        """The next `count` slots."""
        while count:
            chunk, offset = divmod(self._num_drawn, self.CHUNK)
            if chunk != self._chunk:
                ids = torch.arange(self.CHUNK // 4, device=self._device) + chunk * (self.CHUNK // 4)
                bits = philox.random_bits(
                    self._seed, ids, step=0, stream=philox.STREAM_DRAWS, count=4
                )
                self._bits, self._chunk = bits.flatten(), chunk  # (CHUNK,)
            bits = self._bits[offset : offset + count]
            place = (bits * self._blocks.num_drawable) >> 32
            self._num_drawn += len(bits)
            count -= len(bits)
            yield (place + self._blocks.first_slot) % self._blocks.capacity

    def state_dict(self) -> dict[str, Any]:
        """How many slots have been drawn."""
        return {"num_drawn": self._num_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._num_drawn, self._chunk = state["num_drawn"], -1


class Balanced:
    """Class n % C at draw number n; within a class, the least used images first, shuffled.

    Images are sorted again after as many draws as there are images, and when a block comes. A class
    without images gives its turn to the next class that has some.

    Args:
        blocks: What there is.
        labels: (N,) int64, the ring's.
        uses: (N,) int64, the ring's.
        num_classes: C, at most 2**15.
        seed: Of the order.
    """

    unique = False

    def __init__(
        self, blocks: BlockTable, labels: Tensor, uses: Tensor, *, num_classes: int, seed: int
    ) -> None:
        self._blocks, self._labels, self._uses = blocks, labels, uses
        self._num_classes, self._seed = num_classes, seed
        self._num_drawn = self._first = self._num_shuffles = 0
        self._slots: Tensor | None = None
        self._table = torch.empty(0, dtype=torch.int64, device=labels.device)

    def uses_left(self) -> int | None:
        """Any number."""
        return None

    def on_commit(self) -> None:
        """Sort anew before the next draw."""
        self._slots = None

    def draw(self, count: int) -> Iterator[Tensor]:
        """The next `count` slots."""
        while count:
            used = self._num_drawn - self._first
            if self._slots is None or used >= self._blocks.num_drawable:
                self._first, used = self._num_drawn, 0
                self._num_shuffles += 1
                self._slots = self._shuffle()
                self._table = self._by_class(self._slots)
            part = min(count, self._blocks.num_drawable - used)
            slots = self._look_up(self._slots, part)
            self._num_drawn += part
            count -= part
            yield slots

    def _shuffle(self) -> Tensor:
        """Slots sorted by class, use and at random, (n,)."""
        blocks, device = self._blocks, self._labels.device
        count = blocks.num_drawable
        slots = (torch.arange(count, device=device) + blocks.first_slot) % blocks.capacity
        keys = _shuffle_keys(self._seed, self._num_shuffles, count, device)
        keys |= self._uses[slots].clamp(max=2**16 - 1) << 32
        return slots[(keys | self._labels[slots] << 48).argsort(stable=True)]

    def _by_class(self, slots: Tensor) -> Tensor:
        """Look up the class that serves each class, (4, C).

        Rows: the place of this turn among the server's turns in C draws, how many turns it has,
        where its images begin in `slots`, and how many images it has.
        """
        labels = self._labels[slots]
        numbers = torch.zeros(self._num_classes, dtype=torch.int64, device=slots.device)
        numbers.scatter_add_(0, labels, torch.ones_like(labels))
        classes = torch.arange(self._num_classes, device=slots.device)
        # The first class at or after each one, going round, that has images.
        twice = torch.cat((classes, classes + self._num_classes))
        twice = torch.where(numbers.repeat(2) > 0, twice, 2 * self._num_classes)
        served = twice.flip(0).cummin(0).values.flip(0)[: self._num_classes]
        served = served % self._num_classes
        turns = torch.zeros_like(numbers).scatter_add_(0, served, torch.ones_like(served))
        # C draws begin with the class whose turn it was when the images were sorted.
        first = self._first % self._num_classes
        place = occurrences(served.roll(-first)).roll(first)
        starts = numbers.cumsum(0) - numbers
        return torch.stack((place, turns[served], starts[served], numbers[served]))

    def _look_up(self, slots: Tensor, count: int) -> Tensor:
        """Slots (count,) of draws `num_drawn` and after."""
        draws = torch.arange(self._num_drawn, self._num_drawn + count, device=slots.device)
        place, turns, starts, numbers = self._table[:, draws % self._num_classes]  # (count,)
        rounds = (draws - self._first) // self._num_classes
        return slots[starts + (rounds * turns + place) % numbers]

    def state_dict(self) -> dict[str, Any]:
        """Draws, and the sorted slots under way."""
        return {
            "num_drawn": self._num_drawn,
            "first": self._first,
            "num_shuffles": self._num_shuffles,
            "slots": self._slots,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._num_drawn, self._first = state["num_drawn"], state["first"]
        self._num_shuffles = state["num_shuffles"]
        self._slots = None if state["slots"] is None else state["slots"].to(self._labels.device)
        if self._slots is not None:
            self._table = self._by_class(self._slots)


def make_order(
    name: OrderName, blocks: BlockTable, *, labels: Tensor, uses: Tensor, num_classes: int | None,
    max_uses: int | None, seed: int,
) -> Order:  # fmt: skip
    """The order of that name.

    Args:
        name: Which.
        blocks: What there is to draw from.
        labels, uses: (N,) int64, the ring's.
        num_classes: C; needed by "balanced".
        max_uses: For orders in passes.
        seed: Of the order.
    """
    if name == "uniform":
        return Uniform(blocks, seed=seed, device=labels.device)
    if name == "balanced":
        assert num_classes is not None
        return Balanced(blocks, labels, uses, num_classes=num_classes, seed=seed)
    equal = name == "equal"
    return Passes(blocks, equal=equal, max_uses=max_uses, seed=seed, device=labels.device)


def occurrences(slots: Tensor) -> Tensor:
    """How often the value at each place came before it, (n,) int64 -> (n,) int64."""
    ordered, order = slots.sort(stable=True)
    rank = torch.arange(len(slots), device=slots.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter_(0, order, rank)


def _shuffle_keys(seed: int, number: int, count: int, device: torch.device) -> Tensor:
    """(count,) random int64 keys below 2**32 of shuffle `number`; ties go to the earlier."""
    ids = torch.full((1,), number, dtype=torch.int64, device=device)
    return philox.random_bits(seed, ids, step=1, stream=philox.STREAM_DRAWS, count=count)[0]
