"""The harness times arms in turn, and records rows, goals and arguments."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import harness


def test_arguments_that_change_no_figure_are_not_recorded() -> None:
    parser = harness.arguments("thing", "", selects=["parts"])
    for name in ("--data", "--views", "--parts"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(["--record", "--data", "a", "--views", "b", "--parts", "c"])
    assert harness.recorded(options) == {"views": "b"}


def test_arms_take_turns_and_medians_are_right() -> None:
    order: list[str] = []
    arms = {
        "slow": lambda: (order.append("slow"), time.sleep(0.02)),
        "fast": lambda: order.append("fast"),
    }
    timings = harness.time_interleaved(arms, n=3, warmup=1)
    assert order == [*["slow", "fast"] * 2, "fast", "slow", "slow", "fast"]
    assert 20 <= timings["slow"]["median_ms"] < 60 > timings["fast"]["median_ms"]
    assert harness.summary([5, 1, 4, 2, 3]) == {"median_ms": 3, "p20_ms": 2, "p80_ms": 4, "n": 5}


def test_missed_goal_is_reported_and_rows_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    report = harness.Report(bench="thing", arguments={"n": 3})
    report.rows.append({"x": 1})
    report.at_least("speed", 2.0, 3.0)
    report.at_most("time", 2.0, 3.0)
    report.finish(record=True)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["goals"]["speed"] == {"value": 2.0, "goal": 3.0, "met": False}
    assert line["goals"]["time"]["met"] and line["environment"]["cores"] >= 1
    (row,) = harness.read_rows("thing")
    assert row["x"] == 1 and row["arguments"] == {"n": 3}


def test_arms_are_timed_as_often_and_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short arm is called more often in a timing; the long ones beside it are not."""
    clock, calls = [0.0], {"short": 0, "long": 0, "longest": 0}

    def arm(name: str, seconds: float) -> None:
        calls[name] += 1
        clock[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    lengths = {"short": 1 / 128, "long": 1.0, "longest": 8.0}
    arms = {name: partial(arm, name, seconds) for name, seconds in lengths.items()}
    timings = harness.time_interleaved(arms, n=2, warmup=1, at_least_s=4.0)
    # A warm-up, a call that tells how many calls a timing has, and two timings.
    assert calls == {"short": 2 + 2 * 256, "long": 2 + 2 * 2, "longest": 2 + 2}
    for name, seconds in lengths.items():
        assert timings[name]["n"] == 2
        assert timings[name]["median_ms"] == pytest.approx(1e3 * seconds)
    calls["short"] = 0
    assert harness.time_interleaved(arms, n=2, warmup=0)["short"]["n"] == calls["short"] == 2


def test_state_of_a_gpu_is_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert harness.gpu_state() == {}
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$1" in *compute-apps*) echo 77; echo $PPID;; '
        '*) echo "580.1, 1980, 1980, 2619, 700.00, 90.1, 41";; esac\n'
    )
    program.chmod(0o755)
    found = harness.gpu_state()
    assert found["driver_version"] == "580.1" and found["temperature.gpu"] == "41"
    assert found["power.limit"] == "700.00" and found["other_processes"] == 1


def test_the_machine_of_a_row_says_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs of one name, with and without instructions for bfloat16, are two machines."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    names = []
    for has_bf16 in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_bf16: has)
        names.append(harness.environment(torch.device("cpu"))["device"])
    assert names[0].endswith(" (AVX512-BF16)")
    assert names[1].endswith(f" ({torch.backends.cpu.get_cpu_capability()})")
