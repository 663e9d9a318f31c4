"""Checkpoints of a run and the ring's images on disk, saved by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dmkd_fast.checkpoint import step_folders
from dmkd_fast.checkpoint.step_folders import Stateful
from dmkd_fast.ring.buffer import RingBuffer
from dmkd_fast.ring.storage import BlockFiles
from dmkd_fast.runtime import files
from dmkd_fast.runtime.distributed import Ranks, Turns
from dmkd_fast.runtime.signals import Interrupts


class CheckpointManager:
    """Save and restore a run.

    Args:
        run_dir: Run directory of all ranks; each rank has its `checkpoints` and `blocks` there.
        ring: Ring buffer of this rank.
        remakes: Functions that make damaged images again; see `BlockFiles`.
        every_s: Seconds between checkpoints.
        ranks: Processes that save together.
        interrupts: Signals to hold while the state is copied; a pending one stops the run.
        note: Function that logs one line, called when a checkpoint could not be written.
    """

    def __init__(
        self,
        run_dir: Path,
        ring: RingBuffer,
        *,
        remakes: Sequence[Callable[..., object]],
        every_s: float,
        ranks: Ranks,
        interrupts: Interrupts,
        note: Callable[[str], None],
    ) -> None:
        self._ring, self._ranks, self._interrupts, self._note = ring, ranks, interrupts, note
        self._turns = Turns(ranks)
        self.writer = files.Writer()
        self.blocks = BlockFiles(
            ring, ranks.folder(run_dir / "blocks"), self.writer, remakes=remakes
        )
        self.saver = step_folders.Saver(
            run_dir / "checkpoints", self.writer, every_s=every_s, ranks=ranks
        )

    def state(
        self, common: Mapping[str, Stateful], own: Mapping[str, Stateful]
    ) -> dict[str, Stateful]:
        """Return what this rank saves; only rank 0 saves `common`."""
        return {**(common if self._ranks.is_first else {}), "ring": self.blocks, **own}

    def restore(
        self, common: Mapping[str, Stateful], own: Mapping[str, Stateful]
    ) -> step_folders.Restored:
        """Load the newest checkpoint that is intact on all ranks.

        Raises:
            UserError: No checkpoint is intact on all ranks, or it belongs to another student,
                ring, optimizer or number of ranks.
        """
        with self._ranks.agreed():
            step, notes = self.saver.restore(
                self.state(common, own), common={} if self._ranks.is_first else common
            )
        return step_folders.Restored(step, [*notes, *self.blocks.notes])

    def save_if_due(self, step: int, state: Mapping[str, Stateful]) -> None:
        """Start a checkpoint in the background if one is due.

        If the last checkpoint failed, the reason is logged, and the run continues.

        Raises:
            KeyboardInterrupt: One of several ranks was asked to stop.
        """
        if problem := self.saver.problem():
            self._note(problem)
        now = self._turns.next(
            due=self.saver.is_due(),
            busy=self.saver.is_busy,
            failed=problem is not None,
            stop=self._interrupts.is_pending,
        )
        if now.failed and problem is None:
            self.saver.withdraw()
        if now.save:
            with self._interrupts.held():
                self.saver.start(step, state, mark=self._ring.num_inserted)
                self._drop_unused()
        if now.stop:
            raise KeyboardInterrupt

    def save_last(self, step: int, state: Mapping[str, Stateful]) -> Path:
        """Write a checkpoint and wait until all ranks have written theirs.

        Raises:
            SaveError: The checkpoint could not be written on some rank.
        """
        self._turns.end()
        if problem := self.saver.problem():
            self._note(problem)
        with self._ranks.agreed(files.SaveError):
            path = self.saver.finish(step, state, mark=self._ring.num_inserted)
        self._drop_unused()
        self.writer.close()
        return path

    def _drop_unused(self) -> None:
        self.blocks.drop_unused(lambda: self.saver.describe("ring"))
