"""Trace some training steps with the profiler of PyTorch, and list what each piece takes."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dmkd_fast.runtime import files
from dmkd_fast.runtime.clock import Clock
from dmkd_fast.runtime.output.progress import Progress

FOLDER = "profile"
SKIPPED_STEPS = 2
"""Steps before the trace, in which caches and allocators still grow."""
_NUM_OPERATORS = 25


class StepProfile:
    """Trace steps of a run, and write `profile/trace.json` and `profile/table.txt`.

    The pieces are the parts of the run's clock: `generate`, `views`, `teacher`, `student` and so
    on. The trace has them as ranges around the operators.

    Args:
        run_dir: Run directory.
        clock: Clock of the run.
        display: Display that says where the files are.
        num_steps: Number of steps to trace; a run that ends earlier is traced to its end.
    """

    def __init__(self, run_dir: Path, clock: Clock, display: Progress, num_steps: int) -> None:
        self._folder, self._clock, self._display = run_dir / FOLDER, clock, display
        self._num_steps, self._step = num_steps, 0
        self._profile: profile | None = None
        self._before: dict[str, float] = {}
        self._started_s = 0.0

    def after_step(self) -> None:
        """Count a step; start or end the trace where it is due."""
        self._step += 1
        if self._step == SKIPPED_STEPS:
            kinds = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=kinds)
            self._before, self._started_s = dict(self._clock.parts), self._clock.wall_s()
            self._clock.mark = torch.profiler.record_function
            self._profile.start()
        elif self._step == SKIPPED_STEPS + self._num_steps:
            self.stop()

    def stop(self) -> None:
        """End the trace, if one has started, and write the files."""
        if self._profile is None:
            return
        found, self._profile = self._profile, None
        found.stop()
        self._clock.mark = None
        whole_s = self._clock.wall_s() - self._started_s
        files.make_folder(self._folder)
        found.export_chrome_trace(str(self._folder / "trace.json"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        operators = found.key_averages().table(sort_by=by, row_limit=_NUM_OPERATORS)
        text = f"{self._pieces(whole_s)}\n{operators}"
        files.replace_unsynced(self._folder / "table.txt", text.encode())
        self._display.note(f"{self._pieces(whole_s)}profile: {self._folder}")

    def _pieces(self, whole_s: float) -> str:
        """Return the table of the host's time by piece."""
        steps = self._step - SKIPPED_STEPS
        spent = {
            name: seconds - self._before.get(name, 0.0)
            for name, seconds in self._clock.parts.items()
        }
        spent = dict(sorted(spent.items(), key=lambda item: -item[1]))
        spent["rest"] = whole_s - sum(spent.values())
        out = io.StringIO()
        print(f"{steps} steps, {whole_s:.3f} s under the profiler, time of the host", file=out)
        print(f"{'piece':<12} {'s':>9} {'ms/step':>9} {'share':>7}", file=out)
        for name, seconds in spent.items():
            share = seconds / whole_s if whole_s else 0.0
            if share >= 0.0005:
                row = (
                    f"{name:<12} {seconds:9.3f} {1000 * seconds / max(1, steps):9.2f} {share:7.1%}"
                )
                print(row, file=out)
        return out.getvalue()
