"""How soon the embedded job reaches the accuracy of the best many-step setting.

Each seed of a job runs in a process of its own: `configs/many_steps.yaml` runs to its end; its mean
final accuracy is the target. `configs/fashion_mnist.yaml` runs with the training settings of the
former, since only the images are compared; its time is that of the first evaluation at the target
or above. Evaluations, start and compilation count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from benchmarks.harness import CONFIGS, Report, arguments, recorded
from benchmarks.job.embedded import ADAMW, run_job

JOBS = {"many steps": ("many_steps.yaml", ()), "few steps": ("fashion_mnist.yaml", ADAMW)}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("fewstep", __doc__ or "")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--points", type=int, default=20, help="evaluations per run")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    report = Report(bench="fewstep", arguments=recorded(options))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in JOBS}
    for seed in range(options.seeds):
        for name, (config, settings) in JOBS.items():
            overrides = [*settings, f"seed={seed}", f"eval.num_points={options.points}"]
            summary, stats = run_job(CONFIGS / config, overrides)
            runs[name].append({"job": name, "seed": seed, **summary, "curve": curve(stats)})
            print({k: v for k, v in runs[name][-1].items() if k != "curve"}, file=sys.stderr)
    target = statistics.mean(run["top1"] for run in runs["many steps"])
    for found in runs.values():
        for run in found:
            reached = time_to(run.pop("curve"), target)
            report.rows.append({**run, "target": round(target, 4), "s_to_target": reached})
    spent = statistics.mean(run["wall_s"] for run in runs["many steps"])
    times = [row["s_to_target"] for row in report.rows if row["job"] == "few steps"]
    if None in times:
        print("a few-step run never reached the target", file=sys.stderr)
    else:
        report.at_least(
            "many-step wall time / few-step time to its accuracy",
            spent / statistics.mean(times),
            3.0,
        )
    report.finish(record=options.record)


def curve(stats: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(wall seconds, top-1) of every evaluation."""
    return [(row["wall_s"], row["top1"]) for row in stats if "top1" in row]


def time_to(points: list[tuple[float, float]], target: float) -> float | None:
    """Seconds to the first evaluation at `target` or above."""
    return next((round(wall, 1) for wall, top1 in points if top1 >= target), None)
