"""`GeneratedLoader` in an ordinary loop (examples/plain_loop.py) beside the `Distiller`.

Both train the student of the embedded job, from the same weights, on the same views, by the job's
older settings, which are those of the loop: AdamW, batches of 64, one teacher. `speed` is the
views/s of the loop in parts of those of the Distiller, whose step guards against bad steps and
keeps times: both take turns, a piece of the run each, new images included. The other rows are
accuracies of whole runs on the real test images, for the same seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

from torch import nn

from benchmarks.findings import study
from benchmarks.harness import CONFIGS, arguments, summary
from benchmarks.job.embedded import ADAMW
from dmkd_fast import GeneratedLoader, measure
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.parts import Parts, prepare
from dmkd_fast.jobs.resolve import ResolvedJob
from examples.plain_loop import train

LOOP, DISTILLER, SPEED = "ordinary loop", "Distiller", "speed"
EPOCHS, PIECE = 5, 40


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("loader", __doc__ or "", selects=["seeds", "threads", "part"])
    parser.add_argument("--part", choices=("speed", "accuracy"), help="default: both")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--views", type=int, default=200_000, help="per student")
    parser.add_argument("--n", type=int, default=25, help=f"timings of {PIECE} steps")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    cells = study.Cells("loader", options)
    if options.part != "speed":
        for seed in study.student_seeds(options.seeds):
            for arm, run in ((LOOP, run_loop), (DISTILLER, run_distiller)):
                if not cells.has(arm=arm, seed=seed, views=options.views):
                    cells.add({"arm": arm, "seed": seed}, run(seed, options.views))
    if options.part != "accuracy" and not cells.has(arm=SPEED):
        cells.add({"arm": SPEED, "seed": "quality"}, speed(options.n))
    cells.finish()


def job_of(seed: int, views: int) -> tuple[ResolvedJob, Parts]:
    """Load the embedded job with a seed and a length."""
    # The optimizer and the teacher of the ordinary loop.
    overrides = [*ADAMW, f"seed={seed}", f"train.num_views={views}", "eval.num_points=1"]
    return prepare(load_config(DistillConfig, CONFIGS / "fashion_mnist.yaml", overrides))


def run_loop(seed: int, views: int) -> dict[str, Any]:
    """Train a student in the ordinary loop."""
    began, cpu = time.perf_counter(), time.process_time()
    job, parts = job_of(seed, views)
    steps = job.schedule.num_steps // EPOCHS
    loader = GeneratedLoader(job.config, steps_per_epoch=steps, teacher_logits=True)
    *_, student = train(parts.student, loader, EPOCHS)
    return {"views": views} | _scores(student, parts) | _times(began, cpu)


def run_distiller(seed: int, views: int) -> dict[str, Any]:
    """Train a student of the same weights as `dmkd distill` does."""
    began, cpu = time.perf_counter(), time.process_time()
    job, parts = job_of(seed, views)
    with tempfile.TemporaryDirectory() as folder:
        config = job.config.model_copy(update={"run_dir": f"{folder}/run"})
        distiller = build(replace(job, config=config), parts, show=False)
        distiller.fit()
    student = distiller.student.average.module
    return {"views": views} | _scores(student, parts) | _times(began, cpu)


def speed(n: int) -> dict[str, Any]:
    """Time pieces of both runs in turn."""
    job, parts = job_of(0, 200_000)
    distiller = build(job, parts, show=False)
    loader = GeneratedLoader(job.config, steps_per_epoch=PIECE, teacher_logits=True)
    loop = train(job_of(0, 200_000)[1].student, loader, n + 1)

    def piece() -> None:
        for _ in range(PIECE):
            distiller.refill()
            distiller.train_step()

    samples: dict[str, list[float]] = {DISTILLER: [], LOOP: []}
    for _ in range(n + 1):  # The first piece fills the rings.
        for name, take in ((DISTILLER, piece), (LOOP, lambda: next(loop))):
            start = time.perf_counter()
            take()
            samples[name].append(1e3 * (time.perf_counter() - start))
    ratios = [d / o for d, o in zip(*(samples[a][1:] for a in (DISTILLER, LOOP)), strict=True)]
    timings = {name: summary(values[1:]) for name, values in samples.items()}
    views = job.schedule.batch_size * PIECE
    return {
        "times_distiller": round(statistics.median(ratios), 3),
        "p20": round(statistics.quantiles(ratios, n=5)[0], 3),
        "p80": round(statistics.quantiles(ratios, n=5)[3], 3),
        **{f"{name} views/s": round(1e3 * views / t["median_ms"]) for name, t in timings.items()},
        "n": n,
    }


def _scores(student: nn.Module, parts: Parts) -> dict[str, Any]:
    spec = parts.student_spec
    batches = study.test_images().batches([spec.input])
    found = measure(student.eval(), batches, input=spec.input, num_classes=10).result()
    return {"top1": round(found["top1"], 4)}


def _times(began: float, cpu: float) -> dict[str, float]:
    return {
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
    }
