"""Measure the ring: insert, draw and limiter, and its share of a training step.

The step is that of the embedded job with its older settings (one teacher, AdamW, batches of 64).
`whole` is `Distiller.train_step`: draw, views, teacher, student, loss, optimizer, average. `bare`
is teacher, student, backward from a gradient that is there already, optimizer and average, on
views that are there already. Between them stand the parts, each alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import CONFIGS, Report, arguments, recorded, time_interleaved
from benchmarks.job.embedded import ADAMW
from dmkd_fast import Distiller, RingBuffer, RingPlan
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.parts import prepare
from dmkd_fast.loss.functional import kd_loss_and_grad
from dmkd_fast.runtime.device import resolve_device, set_num_threads

CONFIG = CONFIGS / "fashion_mnist.yaml"
CAPACITIES = (1_024, 10_240, 102_400)
BLOCK, BATCH = 512, 64
CALLS = 50  # of the ring per timing, because one takes microseconds


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("ring", __doc__ or "")
    parser.add_argument("--n", type=int, default=60, help="timings per arm")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: one capacity, one timing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    set_num_threads(0)
    device = resolve_device("auto")
    report = Report(bench="ring", arguments=recorded(options), device=device)
    capacities, n = (CAPACITIES[:1], 1) if options.tiny else (CAPACITIES, options.n)
    for capacity in capacities:
        report.rows += operations(capacity, device, n=1 if options.tiny else max(3, n // 10))
    # The stand-in for CUDA has no autocast.
    training_step(report, ["dtype=float32"] if options.tiny else [], n=n)
    report.finish(record=options.record)


def operations(capacity: int, device: torch.device, *, n: int) -> list[dict[str, Any]]:
    """One row per operation and order, in microseconds a call."""
    arms: dict[str, Callable[[], object]] = {}
    for order in ("shuffled", "equal", "uniform", "balanced"):
        ring = filled(capacity, order, device)
        arms[f"sample {BATCH}, {order}"] = repeat(partial(ring.sample, BATCH))
    ring = filled(capacity, "shuffled", device)
    ids = torch.arange(BLOCK, device=device)
    arms[f"insert {BLOCK}"] = repeat(lambda: ring.commit(ring.reserve(), ids=ids, labels=ids % 10))
    arms["limiter"] = repeat(lambda: ring.must_insert(BATCH))
    timings = time_interleaved(arms, n=n, warmup=1)
    return [
        {
            "operation": name,
            "capacity": capacity,
            "us": round(1e3 * timing["median_ms"] / CALLS, 2),
            "n": timing["n"],
        }
        for name, timing in timings.items()
    ]


def filled(capacity: int, order: Any, device: torch.device) -> RingBuffer:
    """A full ring of small images in ten classes."""
    plan = RingPlan(
        capacity_images=capacity,
        image_shape=(1, 28, 28),
        block_images=BLOCK,
        samples_per_insert=1e6,
        min_fill_images=BLOCK,
    )
    ring = RingBuffer(plan, order=order, num_classes=10, device=device)
    for start in range(0, ring.capacity, BLOCK):
        ids = torch.arange(start, start + BLOCK, device=device)
        ring.commit(ring.reserve(), ids=ids, labels=ids % 10)
    return ring


def repeat(call: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


def training_step(report: Report, overrides: list[str], *, n: int) -> None:
    """Times the whole step, the bare one and what lies between."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            DistillConfig,
            CONFIG,
            [*ADAMW, f"run_dir={folder}/run", "sampler.compile=false", *overrides],
        )
        job, parts = prepare(config)
        distiller = build(job, parts, show=False)
    ring, count = distiller.ring, distiller.schedule.batch_size
    generator = torch.Generator(distiller.device).manual_seed(0)
    while ring.num_filled < ring.capacity:
        block = ring.reserve()
        block.images.random_(generator=generator)
        ids, labels = distiller.images.next_block(len(block.images))
        ring.commit(block, ids=ids, labels=labels)
        distiller.images.advance(len(ids))
    draw = ring.sample(count)
    views = distiller.targets.views(ring.images, draw.indices, draw.ids, draw.uses)
    student, teacher = (torch.randn(count, 10, device=distiller.device) for _ in range(2))
    gradient = kd_loss_and_grad(student, teacher)[1]
    timings = time_interleaved(
        {
            "whole": distiller.train_step,
            "bare": lambda: bare_step(distiller, views, gradient),
            "draw": lambda: ring.sample(count),
            "views": lambda: distiller.targets.views(
                ring.images, draw.indices, draw.ids, draw.uses
            ),
            "loss": lambda: kd_loss_and_grad(student, teacher),
        },
        n=n,
    )
    for arm, timing in timings.items():
        report.rows.append({"step": arm, "batch": count, "dtype": job.config.dtype, **timing})
    share = timings["whole"]["median_ms"] / timings["bare"]["median_ms"] - 1
    report.rows[-1]["overhead"] = round(share, 4)
    report.at_most("overhead of ring, views and loss in a step", share, 0.10)


def captured_step(distiller: Distiller) -> Tensor:
    """Take a training step; on a GPU, an error if it is not one CUDA graph, as rows say it is."""
    loss = distiller.train_step()
    if distiller.device.type == "cuda" and distiller._captured is None:
        raise RuntimeError("a step is not one CUDA graph; a warning above says why")
    return loss


def bare_step(distiller: Distiller, views: Tensor, gradient: Tensor) -> None:
    """What a step costs on ready views with a ready gradient."""
    targets, student = distiller.targets, distiller.student
    with student.autocast:
        with torch.no_grad():
            targets.networks.networks[0](views.to(targets._dtype))
        logits = student.network(views)
    logits.backward(gradient.to(logits.dtype))
    student.optimizer.step()
    student.optimizer.zero_grad(set_to_none=True)
    student.average.update()
