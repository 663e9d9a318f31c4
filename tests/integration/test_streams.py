"""Output that cannot be written: one line and exit code 2 for stdout, nothing at all for stderr."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from small_jobs import CONFIG

from dmkd_fast import Distiller, cli

RESULT = {"top1": 0.5}


@pytest.fixture(params=["full", "closed pipe"])
def broken(request: pytest.FixtureRequest) -> Iterator[TextIO]:
    """A stream that takes nothing."""
    if request.param == "full":
        handle = os.open("/dev/full", os.O_WRONLY)
    else:
        read, handle = os.pipe()
        os.close(read)
    stream = os.fdopen(handle, "w")
    yield stream
    stream.close()  # Raises where something is still to be written.


def verb(_: argparse.Namespace) -> dict[str, Any]:
    for line in range(3):
        print("progress", line, file=sys.stderr, flush=True)
    return RESULT


def test_stdout_that_fails_is_one_line_and_the_result_is_not_lost(
    broken: TextIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.verbs, "distill", verb)
    monkeypatch.setattr(sys, "stdout", broken)
    assert cli.main(["distill", CONFIG]) == 2
    *_, line, result = capsys.readouterr().err.splitlines()
    assert line.startswith("dmkd: stdout: cannot write (") and "all files are complete" in line
    assert json.loads(result) == RESULT


def test_a_dry_run_whose_output_is_lost_is_an_error(
    broken: TextIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", broken)
    assert cli.main(["distill", CONFIG, "--dry-run"]) == 2
    assert [line[:12] for line in capsys.readouterr().err.splitlines()] == ["dmkd: stdout"]


def test_stderr_that_fails_changes_nothing(
    broken: TextIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.verbs, "distill", verb)
    monkeypatch.setattr(sys, "stderr", broken)
    assert cli.main(["distill", CONFIG]) == 0
    assert json.loads(capsys.readouterr().out) == RESULT


@pytest.mark.slow
def test_training_goes_on_when_its_progress_cannot_be_printed(
    make_distiller: Callable[..., Distiller], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_distiller()
    run.display.show = True
    with open("/dev/full", "w", buffering=1) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        run.fit()
        os.dup2(1, full.fileno())  # What is buffered goes to pytest.
    assert run.step == run.num_steps and list((run.run_dir / "checkpoints").glob("step-*40"))


def test_files_never_get_the_numbers_of_closed_streams(tmp_path: Path) -> None:
    path, script = tmp_path / "file", tmp_path / "script.py"
    script.write_text(f"""
import os, sys
from dmkd_fast import cli

def verb(_):
    with open({str(path)!r}, "w") as file:
        print("message", file=sys.stderr)
        os.write(2, b"from C")
        file.write(str(file.fileno() > 2))
    return {{"top1": 1}}

cli.verbs.distill = verb
sys.exit(cli.main(["distill", "config"]))
""")
    command = f"exec {sys.executable} {script} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    assert path.read_text() == "True"
