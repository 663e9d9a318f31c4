"""Stream the images of a job into any training loop.

    loader = GeneratedLoader("job.yaml", batch_size=256, steps_per_epoch=1000)
    for epoch in range(100):
        for views, labels in loader:
            ...

The views are those that `Distiller` shows its student in a run of the same job.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dmkd_fast.checkpoint.state import join_state, split_state
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs.build import build_images
from dmkd_fast.jobs.images import Priors
from dmkd_fast.jobs.parts import prepare
from dmkd_fast.runtime import checks, distributed
from dmkd_fast.runtime.distributed import Ranks
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.training.feed import Feed
from dmkd_fast.training.objective import TopLogits

ENDLESS = 2**53


class GeneratedLoader:
    """Iterate over batches of views of the images that a job generates, or reads from disk.

    A batch is (views, labels), or (views, labels, teacher_logits). Each pass continues the stream,
    so that no epoch repeats another one. The images depend on the config, the batch size and the
    number of ranks only. The loader draws nothing from the
    global random generators of torch, NumPy and Python.

    Args:
        config: Path of a YAML file for `dmkd distill`, or a config. The student in it is not
            trained, but the views have its size and normalization.
        batch_size: Views of a batch on this rank; None: `train.batch_size` divided by the ranks.
        steps_per_epoch: Batches of one pass; None: as many as the job has steps.
        teacher_logits: Whether to add the logits of the job's teachers, run or stored.
        ranks: This process among those that train together; None: as torchrun has started it.
        show: Whether to print a message while waiting for images on disk.
        overrides: Settings to change. A dictionary changes the settings of a section.

    Raises:
        UserError: A setting or a file is wrong, or the machine cannot run the job.

    Attributes:
        step: Number of batches so far.
        num_classes: Number of classes C.
    """

    def __init__(
        self,
        config: str | Path | DistillConfig,
        *,
        batch_size: int | None = None,
        steps_per_epoch: int | None = None,
        teacher_logits: bool = False,
        ranks: Ranks | None = None,
        show: bool = False,
        **overrides: Any,
    ) -> None:
        ranks = distributed.read() if ranks is None else ranks
        loaded = load_config(DistillConfig, config, overrides)
        if batch_size is not None:
            size = checks.whole("batch_size", batch_size, low=1, high=10**7) * ranks.world_size
            loaded = load_config(DistillConfig, loaded, {"train": {"batch_size": size}})
        # The new student of the job is seeded; the caller's networks are not.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            job, parts = prepare(loaded, ranks)
            if isinstance(parts.origin, Priors) and not teacher_logits:
                got = "false with source.kind=priors, whose images have no classes"
                raise invalid("teacher_logits", got, "true", "pass teacher_logits=True")
            images, ring, targets = build_images(job, parts, show=show)
        self.batch_size = ranks.per_rank("train.batch_size", job.schedule.batch_size)
        self._feed = Feed(images, ring, targets, batch_size=self.batch_size)
        self._micro_batch = self.batch_size // job.schedule.accumulate
        self._num_steps = job.schedule.num_steps
        steps = self._num_steps if steps_per_epoch is None else steps_per_epoch
        self._epoch_steps = checks.whole("steps_per_epoch", steps, low=1, high=ENDLESS)
        self._teacher_logits, self.num_classes = teacher_logits, parts.origin.num_classes
        self.step, self._is_resumed = 0, False
        self._start = self._state(images=False)

    def __len__(self) -> int:
        """Return the number of batches of a pass."""
        return self._epoch_steps

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Yield the batches of one pass.

        The first pass after `load_state_dict` yields what is left of the interrupted one.

        Yields:
            Views (B, c, S, S), normalized, channels_last, on the device; class ids (B,), or
            probabilities (B, C) if the job mixes views; with `teacher_logits` also logits (B, C),
            or `TopLogits` where the shards store the largest ones only.

        Raises:
            NotFiniteError: Too many images so far are not finite.
            UserError: Labels are out of range, or an image was drawn too often.
        """
        done = self.step % self._epoch_steps if self._is_resumed else 0
        end, self._is_resumed = self.step + self._epoch_steps - done, False
        while self.step < end:
            batch = self._next()
            yield batch
        self._feed.images.check(
            {name: int(n) for name, n in self._feed.images.counts(batch[0].device).items()}
        )
        self._feed.ring.check_faults(int(self._feed.ring.num_faults()))

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be number `epoch`, counted from 0.

        Passes in order need no work. Going back starts the stream again, and batches that are
        passed over are drawn without views, for which their images are generated. An epoch that
        `load_state_dict` has restored in part is continued.
        """
        first = checks.whole("epoch", epoch, low=0, high=ENDLESS) * self._epoch_steps
        if self._is_resumed and first <= self.step < first + self._epoch_steps:
            return
        if first < self.step:
            self._load(self._start)
        while self.step < first:
            self._fill()
            self._feed.skip()
            self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that the next batches depend on, the ring's images included."""
        return self._state(images=True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called, bit for bit.

        Raises:
            UserError: The state belongs to another job or batch size.
        """
        if state["batch_size"] != self.batch_size:
            got = f"a state of batches of {state['batch_size']}"
            raise invalid("batch_size", got, str(self.batch_size), "use the same batch size")
        self._load(state)
        self._is_resumed = True

    @property
    def _progress(self) -> float:
        return min(1.0, self.step / self._num_steps)

    def _fill(self) -> None:
        feed, progress = self._feed, self._progress
        while feed.must_insert:
            feed.commit(feed.write(progress=progress))
        if feed.wants_block_ahead(ENDLESS):
            feed.write_ahead(progress=progress)

    @torch.no_grad()
    def _next(self) -> tuple[Any, ...]:
        self._fill()
        targets, progress = self._feed.targets, self._progress
        drawn = self._feed.draw(step=self.step, progress=progress, teachers=self._teacher_logits)
        views, labels, mixed, _ = drawn
        target = labels if mixed is None else mixed.targets(labels, self.num_classes)
        batch: list[Any] = [views[targets.input], target]
        if self._teacher_logits:
            # Use the job's micro-batches, as another size would change the last bits.
            made = targets.micro_batches(*drawn, progress=progress, size=self._micro_batch)
            logits: list[Any] = [each.teacher_logits for each in made]
            if isinstance(logits[0], TopLogits):
                batch.append(TopLogits(*map(torch.cat, zip(*logits, strict=True))))
            else:
                batch.append(torch.cat(logits))
        self.step += 1
        return tuple(batch)

    def _state(self, *, images: bool) -> dict[str, Any]:
        feed = self._feed
        tensors: dict[str, torch.Tensor] = {}
        state = {"ring": feed.ring.state_dict(images=images), "images": feed.images.state_dict()}
        rest = split_state(state, "", tensors, set())
        if feed.ring.images.is_cuda:
            # The copies to the host have been queued only.
            torch.cuda.synchronize(feed.ring.images.device)
        return {"step": self.step, "batch_size": self.batch_size, "rest": rest, "tensors": tensors}

    def _load(self, saved: dict[str, Any]) -> None:
        state = join_state(saved["rest"], saved["tensors"])
        self._feed.ring.load_state_dict(state["ring"])
        self._feed.images.load_state_dict(state["images"])
        self._feed.drop_ahead()
        self._feed.read_logits()
        self.step, self._is_resumed = saved["step"], False
