"""The loop that all training shares: steps, statistics, checkpoints, signals, resume."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.checkpoint.manager import CheckpointManager, Restored
from dmkd_fast.checkpoint.random_state import Generators
from dmkd_fast.checkpoint.step_folders import Stateful
from dmkd_fast.data.listing import SourceError
from dmkd_fast.runtime import files
from dmkd_fast.runtime.clock import Clock
from dmkd_fast.runtime.device import is_out_of_memory
from dmkd_fast.runtime.errors import NotFiniteError, invalid
from dmkd_fast.runtime.output.profile import StepProfile
from dmkd_fast.runtime.output.progress import Phase, Progress
from dmkd_fast.runtime.signals import Interrupts
from dmkd_fast.training.metrics import Metrics, row_text
from dmkd_fast.training.student import StudentTrainer


class TrainingLoop:
    """Take training steps to the end of a schedule, such that a run can be stopped and resumed.

    A subclass says what one step is (`train_step`), and may prepare each step, report figures and
    save further objects.

    Args:
        student: Network to train, with its optimizer and schedule.
        run_dir: Folder for all files of the run; shared by all ranks.
        display: Display of the progress.

    Attributes:
        step: Number of steps taken.
        checkpoints: Writer and reader of the checkpoints.
        clock: Time that the run has taken.
        on_row: Functions called with each row of stats.jsonl, on the rank that writes it. An error
            that one raises ends the run; a checkpoint is written if the run has one rank.
        profile: Trace of some steps, which `fit` takes; None: no trace.
    """

    def __init__(self, student: StudentTrainer, run_dir: Path | str, display: Progress) -> None:
        self.student, self.run_dir = student, Path(run_dir)
        self.schedule, self.ranks, self.device = student.schedule, student.ranks, student.device
        self.step, self.num_steps = 0, self.schedule.num_steps
        self.clock = Clock()
        self.on_row: list[Callable[[dict[str, Any]], object]] = []
        self.profile: StepProfile | None = None
        self._calls_back = False  # True while functions of `on_row` run
        self._cpu_elsewhere_s = 0.0
        self._generators = Generators(self.device)
        self._drawn_before: dict[str, Any] | None = None  # random states; not None in a warm-up
        self._num_views = self.num_steps * self.schedule.batch_size
        self.display = display
        self._metrics = Metrics(self.run_dir, display, ranks=self.ranks)
        self._interrupts = Interrupts(only_noted=self.ranks.world_size > 1)
        self.checkpoints = CheckpointManager(
            self.run_dir / "checkpoints",
            every_s=self.schedule.checkpoint_every_s,
            ranks=self.ranks,
            interrupts=self._interrupts,
            display=self.display,
        )

    def train_step(self) -> Tensor:
        """Take one optimizer step and return its loss without waiting for the device."""
        raise NotImplementedError

    def _run_once(self) -> None:
        """Run all networks once on scratch inputs, so that they compile."""
        raise NotImplementedError

    def _prepare_step(self) -> None:
        """Do what the next step needs and what may take long; a signal may interrupt it."""

    def _rated_counts(self) -> dict[str, float]:
        """Return the number of images so far, as `images`, if it gets a rate."""
        return {}

    def _figures(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Return figures for a row of statistics, and counts that the host reads with the row."""
        return {}, {}

    def _check(self, counts: Mapping[str, int]) -> None:
        """Stop a run that cannot continue, by the counts of `_figures`."""

    def _is_scored(self) -> bool:
        """Return whether the student is evaluated after the current step."""
        return False

    def _scores(self) -> dict[str, float]:
        """Return the scores of the student for a row of statistics."""
        return {}

    def _own_state(self) -> dict[str, Stateful]:
        """Return the objects that each rank saves."""
        return {"metrics": self._metrics, "clock": self.clock, "progress": self}

    def _mark(self) -> int:
        """Return a number that distinguishes checkpoints at the same step."""
        return 0

    def _after_save(self) -> None:
        """Do what follows each checkpoint."""

    @property
    def num_views(self) -> int:
        """Number of views the student has seen, on all ranks."""
        return self.step * self.schedule.batch_size

    @property
    def progress(self) -> float:
        """Progress of the run in [0, 1], on which all schedules depend."""
        return self.step / self.num_steps

    def lr(self) -> float:
        """Return the learning rate of the current step."""
        return self.schedule.lr_at(self.step)

    def totals(self) -> dict[str, Any]:
        """Return the current values of what `fit` returns."""
        return {
            "views": self.num_views,
            "wall_s": round(self.clock.wall_s(), 1),
            "cpu_s": round(self.clock.cpu_s() + self._cpu_elsewhere_s, 1),
        }

    def restore(self) -> Restored:
        """Load the newest intact checkpoint of `run_dir`; `fit` then continues from there.

        Returns:
            The checkpoint's step, and a line for each damaged file or checkpoint.

        Raises:
            UserError: No checkpoint is intact, or it is of another student, ring or optimizer.
        """
        return self.checkpoints.restore(self._own_state(), common=self.student.objects())

    def fit(self) -> dict[str, Any]:
        """Train to the end of the schedule.

        A checkpoint is written at regular intervals, at the end, and on Ctrl-C or SIGTERM. Call
        `restore` first to continue an earlier run.

        Returns:
            The figures of `totals`, for the whole run, compilation and evaluation included.

        Raises:
            KeyboardInterrupt: Training was interrupted; a checkpoint has been written.
            SourceError: Images on disk cannot be read; a checkpoint has been written.
            NotFiniteError: `max_skipped_steps` steps in a row were skipped, or the logits of too
                many test images, or too many images, are not finite; a checkpoint has been written.
            torch.OutOfMemoryError: Memory ran out; a checkpoint has been written if possible.
            SaveError: The last checkpoint could not be written.
            UserError: `run_dir` holds checkpoints that were not restored.
        """
        self.checkpoints.check_folder()
        files.make_folder(self.run_dir)
        self.checkpoints.writer.start()  # Before signals can stop the start of the thread half-way.
        try:
            with (
                self._interrupts,
                self.display.phase(
                    "training", self._num_views, "views", done=self.num_views
                ) as phase,
            ):
                self._run(phase)
        finally:
            gc.unfreeze()
            self._metrics.close()
            if self.profile is not None:
                self.profile.stop()
        self._cpu_elsewhere_s = self.ranks.elsewhere(self.clock.cpu_s())
        if self._interrupts.is_pending:  # With several ranks, a signal during the last save.
            raise KeyboardInterrupt
        return self.totals()

    def warm_up(self) -> None:
        """Run all networks once on scratch inputs; weights, buffers and random states stay."""
        self.display.note("warming up ...")
        started = time.monotonic()
        self._drawn_before = self._generators.state_dict()
        try:
            with self.clock.part("warm_up"):
                if self.device.type == "cuda":
                    # The producer's stream does not wait for this one, which prepares the weights.
                    torch.cuda.synchronize(self.device)
                self._run_once()
        finally:
            self._undo_warm_up()
        self.display.note(f"warm after {time.monotonic() - started:.0f} s")

    def _undo_warm_up(self) -> None:
        """Restore what a warm-up changed; called again if an interrupt stopped the first call."""
        if self._drawn_before is not None:
            self._generators.load_state_dict(self._drawn_before)
        self.student.undo_warm_up()
        self._drawn_before = None

    def state_dict(self) -> dict[str, Any]:
        """Return the step and what it counts; the other parts have state dicts of their own."""
        return {"step": self.step, **self._fixed_settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict`.

        Raises:
            UserError: The state is that of a run with another batch size or seed.
        """
        for name, value in self._fixed_settings().items():
            saved = state.get(name, value)  # Earlier versions saved the step alone.
            if saved != value:
                raise invalid(name, value, f"{saved} as in the checkpoint", "set it back")
        self.step = state["step"]

    def _fixed_settings(self) -> dict[str, int]:
        """Return the settings that the meaning of a step depends on, by their names."""
        return {"train.batch_size": self.schedule.batch_size}

    def _run(self, phase: Phase) -> None:
        """Run the loop, and write a checkpoint when something ends it early."""
        try:
            self._loop(phase)
        except (KeyboardInterrupt, SourceError, NotFiniteError):
            saved = self._save_last()  # A second signal stops the save at once.
            seen = f"{self.num_views:,} of {self._num_views:,} views"
            self.display.note(f"interrupted at {seen}; saved {saved}")
            raise
        except Exception as error:
            is_sound = is_out_of_memory(error) or self._calls_back
            # Saving is collective, and the other ranks have not reached it.
            if is_sound and self.ranks.world_size == 1:
                self._save_what_is_left()
            self.checkpoints.writer.close()
            raise

    def _loop(self, phase: Phase) -> None:
        self.warm_up()
        # Later collections skip all objects made so far; `fit` unfreezes these objects. Signals are
        # held, because an exception that a signal raises inside a finalizer would be lost.
        with self._interrupts.held():
            gc.collect()
            gc.freeze()
        self._metrics.begin(
            views=self.num_views, wall_s_before=self.clock.wall_s(), **self._rated_counts()
        )
        first_step = self.step
        while True:
            self._report(phase)
            self._save_if_due()
            if self.step >= self.num_steps:
                break
            self._prepare_step()
            if self.step == first_step:  # The first fill says nothing about the time left.
                phase.start_clock()
            with self._interrupts.held():
                self._metrics.add("loss", self.train_step())
            phase.update(self.num_views)
            if self.profile is not None:
                self.profile.after_step()
        with self._interrupts.held():
            self._save_last()

    def _report(self, phase: Phase) -> None:
        """Write a row of statistics if one is due; an interrupted row is due after a resume."""
        is_scored = self._is_scored()
        is_due = is_scored or self.step % self.schedule.log_every_steps == 0
        is_due = is_due or self.step >= self.num_steps
        if not (is_due and self._metrics.has_values):
            return
        scores: dict[str, float] = {}
        if is_scored:
            with self.clock.part("evaluate"):
                scores = self._scores()
        row: dict[str, Any] | None = None
        try:
            with self._interrupts.held(), self.clock.part("log"):
                figures, counts = self._figures()
                row = self._metrics.flush(
                    views=self.num_views,
                    **self._rated_counts(),
                    lr=self.lr(),
                    **scores,
                    **figures,
                    counts=self.student.counts() | counts,
                )
                self.student.check(row["skipped_in_a_row"])
                self._check(row)
        except BaseException:  # also the interrupt of a signal that has waited
            # The row is in stats.jsonl and is not written again. Its reason to end the run
            # outweighs an error of a callback.
            if row is not None:
                with contextlib.suppress(Exception):
                    self._tell(phase, row)
                self._calls_back = False
            raise
        self._tell(phase, row)

    def _tell(self, phase: Phase, row: dict[str, Any]) -> None:
        """Show a row and pass it to the functions of `on_row`, on the rank that writes it."""
        if not self.ranks.is_first:
            return
        with self.clock.part("log"):
            phase.update(self.num_views, row_text(row))
            self._calls_back = True
            for on_row in self.on_row:
                on_row(row)
            self._calls_back = False

    def _save_if_due(self) -> None:
        with self.clock.part("save"):
            if self.checkpoints.save_if_due(self.step, self._state(), mark=self._mark()):
                self._after_save()

    def _save_last(self) -> Path:
        self._undo_warm_up()
        with self.clock.part("save"):
            saved = self.checkpoints.save_last(self.step, self._state(), mark=self._mark())
            self._after_save()
            self.checkpoints.writer.close()
        return saved

    def _save_what_is_left(self) -> None:
        """Write a checkpoint after an error, unless the error left weights partly updated."""
        with contextlib.suppress(Exception):  # The first error is the one to report.
            self.step += self.student.give_up()  # The views of an unfinished step were drawn.
            self.display.note(f"saved {self._save_last()}")

    def _state(self) -> dict[str, Stateful]:
        """Return the objects of the run that this rank saves."""
        common = self.student.objects() if self.ranks.is_first else {}
        return {**common, **self._own_state()}
