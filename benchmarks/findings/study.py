"""Tools of the studies: images made once, a student on a fixed set, no row measured twice.

A study is a grid of cells. Each cell's row goes to results/STUDY.jsonl the moment it is there, and
a cell whose row is there is not measured again: kill a study at any time and call it again. Sets of
generated images wait in runs/studies, which may be deleted. All students see the same number of
views of whichever images they get, in shuffled passes, with the same optimizer; the test set is
read once, at the end of each. N images, c channels, H W pixels.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.harness import RESULTS, ROOT, environment, read_rows, recorded
from dmkd_fast import (
    DiffusionSampler,
    Distiller,
    ImageSet,
    LabelStream,
    Objective,
    RingBuffer,
    RingPlan,
    Schedule,
    StudentTrainer,
    Targets,
    Views,
    ViewSpec,
    assets,
    load_idx,
    measure,
)
from dmkd_fast.classifiers.loading import build_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.jobs import networks
from dmkd_fast.jobs.build import make_sampler
from dmkd_fast.jobs.parts import prepare
from dmkd_fast.runtime.device import keep_freed_memory, resolve_dtype, set_num_threads

CACHE = ROOT / "runs" / "studies"
BLOCK = 512
Row = dict[str, Any]
RESNET: Row = {
    "architecture": "resnet18",
    "stem": "conv3_stride2",
    "model_args": {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 128]},
}
STUDENTS: dict[str, Row] = {
    "lenet5_half": {"architecture": "lenet5_half"},
    "resnet": RESNET,
    "resnet_half": {**RESNET, "model_args": {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}},
    "resnet_quarter": {**RESNET, "model_args": {"layers": [1] * 4, "channels": [8, 16, 32, 32]}},
}
"""LeNet-5-half is that of zero-shot distillation, `resnet` that of configs/fashion_mnist.yaml."""
# Chosen on the 5,000 held-out images: docs/notebook.md.
RECIPES: dict[str, Row] = {
    "lenet5_half": {"name": "adamw", "lr": 8e-3, "batch_size": 32, "pad": 2},
    "resnet": {"name": "adamw", "lr": 2e-3, "batch_size": 64, "pad": 2},
    "resnet_half": {"name": "muon", "lr": 1e-2, "batch_size": 64, "pad": 1},
    "resnet_quarter": {"name": "muon", "lr": 1e-2, "batch_size": 64, "pad": 1},
}
EMBEDDED_TEACHERS = ("weak", "lenet5", "strong")
FIRST_SEED = 1
"""Seed of the first student. The embedded teachers have seed 0, and equal seeds mean equal initial
weights wherever two networks have a layer in common; teachers of new studies count from 100."""


@dataclass(kw_only=True)
class FixedSet:
    """Images that exist already, as the image stream of a Distiller."""

    images: Tensor
    """(N, c, H, W) uint8."""
    labels: Tensor
    """(N,) int64."""
    cpu_s: float = 0.0
    """Processor time that making all of them took, where it is known."""
    next_id: int = 0
    may_wait = False
    rewrites = ()

    def write(self, ids: Tensor, labels: Tensor, out: Tensor, *, progress: float) -> None:
        """Copy images into the ring."""
        del labels, progress
        out.copy_(self.images[ids % len(self.images)])

    def warm_up(self, scratch: Tensor) -> None:
        """Do nothing."""

    def counts(self, device: torch.device) -> dict[str, Tensor]:
        """Return no counts."""
        del device
        return {}

    def check(self, counts: Mapping[str, int]) -> None:
        """Do nothing."""

    def totals(self) -> dict[str, float]:
        """Return no figures."""
        return {}

    def next_block(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the next ids and their labels."""
        ids = torch.arange(self.next_id, self.next_id + count)
        return ids, self.labels[ids % len(self.labels)]

    def advance(self, count: int) -> None:
        """Count them as given."""
        self.next_id += count

    @property
    def is_exhausted(self) -> bool:
        """Return whether all images are in the ring."""
        return self.next_id >= len(self.images)

    def first(self, count: int) -> FixedSet:
        """The set's first images alone."""
        if count > len(self.images):
            raise ValueError(f"got {len(self.images)} images, expected at least {count}")
        share = count / len(self.images)
        return FixedSet(
            images=self.images[:count], labels=self.labels[:count], cpu_s=share * self.cpu_s
        )

    def state_dict(self) -> Row:
        """The next id."""
        return {"next_id": self.next_id}

    def load_state_dict(self, state: Row) -> None:
        """Inverse of `state_dict`."""
        self.next_id = state["next_id"]


def generated(count: int, overrides: Sequence[str], *, file: str = "many_steps.yaml") -> FixedSet:
    """The first `count` images of a config's stream, from the cache as far as it has them.

    Args:
        count: A multiple of the sampler's micro-batch.
        overrides: Settings that differ from the file's.
        file: In configs/.
    """
    path = CACHE / f"{file.removesuffix('.yaml')} {' '.join(overrides)}.safetensors".replace(
        "/", "_"
    )
    held = load_file(path) if path.exists() else {}
    there = len(held["labels"]) if held else 0
    if there < count:
        job, parts = prepare(load_config(DistillConfig, ROOT / "configs" / file, list(overrides)))
        assert isinstance(parts.origin, Denoiser)
        sampler = make_sampler(job, parts.origin)
        ids = torch.arange(there, count)
        labels = LabelStream(parts.origin.num_classes, seed=job.config.seed).labels_of(ids)
        images = torch.empty(len(ids), *parts.origin.image_shape, dtype=torch.uint8)
        began = time.process_time()
        _sample(sampler, ids, labels, images, sampler.micro_batch_images)
        spent = time.process_time() - began
        before = held or {"images": images[:0], "labels": labels[:0], "cpu_s": torch.zeros(())}
        held = {
            "images": torch.cat([before["images"], images]),
            "labels": torch.cat([before["labels"], labels]),
            "cpu_s": before["cpu_s"] + spent,
        }
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file(held, path)
        say(f"{path.stem}: {count:,} images, {spent:.0f} CPU s")
    made = FixedSet(images=held["images"], labels=held["labels"], cpu_s=float(held["cpu_s"]))
    return made.first(count)


def real(folder: Path) -> tuple[FixedSet, ImageSet]:
    """The training images that the denoiser saw, and the 5,000 that nothing saw."""
    from dmkd_fast.jobs.pretrain.real_data import load_real

    data = load_real(folder, torch.device("cpu"))
    return FixedSet(images=data.train.images, labels=data.train.labels), data.held_out


@functools.cache
def test_images() -> ImageSet:
    """The 10,000 real test images."""
    return load_idx(assets.resolve("embedded:fashion_mnist/test"), "t10k")


def load_teacher(name: str) -> tuple[nn.Module, ClassifierSpec]:
    """One of the embedded classifiers (weak, lenet5, strong), or the one in a folder."""
    path = f"embedded:fashion_mnist/{name}" if name in EMBEDDED_TEACHERS else name
    model, spec, _ = networks.load_trained(path, torch.device("cpu"))
    return model, spec


def student_seeds(count: int) -> range:
    """Seeds of a study's students, apart from those of all teachers."""
    return range(FIRST_SEED, FIRST_SEED + count)


def new_student(name: str, seed: int, like: ClassifierSpec) -> tuple[nn.Module, Any]:
    """Make a student with random weights, and its specification.

    Args:
        name: A key of `STUDENTS`.
        seed: Seed of the weights.
        like: The teacher's specification, whose normalization the student shares.
    """
    spec = ClassifierSpec(
        num_classes=10, in_chans=1, input_size=28, mean=like.mean, std=like.std, **STUDENTS[name]
    )
    torch.manual_seed(seed)
    return build_classifier(spec).to(memory_format=torch.channels_last), spec


def train_student(
    images: FixedSet,
    *,
    teacher: str,
    student: str,
    num_views: int,
    seed: int,
    objective: Objective | None = None,
    capacity: int | None = None,
    recipe: Row | None = None,
) -> Row:
    """Train one student from its random weights, and score it on the test images.

    Args:
        images: Images to train on, cut to whole blocks.
        teacher: Name of an embedded classifier, or the folder of another one.
        student: A key of `STUDENTS`.
        num_views: Number of views in the whole run.
        seed: Seed of the student's weights, of draws and views.
        objective: Loss of the student; None: KL at a temperature of 4.
        capacity: Images in the ring at a time; None: all of them, from the first step on.
        recipe: Optimizer, learning rate, batch size, shift of views in pixels, and `dtype` if it
            shall not depend on the CPU; None: that of `RECIPES`.

    Returns:
        top1, agreement with the teacher, images, views, recipe and dtype, wall_s and cpu_s.
    """
    began, cpu = time.perf_counter(), time.process_time()
    found = fitted(
        images,
        teacher=teacher,
        student=student,
        num_views=num_views,
        seed=seed,
        objective=objective,
        capacity=capacity,
        recipe=recipe,
    )
    recipe = recipe or RECIPES[student]
    input, scored = found.spec.input, found.teacher_spec.input
    scores = measure(
        found.student,
        test_images().batches([input, scored]),
        input=input,
        num_classes=10,
        teacher=lambda views: found.teacher(views[scored]),
    ).result()
    return {
        "top1": round(scores["top1"], 4),
        "agreement": round(scores["agreement"], 4),
        "images": len(images.images) // BLOCK * BLOCK,
        "views": num_views,
        "optimizer": recipe["name"],
        "batch": recipe["batch_size"],
        "lr": recipe["lr"],
        "pad": recipe["pad"],
        "dtype": str(found.dtype).removeprefix("torch."),
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
    }


class Fitted(NamedTuple):
    """A trained student with its averaged weights, and its teacher."""

    student: nn.Module
    spec: ClassifierSpec
    teacher: nn.Module
    teacher_spec: ClassifierSpec
    dtype: torch.dtype


def fitted(
    images: FixedSet,
    *,
    teacher: str,
    student: str,
    num_views: int,
    seed: int,
    objective: Objective | None = None,
    capacity: int | None = None,
    recipe: Row | None = None,
) -> Fitted:
    """Train one student; see `train_student` for the arguments."""
    scorer, teacher_spec = load_teacher(teacher)
    network, spec = new_student(student, seed, teacher_spec)
    optim = {"dtype": "auto", **(recipe or RECIPES[student])}
    pad, dtype = optim.pop("pad"), resolve_dtype(optim.pop("dtype"), torch.device("cpu"))
    count = len(images.images) // BLOCK * BLOCK
    source = images.first(count)
    # The first view needs one free block. All images at once leave it free for the whole run.
    slots = capacity or count + BLOCK
    plan = RingPlan(
        capacity_images=slots,
        image_shape=(1, 28, 28),
        block_images=BLOCK,
        min_fill_images=slots - BLOCK,
        # The last block of a stream enters after three quarters of the run.
        samples_per_insert=0.75 * num_views / count,
    )
    with tempfile.TemporaryDirectory() as folder:
        schedule = Schedule(
            num_views=num_views,
            **optim,
            weight_decay=0.05,
            ema_decay=0.99,
            log_every_steps=10**9,
            num_evaluations=1,
        )
        views = Views(ViewSpec(size=28, mean=spec.mean, std=spec.std), pad=pad, flip=0.0, seed=seed)
        distiller = Distiller(
            source,
            RingBuffer(plan, seed=seed),
            StudentTrainer(network, schedule, objective or Objective(), dtype=dtype),
            Targets(scorer, views, dtype=dtype),
            folder,
            show=False,
        )
        distiller.fit()
    return Fitted(distiller.student.average.module, spec, scorer, teacher_spec, dtype)


class Cells:
    """The rows of a study: those on record, and those to come.

    Args:
        study: Name of the file in results/.
        options: Arguments of the command. With `record` rows are appended to the file.
    """

    def __init__(self, study: str, options: argparse.Namespace) -> None:
        set_num_threads(options.threads)
        keep_freed_memory()
        self.study, self.record = study, options.record
        self.arguments = recorded(options)
        self.rows = read_rows(study) if self.record else []

    def has(self, **cell: Any) -> bool:
        """Return whether the cell has a row that is not superseded."""
        return any(
            "superseded" not in row and all(row.get(k) == v for k, v in cell.items())
            for row in self.rows
        )

    def add(self, cell: Row, figures: Row) -> None:
        """Keep a row."""
        row = {**cell, **figures, "arguments": self.arguments, "environment": environment()}
        self.rows.append(row)
        say(json.dumps({**cell, **figures}))
        if self.record:
            RESULTS.mkdir(exist_ok=True)
            with (RESULTS / f"{self.study}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def finish(self) -> None:
        """The JSON line of all rows."""
        spent = sum(row.get("cpu_s", 0.0) for row in self.rows)
        print(json.dumps({"bench": self.study, "rows": len(self.rows), "cpu_s": round(spent, 1)}))


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


def _sample(sampler: DiffusionSampler, ids: Tensor, labels: Tensor, out: Tensor, size: int) -> None:
    began = reported = time.monotonic()
    for start in range(0, len(ids), size):
        part = slice(start, start + size)
        sampler.sample(ids[part], labels[part], out=out[part])
        if time.monotonic() - reported > 20:
            reported = time.monotonic()
            rate = (start + size) / (reported - began)
            left = (len(ids) - start - size) / rate
            say(f"{start + size:,} of {len(ids):,} images, {rate:.0f} images/s, ETA {left:.0f} s")
