"""Read what a run directory says about its run, whatever state the run is in.

A run writes `report.json` beside its page while it goes on: facts that the other files do not
hold. Neither this module nor the page needs PyTorch.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmkd_fast.jobs.report import checks
from dmkd_fast.runtime import files
from dmkd_fast.runtime.errors import UserError

CONFIG, STATS, SUMMARY, LOCK = "config.yaml", "stats.jsonl", "summary.json", ".lock"
FACTS, PAGE = "report.json", "report.html"
NO_CLASS = "no class"  # in place of the class names of images that have none
MOST_POINTS, MOST_DRAWN = 600, 1e100
STATES = {
    "running": "running",
    "finished": "finished",
    "interrupted": "interrupted",
    "failed": "ended with an error",
    "killed": "killed or lost",
}


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run as its files describe it."""

    folder: Path
    state: str
    """Key of `STATES`."""
    facts: dict[str, Any]
    """Content of `report.json`; empty if the run wrote none."""
    rows: list[dict[str, Any]]
    """Rows of stats.jsonl, thinned if there are many."""
    num_rows: int
    """Number of rows in stats.jsonl."""
    config_text: str
    config: dict[str, Any]
    summary: dict[str, Any]
    """Content of `summary.json`; empty unless the run has finished."""

    @property
    def top1(self) -> float | None:
        """Accuracy of the student: of the saved one, or of the last evaluation of the run."""
        if "top1" in self.summary:
            return float(self.summary["top1"])
        return next((row["top1"] for row in reversed(self.rows) if "top1" in row), None)

    @property
    def teacher_top1(self) -> float | None:
        """Accuracy of the teacher, known when the run has finished."""
        return self.summary.get("teacher_top1")

    @property
    def wall_s(self) -> float | None:
        """Seconds that the run has taken."""
        last = self.rows[-1]["wall_s"] if self.rows else None
        found: float | None = self.summary.get("wall_s", last)
        return found

    @property
    def images(self) -> float | None:
        """Images that were made or read."""
        found: float | None = self.summary.get(
            "generated_images", self.rows[-1].get("images") if self.rows else None
        )
        return found

    @property
    def views(self) -> int:
        """Views that the student has seen."""
        return int(self.rows[-1]["views"]) if self.rows else 0

    @property
    def total_views(self) -> int:
        """Views of the whole run by its settings, or 0 if the settings do not say."""
        return int((self.config.get("train") or {}).get("num_views", 0))

    @property
    def command(self) -> str:
        """Words of the command line before the config, such as `dmkd distill`."""
        return str(self.facts.get("command", "dmkd distill"))

    def points(self, x: str, y: str, scale: float = 1) -> list[tuple[float, float]]:
        """Return a curve of two columns, without values that no chart can show."""
        pairs = [(row[x], scale * row[y]) for row in self.rows if x in row and y in row]
        return [pair for pair in pairs if all(abs(v) < MOST_DRAWN for v in pair)]

    def times(self) -> dict[str, float]:
        """Return host seconds by part of the run, and those that no part accounts for."""
        found = self.facts.get("seconds", {})
        spent = {name: found[name] for name in PARTS if name in found}
        if spent:
            spent["other"] = max(0.0, found.get("whole", 0.0) - sum(spent.values()))
        return spent


PARTS = {
    "warm_up": "warm-up: compile, first call of every network",
    "generate": "generate or read images",
    "views": "draw and render views",
    "teacher": "teachers",
    "student": "student: forward, loss, backward, optimizer",
    "evaluate": "evaluate on the test set",
    "save": "checkpoints",
    "log": "statistics and this page",
    "other": "loading and everything else",
}


def load(folder: Path) -> RunData:
    """Read a run directory, and decide which state the run is in.

    Raises:
        UserError: The directory is not that of a run, or one of its files is damaged.
    """
    if not (folder / CONFIG).is_file():
        what = "no such directory" if not folder.is_dir() else f"got a directory without {CONFIG}"
        raise UserError(f"{folder}: {what}, expected the directory of a run; see dmkd report")
    facts = checks.read_json(folder / FACTS, checks.Facts)
    summary = checks.read_json(folder / SUMMARY, checks.Summary)
    rows, num_rows = read_rows(folder / STATS)
    text, config = checks.read_config(folder / CONFIG)
    return RunData(
        folder=folder,
        state=_state(folder, facts, summary),
        facts=facts,
        rows=rows,
        num_rows=num_rows,
        config_text=text,
        config=config,
        summary=summary,
    )


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of stats.jsonl, thinned if there are many, and their number.

    Lines that are no JSON are left out, such as one that is still being written.

    Raises:
        UserError: The file cannot be read, or a row does not hold numbers.
    """
    rows: list[dict[str, Any]] = []
    count = 0
    if not path.is_file():
        return rows, count
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                try:
                    add_row(rows, checks.check_row(row))
                except ValueError as error:
                    raise UserError(f"{path}: line {number}: {error}; delete the line") from None
                count += 1
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return thinned(rows), count


def add_row(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Append a row, and thin the rows out if there are too many to keep."""
    rows.append(row)
    if len(rows) >= 4 * MOST_POINTS:
        rows[:] = thinned(rows, 2 * MOST_POINTS)


def thinned(rows: list[dict[str, Any]], most: int = MOST_POINTS) -> list[dict[str, Any]]:
    """Return about `most` rows, evenly spaced, and the last one."""
    if len(rows) <= most:
        return rows
    every = len(rows) / (most - 1)
    return [rows[int(i * every)] for i in range(most - 1)] + [rows[-1]]


def go_on_command(run: RunData) -> str:
    """Return the command that continues a run."""
    if run.command == "dmkd distill":
        return f"dmkd distill {shlex.quote(str(run.folder / CONFIG))} --resume"
    return f"{_again(run, run.folder)} --resume"


def repeat_command(run: RunData) -> str:
    """Return the command that repeats a run in a directory of its own."""
    return _again(run, run.folder.with_name(f"{run.folder.name}-again"))


def _again(run: RunData, folder: Path) -> str:
    config = shlex.quote(str(run.folder / CONFIG))
    rest = "".join(f" {word}" for word in run.facts.get("arguments", ()))
    return f"{run.command} {config} {shlex.quote(f'run_dir={folder}')}{rest}"


def _state(folder: Path, facts: dict[str, Any], summary: dict[str, Any]) -> str:
    if files.is_locked(folder / LOCK):
        return "running"
    if summary or (folder / "model").is_dir():
        return "finished"
    state = str(facts.get("state", "killed"))
    return state if state in STATES and state != "running" else "killed"
