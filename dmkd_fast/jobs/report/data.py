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

from dmkd_fast.runtime import files
from dmkd_fast.runtime.errors import UserError

CONFIG, STATS, SUMMARY, LOCK = "config.yaml", "stats.jsonl", "summary.json", ".lock"
FACTS, PAGE = "report.json", "report.html"
MOST_POINTS = 600
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

    def times(self) -> dict[str, float]:
        """Return host seconds by part of the run, and those that no part accounts for."""
        found = self.facts.get("seconds", {})
        spent = {name: found[name] for name in PARTS if name in found}
        if spent:
            spent["other"] = max(0.0, found["whole"] - sum(spent.values()))
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
    facts = _json(folder / FACTS)
    summary = _json(folder / SUMMARY)
    rows, num_rows = read_rows(folder / STATS)
    return from_parts(
        folder,
        state=_state(folder, facts, summary),
        facts=facts,
        rows=rows,
        num_rows=num_rows,
        summary=summary,
    )


def from_parts(folder: Path, **parts: Any) -> RunData:
    """Return a run of these parts, with the config that its directory holds."""
    import yaml

    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / CONFIG}: cannot be read ({reason}); restore it") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: got no settings, expected a mapping; restore it")
    return RunData(folder=folder, config_text=text, config=config, **parts)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of stats.jsonl, thinned if there are many, and their number.

    A last line that is still being written is left out.
    """
    rows: list[dict[str, Any]] = []
    count = 0
    if not path.is_file():
        return rows, count
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and {"views", "wall_s"} <= row.keys():
                count += 1
                add_row(rows, row)
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


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: got no JSON object, expected one; delete it")
    return found
