"""The harness counts right, and every rendered table is what its rows say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, render

ROOT = Path(__file__).parent.parent


def test_tables_agree_with_the_recorded_rows() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text(encoding="utf-8")
        assert render.render(text) == text, f"{path.name}: run python -m benchmarks render"
    marked = re.findall(r"<!-- rows:([a-z-]+) -->", (ROOT / "README.md").read_text())
    assert marked, "README shows no measured rows"
    for name in marked:
        assert render.latest(name), f"no rows for {name}"


def test_a_changed_figure_is_noticed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = render.MARKED.search(text)
    assert block
    digit = re.search(r"0\.\d+", block[0])
    assert digit
    wrong = text.replace(digit[0], "0.12345", 1)
    assert render.render(wrong) == text != wrong


def test_arms_take_turns_and_medians_are_right() -> None:
    order: list[str] = []
    arms = {
        "slow": lambda: (order.append("slow"), time.sleep(0.02)),
        "fast": lambda: order.append("fast"),
    }
    timings = harness.time_interleaved(arms, n=3, warmup=1)
    assert order == ["slow", "fast"] * 4
    assert 20 <= timings["slow"]["median_ms"] < 60 > timings["fast"]["median_ms"]
    assert harness.summary([5, 1, 4, 2, 3]) == {
        "median_ms": 3, "p20_ms": 2, "p80_ms": 4, "n": 5,
    }  # fmt: skip


def test_missed_goal_is_reported_and_rows_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    report = harness.Report(bench="thing")
    report.rows.append({"x": 1})
    report.at_least("speed", 2.0, 3.0)
    report.at_most("time", 2.0, 3.0)
    report.finish(record=True)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["goals"]["speed"] == {"value": 2.0, "goal": 3.0, "met": False}
    assert line["goals"]["time"]["met"] and line["environment"]["cores"] >= 1
    assert harness.read_rows("thing")[0]["x"] == 1


@pytest.mark.slow
def test_kd_loss_benchmark_ends_with_one_json_line() -> None:
    command = [sys.executable, "-m", "benchmarks", "kd-loss", "--quick", "--n", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["bench"] == "kd-loss" and len(line["goals"]) == 2
    assert all("peak memory" in name and goal["met"] for name, goal in line["goals"].items())
    assert {row["arm"] for row in line["rows"]} >= {"ours", "eager", "compile", "copy"}
    assert {row["set"] for row in line["rows"]} == {"allocated", "reused", "memory"}
    peaks = {row["arm"]: row["peak_gradients"] for row in line["rows"] if row["set"] == "memory"}
    # One gradient is the least there can be; a measurement that sees nothing would say 0.
    assert 0.9 < peaks["ours"] <= 1.1 and 0.9 < peaks["ours, one pass"] <= 1.1 < peaks["eager"]
    timed = [row for row in line["rows"] if row["set"] != "memory"]
    assert {row["threads"] for row in timed} >= {1} and {row["dtype"] for row in timed} == {
        "float32",
        "bfloat16",
    }


def test_views_benchmark_ends_with_one_json_line() -> None:
    command = [sys.executable, "-m", "benchmarks", "views", "--quick", "--n", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["bench"] == "views" and not line["goals"]  # those are of the large images
    timed = {(row["arm"], row["set"]) for row in line["rows"] if row["device"] == "cpu"}
    assert timed >= {("ours", "fresh"), ("ours", "reused"), ("eager", "fresh"), ("copy", "fresh"),
                     ("torchvision", "fresh"), ("torchvision", "reused")}  # fmt: skip
    assert all(row["images_per_s"] > 0 for row in line["rows"])
    timing = next(r for r in line["rows"] if r["arm"] == "ours" and r["set"] == "fresh")
    for row in line["rows"]:
        row["environment"] = line["environment"]
    assert f"| 32 -> 32 | float32 | {timing['images_per_s']:,} |" in render.TABLES["views"](
        line["rows"]
    )


def test_all_arms_of_the_views_benchmark_make_such_views() -> None:
    """The same shape and range of numbers: black borders and white pixels are in each batch."""
    from benchmarks import views

    mean, std = torch.tensor(views.MEAN), torch.tensor(views.STD)
    for arm, call in views.arms("32 -> 32", torch.float32, torch.device("cpu")).items():
        made = call()
        if arm == "DALI":
            made = torch.from_numpy(made[0].as_array()).permute(0, 3, 1, 2)  # type: ignore[index]
        assert isinstance(made, torch.Tensor) and made.shape == (views.BATCH, 3, 32, 32), arm
        if not arm.startswith("copy"):
            for got, pixel in ((made.amin((0, 2, 3)), 0), (made.amax((0, 2, 3)), 1)):
                torch.testing.assert_close(got, (pixel - mean) / std, rtol=0, atol=1e-4, msg=arm)
