"""Train a student on images that are generated (or read from disk) during training.

    ImageStream -> RingBuffer -> Targets (views, mixing, teachers) -> StudentTrainer

The parts do not know the config or each other. Under torchrun each rank has its own parts.
Source: arXiv 2305.12954.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.checkpoint.manager import Restored
from dmkd_fast.checkpoint.step_folders import Stateful
from dmkd_fast.data.listing import SourceError
from dmkd_fast.data.test_sets import EncodedSet, ImageSet
from dmkd_fast.ring.buffer import RingBuffer
from dmkd_fast.ring.statistics import Statistics
from dmkd_fast.ring.storage import BlockFiles
from dmkd_fast.runtime.cuda_graph import CapturedFunction, CaptureError
from dmkd_fast.runtime.errors import warn_once
from dmkd_fast.runtime.output.progress import Phase, Progress
from dmkd_fast.training import scoring
from dmkd_fast.training.feed import Batch, Feed
from dmkd_fast.training.images import ImageStream
from dmkd_fast.training.loop import TrainingLoop
from dmkd_fast.training.student import StudentTrainer
from dmkd_fast.training.targets import Targets


class Distiller(TrainingLoop):
    """Train a student on images that are generated (or read from disk) during training.

    `fit` fills the ring buffer and then takes one training step after another: it draws a batch
    from the ring, renders random views, computes the teachers' logits, and updates the student.
    Between steps it inserts new images as the plan of the ring demands.

    Args:
        images: Source of the images; `GeneratedImages` or `StoredImages`.
        ring: Buffer that holds the newest images of this process on the device.
        student: Network to train, with its loss, optimizer and schedule.
        targets: Views of the images, and the teachers' logits for them.
        run_dir: Folder for all files of the run; shared by all ranks.
        test_set: Real images for the reported accuracy, which has no effect on the training.
        show: Whether to show progress.
        on_row: Function called with each row of stats.jsonl, on rank 0; see `TrainingLoop`.

    Attributes:
        ring_statistics: Statistics of the ring at the last row; None before the first row.

    Raises:
        UserError: The ring would stop the loop, or it has guard blocks and `images` may wait.
    """

    def __init__(
        self,
        images: ImageStream,
        ring: RingBuffer,
        student: StudentTrainer,
        targets: Targets,
        run_dir: Path | str,
        *,
        test_set: ImageSet | EncodedSet | None = None,
        show: bool = True,
        on_row: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        super().__init__(student, run_dir, Progress(show=show and student.ranks.is_first))
        self.images, self.ring, self.targets, self.test_set = images, ring, targets, test_set
        self.feed = Feed(images, ring, targets, batch_size=student.batch_size)
        self.blocks = BlockFiles(
            ring,
            self.ranks.folder(self.run_dir / "blocks"),
            self.checkpoints.writer,
            remakes=images.rewrites,
        )
        self._captures = student.is_compiled and self.device.type == "cuda"
        self._captured: CapturedFunction | None = None
        self._captured_teachers: tuple[int, ...] = ()
        self.ring_statistics: Statistics | None = None
        if on_row is not None:
            self.on_row.append(on_row)

    @property
    def num_images(self) -> int:
        """Number of images inserted so far on all ranks, the same number on each."""
        return self.ring.num_inserted * self.ranks.world_size

    def refill(self, *, is_fitting: bool = False) -> None:
        """Insert blocks until the limiter lets the next batch be drawn.

        Does nothing once all images of a stream that fits into the ring are there.

        Args:
            is_fitting: Whether to write block files and due checkpoints, and to show progress.
        """
        missing = self.ring.num_missing(self.student.batch_size) * self.ranks.world_size
        # One block is the usual refill during training, which its rates show.
        if is_fitting and missing > self.ring.block_images * self.ranks.world_size:
            with self.display.phase("filling", missing, "images") as phase:
                self._refill(is_fitting, phase)
        else:
            self._refill(is_fitting)
        if self.feed.wants_block_ahead((self.num_steps - self.step) * self.student.batch_size):
            with self.clock.part("generate"):
                self.feed.write_ahead(progress=self.progress)

    def _refill(self, is_fitting: bool, phase: Phase | None = None) -> None:
        while self.feed.must_insert:
            with self.clock.part("generate"):
                written = self.feed.write(progress=self.progress)
            with self._interrupts.held():
                self.feed.commit(written)
            if not is_fitting:
                continue
            # Not held, as it may wait for the disk. The next checkpoint queues missed blocks.
            self.blocks.append()
            self.display.pictures(written.block.images)
            self.ring.release()  # `append` has read the block's slots.
            self._save_if_due()
            if phase is not None:
                phase.advance(self.ring.block_images * self.ranks.world_size)

    def train_step(self) -> Tensor:
        """Take one optimizer step and return its loss ().

        With a fused optimizer the host does not wait for the device.
        """
        self.student.start(self.lr())
        with self.clock.part("views"):
            batch = self.feed.draw(step=self.step, progress=self.progress)
        captured = self._capture(batch) if self._captures else None
        if captured is None:
            loss = self._learn(batch)
        else:
            with self.clock.part("student"):
                loss = self.student.replay(partial(captured, batch))
        self.step += 1
        return loss

    def _learn(self, batch: Batch) -> Tensor:
        """Take the started step on a drawn batch, and return its loss."""
        # The teachers run on one micro-batch at a time.
        micro_batches = self.targets.micro_batches(
            *batch, progress=self.progress, size=self.student.micro_batch_size
        )
        losses = []
        for micro_batch in self.clock.making("teacher", micro_batches):
            with self.clock.part("student"):
                losses.append(self.student.learn(*micro_batch))
        with self.clock.part("student"):
            self.student.finish()
        return sum(losses[1:], losses[0])

    def _capture(self, batch: Batch) -> CapturedFunction | None:
        """Return the rest of a step, after the draw, as a CUDA graph; None if it cannot be one.

        It is captured at the first step, and again when other teachers start to teach.
        """
        teachers = self.targets.networks.active_at(self.progress)
        if self._captured is not None and teachers == self._captured_teachers:
            return self._captured

        def step(batch: Batch) -> Tensor:
            self.student.start()
            return self._learn(batch)

        self._captured, states = None, self._generators.state_dict()
        try:
            reason = self.student.why_not_captured()
            if self.targets.mixer is not None:
                reason = reason or "the host draws how views are mixed"
            if reason:
                raise CaptureError(reason)
            with self.student.capturing():
                self._captured = CapturedFunction(step, batch)
            drawn = self._generators.state_dict()
            if any(drawn[name] != states[name] for name in ("numpy", "python")):
                raise CaptureError("the student draws random numbers on the host")
        except CaptureError as error:
            self._captured, self._captures = None, False
            warn_once(f"training: steps are not one CUDA graph each, and slower ({error})")
        self._captured_teachers = teachers
        self._generators.load_state_dict(states)
        return self._captured

    def totals(self) -> dict[str, Any]:
        """Return generated_images, views, reuse (views per image), rates and times so far."""
        images, views, wall_s = self.num_images, self.num_views, self.clock.wall_s()
        return {
            "generated_images": images,
            "views": views,
            "reuse": round(views / images, 2),
            "images_per_s": round(images / wall_s, 1),
            "views_per_s": round(views / wall_s, 1),
            **super().totals(),
            **self.images.totals(),
        }

    def restore(self) -> Restored:
        """Load the newest intact checkpoint and the images of the ring; see `TrainingLoop`."""
        step, notes = super().restore()
        self.feed.read_logits()
        return Restored(step, [*notes, *self.blocks.notes])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        super().load_state_dict(state)
        self.feed.drop_ahead()
        self._captured = None  # Its optimizer state has been replaced.

    def _prepare_step(self) -> None:
        self.refill(is_fitting=True)

    def _run_once(self) -> None:
        scratch = torch.zeros_like(self.ring.images[: self.ring.block_images])
        slots = torch.zeros(self.student.micro_batch_size, dtype=torch.int64, device=self.device)
        # On the producer's stream: a captured graph must not run on two streams at once.
        with self.ring.producing():
            self.images.warm_up(scratch)
        views = self.targets.warm_up(scratch, slots)
        self.student.warm_up(lambda: self.student.logits(views).sum())

    def _rated_counts(self) -> dict[str, float]:
        return {"images": self.num_images}

    def _figures(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        self.ring_statistics = statistics = self.ring.statistics()
        for name, value in statistics.means().items():
            self._metrics.add(name, value)
        faults = self.ring.num_faults().float() * self.ranks.world_size
        return statistics.figures(), self.images.counts(self.device) | {"ring_faults": faults}

    def _check(self, counts: Mapping[str, int]) -> None:
        self.images.check(counts)
        self.ring.check_faults(counts["ring_faults"])

    def _is_scored(self) -> bool:
        return self.test_set is not None and self.schedule.is_evaluated(self.step)

    def _scores(self) -> dict[str, float]:
        """Compute top1 of the weight EMA on the test set, in the compute dtype."""
        assert self.test_set is not None
        model, wanted, ranks = self.student.average.module, self.targets.input, self.ranks
        ranks.follow_first(list(model.buffers()))
        batches = self.test_set.batches([wanted], rank=ranks.rank, world_size=ranks.world_size)
        shown = scoring.tracked(batches, -(-len(self.test_set) // ranks.world_size), self.display)
        num_classes = len(self.test_set.class_names)
        # Otherwise ranks would wait for the sums of one that cannot read an image.
        with ranks.agreed(SourceError), self.student.autocast:
            scores = scoring.measure(model, shown, input=wanted, num_classes=num_classes)
        scores.sums = ranks.total(scores.sums)
        scoring.check_trained(scores)
        top1 = scores.result()["top1"]
        self.display.accuracy(top1)
        return {"top1": top1}

    def _own_state(self) -> dict[str, Stateful]:
        return {
            "ring": self.blocks,
            "images": self.images,
            "generators": self._generators,
            **super()._own_state(),
        }

    def _mark(self) -> int:
        return self.ring.num_inserted

    def _after_save(self) -> None:
        self.blocks.drop_unused(lambda: self.checkpoints.describe("ring"))
