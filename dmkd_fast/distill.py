"""Online generate-and-distill. Read this file first: the whole job is `Distiller.fit`.

Stands on floor 3. Data goes one way::

    LabelStream -> DiffusionSampler -> RingBuffer -> Views -> teacher, student -> kd_loss

The parts know nothing of settings or of each other; `job.py` makes them from a config.
Source: Li et al., "Is synthetic data from diffusion models ready for knowledge distillation?"
(arXiv 2305.12954).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast import checkpoint, evaluate, models, optim, runtime
from dmkd_fast.image_sets import EncodedSet, ImageSet
from dmkd_fast.inputs import InputSpec
from dmkd_fast.labels import LabelStream
from dmkd_fast.metrics import Metrics
from dmkd_fast.ops.kd_loss import kd_loss_and_grad
from dmkd_fast.ring_buffer import RingBuffer
from dmkd_fast.sampler import DiffusionSampler
from dmkd_fast.teachers import Teacher, Teachers
from dmkd_fast.views import Views


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Optimizer settings and the rhythm of a run; see `OptimConfig` and `TrainConfig`."""

    batch_size: int
    num_views: int
    lr: float
    name: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup: float = 0.05
    ema_decay: float = 0.0
    max_grad_norm: float = 0.0
    checkpoint_every_s: float = 600.0
    log_every_steps: int = 50
    num_evaluations: int = 8


class Distiller:
    """Trains a student from a teacher on images that a diffusion model makes on the way.

    Args:
        sampler: Makes images: `sample(ids, labels, out=)`.
        ring: Holds them; its block size is the sampler's batch.
        labels: Decides the class of each image.
        views: Makes the random views that the student sees.
        teacher: A classifier fed like the student, or `Teachers`, each of which sees the same crops
            at its own size and normalisation; frozen here.
        student: (B, c, S, S) views -> (B, C) logits; trained.
        schedule: Length, batch and optimizer.
        run_dir: Everything a run leaves goes there.
        temperature: Of the loss.
        dtype: Autocast dtype of both networks; float32 turns autocast off.
        compile: torch.compile both networks.
        test_set: Real images to report accuracy on; nothing is decided by them.
        student_input: How test images are cut for the student; None: as its views.
        later_samplers: (share of the run, sampler) from which on others make the images.
        show: Whether to print progress.
    """

    def __init__(
        self, *, sampler: DiffusionSampler, ring: RingBuffer, labels: LabelStream, views: Views,
        teacher: nn.Module | Teachers, student: nn.Module, schedule: Schedule,
        run_dir: Path | str, temperature: float = 4.0, dtype: torch.dtype = torch.float32,
        compile: bool = False, test_set: ImageSet | EncodedSet | None = None,
        student_input: InputSpec | None = None,
        later_samplers: Sequence[tuple[float, DiffusionSampler]] = (), show: bool = True,
    ) -> None:  # fmt: skip
        self.sampler, self.ring, self.labels, self.views = sampler, ring, labels, views
        self._samplers = [(0.0, sampler), *later_samplers]
        self.teacher, self.student = models.freeze(teacher), student.train()
        self.schedule, self.temperature, self.test_set = schedule, temperature, test_set
        self.run_dir, self.show = Path(run_dir), show
        self.device = ring.images.device
        self.num_steps = -(-schedule.num_views // schedule.batch_size)
        self.step = 0
        self.optimizer = optim.build_optimizer(
            student, name="sgd" if schedule.name == "sgd" else "adamw", lr=schedule.lr,
            momentum=schedule.momentum, weight_decay=schedule.weight_decay,
        )  # fmt: skip
        self.average = optim.Average(student, decay=schedule.ema_decay)
        self.dtype = dtype
        self.input = student_input or InputSpec(
            size=views.size, mean=tuple(views.mean.tolist()), std=tuple(views.std.tolist())
        )
        if self.input.size != views.size or len(self.input.mean) != len(views.mean):
            raise ValueError(
                f"student_input: got {self.input.num_channels} channels of {self.input.size} "
                f"pixels, expected the views' {len(views.mean)} of {views.size}; make both agree"
            )
        if not isinstance(teacher, Teachers):
            teacher = Teachers([Teacher(module=teacher, input=self.input)])

        def fast(module: nn.Module) -> nn.Module:
            copy = models.for_inference(module, dtype)
            return torch.compile(copy, dynamic=False) if compile else copy  # type: ignore[return-value]

        self._teachers = teacher.mapped(fast)
        self._views = {spec: _views_for(views, spec) for spec in teacher.inputs}
        self._views[self.input] = views
        self._student = torch.compile(student, dynamic=False) if compile else student
        self._autocast = torch.autocast(
            self.device.type, dtype=dtype, enabled=dtype != torch.float32
        )
        self._interrupts = runtime.Interrupts()
        self.clock = runtime.Clock()

    def refill(self, metrics: Metrics | None = None) -> None:
        """Generate blocks until the limiter lets the next batch be drawn.

        Args:
            metrics: Told how a long fill goes on.
        """
        before, started = self.ring.num_inserted, time.monotonic()
        told = started
        while self.ring.must_insert(self.schedule.batch_size):
            block = self.ring.reserve()
            ids, labels = self.labels.peek(len(block.images))
            try:
                self._sampler().sample(ids, labels, out=block.images)
            except BaseException:
                self.ring.abort()
                raise
            with self._interrupts.held():
                self.ring.commit(block, ids=ids, labels=labels)
                self.labels.advance(len(ids))
            now = time.monotonic()
            if metrics is not None and now - told > 5:
                made, told = self.ring.num_inserted - before, now
                metrics.note(f"filling: {made:,} images, {made / (now - started):,.0f} images/s")

    def train_step(self) -> Tensor:
        """One optimizer step on one batch of views; returns the loss without waiting for it."""
        draw = self.ring.sample(self.schedule.batch_size)
        views = self._render(self.ring.images, draw.indices, draw.ids, draw.uses)
        labels = self.ring.labels[draw.indices]  # (B,)
        optim.set_lr(self.optimizer, self.lr())
        with self._autocast:
            teacher_logits = self._ask(views, labels)  # (B, C)
            student_logits = self._student(views[self.input])  # (B, C)
        loss, grad = kd_loss_and_grad(student_logits, teacher_logits, temperature=self.temperature)
        student_logits.backward(grad)
        if self.schedule.max_grad_norm:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.schedule.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.student)
        self.step += 1
        return loss

    def restore(self) -> None:
        """Take up the newest checkpoint of `run_dir`; `fit` then goes on from there.

        Raises:
            ValueError: There is none, or it is damaged.
        """
        checkpoint.restore(self._checkpoints, self._state())

    def fit(self) -> dict[str, Any]:
        """Run to the end, or until Ctrl-C.

        Returns:
            generated_images, views, reuse (views per image), and over the whole run, compilation
            and evaluation included: wall_s, cpu_s, images_per_s, views_per_s.

        Raises:
            KeyboardInterrupt: After a checkpoint has been written.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        total = self.num_steps * self.schedule.batch_size
        metrics = Metrics(self.run_dir, total, wall_s_before=self.clock.wall_s(), show=self.show)
        try:
            with self._interrupts:
                self._loop(metrics)
        except KeyboardInterrupt:
            saved = checkpoint.save(self._checkpoints, self.step, self._state())
            metrics.note(f"interrupted at {self.num_views:,} of {total:,} views; saved {saved}")
            raise
        finally:
            metrics.close()
        return self.totals()

    @property
    def num_views(self) -> int:
        """Views the student has seen."""
        return self.step * self.schedule.batch_size

    def lr(self) -> float:
        """Learning rate of the current step."""
        schedule = self.schedule
        return optim.lr_at(
            self.step, num_steps=self.num_steps, peak=schedule.lr, warmup=schedule.warmup
        )

    @property
    def share(self) -> float:
        """How much of the run is done, in [0, 1]: what schedules go by."""
        return self.step / self.num_steps

    def _sampler(self) -> DiffusionSampler:
        """The one whose time it is."""
        return [sampler for start, sampler in self._samplers if start <= self.share][-1]

    def _render(
        self, slots: Tensor, indices: Tensor, ids: Tensor, uses: Tensor
    ) -> dict[InputSpec, Tensor]:
        """The same crops for the student and for every teacher whose time it is."""
        boxes, flips = self.views.parameters(ids, uses, slots.shape[-2], slots.shape[-1])
        needed = {self.input, *self._teachers.inputs_at(self.share)}
        return {
            spec: views.render(slots, indices, boxes, flips)
            for spec, views in self._views.items()
            if spec in needed
        }

    def _ask(self, views: dict[InputSpec, Tensor], labels: Tensor) -> Tensor:
        """The teachers' logits (B, C)."""
        wanted = self._teachers.inputs_at(self.share)
        return self._teachers(
            {spec: views[spec].to(self.dtype) for spec in wanted}, labels, self.share
        )

    def _loop(self, metrics: Metrics) -> None:
        schedule, folder = self.schedule, self._checkpoints
        self._warm_up(metrics)
        metrics.begin(views=self.num_views, images=self.ring.num_inserted)
        last_saved = time.monotonic()
        count = schedule.num_evaluations
        evaluate_at = {self.num_steps * (i + 1) // count for i in range(count)}
        while self.step < self.num_steps:
            self.refill(metrics)
            with self._interrupts.held():
                metrics.add("loss", self.train_step())
            scores = self._scores() if self.step in evaluate_at else {}
            if scores or self.step % schedule.log_every_steps == 0:
                metrics.flush(
                    views=self.num_views, images=self.ring.num_inserted, lr=self.lr(), **scores
                )
            if time.monotonic() - last_saved > schedule.checkpoint_every_s:
                with self._interrupts.held():
                    checkpoint.save(folder, self.step, self._state())
                last_saved = time.monotonic()
        with self._interrupts.held():
            checkpoint.save(folder, self.step, self._state())

    def _warm_up(self, metrics: Metrics) -> None:
        """Run everything on throw-away inputs: what compiles does so here, not inside a step."""
        metrics.note("warming up ...")
        started = time.monotonic()
        buffers = [b.clone() for b in self.student.buffers()]
        scratch = torch.zeros_like(self.ring.images[: self.ring.block_images])
        ids = torch.arange(len(scratch), device=self.device)
        places = torch.zeros(self.schedule.batch_size, dtype=torch.int64, device=self.device)
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                for _, sampler in self._samplers:
                    sampler.sample(ids, torch.zeros_like(ids), out=scratch)
                boxes, flips = self.views.parameters(places, places, *scratch.shape[-2:])
                views = {
                    spec: made.render(scratch, places, boxes, flips)
                    for spec, made in self._views.items()
                }
                with self._autocast:
                    with torch.no_grad():
                        for network, member in zip(
                            self._teachers.networks, self._teachers.members, strict=True
                        ):
                            network(views[member.input].to(self.dtype))
                    self._student(views[self.input]).sum().backward()
        finally:  # An interrupt here must not leave traces in what the checkpoint saves.
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, before in zip(self.student.buffers(), buffers, strict=True):
                buffer.copy_(before)
        metrics.note(f"warm after {time.monotonic() - started:.0f} s")

    def _scores(self) -> dict[str, float]:
        """top1 of the averaged student on the test set, in the compute dtype."""
        if self.test_set is None:
            return {}
        with self._autocast:
            scores = evaluate.measure(
                self.average.module, self.test_set.batches([self.input]), input=self.input,
                num_classes=len(self.test_set.class_names),
            )  # fmt: skip
        return {"top1": scores.result()["top1"]}

    def totals(self) -> dict[str, Any]:
        """What `fit` returns, as of now."""
        images, views, wall_s = self.ring.num_inserted, self.num_views, self.clock.wall_s()
        return {
            "generated_images": images,
            "views": views,
            "reuse": round(views / images, 2),
            "images_per_s": round(images / wall_s, 1),
            "views_per_s": round(views / wall_s, 1),
            "wall_s": round(wall_s, 1),
            "cpu_s": round(self.clock.cpu_s(), 1),
        }

    @property
    def _checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def _state(self) -> dict[str, checkpoint.Stateful]:
        """Everything that the rest of the run depends on."""
        return {
            "student": self.student,
            "optimizer": self.optimizer,
            "average": self.average,
            "ring": self.ring,
            "labels": self.labels,
            "progress": self,
        }

    def state_dict(self) -> dict[str, Any]:
        """Step, time spent, and the random state that a student with dropout draws from."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "step": self.step,
            "clock": self.clock.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": cuda,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.step = state["step"]
        self.clock.load_state_dict(state["clock"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


def _views_for(views: Views, spec: InputSpec) -> Views:
    """The same random crops at another size and normalisation."""
    return Views(
        size=spec.size, scale=views.scale, ratio=views.ratio, pad=views.pad, flip=views.flip,
        mean=spec.mean, std=spec.std, dtype=views.dtype, device=views.mean.device, seed=views.seed,
    )  # fmt: skip
