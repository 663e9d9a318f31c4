"""Measure the wall-clock and CPU time of a run, summed over its restarts."""

from __future__ import annotations

import os
import time


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the child processes it has waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


class Clock:
    """Measure wall-clock and CPU seconds since creation, plus those of the run before a resume."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()

    def wall_s(self) -> float:
        """Return the wall-clock time in seconds."""
        return time.perf_counter() - self._wall

    def cpu_s(self) -> float:
        """Return the CPU time in seconds, all threads together."""
        return cpu_seconds() - self._cpu

    def state_dict(self) -> dict[str, float]:
        """Return both times."""
        return {"wall_s": self.wall_s(), "cpu_s": self.cpu_s()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from the times in `state`."""
        self._wall = time.perf_counter() - state["wall_s"]
        self._cpu = cpu_seconds() - state["cpu_s"]
