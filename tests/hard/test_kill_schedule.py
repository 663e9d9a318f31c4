"""Runs that are killed by any signal, and started twice, end as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_jobs import ROOT

pytestmark = pytest.mark.hard
CLAIM = (
    "random kill -9, SIGTERM and SIGHUP, two starters at once: one trains, the other is refused, "
    "the whole state and all rows at the end are equal"
)


def test_random_signals_and_second_starters_change_no_bit(
    tmp_path: Path,
    num_cases: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    count = num_cases(100, 15)
    script = ROOT / "tests" / "helpers" / "kill_server.py"
    command = [sys.executable, str(script), str(tmp_path), "MIXED", str(count), "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"failures": done.stderr}
    record_property("claim", CLAIM)
    record_property("cases", result.get("cases", 0))
    record_property("failures", len(result["failures"]))
    assert done.returncode == 0 and result["failures"] == [], (result, done.stderr[-2000:])
    assert result["cases"] == count
    # Each kind of signal has hit, and second starters were refused while a run was alive.
    assert set(result["signals"]) == {"KILL", "TERM", "HUP"} and result["refused"] >= count // 5
