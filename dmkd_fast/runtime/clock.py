"""Measure the wall-clock and CPU time of a run and of its parts, summed over its restarts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

T = TypeVar("T")


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the child processes it has waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


class Clock:
    """Measure wall-clock and CPU seconds since creation, plus those of the run before a resume.

    Attributes:
        parts: Wall-clock seconds of the host by part of the run, such as `generate`. Work that is
            queued on a GPU counts in the part in which the host waits for it.
        mark: Function that returns a context for a part's name, by which a profiler knows the part.
    """

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.mark: Callable[[str], AbstractContextManager[object]] | None = None
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()

    def wall_s(self) -> float:
        """Return the wall-clock time in seconds."""
        return time.perf_counter() - self._wall

    def cpu_s(self) -> float:
        """Return the CPU time in seconds, all threads together."""
        return cpu_seconds() - self._cpu

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a part of the run."""
        started = time.perf_counter()
        try:
            with nullcontext() if self.mark is None else self.mark(name):
                yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - started

    def making(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and add the time that it takes to make them to a part of the run."""
        iterator, end = iter(items), object()
        while True:
            with self.part(name):
                item: Any = next(iterator, end)
            if item is end:
                return
            yield item

    def state_dict(self) -> dict[str, Any]:
        """Return all times."""
        return {"wall_s": self.wall_s(), "cpu_s": self.cpu_s(), "parts": dict(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the times in `state`."""
        self.parts = dict(state["parts"])
        self._wall = time.perf_counter() - state["wall_s"]
        self._cpu = cpu_seconds() - state["cpu_s"]
