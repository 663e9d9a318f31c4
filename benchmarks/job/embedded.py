"""The embedded job as `make run` does it, each seed in a process of its own, and at least 1."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import CONFIGS, Report, arguments, recorded

CONFIG = CONFIGS / "fashion_mnist.yaml"
ADAMW = (
    "more_teachers=[]",
    "views.pad=2",
    "optim={name: adamw, lr: 2.0e-3, weight_decay: 0.05, ema_decay: 0.99}",
    "train.batch_size=64",
    "train.num_views=200000",
    "train.log_every_steps=100",
    "ring.samples_per_insert=20",
)
"""Overrides that restore the settings of this job before it had Muon and a second teacher. Other
measurements keep them, so that their rows go together; the many-step job trains like this, too."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("embedded", __doc__ or "")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    report = Report(bench="embedded", arguments=recorded(options))
    for seed in range(options.seeds):
        summary, _ = run_job(CONFIG, [f"seed={seed}", *options.overrides])
        report.rows.append({"seed": seed, **summary})
        print(report.rows[-1], file=sys.stderr)
    top1 = [row["top1"] for row in report.rows]
    report.at_least("top1 on real test images (mean)", statistics.mean(top1), 0.88)
    report.at_most("wall_s (worst)", max(row["wall_s"] for row in report.rows), 300)
    report.at_most("cpu_s (worst)", max(row["cpu_s"] for row in report.rows), 600)
    report.finish(record=options.record)


def run_job(config: Path, overrides: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One whole job in a process of its own: its summary and its stats.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dmkd_fast", "distill", str(config)]
        command += [f"run_dir={folder}/run", *overrides]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        stats = (Path(folder) / "run" / "stats.jsonl").read_text(encoding="utf-8")
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    summary.pop("run_dir")
    return summary, [json.loads(line) for line in stats.splitlines()]
