"""The harness counts right, and every rendered table is what its rows say."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import harness, provenance, render
from benchmarks.job import tables

ROOT = Path(__file__).parents[2]


def test_tables_agree_with_the_recorded_rows() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text(encoding="utf-8")
        assert render.render(text) == text, f"{path.name}: run python -m benchmarks render"
    marked = re.findall(r"<!-- rows:([a-z0-9-]+) -->", (ROOT / "README.md").read_text())
    assert marked, "README shows no measured rows"
    for name in marked:
        assert render.rows_of(name)[0], f"no rows for {name}"


def test_shown_rows_were_made_with_the_defaults_of_their_command() -> None:
    """Every measurement's parser is called, and no row has a mark without a meaning."""
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    assert render.check(match[2] for text in texts for match in render.MARKED.finditer(text)) == []


def test_check_refuses_rows_of_other_arguments_and_unknown_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = harness.RESULTS
    shutil.copytree(real, tmp_path / "results")
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    lines = (real / "fidelity.jsonl").read_text().splitlines()
    for change, message in (
        ({"arguments": {"seeds": 1, "views": 1}}, "fidelity: arguments of rows: got"),
        ({"superseded": "tired"}, "fidelity.jsonl:4: superseded: got 'tired', expected one of"),
    ):
        changed = json.dumps({**json.loads(lines[-1]), **change})
        (tmp_path / "results" / "fidelity.jsonl").write_text("\n".join([*lines[:-1], changed]))
        assert render.main(["--check"]) == 1
        assert message in capsys.readouterr().err
    # A row that is known to be superseded may have any arguments.
    row = json.loads(lines[0]) | {"superseded": "one seed", "arguments": {}}
    assert provenance.other_arguments("fidelity", [row]) == []


def test_superseded_rows_give_way_to_as_many_as_an_interval_needs() -> None:
    old = {"cell": 1, "superseded": "one seed"}
    new, wrong = {"cell": 1}, {"cell": 1, "superseded": "starts as the teacher"}
    cell = lambda row: row["cell"]  # noqa: E731
    assert provenance.counted([old, new, new], cell) == [old, new, new]
    assert provenance.counted([old, new, new, new], cell) == [new, new, new]
    # What misleads gives way at once, and is shown where it is all there is.
    assert provenance.counted([wrong, new], cell) == [new]
    assert provenance.counted([wrong, {"cell": 2}], cell) == [wrong, {"cell": 2}]
    assert provenance.awaited([wrong, new], cell) == [wrong]
    assert provenance.awaited([wrong, new, new, new], cell) == []
    assert "initial weights of the weak teacher" in provenance.remarks([wrong])


def test_a_table_says_the_command_that_made_its_rows() -> None:
    row = {
        "environment": {"commit": "abc"},
        "arguments": {
            "model": None,
            "tiny": False,
            "num_points": 3,
            "arms": ["a, b"],
            "overrides": ["seed=1"],
        },
    }
    assert provenance.made_by("thing", [row, row], ("--data", "DIR")) == (
        "Made by `python -m benchmarks thing --data DIR --num-points 3 --arms 'a, b' seed=1` "
        "at abc."
    )


def test_arguments_that_change_no_figure_are_not_recorded() -> None:
    parser = harness.arguments("thing", "", selects=["parts"])
    for name in ("--data", "--views", "--parts"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(["--record", "--data", "a", "--views", "b", "--parts", "c"])
    assert harness.recorded(options) == {"views": "b"}


def test_few_steps_are_charged_with_what_their_denoiser_cost() -> None:
    """Its 2,758.2 CPU s are repaid by 276 jobs that save 10 each, or by 28 that save 100."""
    text = tables.break_even([10.0, 100.0])
    assert (
        "3,240 s on one thread (2,758 CPU s)" in text and "repays that after 28 to 276 jobs" in text
    )
    assert "repays" not in tables.break_even([-1.0])


def test_runs_that_differ_are_said_to() -> None:
    rows = [
        {"arm": arm, "seed": 0, "wall_s": wall}
        for arm, wall in (("a", 100.0), ("b", 50.0), ("a", 150.0), ("b", 25.0), ("c", 1.0))
    ]
    assert "same arm took 1.5 to 2.0 times as long" in tables.drift(rows)
    assert tables.drift(rows[:2]) == ""


def test_gains_that_one_run_cannot_tell_are_called_noise() -> None:
    proof = {
        "sampler": "s",
        "attention": "a",
        "sampler_dtype": "d",
        "png_files": 0,
        "ops": {},
        "teacher_batch_norms": 0,
        "page_faults_per_step": 0,
        "compiled_graphs": 0,
    }
    same = {
        "seed": 0,
        "top1": 0.5,
        "images_per_s": 1.0,
        "views_per_s": 1.0,
        "s_to_target": None,
        "proof": proof,
        "environment": dict.fromkeys(("device", "threads", "torch", "date"), 1),
    }
    rows = [
        {"arm": arm, "after": after, "wall_s": wall, **same}
        for arm, after, wall in (("a", None, 100.0), ("b", "a", 90.0), ("c", "b", 60.0))
    ]
    text = tables.ladder(rows)
    assert "| 1.11x (noise) |" in text and "| 1.50x |" in text


def test_steps_alone_differ_in_what_their_names_say() -> None:
    from benchmarks.job import step
    from benchmarks.job.arms import ARMS, BF16, CHANNELS_LAST, PUBLISHED, TARGET

    torch.set_num_threads(1)
    for call in step.arms(("train.batch_size=4",)).values():
        call()
    recipes = [ARMS[name].recipe for name in (PUBLISHED, TARGET, BF16, CHANNELS_LAST)]
    for before, after in itertools.pairwise(recipes):
        assert before and after
        one, other = asdict(before), asdict(after)
        assert sum(one[name] != other[name] for name in one) == 1


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
    assert timed >= {
        ("ours", "fresh"),
        ("ours", "reused"),
        ("eager", "fresh"),
        ("copy", "fresh"),
        ("torchvision", "fresh"),
        ("torchvision", "reused"),
    }
    assert all(row["images_per_s"] > 0 for row in line["rows"])
    timing = next(r for r in line["rows"] if r["arm"] == "ours" and r["set"] == "fresh")
    for row in line["rows"]:
        row["environment"] = line["environment"]
    assert f"| 32 -> 32 | float32 | {timing['images_per_s']:,} |" in render.TABLES["views"](
        line["rows"]
    )


def test_all_arms_of_the_views_benchmark_make_such_views() -> None:
    """The same shape and range of numbers: black borders and white pixels are in each batch."""
    from benchmarks.parts import views

    mean, std = torch.tensor(views.MEAN), torch.tensor(views.STD)
    for arm, call in views.arms("32 -> 32", torch.float32, torch.device("cpu")).items():
        made = call()
        if arm == "DALI":
            made = torch.from_numpy(made[0].as_array()).permute(0, 3, 1, 2)  # type: ignore[index]
        assert isinstance(made, torch.Tensor) and made.shape == (views.BATCH, 3, 32, 32), arm
        if not arm.startswith("copy"):
            for got, pixel in ((made.amin((0, 2, 3)), 0), (made.amax((0, 2, 3)), 1)):
                torch.testing.assert_close(got, (pixel - mean) / std, rtol=0, atol=1e-4, msg=arm)
