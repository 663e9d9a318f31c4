"""Cost: how time and memory grow with batch, capacity, image size and ranks.

Each point is a process of its own, so that its peak memory is its own. A straight line a + b x is
fitted to each axis; the table says how far the worst point is from it. Axes: views of a training
step of the embedded student; images in a ring from which 64 are drawn and made views of; pixels of
64 views; images per call of the embedded denoiser (8 guided steps); ranks that share a step of 64
views, one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.findings.study import RESNET, load_teacher
from benchmarks.harness import Report, arguments, recorded, time_interleaved
from dmkd_fast import (
    DiffusionSampler,
    Distiller,
    GeneratedImages,
    Guidance,
    LabelStream,
    RingBuffer,
    RingPlan,
    Schedule,
    Steps,
    StudentTrainer,
    Targets,
    Views,
    ViewSpec,
)
from dmkd_fast.classifiers.loading import build_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.config.networks import DenoiserConfig
from dmkd_fast.jobs.images import open_denoiser
from dmkd_fast.runtime import distributed
from dmkd_fast.runtime.device import peak_memory_mib, resolve_dtype, set_num_threads

Row = dict[str, Any]
# Nothing of this listens outside loopback: docs/guides/several-processes.md.
LOCAL = ("--rdzv-backend=c10d", "--rdzv-conf=store_type=file")
AXES: dict[str, tuple[int, ...]] = {
    "batch": (32, 64, 128, 256, 512),
    "capacity": (4_096, 16_384, 65_536, 262_144),
    "pixels": (28 * 28, 56 * 56, 112 * 112, 224 * 224),
    "sampled images": (64, 128, 256, 512),
    "ranks": (1, 2),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("cost", __doc__ or "")
    parser.add_argument("--n", type=int, default=20, help="timings per point")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--point", nargs=3, help="one point, by itself: AXIS VALUE N")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.point:
        row = POINTS[options.point[0]](int(options.point[1]), int(options.point[2]))
        if distributed.read().is_first:
            print(json.dumps(row))
        if options.point[0] == "ranks":
            distributed.end_process(0)
        return
    report = Report(bench="cost", arguments=recorded(options))
    for axis in options.axes:
        for value in AXES[axis]:
            command = [sys.executable, "-m", "benchmarks", "cost"]
            command += ["--point", axis, str(value), str(options.n)]
            if axis == "ranks":
                command[1:2] = [
                    "-m",
                    "torch.distributed.run",
                    *LOCAL,
                    f"--nproc-per-node={value}",
                    "-m",
                ]
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            )
            row = {"axis": axis, "value": value, **json.loads(done.stdout.splitlines()[-1])}
            report.rows.append(row)
            print(row, file=sys.stderr)
    report.finish(record=options.record)


def step(batch: int, n: int) -> Row:
    """A training step at a batch size."""
    set_num_threads(0)
    with tempfile.TemporaryDirectory() as folder:
        distiller = _distiller(Path(folder), batch)
        distiller.refill()
        return _timed(distiller.train_step, n)


def capacity(images: int, n: int) -> Row:
    """A draw and its views, from a ring of so many images; its memory."""
    set_num_threads(0)
    ring = _ring(images, min_fill_images=images - 512)
    views = Views(ViewSpec(size=28, mean=(0.286,), std=(0.353,)), pad=2, flip=0.0)
    while ring.must_insert(64):
        block = ring.reserve()
        block.images.zero_()
        ids = torch.arange(512)
        ring.commit(block, ids=ids, labels=ids % 10)

    def call() -> None:
        draw = ring.sample(64)
        views(ring.images, draw.indices, draw.ids, draw.uses)
        ring.release()

    return _timed(call, n)


def pixels(count: int, n: int) -> Row:
    """64 views of images of so many pixels."""
    set_num_threads(0)
    side = round(count**0.5)
    images = torch.randint(256, (1024, 3, side, side), dtype=torch.uint8)
    views = Views(ViewSpec(size=side, mean=(0.5,) * 3, std=(0.5,) * 3), scale=(0.5, 1.0))
    places = torch.arange(64)
    return _timed(lambda: views(images, places, places, places), n)


def sampled(count: int, n: int) -> Row:
    """A call of the sampler for so many images."""
    set_num_threads(0)
    sampler = _sampler(count)
    ids, out = torch.arange(count), torch.empty(count, 1, 28, 28, dtype=torch.uint8)
    return _timed(lambda: sampler.sample(ids, ids % 10, out=out), max(3, n // 4))


def ranked(count: int, n: int) -> Row:
    """A step of 64 views that so many ranks share, one thread each; peak memory is one rank's."""
    here = distributed.join()
    assert here.world_size == count
    set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        distiller = _distiller(Path(folder), 64, here)
        distiller.refill()
        return _timed(distiller.train_step, n)


POINTS = {
    "batch": step,
    "capacity": capacity,
    "pixels": pixels,
    "sampled images": sampled,
    "ranks": ranked,
}


def _distiller(folder: Path, batch: int, here: distributed.Ranks = distributed.ALONE) -> Distiller:
    """The embedded student and teacher; images are of no matter here."""
    teacher, spec = load_teacher("strong")
    student_spec = ClassifierSpec(
        num_classes=10, in_chans=1, input_size=28, mean=spec.mean, std=spec.std, **RESNET
    )
    student: nn.Module = build_classifier(student_spec)
    dtype = resolve_dtype("auto", torch.device("cpu"))
    labels = LabelStream(10, rank=here.rank, world_size=here.world_size)
    return Distiller(
        GeneratedImages(labels, _sampler(512, num_steps=1), ranks=here),
        _ring(2048, min_fill_images=1024),
        StudentTrainer(
            student.to(memory_format=torch.channels_last),
            Schedule(batch_size=batch, num_views=10**6, lr=1e-4, ema_decay=0.99),
            dtype=dtype,
            ranks=here,
        ),
        Targets(
            teacher,
            Views(ViewSpec(size=28, mean=spec.mean, std=spec.std), pad=2, flip=0.0),
            dtype=dtype,
        ),
        folder,
        show=False,
    )


def _ring(capacity_images: int, *, min_fill_images: int) -> RingBuffer:
    plan = RingPlan(
        capacity_images=capacity_images,
        image_shape=(1, 28, 28),
        block_images=512,
        samples_per_insert=1e6,
        min_fill_images=min_fill_images,
    )
    return RingBuffer(plan)


def _sampler(count: int, *, num_steps: int = 8) -> DiffusionSampler:
    device = torch.device("cpu")
    path = "embedded:fashion_mnist/denoiser"
    return DiffusionSampler(
        open_denoiser(DenoiserConfig(path=path), device),
        Steps(count=num_steps, solver="dpm++2m"),
        Guidance(scale=1.5),
        micro_batch_images=count,
        dtype=resolve_dtype("auto", device),
        device=device,
    )


def _timed(call: Any, n: int) -> Row:
    timing = time_interleaved({"call": call}, n=n)["call"]
    return {**timing, "peak_memory_mib": round(peak_memory_mib())}
