"""Write one page of what a run of benchmarks/gpu.sh found, from its logs.

    python -m benchmarks gpu-summary runs/gpu

Run by benchmarks/gpu.sh at its end. Each log ends with the JSON line of its measurement.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.markdown import table

PAGE = "summary.md"
# Fields of a row that name it, and fields that are its figures.
NAMES = (
    "part",
    "model",
    "piece",
    "of",
    "cache",
    "case",
    "shape",
    "dtype",
    "student",
    "steps",
    "arm",
)
FIGURES = (
    "images_per_s",
    "views_per_s",
    "us_per_step",
    "share_of_copy",
    "predicted_share",
    "tflop_per_s",
    "share_of_product",
    "gb_per_s",
    "seconds",
    "median_ms",
    "hours",
    "top1",
    "wall_s",
    "s_to_target",
    "peak_mib",
    "attention",
    "host_ms_per_batch",
)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-summary", description=__doc__)
    parser.add_argument("logs", type=Path, help="folder of the logs")
    parser.set_defaults(selects=())
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    logs = parse(argv).logs
    text = page(logs)
    (logs / PAGE).write_text(text, encoding="utf-8")
    print(logs / PAGE)
    return 0


def page(logs: Path) -> str:
    """Return the page of all steps that have a log."""
    steps = _lines(logs / "steps.txt")
    found = {name: last_line(logs / f"{name}.log") for name in dict.fromkeys(s[0] for s in steps)}
    stamps = [line["environment"] for line in found.values() if line is not None]
    parts = ["# benchmarks/gpu.sh\n"]
    if stamps:
        first = stamps[0]
        facts = {k: first[k] for k in ("device", "torch", "python", "commit", "date")}
        parts.append("\n".join(f"- {k}: {v}" for k, v in (facts | first.get("gpu", {})).items()))
    body = [[name, state, f"{seconds} s"] for name, state, seconds in steps]
    parts.append(table(["step", "result", "time"], body, f"{len(body)} steps."))
    for name, line in found.items():
        if line is None:
            continue
        rows = [[_named(row), _figures(row)] for row in line["rows"]]
        goals = [
            f"- {'met' if goal['met'] else 'MISSED'}: {what}: {goal['value']}, goal {goal['goal']}"
            for what, goal in line["goals"].items()
        ]
        state = line["environment"].get("gpu", {})
        note = ", ".join(f"{k} {v}" for k, v in state.items()) or "no state of a GPU"
        parts.append(f"## {name}\n\n{table(['what', 'figures'], rows, f'At the end: {note}.')}")
        parts.append("\n".join(goals))
    return "\n\n".join(part for part in parts if part) + "\n"


def last_line(log: Path) -> dict[str, Any] | None:
    """Return the JSON line of a measurement's log; None if it has none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    for line in reversed(lines):
        if line.startswith('{"bench"'):
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def _lines(path: Path) -> list[list[str]]:
    """Return name, result and seconds of each step."""
    if not path.is_file():
        return []
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def _named(row: dict[str, Any]) -> str:
    return ", ".join(f"{row[k]}" if k != "steps" else f"{row[k]} steps" for k in NAMES if k in row)


def _figures(row: dict[str, Any]) -> str:
    shown = (
        f"{k} {row[k]:,.4g}" if isinstance(row[k], float) else f"{k} {row[k]}"
        for k in FIGURES
        if row.get(k) not in (None, 0.0)
    )
    return ", ".join(shown)
