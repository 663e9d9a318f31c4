"""The measurement of the loss ends with the line that other programs read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_kd_loss_benchmark_ends_with_one_json_line() -> None:
    command = [sys.executable, "-m", "benchmarks", "kd-loss", "--quick", "--n", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["bench"] == "kd-loss" and len(line["goals"]) == 2
    assert all("peak memory" in name and goal["met"] for name, goal in line["goals"].items())
    assert {row["arm"] for row in line["rows"]} >= {"ours", "eager", "compile", "copy"}
    assert {row["set"] for row in line["rows"]} == {"allocated", "reused", "memory", "fixed cost"}
    peaks = {row["arm"]: row["peak_gradients"] for row in line["rows"] if row["set"] == "memory"}
    # One gradient is the least there can be; a measurement that sees nothing would say 0.
    assert 0.9 < peaks["ours"] <= 1.1 and 0.9 < peaks["ours, one pass"] <= 1.1 < peaks["eager"]
    timed = [row for row in line["rows"] if row["set"] != "memory"]
    assert {row["threads"] for row in timed} >= {1} and {row["dtype"] for row in timed} == {
        "float32",
        "bfloat16",
    }
