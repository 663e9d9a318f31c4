"""Every C++ operator under address and undefined-behavior sanitizers, on random calls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sanitized

CALLS = Path(__file__).parents[1] / "helpers" / "run_operator_calls.py"
# Of the calls of each operator; what most machines run gets most of them.
SHARES = {"scalar": 0.15, "avx2": 0.2, "avx512": 0.15, "avx512_bf16": 0.5}
pytestmark = [pytest.mark.hard, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sanitized.build(tmp_path_factory.mktemp("sanitized"))


@pytest.mark.parametrize("instruction_set", list(sanitized.instruction_sets()))
def test_operators_touch_their_own_memory_and_equal_their_definitions(
    instruction_set: str,
    library: Path,
    tmp_path: Path,
    num_cases: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    share = SHARES[instruction_set]
    calls, large = round(share * num_cases(20_000, 2_000)), round(share * num_cases(200, 20))
    running = tmp_path / "running"
    done = sanitized.run(
        library, CALLS, str(calls), str(large), "0", str(running), instruction_set=instruction_set
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    failures = sum(row["failures"] for row in rows) + (done.returncode != 0)
    record_property("claim", "C++ operators: no sanitizer report, values of the eager definition")
    record_property("cases", sum(row["cases"] for row in rows))
    record_property("failures", failures)
    errors = ("ERROR", "runtime error")
    found = [line for line in done.stderr.splitlines() if any(e in line for e in errors)]
    place = running.read_text() if running.exists() else "before the first call"
    assert done.returncode == 0, "\n".join((place, *found, done.stderr[-4000:]))
    assert failures == 0, [row for row in rows if row["failures"]]
    assert len(rows) == 10 - (instruction_set in ("scalar", "avx2"))  # attention needs AVX-512
