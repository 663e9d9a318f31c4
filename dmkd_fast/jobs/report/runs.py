"""Report on runs: list them, write the page of one, or compare several: `dmkd report`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmkd_fast.jobs.report import compare as report_compare
from dmkd_fast.jobs.report import page as report_page
from dmkd_fast.jobs.report.data import CONFIG, PAGE, RunData, load
from dmkd_fast.jobs.report.html import duration
from dmkd_fast.runtime import files
from dmkd_fast.runtime.errors import UserError, warn_once

RUNS = Path("runs")
COMPARISON = "comparison.html"


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> dict[str, Any]:
    """Write the page of one run, or one page that compares several.

    The page of a run that goes on is left to the run, which writes it every few seconds.

    Args:
        runs: Run directories.
        out: HTML file to write. None: `report.html` in the run directory; for several runs
            `comparison.html` in the folder that holds them.

    Returns:
        What `dmkd report --json` prints: `report`, the path of the page, and the figures.

    Raises:
        UserError: A directory is not that of a run, or the page cannot be written.
    """
    folders = list(dict.fromkeys(Path(run) for run in runs))
    found = [load(folder) for folder in folders]
    if len(found) == 1:
        run = found[0]
        page = run.folder / PAGE if out is None else Path(out)
        if out is not None or run.state != "running" or not page.is_file():
            _write(page, report_page.render(run))
        return {"report": str(page), **report_compare.record(run, is_full=True)}
    if out is None:
        whole = os.path.commonpath([os.path.abspath(folder) for folder in folders])
        out = Path(os.path.relpath(whole)) / COMPARISON
    page = Path(out)
    _write(page, report_compare.render(found, page.resolve()))
    return {
        "report": str(page),
        "runs": [report_compare.record(run) for run in found],
        "settings": report_compare.differences(found),
    }


def _written(path: Path) -> float:
    """Return when a file was written; 0 if it has been deleted meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def list_runs(folder: Path = RUNS) -> list[tuple[RunData, str]]:
    """Return the runs in a folder, the newest last, each with its settings that differ.

    A run whose files are damaged is left out with a warning.
    """
    runs = []
    for path in sorted(folder.glob(f"*/{CONFIG}"), key=_written):
        try:
            runs.append(load(path.parent))
        except UserError as error:
            warn_once(f"left out: {error}")
    return list(zip(runs, report_compare.short_differences(runs), strict=True))


def show_runs(*, as_json: bool = False) -> dict[str, Any] | None:
    """Print a table of the runs in runs/, or return it for machines."""
    from rich.console import Console
    from rich.table import Table

    runs = list_runs()
    if as_json:
        return {"runs": [{**report_compare.record(run), "differs": line} for run, line in runs]}
    if not runs:
        print(f"no runs in {RUNS}/")
        return None
    table = Table()
    table.add_column("run", overflow="fold")
    table.add_column("state")
    for name in ("top-1", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("settings that differ", overflow="fold")
    for run, differing in runs:
        top1 = "" if run.top1 is None else f"{run.top1:.4f}"
        spent = "" if run.wall_s is None else duration(run.wall_s)
        table.add_row(run.folder.name, run.state, top1, spent, differing)
    Console(markup=False, highlight=False).print(table)
    return None


def print_classes(classes: dict[str, dict[str, Any]]) -> None:
    """Print a table of all classes, or of the 20 with the lowest top-1 if there are over 100."""
    from rich.console import Console
    from rich.table import Table

    rows = [(name, row) for name, row in classes.items() if row["images"]]
    title = None
    if len(rows) > 100:
        rows = sorted(rows, key=lambda row: row[1]["top1"])[:20]
        title = f"the 20 lowest of {len(classes)} classes"
    table = Table(title=title)
    table.add_column("class", overflow="fold")
    for column in ("images", "top-1", "top-5"):
        table.add_column(column, justify="right")
    for name, row in rows:
        table.add_row(name, f"{row['images']:,}", f"{row['top1']:.4f}", f"{row['top5']:.4f}")
    Console(markup=False).print(table)


def _write(path: Path, page: str) -> None:
    try:
        files.replace_unsynced(path, page.encode(errors="replace"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the page ({error.strerror}); name another file with --out"
        ) from None
