"""Orders those who share the ring: the producer, who writes blocks, and the consumer, who draws.

`Turns` is for one stream, where the order of the calls is
the order of the work. `Fences` gives the producer a CUDA stream of its own. Only pixels are written
on that stream; labels, ids and counts belong to the consumer's. Per block one event says "written",
per gather one says "read". Slots stop being drawn `guard_blocks` commits before they are written
again, so their writer waits for the last gather before that commit, not for the newest. The host
never waits.

Source: the rule of FFCV's loader (Leclerc et al., arXiv 2306.12517), for slots instead of batches.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Turns:
    """Producer and consumer take turns on one stream: nothing to order, only time to tell."""

    def __init__(self) -> None:
        self._seconds = {"producer": 0.0, "consumer": 0.0}
        self._idle_since = time.perf_counter()

    @contextmanager
    def producing(self) -> Iterator[None]:
        """The consumer waits for what runs inside; the rest of the time the producer waits."""
        started = time.perf_counter()
        self._seconds["producer"] += started - self._idle_since
        try:
            yield
        finally:
            self._idle_since = time.perf_counter()
            self._seconds["consumer"] += self._idle_since - started

    def waits_s(self) -> dict[str, float]:
        """Seconds of host time that either waited since the last call."""
        seconds, self._seconds = self._seconds, {"producer": 0.0, "consumer": 0.0}
        return seconds

    def before_write(self) -> None:
        """Nothing to wait for."""

    def after_draw(self) -> None:
        """Nothing to note."""

    def after_gather(self) -> None:
        """Nothing to note."""

    def before_commit(self, *tensors: Tensor) -> None:
        """Nothing to wait for."""

    def after_commit(self) -> None:
        """Nothing to note."""

    def join(self) -> None:
        """Nothing to wait for."""


class Fences:
    """The producer's stream and all events between it and the consumer's (the current) stream.

    Args:
        device: A CUDA device.
        guard_blocks: Commits between the last draw of a slot and its writing, at least 1.
    """

    def __init__(self, device: torch.device, *, guard_blocks: int) -> None:
        self._stream = torch.cuda.Stream(device)
        self._written = self._record(self._stream)
        # Read at every log line; a caller who never asks must not pay memory for it.
        self._waits: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=1000)
        self._read = self._record(torch.cuda.current_stream(device))
        self._left = deque([self._read] * guard_blocks, maxlen=guard_blocks)
        self._is_unread = self._was_joined = False

    def before_write(self) -> None:
        """The producer waits until slots about to be overwritten have been read."""
        if self._was_joined:
            self._restart()
        idle = self._record(self._stream)
        self._stream.wait_event(self._left[0])
        self._waits.append(("producer", idle, self._left[0]))

    @contextmanager
    def producing(self) -> Iterator[None]:
        """What runs inside does so on the producer's stream, as one block."""
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._written = self._record(self._stream)

    def before_commit(self, *tensors: Tensor) -> None:
        """The consumer waits for the block, and the producer's memory waits for the consumer.

        Args:
            tensors: Made on the producer's stream and read by the consumer from now on: their
                memory must not be handed out again to the producer before that.

        Raises:
            RuntimeError: Slots were drawn and their gather was not told of.
        """
        if self._is_unread:
            raise RuntimeError("commit: drawn slots may still be read; call release() first")
        consumer = torch.cuda.current_stream()
        idle = self._record(consumer)
        consumer.wait_event(self._written)
        self._waits.append(("consumer", idle, self._written))
        for tensor in tensors:
            tensor.record_stream(consumer)

    def after_commit(self) -> None:
        """From here on another block of slots is drawn no more; gathers so far may read it."""
        self._left.append(self._read)

    def after_draw(self) -> None:
        """Slots will be read by work that is still to come."""
        self._is_unread = True

    def after_gather(self) -> None:
        """Everything that was drawn has been read by work on the current stream."""
        self._read = self._record(torch.cuda.current_stream())
        self._is_unread = False

    def join(self) -> None:
        """All slots will be read or written on the current stream now.

        It waits for all that the producer was told to do, aborted blocks too, and the producer's
        next block waits for it.
        """
        torch.cuda.current_stream().wait_event(self._written)
        self._was_joined = True

    def _restart(self) -> None:
        """The next blocks wait for everything on the current stream."""
        self._read = self._record(torch.cuda.current_stream())
        self._left.extend([self._read] * len(self._left))
        self._was_joined = False

    def waits_s(self) -> dict[str, float]:
        """Seconds that either stream waited for the other since the last call; waits for both."""
        seconds = {"producer": 0.0, "consumer": 0.0}
        for who, idle, event in self._waits:
            event.synchronize()
            idle.synchronize()
            seconds[who] += max(0.0, idle.elapsed_time(event)) / 1e3
        self._waits.clear()
        return seconds

    @staticmethod
    def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
        return stream.record_event(torch.cuda.Event(enable_timing=True))
