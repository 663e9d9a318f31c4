"""When a run is saved, and what of it: checkpoints and the ring's images, on all ranks together."""

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
    """Saves and restores a run.

    Args:
        run_dir: Of all ranks; each has `checkpoints` and `blocks` there.
        ring: This rank's.
        remakes: See `RingBlocks`.
        every_s: Seconds between checkpoints.
        ranks: Who saves together.
        interrupts: Held while the state is copied, and asked whether to stop.
        note: Told what could not be saved.
    """

    def __init__(
        self, run_dir: Path, ring: RingBuffer, *, remakes: Sequence[Callable[..., object]],
        every_s: float, ranks: Ranks, interrupts: Interrupts, note: Callable[[str], None],
    ) -> None:  # fmt: skip
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
        """What is saved here: what all ranks have in common only by the first."""
        return {**(common if self._ranks.is_first else {}), "ring": self.blocks, **own}

    def restore(
        self, common: Mapping[str, Stateful], own: Mapping[str, Stateful]
    ) -> step_folders.Restored:
        """Take up the newest checkpoint that is whole on all ranks.

        Raises:
            ValueError: There is none, or it is of another student, ring, optimizer or number of
                ranks.
        """
        with self._ranks.agreed(ValueError):
            step, notes = self.saver.restore(
                self.state(common, own), common={} if self._ranks.is_first else common
            )
        return step_folders.Restored(step, [*notes, *self.blocks.notes])

    def save_if_due(self, step: int, state: Mapping[str, Stateful]) -> None:
        """Start a checkpoint in the background; one that failed is told of, and the run goes on.

        Raises:
            KeyboardInterrupt: One of several ranks was asked to stop.
        """
        if problem := self.saver.problem():
            self._note(problem)
        now = self._turns.next(
            due=self.saver.is_due(), busy=self.saver.is_busy, failed=problem is not None,
            stop=self._interrupts.is_pending,
        )  # fmt: skip
        if now.failed and problem is None:
            self.saver.withdraw()
        if now.save:
            with self._interrupts.held():
                self.saver.start(step, state, mark=self._ring.num_inserted)
                self._drop_unused()
        if now.stop:
            raise KeyboardInterrupt

    def save_last(self, step: int, state: Mapping[str, Stateful]) -> Path:
        """Write a checkpoint and wait until all ranks have theirs.

        Raises:
            SaveError: It could not be written somewhere.
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
