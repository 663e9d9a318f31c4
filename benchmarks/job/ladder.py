"""Train between the paper's way and ours: each change is a switch, checked on the run.

Student, optimizer, schedule, averaged weights, batch and views are the job's in every recipe, and
so is the test: the averaged student on the real test images at equal distances, in the compute
dtype. What a recipe claims is compared with what one more step is seen to do.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import transforms

from benchmarks.job import baseline
from dmkd_fast import RingBuffer, Schedule, Views, ViewSpec
from dmkd_fast.classifiers.loading import for_inference
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.jobs import memory
from dmkd_fast.jobs import networks as networks_module
from dmkd_fast.jobs.evaluate import open_test_set
from dmkd_fast.loss.functional import kd_loss_and_grad
from dmkd_fast.runtime.clock import Clock
from dmkd_fast.runtime.device import keep_freed_memory, peak_memory_mib, set_num_threads
from dmkd_fast.training import scoring
from dmkd_fast.training.ema import WeightEMA
from dmkd_fast.training.optim import build_optimizer, set_lr
from dmkd_fast.views.spec import InputSpec

CPU = torch.device("cpu")
FUSED_VIEWS, FUSED_LOSS = "dmkd_fast::views", "dmkd_fast::kd_loss_forward_backward"
# An accuracy takes a topk; scalars are read by optimizer and batch norms as well.
EAGER_LOSS, ACCURACY = "aten::kl_div", "aten::topk"
SEEN = (FUSED_VIEWS, FUSED_LOSS, EAGER_LOSS, ACCURACY, "aten::_local_scalar_dense")
TRIAL_STEPS = 16  # with each number of workers, before the clock starts
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student is trained; the defaults are the paper's way with the teacher under no_grad."""

    dtype: str = "float32"
    """Autocast dtype of both networks."""
    teacher_graph: bool = False
    """As published: the teacher's logits are not detached, so it is differentiated as well."""
    ring: bool = False
    """Images stay in memory; else PNG files, ImageFolder and DataLoader."""
    channels_last: bool = False
    """Memory layout of both networks; else planes of channels."""
    fused_views: bool = False
    """`Views`; else torchvision's transforms of each image."""
    fused_loss: bool = False
    """`kd_loss_and_grad`; else the eager loss and its backward pass."""
    folded_teacher: bool = False
    """Batch norms folded and weights cast once."""
    reads_each_step: bool = True
    """Loss and two accuracies; else the loss alone, every `train.log_every_steps`."""
    keeps_memory: bool = False
    """glibc keeps freed memory, as in `dmkd`."""
    compiled_student: bool = False
    """torch.compile."""


class Trainer:
    """Steps of one student by one recipe.

    Args:
        student, teacher: Views -> logits.
        recipe: See there.
        schedule: Of the job.
        temperature: Of the loss.
        input: How the teacher wants its images.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        recipe: Recipe,
        *,
        schedule: Schedule,
        temperature: float,
        input: InputSpec,
    ) -> None:
        self.recipe, self.schedule, self.temperature = recipe, schedule, temperature
        dtype = getattr(torch, recipe.dtype)
        self.student = student.train()
        self.teacher = teacher.eval().requires_grad_(recipe.teacher_graph)
        if recipe.folded_teacher:
            self.teacher = for_inference(teacher, dtype, input)
        self._teacher_dtype = dtype if recipe.folded_teacher else torch.float32
        self._forward: Any = student
        if recipe.compiled_student:
            self._forward = torch.compile(student, dynamic=False)
        self.autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
        self.optimizer = build_optimizer(student, schedule)
        self.average = WeightEMA(student, decay=schedule.ema_decay)
        self.num_steps, self.steps = schedule.num_steps, 0

    def step(self, views: Tensor, labels: Tensor) -> None:
        """One optimizer step on views (B, c, S, S) of images made for labels (B,)."""
        recipe, schedule = self.recipe, self.schedule
        set_lr(self.optimizer, schedule.lr_at(self.steps))
        with self.autocast:
            student_logits = self._forward(views)  # (B, C)
            with torch.set_grad_enabled(recipe.teacher_graph):
                teacher_logits = self.teacher(views.to(self._teacher_dtype))  # (B, C)
        grad: Tensor | None = None
        if recipe.fused_loss:
            loss, grad = kd_loss_and_grad(
                student_logits, teacher_logits, temperature=self.temperature
            )
        else:
            loss = baseline.kd_loss(
                student_logits.float(), teacher_logits.float(), self.temperature
            )
        if recipe.reads_each_step:
            baseline.read_figures(loss, student_logits, labels)
        elif (self.steps + 1) % schedule.log_every_steps == 0:
            loss.item()
        self.optimizer.zero_grad()
        if grad is None:
            loss.backward()
        else:
            student_logits.backward(grad)
        self.optimizer.step()
        self.average.update()
        self.steps += 1

    def warm_up(self, views: Tensor) -> None:
        """Compile the student, and leave it as it was."""
        before = [buffer.clone() for buffer in self.student.buffers()]
        with self.autocast:
            self._forward(views).sum().backward()
        for buffer, value in zip(self.student.buffers(), before, strict=True):
            buffer.copy_(value)
        self.optimizer.zero_grad()


def train(
    recipe: Recipe, config: DistillConfig, *, images: Tensor, labels: Tensor, pngs: Path | None
) -> dict[str, Any]:
    """Train a student on finished images.

    Args:
        recipe: See there.
        config: Of the job; what it says of where images come from is not used.
        images: (N, c, H, W) uint8, already in memory: a ring is filled with them.
        labels: (N,) int64.
        pngs: The same images in files, for recipes without a ring.

    Returns:
        Times, accuracies (`curve`: seconds, top-1, those of the seconds that evaluating took) and
        `proof`.

    Raises:
        RuntimeError: The run did not do what the recipe claims.
    """
    clock = Clock()
    if recipe.keeps_memory:
        keep_freed_memory()
    set_num_threads(config.num_threads)
    student, teacher, spec = networks(recipe, config)
    test_set = open_test_set(config.eval.path, config.eval.classes, CPU, spec.num_classes, None)
    schedule = schedule_of(config)
    settings: dict[str, Any] = {
        "schedule": schedule,
        "temperature": config.loss.temperature,
        "input": spec.input,
    }
    ring, workers = None, None
    if recipe.ring:
        ring = _filled_ring(config, images, labels)
        source = _drawn(ring, recipe, config, spec.input)
    else:
        assert pngs is not None
        read = partial(
            baseline.png_batches,
            pngs,
            config.views,
            spec.input,
            batch=schedule.batch_size,
            seed=config.seed,
        )
        choosing = Clock()
        plain = replace(recipe, compiled_student=False)  # Compilation counts, so not here.
        workers = baseline.fastest(
            baseline.WORKERS,
            lambda count: _try(
                Trainer(*deepcopy((student, teacher)), plain, **settings), read(workers=count)
            ),
        )
        gc.collect()  # The losers' processes end here, and outside the clock.
        spent, lost = clock.state_dict(), choosing.state_dict()
        without = {kind: spent[kind] - lost[kind] for kind in ("wall_s", "cpu_s")}
        clock.load_state_dict(spent | without)
        source = read(workers=workers)
    trainer = Trainer(student, teacher, recipe, **settings)
    torch.manual_seed(config.seed)  # of torchvision's crops
    if recipe.compiled_student:
        trainer.warm_up(next(source)[0])
    loop = _fit(trainer, source, clock, lambda: test_set.batches([spec.input]), spec)
    last = next(source)
    if ring is None:
        del source
        gc.collect()  # The workers end: their time counts.
    times = clock.state_dict()
    faults = loop.pop("page_faults")
    proof = {
        **seen_in(lambda: trainer.step(*(next(source) if ring else last)), student),
        "png_files": 0 if ring or not pngs else len(list(pngs.rglob("*.png"))),
        "workers": workers,
        "ring_draws": 0 if ring is None else ring.num_sampled,
        "teacher_grads": sum(p.grad is not None for p in trainer.teacher.parameters()),
        "teacher_batch_norms": sum(
            isinstance(module, nn.BatchNorm2d) for module in trainer.teacher.modules()
        ),
        "page_faults_per_step": round(faults / trainer.num_steps),
    }
    if wrong := contradictions(recipe, proof, num_images=len(images)):
        raise RuntimeError(f"recipe: {'; '.join(wrong)}; fix the arm")
    return {
        **times,
        **loop,
        "views": trainer.num_steps * schedule.batch_size,
        "peak_memory_mib": peak_memory_mib(),
        "proof": proof,
    }


def contradictions(recipe: Recipe, proof: dict[str, Any], *, num_images: int) -> list[str]:
    """Where the run did something else than the recipe says."""
    ops = proof["ops"]
    claims = {
        "dtype": recipe.compiled_student or proof["forward_dtype"] == recipe.dtype,
        "layout": recipe.compiled_student or proof["channels_last"] == recipe.channels_last,
        "png files": proof["png_files"] == (0 if recipe.ring else num_images),
        "ring": (proof["ring_draws"] > 0) == recipe.ring,
        "views": (ops[FUSED_VIEWS] > 0) == recipe.fused_views,
        "loss": (ops[FUSED_LOSS], ops[EAGER_LOSS]) == ((1, 0) if recipe.fused_loss else (0, 1)),
        "teacher's graph": (proof["teacher_grads"] > 0) == recipe.teacher_graph,
        "folded teacher": (proof["teacher_batch_norms"] == 0) == recipe.folded_teacher,
        "reads": (ops[ACCURACY] > 0) == recipe.reads_each_step,
        "memory": proof["keeps_freed_memory"] == recipe.keeps_memory,
        "compiled student": (proof["compiled_graphs"] > 0) == recipe.compiled_student,
    }
    return [f"{name}: not as claimed ({proof})" for name, holds in claims.items() if not holds]


def seen_in(step: Callable[[], object], student: nn.Module) -> dict[str, Any]:
    """Return the operators of one more training step, and dtype and layout of its forward pass."""
    seen: list[Tensor] = []
    # In the first convolution both layouts of a grey image are the same.
    *_, watched = (m for m in student.modules() if isinstance(m, nn.Conv2d))
    hook = watched.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    hook.remove()
    calls = {event.key: event.count for event in profile.key_averages()}
    last = seen[-1] if seen else None  # A compiled student runs no hooks.
    return {
        "forward_dtype": None if last is None else str(last.dtype).removeprefix("torch."),
        "channels_last": None
        if last is None
        else last.is_contiguous(memory_format=torch.channels_last),
        "ops": {name: calls.get(name, 0) for name in SEEN},
        "compiled_graphs": compiled_graphs(),
        "keeps_freed_memory": keeps_freed_memory(),
    }


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def keeps_freed_memory() -> bool:
    """Return whether a freed block of 256 MiB is reused without page faults."""
    torch.ones(66 << 20)  # No hole of the heap is as large.
    before = page_faults()
    torch.ones(64 << 20)  # Smaller: what lay free beside the first may be in use by now.
    return page_faults() - before < 64  # of 65,536 pages, or 128 huge ones


def page_faults() -> int:
    """Minor page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def schedule_of(config: DistillConfig) -> Schedule:
    """The job's schedule."""
    return Schedule(
        **config.optim.model_dump(),
        batch_size=config.train.batch_size,
        num_views=config.train.num_views,
        log_every_steps=config.train.log_every_steps,
        num_evaluations=config.eval.num_points,
    )


def networks(recipe: Recipe, config: DistillConfig) -> tuple[nn.Module, nn.Module, ClassifierSpec]:
    """The job's new student and its teacher, in the layout of the recipe."""
    teachers = networks_module.load_teachers(
        config.teachers, temperature=config.loss.temperature, device=CPU
    )
    student, spec = networks_module.load_student(
        config.student, teachers, view_size=config.views.size, device=CPU, seed=config.seed
    )
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    members = [member.module for member in teachers.together.members]
    if len(teachers.together.inputs) > 1:
        raise RuntimeError(f"teachers: got inputs {teachers.together.inputs}, expected equal ones")
    teacher = members[0]
    if len(members) > 1:
        teacher = baseline.Ensemble(members, config.loss.temperature)
    return student.to(memory_format=layout), teacher.to(memory_format=layout), spec


def _try(trainer: Trainer, source: Batches) -> None:
    """A few steps that nobody keeps."""
    for _ in range(min(TRIAL_STEPS, trainer.num_steps)):
        trainer.step(*next(source))


def _fit(
    trainer: Trainer, source: Batches, clock: Clock, test: Callable[[], Any], spec: ClassifierSpec
) -> dict[str, Any]:
    """All steps, with an evaluation at equal distances."""
    started, faults, evaluation_s, curve = time.perf_counter(), page_faults(), 0.0, []
    count = trainer.schedule.num_evaluations
    scored = {trainer.num_steps * (i + 1) // count for i in range(count)}
    while trainer.steps < trainer.num_steps:
        trainer.step(*next(source))
        if trainer.steps in scored:
            began, before = time.perf_counter(), page_faults()
            with trainer.autocast:
                scores = scoring.measure(
                    trainer.average.module, test(), input=spec.input, num_classes=spec.num_classes
                )
            evaluation_s += time.perf_counter() - began
            faults += page_faults() - before  # They are not the training's.
            curve.append((clock.wall_s(), scores.result()["top1"], evaluation_s))
    return {
        "training_s": time.perf_counter() - started - evaluation_s,
        "evaluation_s": evaluation_s,
        "curve": curve,
        "page_faults": page_faults() - faults,
    }


def _filled_ring(config: DistillConfig, images: Tensor, labels: Tensor) -> RingBuffer:
    """The job's ring with all images."""
    channels, height, width = images.shape[1:]
    plan = memory.ring_plan(config, (channels, height, width))
    ring = RingBuffer(plan, order=config.ring.order, device=CPU, seed=config.seed)
    ids = torch.arange(len(images))
    for places in ids.split(plan.block_images):
        block = ring.reserve()
        block.images.copy_(images[places])
        ring.commit(block, ids=places, labels=labels[places])
    return ring


def _drawn(ring: RingBuffer, recipe: Recipe, config: DistillConfig, input: Any) -> Batches:
    """Views and labels from memory, without end."""
    fused = Views(
        ViewSpec(size=config.views.size, mean=input.mean, std=input.std),
        **config.views.model_dump(exclude={"size"}),
        seed=config.seed,
    )
    convert = transforms.ConvertImageDtype(torch.float32)
    by_image = baseline.transform(config.views, input, convert)
    while True:
        draw = ring.sample(config.train.batch_size)
        if recipe.fused_views:
            views = fused(ring.images, draw.indices, draw.ids, draw.uses)
        else:
            views = torch.stack([by_image(ring.images[i]) for i in draw.indices.tolist()])
        yield views, ring.labels[draw.indices]
