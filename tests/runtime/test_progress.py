"""Progress: a total and a time left in every width, plain lines in a pipe, silence on demand."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dmkd_fast.runtime.output import progress
from dmkd_fast.runtime.output.progress import Phase, Progress, half_blocks, sparkline

SCRIPT = """
import sys, time
from dmkd_fast.runtime.output.progress import Progress
display = Progress()
with display.phase("training", 200_000, "views") as phase:
    for step in range(1, 4):
        time.sleep(0.4)
        phase.update(step * 6400, "loss 0.39")
        display.accuracy(0.7 + step / 100)
print("rich" in sys.modules)
"""


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time on the clock, which only the test moves."""
    at = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: at[0])
    return at


def phase_of(total: int) -> Phase:
    return Phase(lambda *_: None, "training", total, "views", 0)


def test_lines_in_a_pipe_have_a_total_and_a_time_left(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    display = Progress()
    with display.phase("filling", 1000, "images") as phase:
        for _ in range(4):
            now[0] += 6
            phase.advance(250)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "filling [ 25%] 250/1,000 images  42 images/s  ETA 0:18"
    assert lines[-1] == "filling: 1,000 images in 0:24" and len(lines) == 5


def test_the_time_left_counts_down_between_rows_that_are_minutes_apart(now: list[float]) -> None:
    phase = phase_of(1000)
    assert phase.eta == "-:--"
    now[0] = 100.0
    phase.update(100)
    assert phase.eta == "15:00"
    now[0] = 400.0
    assert phase.eta == "10:00"
    phase.update(1000)
    assert phase.eta == "0:00"


def test_a_first_fill_does_not_count_for_the_time_left(now: list[float]) -> None:
    phase = phase_of(100)
    now[0] = 500.0
    phase.start_clock()
    now[0] = 510.0
    phase.update(10)
    assert phase.eta == "1:30"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_bar_keeps_percentage_and_time_left_in_every_width(width: int, now: list[float]) -> None:
    phase = phase_of(200_000)
    now[0] = 60.0
    phase.update(50_000, "loss 0.39")
    line = progress._bar(phase, width, is_plain=False).plain
    assert " 25%" in line and line.endswith("ETA 3:00") and len(line) <= width
    assert ("50,000/200,000 views" in line) == (width >= 60)


def test_nothing_is_printed_on_demand(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    display = Progress(show=False)
    with display.phase("filling", 10, "images") as phase:
        now[0] += 100
        phase.advance(10)
        display.note("text")
        display.pictures(torch.zeros(4, 1, 28, 28, dtype=torch.uint8))
    assert capsys.readouterr() == ("", "")


def test_batches_are_tracked_unchanged_and_an_error_ends_the_phase() -> None:
    display = Progress(show=False)
    assert list(display.track([1, 2], "evaluating", 3, "images", size=int)) == [1, 2]
    with pytest.raises(KeyError), display.phase("filling", 10, "images"):
        raise KeyError
    assert display._phases == []


def test_an_image_becomes_half_blocks_of_its_colors() -> None:
    image = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    image[:, 0, :14] = 255  # The upper half is red.
    text = half_blocks(image)
    lines = text.plain.splitlines()
    assert len(lines) == 7 and all(line == "▀" * 14 + " " for line in lines)
    first, last = text.spans[0].style, text.spans[-1].style
    assert str(first) == "#ff0000 on #ff0000" and str(last) == "#000000 on #000000"
    Console(file=open(os.devnull, "w"), force_terminal=True).print(text)  # noqa: SIM115


def test_accuracies_become_a_line_of_blocks() -> None:
    assert sparkline([0.1, 0.2, 0.8]) == "▁▂█" and sparkline([0.5]) == "█"


def run_on_terminal(variables: dict[str, str]) -> str:
    """Run the script with a terminal of 80 columns as its stderr; return what it shows."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **variables}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        stderr=theirs,
        stdout=subprocess.PIPE,
        env=environment,
        check=True,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the end, on Linux
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert done.stdout.strip() == (b"False" if variables.get("TERM") == "dumb" else b"True")
    return shown.decode()


def test_a_terminal_shows_one_live_view_without_color_on_demand() -> None:
    shown = run_on_terminal({})
    assert "\x1b[32m" in shown and "19,200/200,000 views" in shown and "top-1 " in shown
    assert "\x1b[32m" not in run_on_terminal({"NO_COLOR": "1"})
    assert "\x1b" not in run_on_terminal({"TERM": "dumb"})


def test_the_last_frame_is_drawn_with_the_console_of_the_live_view() -> None:
    display, consoles = Progress(show=False), []
    display._live = SimpleNamespace(console="wide")
    display._live.stop = lambda: consoles.append(display._live and display._live.console)
    display._stop_live()
    assert consoles == ["wide"] and display._live is None
