"""Files of a run that hold other types than the run wrote: a page, or one line that names them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_runs import many_class_facts, row, write_run

from dmkd_fast import UserError, cli
from dmkd_fast.jobs.report import runs as report
from dmkd_fast.jobs.report.live import LivePage

VALUES = (None, True, "x", "", -1, 1e308, -1e308, float("nan"), 10**30, [], {}, [1], [[]], {"a": 1})
SUMMARY = {"top1": 0.5, "top5": 0.9, "teacher_top1": 0.6, "agreement": 0.7, "wall_s": 9, "cpu_s": 8}
SUMMARY |= {"generated_images": 64}
CONFIG = {"name": "x", "seed": 0, "device": "cuda", "train": {"num_views": 64_000}}


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside; of a list, to the first two."""
    if before:
        yield before
    if isinstance(value, dict):
        for name, inside in value.items():
            yield from places(inside, (*before, name))
    elif isinstance(value, list):
        for i, inside in enumerate(value[:2]):
            yield from places(inside, (*before, i))


def changed(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield copies, each with one value replaced or removed, and what was done."""
    for value in VALUES:
        yield f"all = {value}", value
    for place in places(content):
        for value in (*VALUES, "removed"):
            other = copy.deepcopy(content)
            inside = other
            for key in place[:-1]:
                inside = inside[key]
            if value == "removed":
                del inside[place[-1]]
            else:
                inside[place[-1]] = value
            yield f"{place} {value!r}", other


def facts() -> dict[str, Any]:
    """Return the content of a whole report.json."""
    found = many_class_facts(2, side=8, name="c")
    for images in (found["samples"], found["evaluation"]["right"], found["evaluation"]["mistakes"]):
        del images[2:]
    found |= {
        "arguments": ["--data", "DIR"],
        "cpu_s": 3.5,
        "forwards_per_image": [[0, 4], [0.5, 8]],
    }
    found |= {
        "num_teachers": 1,
        "world_size": 2,
        "student_parameters": 5,
        "versions": {"torch": "2"},
    }
    return json.loads(json.dumps(found))


def many_facts() -> dict[str, Any]:
    """Return a report.json whose confusion matrix is a picture."""
    found = {"evaluation": many_class_facts(30, side=8)["evaluation"]}
    for name in ("right", "mistakes", "calibration"):
        del found["evaluation"][name]
    return json.loads(json.dumps(found))


def to_json(content: Any) -> str:
    return f"{json.dumps(content)}\n"


FILES: list[tuple[str, Callable[[], Any], Callable[[Any], str]]] = [
    ("report.json", facts, to_json),
    ("report.json", many_facts, to_json),
    ("summary.json", lambda: SUMMARY, to_json),
    ("stats.jsonl", lambda: row(4), lambda content: to_json(row(3)) + to_json(content)),
    ("config.yaml", lambda: CONFIG, yaml.safe_dump),
]


@pytest.mark.parametrize(("name", "make", "dump"), FILES)
def test_values_of_other_types_are_drawn_or_named_in_one_line(
    name: str, make: Callable[[], Any], dump: Callable[[Any], str], tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", num_rows=6, facts=facts(), summary=SUMMARY)
    other = write_run(tmp_path / "other", num_rows=6, facts=facts(), summary=SUMMARY)
    intact = make()
    (run / name).write_text(dump(intact))
    report.report([run])
    refused = 0
    for what, content in changed(intact):
        (run / name).write_text(dump(content))
        problem = ""
        try:
            json.dumps(report.report([run]))
            json.dumps(report.report([run, other]))
        except UserError as error:
            problem, refused = str(error), refused + 1
        except Exception as error:
            raise AssertionError(what) from error
        assert not problem or (problem.startswith(f"{run / name}: ") and "\n" not in problem), what
    assert refused > 10


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("summary.json", '{"top1": "0.9"}', "top1: got '0.9', expected a valid number; delete it"),
        ("summary.json", '{"top1": 90}', "top1: got 90, expected less than or equal to 1"),
        ("report.json", '{"seconds": [1]}', "seconds: got [1], expected an object; delete it"),
        ("report.json", '{"samples": [{}]}', "samples.0.src: missing; delete it"),
        ("report.json", '{"samples": ', "not valid JSON (EOF while parsing"),
        ("stats.jsonl", '{"views": 1, "wall_s": null}\n', "line 1: wall_s: got None, expected"),
        ("stats.jsonl", "\n{}\n", "line 2: views: missing; delete the line"),
        ("config.yaml", "train: 5", "train: got 5, expected"),
    ],
)
def test_the_line_names_file_place_and_value(
    name: str, text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_text(text)
    assert cli.main(["report", str(run)]) == 2
    line = capsys.readouterr().err
    assert f"dmkd: {run / name}: {expected}" in line and line.count("\n") == 1


def test_a_list_of_runs_leaves_a_damaged_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "good")
    (write_run(tmp_path / "runs" / "bad") / "stats.jsonl").write_text("[1]\n")
    assert cli.main(["report", "--json"]) == 0
    captured = capsys.readouterr()
    assert [run["run_dir"] for run in json.loads(captured.out)["runs"]] == ["runs/good"]
    assert "left out: runs/bad/stats.jsonl: line 1" in captured.err


def test_damaged_rows_do_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path / "run")
    (run / "stats.jsonl").write_text('{"views": "x"}\n')
    page = LivePage(run, {})
    page.add(row(0))
    assert "without earlier rows" in caplog.text and page.num_rows == 1
    assert "Running" in (run / "report.html").read_text()
    shutil.rmtree(run)
