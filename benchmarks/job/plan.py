"""The embedded job's wall time as `dmkd plan` predicts it, beside the run that follows at once.

Each pair is two processes: one that plans, and one that runs the job.
"""

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


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("plan", __doc__ or "", selects=["pairs"])
    parser.add_argument("--pairs", type=int, default=3, help="plans, each followed by its run")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Plan and run in turn."""
    options = parse(argv)
    report = Report(bench="plan", arguments=recorded(options))
    for pair in range(options.pairs):
        report.rows.append({"pair": pair, **plan_and_run(CONFIG, options.overrides)})
        print(report.rows[-1], file=sys.stderr)
    errors = [row["error"] for row in report.rows]
    report.at_most("error of the predicted wall time (median)", statistics.median(errors), 0.25)
    report.finish(record=options.record)


def plan_and_run(config: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the predicted and the measured seconds of one run, in all and by part.

    CPU seconds well below the wall time times the threads mean that others used the machine.
    """
    predicted = _last_line("plan", str(config), *overrides, "--json")["seconds"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        summary = _last_line("distill", str(config), f"run_dir={run}", *overrides)
        page = json.loads((run / "report.json").read_text(encoding="utf-8"))
    total = predicted.pop("total")
    return {
        "predicted_s": round(total, 1),
        "wall_s": summary["wall_s"],
        "error": error(total, summary["wall_s"]),
        "cpu_s": summary["cpu_s"],
        "predicted_parts_s": {name: round(value, 1) for name, value in predicted.items()},
        "parts_s": page["seconds"],
    }


def error(predicted_s: float, wall_s: float) -> float:
    """Return by which fraction of the measured time a prediction is off."""
    return round(abs(predicted_s - wall_s) / wall_s, 4)


def _last_line(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "dmkd_fast", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
