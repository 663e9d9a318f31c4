"""Memory of emulated PTX kernels: bounds, alignment, and races between threads.

Threads have numbers over the whole launch. Accesses of two threads to a byte, of which one writes,
must be ordered: by a barrier of their block, or, between blocks, by a release (an atomic after a
barrier) and an acquire. Writing the value that is already there is no race.
"""

from __future__ import annotations

import numpy as np
import torch

NOBODY, MANY = -1, -2


class KernelError(Exception):
    """A kernel did something that a GPU forbids or leaves undefined."""


class Clock:
    """What orders the accesses of a launch: barriers, releases and acquires.

    Args:
        threads: Threads of a block.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.epoch = self.block = self._began = 0
        self._released: dict[int, tuple[int, int]] = {}  # block -> thread, epoch
        self._acquired: tuple[int, int] | None = None

    def start_block(self, block: int) -> None:
        """Begin a block; blocks run one after the other, in any order."""
        self.epoch += 1
        self.block, self._began, self._acquired = block, self.epoch, None

    def barrier(self) -> None:
        """Order what the block did before it against what it does after."""
        self.epoch += 1

    def release_and_acquire(self, thread: int) -> None:
        """Publish what `thread` knows of its block, and see what other blocks published."""
        self._acquired = self._released[self.block] = thread, self.epoch

    def is_ordered(self, owners: np.ndarray, epochs: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Return whether earlier accesses, by `owners` in `epochs`, come before those of now."""
        own = epochs >= self._began
        ordered = (owners == NOBODY) | (owners == threads) | (own & (epochs < self.epoch))
        for block in np.unique(owners[~ordered & ~own & (owners >= 0)] // self.threads):
            if block in self._released and self._acquired is not None:
                releaser, released = self._released[block]
                acquirer, acquired = self._acquired
                is_published = (owners == releaser) | (epochs < released)
                is_seen = (threads == acquirer) | (acquired < self.epoch)
                ordered |= ~own & (owners // self.threads == block) & is_published & is_seen
        return ordered


class Bytes:
    """A range of memory that knows who wrote and who read each byte last.

    Args:
        name: Name in messages.
        data: The bytes, (n,) uint8.
        is_open: Whether a byte may be touched, (n,) bool.
        is_set: Whether bytes hold values from the start.
        clock: Clock of the launch.
    """

    def __init__(
        self, name: str, data: np.ndarray, is_open: np.ndarray, is_set: bool, clock: Clock
    ) -> None:
        self.name, self.data, self.clock = name, data, clock
        self.is_open, self._is_set = is_open, is_set
        self._writer, self._reader = (np.full(len(data), NOBODY, np.int32) for _ in range(2))
        self._written, self._read = (np.zeros(len(data), np.int32) for _ in range(2))

    def load(self, offsets: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """Read `size` bytes for each thread, (n,) -> (n, size)."""
        at = self._places(offsets, size)
        by = np.broadcast_to(threads[:, None], at.shape)
        writer = self._writer[at]
        if not self._is_set and (writer == NOBODY).any():
            raise KernelError(f"{self.name}: read before it was written")
        if not self.clock.is_ordered(writer, self._written[at], by).all():
            raise KernelError(
                f"{self.name}: race, read without a barrier after another thread's write"
            )
        before = self._reader[at]
        is_first = (before == NOBODY) | (before == by) | (self._read[at] < self.clock.epoch)
        self._reader[at] = np.where(is_first, by, MANY)
        self._reader[at[self._reader[at] != by]] = MANY  # two threads in this very instruction
        self._read[at] = self.clock.epoch
        return self.data[at]

    def store(self, offsets: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """Write the bytes of each thread, values (n, size) uint8."""
        at = self._places(offsets, values.shape[1])
        by = np.broadcast_to(threads[:, None], at.shape)
        changed = self.data[at] != values
        unread = self.clock.is_ordered(self._reader[at], self._read[at], by)
        if (changed & ~unread).any():
            raise KernelError(
                f"{self.name}: race, written without a barrier after another thread's read"
            )
        alone = self.clock.is_ordered(self._writer[at], self._written[at], by)
        if (changed & ~alone).any():
            raise KernelError(f"{self.name}: race, two threads write different values")
        self.data[at] = values
        if (self.data[at] != values).any():
            raise KernelError(f"{self.name}: race, two threads write different values at once")
        self._writer[at], self._written[at] = by, self.clock.epoch

    def add(self, offset: int, value: int) -> int:
        """Add to a 32-bit number atomically; return what it was."""
        at = self._places(np.array([offset]), 4)[0]
        before = int(self.data[at].view(np.uint32)[0])
        self.data[at] = np.array([(before + value) % 2**32], np.uint32).view(np.uint8)
        return before

    def _places(self, offsets: np.ndarray, size: int) -> np.ndarray:
        at = offsets.astype(np.int64)[:, None] + np.arange(size)
        if at.size and (at.min() < 0 or at.max() >= len(self.data) or not self.is_open[at].all()):
            raise KernelError(f"{self.name}: access out of bounds")
        return at


class GlobalMemory:
    """The elements of some tensors at their real addresses; all else is out of bounds.

    Args:
        tensors: Tensors by name; bytes between their elements are out of bounds too.
        clock: Clock of the launch.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], clock: Clock) -> None:
        self._ranges: dict[int, Bytes] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            if start not in self._ranges:
                data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                closed = np.zeros(len(data), np.bool_)
                self._ranges[start] = Bytes(name, data, closed, True, clock)
            size = tensor.element_size()
            torch.from_numpy(self._ranges[start].is_open).as_strided(
                (*tensor.shape, size),
                (*(size * step for step in tensor.stride()), 1),
                size * tensor.storage_offset(),
            ).fill_(True)
        self._starts = np.array(sorted(self._ranges), np.uint64)

    def load(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """Read `size` bytes for each thread, (n,) -> (n, size)."""
        found = np.zeros((len(addresses), size), np.uint8)
        for memory, rows, offsets in self._ranges_of(addresses, size):
            found[rows] = memory.load(offsets, size, threads[rows])
        return found

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """Write the bytes of each thread, values (n, size) uint8."""
        for memory, rows, offsets in self._ranges_of(addresses, values.shape[1]):
            memory.store(offsets, values[rows], threads[rows])

    def add(self, address: np.uint64, value: int) -> int:
        """Add to a 32-bit number atomically; return what it was."""
        [(memory, _, offsets)] = self._ranges_of(np.array([address]), 4)
        return memory.add(int(offsets[0]), value)

    def _ranges_of(
        self, addresses: np.ndarray, size: int
    ) -> list[tuple[Bytes, np.ndarray, np.ndarray]]:
        if (addresses % np.uint64(size)).any():
            raise KernelError("global memory: misaligned access")
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        if (at < 0).any():
            raise KernelError("global memory: access out of bounds")
        found = []
        for index in np.unique(at):
            rows = np.nonzero(at == index)[0]
            start = self._starts[index]
            found.append((self._ranges[int(start)], rows, addresses[rows] - start))
        return found
