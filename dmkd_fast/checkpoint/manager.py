"""Save and restore a run in the background, on all ranks together.

With several ranks, rank 0 writes the state common to all ranks, and each rank writes its own state.
A checkpoint counts only if it is intact on all ranks; otherwise an older one is used.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, NamedTuple

from dmkd_fast.checkpoint import step_folders
from dmkd_fast.checkpoint.step_folders import Stateful
from dmkd_fast.runtime import files
from dmkd_fast.runtime.distributed import ALONE, Ranks, Turns
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.runtime.output.progress import Progress
from dmkd_fast.runtime.signals import Interrupts


class Restored(NamedTuple):
    """Step of the loaded checkpoint, and notes on newer ones."""

    step: int
    notes: list[str]
    """One line for each newer checkpoint that was damaged or not on all ranks."""


class CheckpointManager:
    """Write checkpoints in the background; training waits only for a copy in memory.

    Args:
        folder: Folder of the checkpoints. All ranks but rank 0 use a folder of their own below it.
        every_s: Seconds from one checkpoint to the next.
        keep: Number of checkpoints to keep.
        ranks: Ranks of the run, which start and finish checkpoints together.
        interrupts: Signals to hold while the state is copied; a pending one stops the run.
        display: Display of the last checkpoint's progress, and of checkpoints that failed.

    Attributes:
        writer: Thread that hashes and writes the files; close it after the last checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_s: float = 600.0,
        keep: int = 2,
        ranks: Ranks = ALONE,
        interrupts: Interrupts | None = None,
        display: Progress | None = None,
    ) -> None:
        self.folder, self.every_s, self.keep = ranks.folder(folder), every_s, keep
        self.writer = files.Writer()
        self._ranks, self._first_folder, self._turns = ranks, folder, Turns(ranks)
        self._interrupts, self._display = interrupts or Interrupts(), display or Progress()
        self._last = time.monotonic()
        self._saving: Future[Path] | None = None
        self._latest: Future[Path] | None = None
        self._is_ours = False

    def check_folder(self) -> None:
        """Refuse a folder with the checkpoints of another run.

        Raises:
            UserError: The folder holds checkpoints that this object neither restored nor wrote.
        """
        if not self._is_ours and step_folders.found(self.folder):
            fix = "restore them first, or choose another folder"
            raise invalid(str(self.folder), "checkpoints of another run", "none", fix)

    def restore(
        self, own: Mapping[str, Stateful], *, common: Mapping[str, Stateful] | None = None
    ) -> Restored:
        """Load the newest checkpoint that is intact on all ranks, and set newer ones aside.

        A run of several ranks that was killed while its very first checkpoint was written starts
        from the beginning.

        Args:
            own: Objects that each rank saved.
            common: Objects that only rank 0 saved; all ranks load them.

        Raises:
            UserError: There is no intact checkpoint, or it belongs to objects of other names, kinds
                or shapes, or to another number of ranks.
        """
        common = common or {}
        with self._ranks.agreed():
            if self._ranks.is_first:
                own, common = {**common, **own}, {}
            restored = self._restore(own, common)
        self._is_ours = True
        return restored

    def save_if_due(self, step: int, objects: Mapping[str, Stateful], *, mark: int = 0) -> bool:
        """Start a checkpoint in the background if one is due, and return whether it was started.

        If the last checkpoint failed, the reason is logged, and the run continues.

        Args:
            step: Step in the name of the checkpoint.
            objects: Objects that this rank saves.
            mark: Number that distinguishes moments at the same step; equal on all ranks.

        Raises:
            KeyboardInterrupt: One of several ranks was asked to stop.
        """
        if problem := self.problem():
            self._display.note(problem)
        now = self._turns.next(
            due=self.is_due(),
            busy=self.is_busy,
            failed=problem is not None,
            stop=self._interrupts.is_pending,
        )
        if now.failed and problem is None and self._latest is not None:
            # The write of another rank failed.
            self.writer.submit(functools.partial(_withdraw, self._latest))
        if now.save:
            with self._interrupts.held():
                self.start(step, objects, mark=mark)
        if now.stop:
            raise KeyboardInterrupt
        return now.save

    def save_last(self, step: int, objects: Mapping[str, Stateful], *, mark: int = 0) -> Path:
        """Write a checkpoint, and wait until all ranks have written theirs.

        Returns:
            Folder of the checkpoint.

        Raises:
            SaveError: The checkpoint could not be written on some rank.
        """
        self._turns.end()
        if problem := self.problem():
            self._display.note(problem)
        with self._ranks.agreed(files.SaveError):
            return self.finish(step, objects, mark=mark)

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._saving is not None and not self._saving.done()

    def is_due(self) -> bool:
        """Return whether the next checkpoint is due and the last one has been written."""
        return not self.is_busy and time.monotonic() - self._last > self.every_s

    def start(self, step: int, objects: Mapping[str, Stateful], *, mark: int = 0) -> Future[Path]:
        """Copy the state, and queue the copy to be written; the arguments are as in `save_if_due`.

        Returns:
            Future folder of the checkpoint.
        """
        return self._queue(self._copy(step, objects, mark))

    def _copy(self, step: int, objects: Mapping[str, Stateful], mark: int) -> step_folders.Snapshot:
        size = self._ranks.world_size
        return step_folders.Snapshot(step, objects, mark=mark, world_size=size)

    def _queue(self, snapshot: step_folders.Snapshot) -> Future[Path]:
        self._is_ours = True
        self._saving = self._latest = self.writer.submit(
            lambda: step_folders.write(self.folder, snapshot, keep=self.keep)
        )
        self._last = time.monotonic()
        return self._saving

    def finish(self, step: int, objects: Mapping[str, Stateful], *, mark: int = 0) -> Path:
        """Write the current state, and wait until it is on disk.

        Raises:
            SaveError: The checkpoint could not be written.
        """
        snapshot = self._copy(step, objects, mark)
        future = self._queue(snapshot)
        with self._display.phase("saving", snapshot.num_bytes // 1000, "kB") as phase:
            while not future.done():
                wait([future], timeout=0.5)
                phase.update(snapshot.num_written // 1000)
        return future.result()

    def problem(self) -> str | None:
        """Return why the last checkpoint failed, once; None if there is nothing new to report."""
        if self._saving is None or not self._saving.done():
            return None
        error, self._saving = self._saving.exception(), None
        if error is not None and not isinstance(error, files.SaveError):
            raise error
        return None if error is None else f"{error}; the run goes on"

    def describe(self, name: str) -> list[dict[str, Any]]:
        """Return one object's state in each readable checkpoint, without tensors, dicts, lists."""
        states = []
        for path in step_folders.found(self.folder):
            with contextlib.suppress(files.DamagedError):
                pairs = step_folders.read_record(path)["objects"][name]["pairs"]
                states.append({k: v for k, v in pairs if not isinstance(v, dict)})
        return states

    def _restore(self, own: Mapping[str, Stateful], common: Mapping[str, Stateful]) -> Restored:
        """Try the checkpoints present on all ranks, newest first, until all ranks can load one.

        Args:
            own: Objects in the checkpoints of this rank.
            common: Further objects, which only the checkpoints of rank 0 hold.
        """
        ranks, paths = self._ranks, step_folders.found(self.folder)[::-1]
        with ranks.agreed():
            mine, problems = step_folders.moments(paths)
        theirs = [
            {tuple(moment): name for moment, name in json.loads(text)}
            for text in ranks.gather(json.dumps(list(mine.items())))
        ]
        self._check_ranks({moment[2] for names in theirs for moment in names})
        for moment in sorted(set.intersection(*(set(names) for names in theirs)), reverse=True):
            path, problem = self.folder / mine[moment], ""
            with ranks.agreed():
                try:
                    step_folders.load(path, own)
                    if common:
                        first = self._first_folder / theirs[0][moment]
                        step_folders.load(first, common, is_subset=True)
                except files.DamagedError as error:
                    problem = problems[path] = str(error)
            others = ranks.gather(problem)
            if any(others):
                bad = next(rank for rank, text in enumerate(others) if text)
                problems.setdefault(path, f"on rank {bad}: {others[bad]}")
                continue
            newer = paths[: paths.index(path)]
            _set_aside(newer)
            notes = [_describe(other, problems) + f"; {path.name} is used" for other in newer]
            return Restored(moment[0], notes)
        return self._restore_nothing(paths, problems)

    def _check_ranks(self, counts: set[int]) -> None:
        """Refuse checkpoints of another number of ranks."""
        if strange := counts - {self._ranks.world_size}:
            count = strange.pop()
            how = "without torchrun" if count == 1 else f"with --nproc-per-node {count}"
            got = f"checkpoints of {count} rank{'s' * (count > 1)}"
            expected = f"{self._ranks.world_size}, as many as there are now"
            raise invalid(str(self._first_folder), got, expected, f"resume {how}")

    def _restore_nothing(self, paths: list[Path], problems: Mapping[Path, str]) -> Restored:
        """Start from the beginning if a first checkpoint was not finished; else raise an error."""
        notes = [_describe(path, problems) for path in paths if path in problems]
        everywhere = self._ranks.gather(json.dumps([len(paths), notes]))
        counts, all_notes = zip(*(json.loads(text) for text in everywhere), strict=True)
        if self._ranks.world_size > 1 and max(counts) == 1 and not any(all_notes):
            _set_aside(paths)
            notes = [f"checkpoint {p.name}: not on all ranks; started again" for p in paths]
            return Restored(0, notes)
        reasons = "; ".join(note for notes in all_notes for note in notes)
        got = f"no whole checkpoint ({reasons})" if reasons else "no checkpoint"
        expected = "one" if reasons else "step-N folders"
        raise invalid(str(self._first_folder), got, expected, "start a new run")


def _withdraw(written: Future[Path]) -> None:
    """Delete a checkpoint that another rank could not write."""
    with contextlib.suppress(OSError):
        if written.exception() is None:
            files.discard(files.hide(written.result(), "partial"))


def _describe(path: Path, problems: Mapping[Path, str]) -> str:
    if path in problems:
        return f"checkpoint {path.name}: damaged ({problems[path]})"
    return f"checkpoint {path.name}: not on all ranks"


def _set_aside(paths: list[Path]) -> None:
    """Hide checkpoints that are not used.

    Not called if all are damaged, so that they stay available for manual repair.
    """
    for path in paths:
        with contextlib.suppress(OSError):
            files.hide(path, "damaged")
