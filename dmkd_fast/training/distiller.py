"""Train a student on images that are generated during training: `Distiller.fit`.

    LabelStream -> DiffusionSampler -> RingBuffer -> Views (-> Mixer) -> teacher -> StudentTrainer

For images on disk, an ImageReader replaces LabelStream and DiffusionSampler. The parts do not know
the config or each other. Under torchrun each rank has its own parts. Source: arXiv 2305.12954.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.checkpoint import step_folders
from dmkd_fast.checkpoint.random_state import Generators
from dmkd_fast.classifiers.ensemble import Teachers
from dmkd_fast.classifiers.loading import freeze
from dmkd_fast.data.listing import SourceError
from dmkd_fast.data.stored import ImageReader
from dmkd_fast.data.test_sets import EncodedSet, ImageSet
from dmkd_fast.ring.buffer import Block, RingBuffer
from dmkd_fast.runtime import files
from dmkd_fast.runtime.clock import Clock
from dmkd_fast.runtime.device import InFlight, is_out_of_memory
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.runtime.errors import NotFiniteError, invalid
from dmkd_fast.runtime.signals import Interrupts
from dmkd_fast.sampling.labels import LabelStream
from dmkd_fast.sampling.sampler import DiffusionSampler
from dmkd_fast.training import scoring
from dmkd_fast.training.metrics import Metrics
from dmkd_fast.training.sampler_schedule import SamplerSchedule
from dmkd_fast.training.saving import CheckpointManager
from dmkd_fast.training.schedule import Schedule
from dmkd_fast.training.student import StudentTrainer
from dmkd_fast.training.targets import Targets
from dmkd_fast.views.crops import Views
from dmkd_fast.views.mixing import Mixer
from dmkd_fast.views.spec import InputSpec


class Distiller:
    """Train a student on images that are generated (or read from disk) during training.

    Args:
        sampler: Image generator or reader, called as `sample(ids, labels, out=)`.
        ring: Buffer for the images of this rank; its block size is the sampler's batch.
        labels: Source of image ids and classes; the same ImageReader if `sampler` is one.
        views: Renderer of the student's random views.
        teacher: Classifier with the student's input, or `Teachers`, each of which sees the same
            crops at its own size and normalization; frozen here.
        student: Network to train, (B, c, S, S) views -> (B, C) logits.
        schedule: Length, batch size (of all ranks together) and optimizer settings.
        run_dir: Folder for all files of the run; shared by all ranks.
        temperature: Softmax temperature of the loss.
        alpha: Weight of the teacher's term; cross-entropy with the image's class has 1 - alpha.
        mixer: Mixing of views, the same for the student and all teachers; None: no mixing.
        dtype: Compute dtype of all networks (autocast for the student); float16 scales the loss.
        compile: Whether to use torch.compile on the student and the teachers.
        test_set: Real images for the reported accuracy, which has no effect on the training.
        student_input: Resize and crop of test images for the student; None: same as its views.
        later_samplers: (progress in [0, 1], sampler that is used from there on), in order.
        show: Whether to print progress.
        ranks: This process among those that train the same student.
    """

    def __init__(
        self,
        *,
        sampler: DiffusionSampler | ImageReader,
        ring: RingBuffer,
        labels: LabelStream | ImageReader,
        views: Views,
        teacher: nn.Module | Teachers,
        student: nn.Module,
        schedule: Schedule,
        run_dir: Path | str,
        temperature: float = 4.0,
        alpha: float = 1.0,
        mixer: Mixer | None = None,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        test_set: ImageSet | EncodedSet | None = None,
        student_input: InputSpec | None = None,
        show: bool = True,
        ranks: Ranks = ALONE,
        later_samplers: Sequence[tuple[float, DiffusionSampler]] = (),
    ) -> None:
        self.sampler, self.ring, self.labels, self.views = sampler, ring, labels, views
        self._phases = SamplerSchedule(sampler, later_samplers, ranks)
        self.teacher, self.student = freeze(teacher), student
        self.schedule, self.test_set = schedule, test_set
        self.run_dir, self.device = Path(run_dir), ring.images.device
        self._ranks, self._batch = ranks, ranks.per_rank("batch_size", schedule.batch_size)
        ring.plan.check_batch(self._batch)
        if ring.plan.guard_blocks and isinstance(sampler, ImageReader):
            raise invalid(
                "guard_blocks",
                f"{ring.plan.guard_blocks} with an ImageReader",
                "0, as blocks are not read ahead",
                "make the ring without",
            )
        # An image that one rank cannot read stops all ranks.
        self._readers = ranks if isinstance(sampler, ImageReader) else ALONE
        self._ahead: tuple[Block, Tensor, Tensor] | None = None
        self._in_flight = InFlight(self.device)
        self._cpu_elsewhere_s = 0.0
        self.dtype, self.num_steps, self.step = dtype, schedule.num_steps, 0
        self.learner = StudentTrainer(
            student,
            schedule=schedule,
            temperature=temperature,
            alpha=alpha,
            dtype=dtype,
            compile=compile,
            ranks=ranks,
        )
        self.average = self.learner.average
        self._supervision = Targets(
            teacher, views, mixer, input=student_input, dtype=dtype, compile=compile
        )
        self._interrupts = Interrupts(only_noted=ranks.world_size > 1)
        self._generators = Generators(self.device)
        self.clock = Clock()
        total = self.num_steps * schedule.batch_size
        self._metrics = Metrics(self.run_dir, total, show=show, ranks=ranks)
        self._keeper = CheckpointManager(
            self.run_dir,
            ring,
            remakes=self._phases.samples,
            every_s=schedule.checkpoint_every_s,
            ranks=ranks,
            interrupts=self._interrupts,
            note=self._metrics.note,
        )

    def refill(self, metrics: Metrics | None = None) -> None:
        """Insert blocks until the limiter lets the next batch be drawn.

        Does nothing once an ImageReader's whole set is in the ring.

        Args:
            metrics: Log for the progress of a long fill; None: no log lines and no checkpoints.
        """
        before, started = self.ring.num_inserted, (told := time.monotonic())
        while self.ring.must_insert(self._batch) and not self.labels.is_exhausted:
            with self._readers.agreed(SourceError):
                block, ids, labels = self._ahead or self._generate()
            with self._interrupts.held():
                self.ring.commit(
                    block, ids=ids.to(self.device), labels=labels.to(self.device)
                )  # An ImageReader returns both on the host.
                self.labels.advance(len(ids))
                self._ahead = None
            if metrics is not None:
                # Not held, as it may wait for the disk. The next checkpoint queues missed blocks.
                self._keeper.blocks.append()
                self.ring.release()  # `append` has read the block's slots.
                self._keeper.save_if_due(self.step, self._state())
            now = time.monotonic()
            if metrics is not None and now - told > 5:
                made, told = (self.ring.num_inserted - before) * self._ranks.world_size, now
                metrics.note(f"filling: {made:,} images, {made / (now - started):,.0f} images/s")

        if self._wants_ahead():
            self._ahead = self._generate()

    def _wants_ahead(self) -> bool:
        """Tell whether to make a block early: there is a guard, and remaining views need it."""
        to_come = (self.num_steps - self.step) * self._batch
        return (
            self.ring.plan.guard_blocks > 0
            and self.ring.must_insert(to_come)
            and self.ring.may_insert(self._batch)
        )

    def _generate(self) -> tuple[Block, Tensor, Tensor]:
        """Write an uncommitted block of new images, without waiting for a producer's stream."""
        self.ring.abort()  # Drop a block that an interrupt left uncommitted.
        # `peek` may block until new shards appear; hold no reserved block meanwhile.
        with self.ring.producing():
            ids, labels = self.labels.peek(self.ring.block_images)
        block = self.ring.reserve()
        try:
            with self.ring.producing(), self._in_flight.piece():
                self._phases.at(self.share).sample(ids, labels, out=block.images)
        except BaseException:
            self.ring.abort()
            raise
        return block, ids, labels

    def train_step(self) -> Tensor:
        """Take one optimizer step and return its loss without waiting for the device."""
        self.learner.start(self.lr())
        draw = self.ring.sample(self._batch)
        views = self._supervision.views(
            self.ring.images, draw.indices, draw.ids, draw.uses, share=self.share
        )
        labels = self.ring.labels[draw.indices]  # (B,)
        self.ring.release()
        views, mixed = self._supervision.mixed(views, step=self.step)
        size = self.learner.part_size  # The teachers run on one micro-batch at a time.
        parts = self._supervision.parts(views, labels, mixed, share=self.share, size=size)
        losses = [self.learner.learn(*part) for part in parts]
        self.learner.finish()
        self.step += 1
        return sum(losses[1:], losses[0])

    def restore(self) -> step_folders.Restored:
        """Load the newest intact checkpoint of `run_dir`; `fit` then continues from there.

        Returns:
            The checkpoint's step, and a line for each damaged file or checkpoint.

        Raises:
            UserError: No checkpoint is intact, or it is of another student, ring or optimizer.
        """
        return self._keeper.restore(self._common_state(), self._own_state())

    def check_folder(self) -> None:
        """Raise ValueError if the run directory holds checkpoints that were not restored."""
        self._keeper.saver.check_folder()

    def fit(self) -> dict[str, Any]:
        """Train to the end of the schedule, or until Ctrl-C or SIGTERM.

        Returns:
            generated_images, views, reuse (views per image), and over the whole run, compilation
            and evaluation included: wall_s, cpu_s, images_per_s, views_per_s.

        Raises:
            KeyboardInterrupt: Training was interrupted; a checkpoint has been written.
            SourceError: Images on disk cannot be read; a checkpoint has been written.
            NotFiniteError: `max_skipped_steps` steps in a row were skipped, or the logits of too
                many test images, or too many images, are not finite; a checkpoint has been written.
            torch.OutOfMemoryError: Memory ran out; a checkpoint has been written if possible.
            SaveError: The last checkpoint could not be written.
            UserError: `run_dir` holds checkpoints that were not restored.
        """
        self.check_folder()
        files.make_folder(self.run_dir)
        metrics = self._metrics
        self._keeper.writer.start()  # Before interrupts can stop the start of the thread half-way.
        try:
            with self._interrupts:
                self._run(metrics)
        finally:
            gc.unfreeze()
            metrics.close()
        self._cpu_elsewhere_s = self._ranks.elsewhere(self.clock.cpu_s())
        if self._interrupts.is_pending:  # With several ranks, a signal during the last save.
            raise KeyboardInterrupt
        return self.totals()

    def _run(self, metrics: Metrics) -> None:
        """Run the loop, and write a checkpoint when something ends it early."""
        total = self.num_steps * self.schedule.batch_size
        try:
            self._loop(metrics)
        except (KeyboardInterrupt, SourceError, NotFiniteError):
            saved = self._save_last()  # A second signal stops the save at once.
            metrics.note(f"interrupted at {self.num_views:,} of {total:,} views; saved {saved}")
            raise
        except Exception as error:
            # Saving is collective, and the other ranks have not reached it.
            if is_out_of_memory(error) and self._ranks.world_size == 1:
                self._save_what_is_left()
            self._keeper.writer.close()
            raise

    @property
    def num_views(self) -> int:
        """Number of views the student has seen, on all ranks."""
        return self.step * self.schedule.batch_size

    @property
    def num_images(self) -> int:
        """Number of images inserted so far on all ranks, the same number on each."""
        return self.ring.num_inserted * self._ranks.world_size

    def lr(self) -> float:
        """Learning rate of the current step."""
        return self.schedule.lr_at(self.step)

    @property
    def share(self) -> float:
        """Progress of the run in [0, 1], on which all schedules depend."""
        return self.step / self.num_steps

    def _loop(self, metrics: Metrics) -> None:
        self._warm_up(metrics)
        # A collection over all objects of imports and compilation is slow, and the copies for a
        # checkpoint would trigger one. `fit` unfreezes them.
        gc.collect()
        gc.freeze()
        metrics.begin(
            views=self.num_views, images=self.num_images, wall_s_before=self.clock.wall_s()
        )
        while True:
            self._report(metrics)
            self._keeper.save_if_due(self.step, self._state())
            if self.step >= self.num_steps:
                break
            self.refill(metrics)
            with self._interrupts.held():
                metrics.add("loss", self.train_step())
        with self._interrupts.held():
            self._save_last()

    def _report(self, metrics: Metrics) -> None:
        """Write a row of statistics if one is due; an interrupted row is due after a resume."""
        is_scored = self.test_set is not None and self.schedule.is_evaluated(self.step)
        is_due = is_scored or self.step % self.schedule.log_every_steps == 0
        is_due = is_due or self.step >= self.num_steps
        if not (is_due and metrics.has_values):
            return
        scores = self._scores() if is_scored else {}
        with self._interrupts.held():
            statistics = self.ring.statistics()
            for name, value in statistics.means().items():
                metrics.add(name, value)
            counts = self.learner.counts() | self._phases.counts(self.device)
            faults = self.ring.num_faults().float() * self._ranks.world_size
            row = metrics.flush(
                views=self.num_views,
                images=self.num_images,
                lr=self.lr(),
                **scores,
                **statistics.figures(),
                counts=counts | {"ring_faults": faults},
            )
            self.learner.check(row["skipped_in_a_row"])
            self._phases.check(row["broken_images"])
            self.ring.check_faults(row["ring_faults"])

    def _save_last(self) -> Path:
        self.learner.undo_warm_up()  # Again, in case an interrupt stopped it.
        return self._keeper.save_last(self.step, self._state())

    def _save_what_is_left(self) -> None:
        """Write a checkpoint after an error, unless the error left weights partly updated."""
        with contextlib.suppress(Exception):  # The first error is the one to report.
            self.step += self.learner.give_up()  # The views of an unfinished step were drawn.
            self._metrics.note(f"saved {self._save_last()}")

    def _warm_up(self, metrics: Metrics) -> None:
        """Run all networks once on scratch inputs, so that they compile before the first step."""
        metrics.note("warming up ...")
        started = time.monotonic()
        scratch = torch.zeros_like(self.ring.images[: self.ring.block_images])
        places = torch.zeros(self.learner.part_size, dtype=torch.int64, device=self.device)
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                if self.device.type == "cuda":
                    # The producer's stream does not wait for this one, which prepares the weights.
                    torch.cuda.synchronize(self.device)
                # On the producer's stream: a captured graph must not run on two streams at once.
                with self.ring.producing():
                    self._phases.try_all(scratch)
                self.learner.warm_up(self._supervision.try_all(scratch, places))
        finally:
            self.learner.undo_warm_up()
        metrics.note(f"warm after {time.monotonic() - started:.0f} s")

    def _scores(self) -> dict[str, float]:
        """Compute top1 of the weight EMA on the test set, in the compute dtype."""
        if self.test_set is None:
            return {}
        wanted, ranks = self._supervision.input, self._ranks
        ranks.follow_first(list(self.average.module.buffers()))
        batches = self.test_set.batches([wanted], rank=ranks.rank, world_size=ranks.world_size)
        with self.learner.autocast:
            num_classes = len(self.test_set.class_names)
            scores = scoring.measure(
                self.average.module, batches, input=wanted, num_classes=num_classes
            )
        scores.sums = ranks.total(scores.sums)
        scoring.check_trained(scores)
        return {"top1": scores.result()["top1"]}

    def totals(self) -> dict[str, Any]:
        """Return the current values of what `fit` returns."""
        images, views, wall_s = self.num_images, self.num_views, self.clock.wall_s()
        return {
            "generated_images": images,
            "views": views,
            "reuse": round(views / images, 2),
            "images_per_s": round(images / wall_s, 1),
            "views_per_s": round(views / wall_s, 1),
            "wall_s": round(wall_s, 1),
            "cpu_s": round(self.clock.cpu_s() + self._cpu_elsewhere_s, 1),
        }

    def _state(self) -> dict[str, step_folders.Stateful]:
        """Return all objects that the rest of the run depends on."""
        return self._keeper.state(self._common_state(), self._own_state())

    def _common_state(self) -> dict[str, step_folders.Stateful]:
        return {
            "student": self.student,
            "optimizer": self.learner.optimizer,
            "average": self.average,
            "learner": self.learner,
        }

    def _own_state(self) -> dict[str, step_folders.Stateful]:
        return {
            "labels": self.labels,
            "generators": self._generators,
            "metrics": self._metrics,
            "clock": self.clock,
            "progress": self,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the step; the other parts have state dicts of their own."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        self.step, self._ahead = state["step"], None
