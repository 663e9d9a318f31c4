"""What a run tells: progress, stats.jsonl, TensorBoard events.

Stands on floor 2. Values are summed on the device; `flush` is the only place that waits for it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor


class Metrics:
    """Collects values on the device and reports them at intervals.

    Args:
        folder: Run directory; `stats.jsonl` and TensorBoard events go there.
        total: Views of the whole run, for the progress bar and the estimate of time left.
        wall_s_before: Seconds that earlier parts of a resumed run took.
        show: Whether to print progress: a bar on a terminal, else plain lines.
    """

    def __init__(
        self, folder: Path, total: int, *, wall_s_before: float = 0.0, show: bool = True
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._stats = (folder / "stats.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder))
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._total, self._show = total, show
        self._last_time = time.perf_counter()
        self._start = self._last_time - wall_s_before
        self._last: dict[str, float] = {}
        self._first_views, self._first_time = 0.0, self._last_time
        self._bar: Progress | None = None

    def begin(self, *, views: int, **totals: float) -> None:
        """Count rates and the time left from here: call it once what is not progress is over."""
        self._last = {"views": float(views), **totals}
        self._first_views, self._first_time = views, time.perf_counter()
        self._last_time = self._first_time

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar tensor to the running mean of `name`, without waiting for the device."""
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def flush(self, *, views: int, **values: float) -> dict[str, Any]:
        """Report the means since the last call, the numbers given, and rates of views and images.

        Args:
            views: Views seen so far.
            values: Further numbers; `images` gets a rate, the others are reported as they are.

        Returns:
            The row appended to stats.jsonl.
        """
        now = time.perf_counter()
        means: dict[str, float] = {}
        if self._sums:
            numbers = torch.stack(list(self._sums.values())).tolist()
            means = {
                name: number / self._counts[name]
                for name, number in zip(self._sums, numbers, strict=True)
            }
            self._sums, self._counts = {}, {}
        totals = {"views": float(views)}
        if "images" in values:
            totals["images"] = values["images"]
        span = max(now - self._last_time, 1e-9)
        rates = {f"{k}_per_s": (v - self._last.get(k, 0.0)) / span for k, v in totals.items()}
        self._last, self._last_time = totals, now
        row = {"views": views, "wall_s": now - self._start, **values, **means, **rates}
        self._stats.write(json.dumps(row) + "\n")
        self._stats.flush()
        for name, number in row.items():
            if name != "views":
                self._board.add_scalar(name, number, views)
        if self._show:
            self._report(row)
        return row

    def note(self, text: str) -> None:
        """Print one line beside the progress."""
        if not self._show:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the progress and close the files."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._stats.close()
        self._board.close()

    def _report(self, row: dict[str, Any]) -> None:
        views = row["views"]
        done = views - self._first_views
        spent = time.perf_counter() - self._first_time
        left = spent * (self._total - views) / done if done > 0 else float("nan")
        parts = [f"{k} {row[k]:.4g}" for k in ("loss", "top1", "lr") if k in row]
        parts += [f"{row[f'{k}_per_s']:,.0f} {k}/s" for k in ("images", "views") if k in row]
        text = "  ".join(parts)
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = Progress(
                    TextColumn("{task.percentage:3.0f}%"), BarColumn(), TimeRemainingColumn(),
                    TextColumn("{task.description}"), console=Console(stderr=True),
                )  # fmt: skip
                self._task = self._bar.add_task(text, total=self._total, completed=views)
                self._bar.start()
            self._bar.update(self._task, completed=views, description=text)
        else:
            eta = "" if left != left else f"  ETA {int(left) // 60}:{int(left) % 60:02d}"
            line = f"[{100 * views / self._total:3.0f}%] {views:,}/{self._total:,} views  {text}"
            print(line + eta, file=sys.stderr, flush=True)
