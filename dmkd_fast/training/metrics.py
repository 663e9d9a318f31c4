"""Statistics of a run: stats.jsonl, TensorBoard events, and figures for the progress display.

Values are summed on the device; only `flush` waits for the device. With several ranks, `flush`
adds up the sums of all ranks, and rank 0 reports them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.runtime import files
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.runtime.output.progress import Progress


class Metrics:
    """Collect values on the device and report their means at intervals.

    Args:
        folder: Run directory, for `stats.jsonl` and TensorBoard events.
        display: Display that says when rows cannot be written.
        ranks: Processes of the run; all add values of the same names and flush together.
    """

    def __init__(self, folder: Path, display: Progress, *, ranks: Ranks = ALONE) -> None:
        self._folder, self._display, self._ranks = folder, display, ranks
        # Bytes of rows on disk, and rows that are still to be written because the disk was full.
        self._written, self._waiting = 0, b""
        self._stats: FileIO | None = None
        self._board: Any = None
        self._sums: dict[str, Tensor] = {}  # sum and number of values
        self._start = self._last_time = time.perf_counter()
        self._last: dict[str, float] = {}

    def begin(self, *, views: int, wall_s_before: float = 0.0, **totals: float) -> None:
        """Open the files, and start to measure rates.

        Rows that a killed run wrote after its last checkpoint are dropped.

        Args:
            views: Views of the run so far.
            wall_s_before: Seconds that the run has taken so far.
            totals: Number of images so far, as `images`, if it gets a rate.

        Raises:
            SaveError: The folder cannot be written to.
        """
        if not self._ranks.is_first:
            return
        try:
            self._stats = (self._folder / "stats.jsonl").open("ab", buffering=0)
            self._written = min(self._written, self._stats.tell())
            self._stats.truncate(self._written)
            with contextlib.suppress(ImportError):  # no events without the extra [tensorboard]
                from torch.utils.tensorboard import SummaryWriter

                purge_step = views + 1 if views else None
                self._board = SummaryWriter(str(self._folder), purge_step=purge_step)
        except OSError as error:
            raise files.SaveError(
                f"{self._folder}: cannot write statistics ({error.strerror or error}); free space "
                "or fix the folder"
            ) from None
        self._start = time.perf_counter() - wall_s_before
        self._last = {"views": float(views), **totals}
        self._last_time = time.perf_counter()

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar tensor to the running mean of `name`, without waiting for the device.

        Values that are not finite are ignored. A mean without values is left out of the row.
        """
        value = value.detach().float()
        pair = torch.stack((value.nan_to_num(0, 0, 0), value.isfinite().float()))
        # Sums restored from a checkpoint are on the host.
        before = self._sums[name].to(pair.device) if name in self._sums else 0
        self._sums[name] = pair + before

    def flush(
        self, *, views: int, counts: Mapping[str, Tensor] | None = None, **values: float
    ) -> dict[str, Any]:
        """Report the means since the last call, the given numbers, and rates of views and images.

        Args:
            views: Views seen so far.
            counts: Integers on the device; their rounded mean over ranks is reported.
            values: Further numbers, reported unchanged; `images` also gets a rate.

        Returns:
            The row appended to stats.jsonl; on ranks other than 0 only the counts.
        """
        now = time.perf_counter()
        means: dict[str, float] = {}
        counts = counts or {}
        if self._sums or counts:
            pairs = [torch.stack((count, count)) for count in counts.values()]
            pairs += self._sums.values()
            # Sums restored from a checkpoint are on the host.
            summed = self._ranks.total(torch.stack([pair.to(pairs[0].device) for pair in pairs]))
            numbers, size = iter(summed.tolist()), self._ranks.world_size
            means = {
                name: round(number / size)
                for name, (number, _) in zip(counts, numbers, strict=False)
            }
            means |= {name: s / n for name, (s, n) in zip(self._sums, numbers, strict=True) if n}
            self._sums = {}
        if not self._ranks.is_first:
            return {name: means[name] for name in counts}
        totals = {"views": float(views)}
        if "images" in values:
            totals["images"] = values["images"]
        span = max(now - self._last_time, 1e-9)
        rates = {f"{k}_per_s": (v - self._last.get(k, 0.0)) / span for k, v in totals.items()}
        self._last, self._last_time = totals, now
        row = {"views": views, "wall_s": now - self._start, **values, **means, **rates}
        self._waiting += json.dumps(row).encode() + b"\n"
        try:
            assert self._stats is not None, "begin comes first"
            count = self._stats.write(self._waiting) or 0
            self._written, self._waiting = self._written + count, self._waiting[count:]
            for name, number in row.items():
                if name != "views" and self._board is not None:
                    self._board.add_scalar(name, number, views)
        except OSError as error:  # Lost statistics do not justify the end of the run.
            self._display.note(
                f"statistics: not written ({error.strerror or error}); the run goes on"
            )
        return row

    def close(self) -> None:
        """Close the files."""
        if self._stats is not None:
            self._stats.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        self._stats = self._board = None

    @property
    def has_values(self) -> bool:
        """Whether any value was added since the last row."""
        return bool(self._sums)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last row, and the size of stats.jsonl up to that row."""
        return {
            "sums": self._sums,
            "written": functools.partial(self._synced, self._written),
            "waiting": self._waiting.decode(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict`; `begin` then truncates stats.jsonl to that size."""
        self._sums = state["sums"]
        self._written, self._waiting = state["written"], state["waiting"].encode()

    def _synced(self, written: int) -> int:
        """Flush the rows to disk and return `written`."""
        path = self._folder / "stats.jsonl"
        if path.exists():  # It is missing if the run was interrupted before `begin`.
            files.sync(path)
        return written


def row_text(row: Mapping[str, Any]) -> str:
    """Return the figures of a row that progress shows."""
    parts = [f"{k} {row[k]:.4g}" for k in ("loss", "top1", "lr") if k in row]
    parts += [f"{row[f'{k}_per_s']:,.0f} {k}/s" for k in ("images", "views") if k in row]
    problems = {"skipped_steps": "skipped {:,} steps", "broken_images": "{:,} broken images"}
    parts += [words.format(row[k]) for k, words in problems.items() if row.get(k)]
    return "  ".join(parts)
