"""The orders in which slots are drawn: shuffled or equal passes, uniform, balanced by class.

The host knows how many slots can be drawn. Only the device knows which slots a draw takes, and the
host never waits for it.

Shapes: N slots, C classes, n drawn slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from dmkd_fast.ring.block_table import BlockTable
from dmkd_fast.rng import philox
from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import invalid

OrderName = Literal["shuffled", "equal", "uniform", "balanced"]
MOST_CLASSES = 2**15  # the sort keys of order "balanced" have 15 bits for the class


class Order(Protocol):
    """Interface of an order, which decides which slots are drawn next."""

    unique: bool
    """Whether one segment of a draw contains each slot at most once."""

    def uses_left(self) -> int | None:
        """Return how many views can be drawn before the next commit; None means any number."""
        return None

    def on_commit(self) -> None:
        """Take in block `blocks.committed - 1`, for which the oldest block may have left."""
        ...

    def draw(self, count: int) -> Iterator[Tensor]:
        """Yield `count` int64 slots in one or more segments.

        The caller counts the uses of each segment before it asks for the next one.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next draws depend on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`; restore the blocks and labels of the ring first."""
        ...


class Passes(Order):
    """Draw in shuffled passes, each of which takes every image exactly once.

    If an image leaves during a pass, the image that comes instead takes its place in the rest of
    the pass. An image that comes while no other one leaves waits for the next pass.

    Args:
        blocks: Blocks to draw from.
        equal: Whether a pass takes only the less used half of the blocks, so that late images
            catch up.
        max_uses: Passes that an image may take part in; None means any number.
        seed: Seed of the shuffles.
        device: Device of the ring.
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
        """Places of the blocks in the current pass."""
        self._passes = [0] * blocks.num_blocks
        """Passes that the block in each place has taken part in."""
        self._num_passes = 0
        self._generator = None if equal else torch.Generator(device).manual_seed(seed)

    def uses_left(self) -> int | None:
        """Return the draws left in this pass and in later passes; None without `max_uses`."""
        if self._max_uses is None:
            return None
        blocks = self._blocks
        later = sum(self._max_uses - self._passes[q % blocks.num_blocks] for q in blocks.drawable)
        return len(self._slots) - self._position + later * blocks.block_images

    def on_commit(self) -> None:
        """Let the new block take over the rest of the pass from the block that leaves."""
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
        """Yield the next `count` slots, one segment for each pass that they come from."""
        while count:
            if self._position == len(self._slots):
                self._begin()
            segment = self._slots[self._position : self._position + count]  # a view
            self._position += len(segment)
            count -= len(segment)
            yield segment

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
            # Built on the device, since a copy from the host would make the host wait.
            places = torch.cat([self._places[place : place + 1] for place in chosen])
            order = places[order // size] * size + order % size
        self._slots, self._position, self._members = order, 0, set(chosen)
        self._num_passes += 1

    def _permutation(self, count: int) -> Tensor:
        if self._generator is not None:
            return torch.randperm(count, generator=self._generator, device=self._device)
        return _shuffle_keys(self._seed, self._num_passes, count, self._device).argsort(stable=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the rest of the current pass, and the counts and generator for later passes."""
        return {
            "slots": self._slots[self._position :],
            "members": sorted(self._members),
            "passes": list(self._passes),
            "num_passes": self._num_passes,
            "generator": None if self._generator is None else self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._slots, self._position = state["slots"].to(self._device), 0
        self._members, self._passes = set(state["members"]), list(state["passes"])
        self._num_passes = state["num_passes"]
        if self._generator is not None:
            self._generator.set_state(state["generator"].cpu())


class Uniform(Order):
    """Draw each image with the same probability, independent of earlier draws.

    Draw number n depends only on (seed, n) and on the blocks in the ring.
    """

    unique = False
    # Random numbers made at a time: on a CPU, Philox in PyTorch takes as long for one as for many.
    CHUNK = 4096

    def __init__(self, blocks: BlockTable, *, seed: int, device: torch.device) -> None:
        self._blocks, self._seed, self._device = blocks, seed, device
        self._num_drawn, self._chunk = 0, -1
        self._bits = torch.empty(0, dtype=torch.int64, device=device)

    def on_commit(self) -> None:
        """Do nothing: each draw looks up which slots can be drawn."""

    def draw(self, count: int) -> Iterator[Tensor]:
        """Yield the next `count` slots."""
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
        """Return how many slots have been drawn."""
        return {"num_drawn": self._num_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._num_drawn, self._chunk = state["num_drawn"], -1


class Balanced(Order):
    """Draw the classes in turn, and within a class the least used images first.

    Draw number n takes class n % C. A class without images gives its turn to the next class that
    has images. Images of equal use come in random order. The images are sorted again after as many
    draws as there are images, and after each commit.

    Args:
        blocks: Blocks to draw from.
        labels: (N,) int64, labels of the ring.
        uses: (N,) int64, use counts of the ring.
        num_classes: Number of classes C.
        seed: Seed of the random order.
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

    def on_commit(self) -> None:
        """Sort the images again before the next draw."""
        self._slots = None

    def draw(self, count: int) -> Iterator[Tensor]:
        """Yield the next `count` slots."""
        while count:
            used = self._num_drawn - self._first
            if self._slots is None or used >= self._blocks.num_drawable:
                self._first, used = self._num_drawn, 0
                self._num_shuffles += 1
                self._slots = self._shuffle()
                self._table = self._by_class(self._slots)
            size = min(count, self._blocks.num_drawable - used)
            slots = self._look_up(self._slots, size)
            self._num_drawn += size
            count -= size
            yield slots

    def _shuffle(self) -> Tensor:
        """Return the drawable slots (n,) sorted by class, then by use count, then at random."""
        blocks, device = self._blocks, self._labels.device
        count = blocks.num_drawable
        slots = (torch.arange(count, device=device) + blocks.first_slot) % blocks.capacity
        keys = _shuffle_keys(self._seed, self._num_shuffles, count, device)
        keys |= self._uses[slots].clamp(max=2**16 - 1) << 32
        return slots[(keys | self._labels[slots] << 48).argsort(stable=True)]

    def _by_class(self, slots: Tensor) -> Tensor:
        """Find for each class the class that takes its turns, and return a (4, C) table.

        A class with images takes its own turns; an empty class is replaced by the next class that
        has images. Rows, all about the class that takes the turn: the position of this turn among
        its turns in C draws, the number of its turns in C draws, where its images begin in
        `slots`, and how many images it has.
        """
        labels = self._labels[slots]
        numbers = torch.zeros(self._num_classes, dtype=torch.int64, device=slots.device)
        numbers.scatter_add_(0, labels, torch.ones_like(labels))
        classes = torch.arange(self._num_classes, device=slots.device)
        # For each class, the first class at or after it (cyclically) that has images.
        twice = torch.cat((classes, classes + self._num_classes))
        twice = torch.where(numbers.repeat(2) > 0, twice, 2 * self._num_classes)
        served = twice.flip(0).cummin(0).values.flip(0)[: self._num_classes]
        served = served % self._num_classes
        turns = torch.zeros_like(numbers).scatter_add_(0, served, torch.ones_like(served))
        # Each C draws begin with the class whose turn it was when the images were sorted.
        first = self._first % self._num_classes
        place = occurrences(served.roll(-first)).roll(first)
        starts = numbers.cumsum(0) - numbers
        return torch.stack((place, turns[served], starts[served], numbers[served]))

    def _look_up(self, slots: Tensor, count: int) -> Tensor:
        """Return the slots (count,) of the draws that start at number `num_drawn`."""
        draws = torch.arange(self._num_drawn, self._num_drawn + count, device=slots.device)
        place, turns, starts, numbers = self._table[:, draws % self._num_classes]  # (count,)
        rounds = (draws - self._first) // self._num_classes
        return slots[starts + (rounds * turns + place) % numbers]

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers of draws and shuffles, and the sorted slots in use."""
        return {
            "num_drawn": self._num_drawn,
            "first": self._first,
            "num_shuffles": self._num_shuffles,
            "slots": self._slots,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._num_drawn, self._first = state["num_drawn"], state["first"]
        self._num_shuffles = state["num_shuffles"]
        self._slots = None if state["slots"] is None else state["slots"].to(self._labels.device)
        if self._slots is not None:
            self._table = self._by_class(self._slots)


def check_order(name: OrderName, *, max_uses: int | None, num_classes: int | None) -> None:
    """Refuse an order that does not exist, or that does not fit the other settings of a ring.

    Args:
        name: Name of the order; see `RingBuffer`.
        max_uses: Draws of an image after which it is not drawn again; None means any number.
        num_classes: Number of classes C; None if it is not known.

    Raises:
        TypeError, UserError: A setting is wrong; the message says what to change.
    """
    if name not in get_args(OrderName):
        raise invalid("order", repr(name), "shuffled, equal, uniform or balanced", "choose one")
    if num_classes is not None:
        checks.whole("num_classes", num_classes, low=1, high=MOST_CLASSES)
    elif name == "balanced":
        raise invalid("num_classes", "None with order=balanced", "their number", "set it")
    if max_uses is not None and name not in ("shuffled", "equal"):
        got = f"{max_uses} with order={name}, which does not draw in passes"
        raise invalid("max_uses", got, "order=shuffled or equal", "change one of the two")


def make_order(
    name: OrderName,
    blocks: BlockTable,
    *,
    labels: Tensor,
    uses: Tensor,
    num_classes: int | None,
    max_uses: int | None,
    seed: int,
) -> Order:
    """Create the order with the given name.

    Args:
        name, num_classes, max_uses: Settings that `check_order` accepts.
        blocks: Blocks to draw from.
        labels, uses: (N,) int64, labels and use counts of the ring.
        seed: Seed of the order.
    """
    if name == "uniform":
        return Uniform(blocks, seed=seed, device=labels.device)
    if name == "balanced":
        assert num_classes is not None
        return Balanced(blocks, labels, uses, num_classes=num_classes, seed=seed)
    equal = name == "equal"
    return Passes(blocks, equal=equal, max_uses=max_uses, seed=seed, device=labels.device)


def occurrences(slots: Tensor) -> Tensor:
    """Count for each entry the equal entries before it, (n,) int64 -> (n,) int64."""
    ordered, order = slots.sort(stable=True)
    rank = torch.arange(len(slots), device=slots.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter_(0, order, rank)


def _shuffle_keys(seed: int, number: int, count: int, device: torch.device) -> Tensor:
    """Return (count,) random int64 keys below 2**32 for shuffle `number`.

    Equal keys are possible, so callers sort with stable=True.
    """
    ids = torch.full((1,), number, dtype=torch.int64, device=device)
    return philox.random_bits(seed, ids, step=1, stream=philox.STREAM_DRAWS, count=count)[0]
