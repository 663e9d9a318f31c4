"""Time a training step alone, from the published way to ours, one change at a time.

Every arm trains the embedded job's student on the same ready views with the same optimizer and
averaged weights. The arms are recipes of the ladder (`arms.py`), so each changes one thing; making
images and views is not timed. All arms run in one process and keep freed memory, which the
published way does not do: the comparison favors it in that respect.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.harness import Report, arguments, recorded, time_interleaved
from benchmarks.job.arms import ARMS, BF16, CHANNELS_LAST, EQUAL, PUBLISHED, TARGET, Study
from benchmarks.job.ladder import Trainer, networks, schedule_of
from dmkd_fast.runtime.device import keep_freed_memory, set_num_threads

CHANGES = (
    PUBLISHED,
    TARGET,
    BF16,
    CHANNELS_LAST,
    "fused loss",
    "folded teacher",
    "no reads per step",
)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("step", __doc__ or "")
    parser.add_argument("--n", type=int, default=60, help="timings per arm")
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    set_num_threads(options.threads)
    keep_freed_memory()
    report = Report(bench="step", arguments=recorded(options), device=torch.device("cpu"))
    timings = time_interleaved(arms(), n=options.n)
    for name, timing in timings.items():
        gain = timings[PUBLISHED]["median_ms"] / timing["median_ms"]
        row = {"arm": name, **timing, "times_faster_than_published": round(gain, 2)}
        report.rows.append(row)
    report.finish(record=options.record)


def arms(overrides: tuple[str, ...] = ()) -> dict[str, Callable[[], object]]:
    """One step of each recipe; each call goes on with the student that the last one left.

    Args:
        overrides: Settings of the job that differ from configs/many_steps.yaml.
    """
    study = Study(num_images=10_240, num_views=200_000, num_points=20, overrides=overrides)
    config = study.load(EQUAL)
    generator = torch.Generator().manual_seed(0)
    shape = (config.train.batch_size, 1, 28, 28)
    planar = torch.randn(shape, generator=generator)
    fused = torch.empty(shape, memory_format=torch.channels_last).copy_(planar)
    labels = torch.arange(shape[0]) % 10

    def step_of(name: str) -> Callable[[], object]:
        recipe = ARMS[name].recipe
        assert recipe is not None
        student, teacher, spec = networks(recipe, config)
        trainer = Trainer(
            student,
            teacher,
            recipe,
            schedule=schedule_of(config),
            temperature=config.loss.temperature,
            input=spec.input,
        )
        views = fused if recipe.channels_last else planar
        return lambda: trainer.step(views, labels)

    return {name: step_of(name) for name in CHANGES}
