"""Order the work of the ring's producer (writes blocks) and its consumer (draws images).

`SingleStream` is for one stream, where work runs in the order of the calls. `ProducerStream` gives
the producer a CUDA stream of its own. Only pixels are written on that stream; labels, ids and
counts belong to the consumer's stream. One event per block means "written", and one event per
gather means "read". Slots stop being drawn `guard_blocks` commits before they are written again. So
the producer waits for the last gather before that commit, not for the newest gather. The host waits
only in `waits_s`.

Source: the rule of FFCV's loader (Leclerc et al., arXiv 2306.12517), for slots instead of batches.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
# Recorded waits to keep unread; beyond that, finished waits are added to the sums.
MOST_UNREAD = 64


class _Waits:
    """Waits of producer and consumer, each between two events."""

    def __init__(self) -> None:
        # Bounded, so that a caller who never reads them does not collect events without end.
        self._waits: deque[tuple[str, Any, Any]] = deque(maxlen=1000)
        self._seconds = {"producer": 0.0, "consumer": 0.0}

    def append(self, wait: tuple[str, Any, Any]) -> None:
        """Add who waited, from which event, and until which one."""
        self._waits.append(wait)
        while len(self._waits) > MOST_UNREAD and all(e.query() for e in self._waits[0][1:]):
            self._read_first()

    def take(self) -> dict[str, float]:
        """Return the seconds that each waited since the last call; wait for all events."""
        while self._waits:
            for event in self._waits[0][1:]:
                event.synchronize()
            self._read_first()
        seconds, self._seconds = self._seconds, {"producer": 0.0, "consumer": 0.0}
        return seconds

    def _read_first(self) -> None:
        who, begin, end = self._waits.popleft()
        self._seconds[who] += max(0.0, begin.elapsed_time(end)) / 1e3


class _HostEvent:
    """A moment of the host, with what is used of the interface of `torch.cuda.Event`."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _HostEvent) -> float:
        return 1e3 * (end.at - self.at)


class SingleStream:
    """Measure how long producer and consumer wait on one stream, where no ordering is needed.

    Args:
        device: Device of the ring, whose clock measures. The host only queues the work of a GPU.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self._waits = _Waits()
        self._now: Callable[[], Any] = _HostEvent
        if device.type == "cuda":
            self._now = lambda: _record(torch.cuda.current_stream(device))
        self._idle_since = self._now()

    @contextmanager
    def producing(self) -> Iterator[None]:
        """Measure the waits: the consumer waits while this context is open, else the producer."""
        begin = self._now()
        self._waits.append(("producer", self._idle_since, begin))
        try:
            yield
        finally:
            self._idle_since = self._now()
            self._waits.append(("consumer", begin, self._idle_since))

    def waits_s(self) -> dict[str, float]:
        """Return the seconds that each of the two waited since the last call.

        On CUDA, the host waits here for the events of the stream.
        """
        return self._waits.take()

    def before_write(self) -> None:
        """Do nothing: one stream needs no wait."""

    def after_draw(self) -> None:
        """Do nothing: one stream needs no record."""

    def after_gather(self) -> None:
        """Do nothing: one stream needs no record."""

    def before_commit(self, *tensors: Tensor) -> None:
        """Do nothing: one stream needs no wait."""

    def after_commit(self) -> None:
        """Do nothing: one stream needs no record."""

    def join(self) -> None:
        """Do nothing: one stream needs no wait."""


class ProducerStream:
    """Order the producer's own CUDA stream against the current stream, which is the consumer's.

    The current stream is that of the ring's device, which need not be the current device.

    Args:
        device: CUDA device of the ring.
        guard_blocks: Commits between the last draw of a slot and its next write, at least 1.
    """

    def __init__(self, device: torch.device, *, guard_blocks: int) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._written = _record(self._stream)
        self._waits = _Waits()
        self._read = _record(torch.cuda.current_stream(device))
        self._left = deque([self._read] * guard_blocks, maxlen=guard_blocks)
        self._is_unread = self._was_joined = False

    def before_write(self) -> None:
        """Make the producer wait until the slots it will overwrite have been read."""
        if self._was_joined:
            self._restart()
        idle = _record(self._stream)
        self._stream.wait_event(self._left[0])
        self._waits.append(("producer", idle, self._left[0]))

    @contextmanager
    def producing(self) -> Iterator[None]:
        """Run the work inside on the producer's stream, as one block."""
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._written = _record(self._stream)

    def before_commit(self, *tensors: Tensor) -> None:
        """Make the consumer wait for the block, and keep the memory of `tensors` for the consumer.

        Args:
            tensors: Tensors made on the producer's stream and read by the consumer. Their memory
                is not given to the producer again before the consumer has read it.

        Raises:
            RuntimeError: Slots were drawn and their gather was not reported by `after_gather`.
        """
        if self._is_unread:
            raise RuntimeError("commit: drawn slots may still be read; call release() first")
        consumer = torch.cuda.current_stream(self._device)
        idle = _record(consumer)
        consumer.wait_event(self._written)
        self._waits.append(("consumer", idle, self._written))
        for tensor in tensors:
            tensor.record_stream(consumer)

    def after_commit(self) -> None:
        """Record the last gather that may read the block that can no longer be drawn."""
        self._left.append(self._read)

    def after_draw(self) -> None:
        """Record that slots were drawn and that their gather has not been queued yet."""
        self._is_unread = True

    def after_gather(self) -> None:
        """Record that work queued on the current stream reads everything drawn so far."""
        self._read = _record(torch.cuda.current_stream(self._device))
        self._is_unread = False

    def join(self) -> None:
        """Let the current stream read or write all slots from here on.

        The current stream waits for all queued work of the producer, aborted blocks included. The
        producer's next block waits for the current stream.
        """
        torch.cuda.current_stream(self._device).wait_event(self._written)
        self._was_joined = True

    def _restart(self) -> None:
        """Make the next blocks wait for everything on the current stream."""
        self._read = _record(torch.cuda.current_stream(self._device))
        self._left.extend([self._read] * len(self._left))
        self._was_joined = False

    def waits_s(self) -> dict[str, float]:
        """Return the seconds that each stream waited for the other since the last call.

        The host waits here for the events of both streams.
        """
        return self._waits.take()


def streams_for(device: torch.device, *, guard_blocks: int) -> SingleStream | ProducerStream:
    """Give the producer a stream of its own if the device has streams and the ring has a guard."""
    if device.type == "cuda" and guard_blocks:
        return ProducerStream(device, guard_blocks=guard_blocks)
    return SingleStream(device)


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    stream.record_event(event)
    return event
