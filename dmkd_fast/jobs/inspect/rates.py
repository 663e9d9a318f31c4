"""Measure how fast this machine runs a job, or estimate how fast a GPU would.

The measurement runs the job's own parts: it generates blocks of images, takes training steps on
them and evaluates some test images. Nothing is written to the run directory.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmkd_fast.data.test_sets import Batch
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.inspect import gpus
from dmkd_fast.jobs.inspect.flops import Flops
from dmkd_fast.jobs.parts import Parts
from dmkd_fast.jobs.resolve import ResolvedJob
from dmkd_fast.ring.plan import RingPlan
from dmkd_fast.training import scoring
from dmkd_fast.training.distiller import Distiller

_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Speed of a job on some machine; None is unknown, and 0 seconds are not counted."""

    origin: str = "not measured"
    """Where the figures come from."""
    images_per_s: float | None = None
    """Images generated or read per second, a mean over the run's phases."""
    views_per_s: float | None = None
    """Views trained on per second, a mean over the run."""
    load_s: float = 0.0
    """Seconds to load all networks and data."""
    warm_up_s: float = 0.0
    """Seconds to compile and to run all networks once."""
    evaluate_s: float = 0.0
    """Seconds of one evaluation during the run."""
    finish_s: float = 0.0
    """Seconds of the final evaluation of the saved student and its teachers."""


def phase_weights(job: ResolvedJob, ring: RingPlan) -> list[tuple[float, float]]:
    """Return the start of each phase of the sampler, and the fraction of images made in it."""
    phases = () if job.config.source is not None else job.config.sampler.phases
    starts = [0.0, *(phase.start for phase in phases)]
    views = job.ranks.per_rank("train.batch_size", job.schedule.batch_size) * job.schedule.num_steps
    made = [0, *(ring.images_for(int(start * views)) for start in starts[1:])]
    ends = [*made[1:], ring.images_for(views)]
    total = ring.images_for(views)
    return [(s, (b - a) / total) for s, a, b in zip(starts, made, ends, strict=True)]


def estimate(gpu: str, flops: Flops, evaluations: float) -> Rates:
    """Estimate the rates of one GPU from its peak.

    Args:
        gpu: Name in `gpus.GPUS`.
        flops: Operations of the job.
        evaluations: Work of the steps of an image, in evaluations of the denoiser.

    Raises:
        UserError: The GPU is not in the table.
    """
    found = gpus.find(gpu)
    return Rates(
        origin=f"estimates for one {gpu} at {gpus.DENOISER:.0%} of its peak for the denoiser, "
        f"{gpus.DECODER:.0%} for the decoder and {gpus.VIEWS:.0%} for views",
        images_per_s=gpus.images_per_s(found, flops, evaluations),
        views_per_s=gpus.views_per_s(found, flops),
    )


def measure(job: ResolvedJob, parts: Parts, *, seconds: float, load_s: float = 0.0) -> Rates:
    """Measure the rates of a job on this machine.

    Args:
        job: Resolved job.
        parts: Loaded networks and data.
        seconds: Seconds to measure images for, and views for.
        load_s: Seconds that loading took.
    """
    with tempfile.TemporaryDirectory(prefix="dmkd-") as folder:
        config = job.config.model_copy(update={"run_dir": folder})
        distiller = build(replace(job, config=config), parts, show=False)
        warm_up_s = _seconds(distiller.warm_up, distiller.device)
        made = torch.empty_like(distiller.ring.images[: distiller.ring.block_images])
        images_s = _image_seconds(distiller, job, made, seconds)
        views_s = _view_seconds(distiller, made, seconds)
        evaluate_s, finish_s = _evaluation_seconds(distiller, parts)
    ranks = job.ranks.world_size
    return Rates(
        origin="measured here",
        images_per_s=ranks / images_s,
        views_per_s=ranks / views_s,
        load_s=load_s,
        warm_up_s=warm_up_s,
        evaluate_s=evaluate_s,
        finish_s=finish_s,
    )


def fill(distiller: Distiller, made: Tensor) -> None:
    """Commit copies of a block of images until the limiter lets the next batch be drawn."""
    ring = distiller.ring
    while ring.must_insert(distiller.student.batch_size):
        block = ring.reserve()
        block.images.copy_(made)
        ids = torch.arange(len(made), device=made.device)
        ring.commit(block, ids=ids + ring.num_inserted, labels=ids % (ring.num_classes or 1))


def _image_seconds(distiller: Distiller, job: ResolvedJob, made: Tensor, seconds: float) -> float:
    """Measure the mean seconds per image, weighted by the images of each phase."""
    images, total = distiller.images, 0.0
    phases = phase_weights(job, distiller.ring.plan)
    for start, weight in phases:
        count, spent = 0, 0.0
        while spent < seconds / len(phases) and not (count and images.is_exhausted):
            ids, labels = images.next_block(len(made))

            def write(ids: Tensor = ids, labels: Tensor = labels, at: float = start) -> None:
                images.write(ids, labels, made, progress=at)

            spent += _seconds(write, distiller.device)
            images.advance(len(ids))
            count += len(ids)
        total += weight * spent / count
    return total


def _view_seconds(distiller: Distiller, made: Tensor, seconds: float) -> float:
    """Measure the mean seconds per view, weighted by how long each set of teachers is active."""
    members = distiller.targets.networks.members
    ends = {0.0, 1.0} | {m.start for m in members} | {m.stop for m in members}
    total = 0.0
    for start, stop in itertools.pairwise(sorted(ends)):
        first = int(start * distiller.num_steps)

        def steps(count: int, first: int = first) -> None:
            for _ in range(count):
                distiller.step = first
                fill(distiller, made)
                distiller.train_step()

        _seconds(lambda: steps(3), distiller.device)
        count, spent = 0, 0.0
        while spent < seconds * (stop - start):
            spent += _seconds(lambda: steps(10), distiller.device)
            count += 10
        total += (stop - start) * spent / (count * distiller.student.batch_size)
    distiller.step = 0
    return total


def _evaluation_seconds(distiller: Distiller, parts: Parts) -> tuple[float, float]:
    """Measure an evaluation during the run, and the final one with the teachers in float32."""
    test_set, teachers = parts.test_set, parts.teachers.together
    wanted = distiller.targets.input
    inputs = [wanted, *teachers.inputs_at(1.0)]
    count = 0

    def batches() -> Iterator[Batch]:
        nonlocal count
        count = 0
        for views, labels in itertools.islice(test_set.batches(inputs), _BATCHES):
            count += len(labels)
            yield views, labels

    def score(teacher: Callable[..., Tensor] | None) -> None:
        scoring.measure(
            distiller.student.average.module,
            batches(),
            input=wanted,
            num_classes=len(test_set.class_names),
            teacher=teacher,
        )

    with distiller.student.autocast:
        score(None)  # The first call chooses kernels.
        during = _seconds(lambda: score(None), distiller.device)
    share = len(test_set) / count
    return share * during, share * _seconds(lambda: score(teachers.predict), distiller.device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of some work, until the device has done it."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
