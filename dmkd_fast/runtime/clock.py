"""Wall-clock and CPU time of a run, summed over its restarts."""

from __future__ import annotations

import resource
import time


def cpu_seconds() -> float:
    """Processor time of this process and of the helpers it has waited for, in seconds."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Clock:
    """Wall and processor seconds since it was made, earlier parts of a resumed run included."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()

    def wall_s(self) -> float:
        """Seconds of wall time."""
        return time.perf_counter() - self._wall

    def cpu_s(self) -> float:
        """Seconds of processor time, all threads together."""
        return cpu_seconds() - self._cpu

    def state_dict(self) -> dict[str, float]:
        """Both readings."""
        return {"wall_s": self.wall_s(), "cpu_s": self.cpu_s()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on counting from these readings."""
        self._wall = time.perf_counter() - state["wall_s"]
        self._cpu = cpu_seconds() - state["cpu_s"]
