"""Write tables between `<!-- rows:NAME -->` and `<!-- end -->` in README and docs.

Each table shows the newest recorded rows of its measurement (those of the last commit and date)
that were measured on a CPU, NAME-gpu those on a GPU; tables of the studies, which take hours, show
all rows. Below each table stands the command that made its rows, and whether they are superseded
(`provenance.py`). Plots of the studies are drawn as well.
`--check` changes nothing and fails where a table and its rows disagree, where rows were made with
arguments other than the defaults of their command, and where a row has an unknown mark.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks import provenance
from benchmarks.__main__ import NAMES
from benchmarks.findings.finding_3_family import FAMILY_TABLES
from benchmarks.findings.generator_tables import GENERATOR_TABLES
from benchmarks.findings.levers import LEVER_TABLES
from benchmarks.findings.plots import draw
from benchmarks.findings.selection import SELECTION_TABLES
from benchmarks.findings.tables import STUDY_TABLES as FINDINGS
from benchmarks.findings.tables import cell_of, nearest_table
from benchmarks.harness import ROOT, read_rows
from benchmarks.job.drawings import DRAWING_TABLES
from benchmarks.job.end_to_end import end_to_end_table
from benchmarks.job.sooner import SHIPPED, sooner_table
from benchmarks.job.tables import JOB_TABLES
from benchmarks.loss.tables import LOSS_TABLES
from benchmarks.markdown import is_gpu
from benchmarks.parts.tables import PART_TABLES

MARKED = re.compile(r"(<!-- rows:([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]
STUDY_TABLES = (
    FINDINGS | GENERATOR_TABLES | FAMILY_TABLES | LEVER_TABLES | SELECTION_TABLES | DRAWING_TABLES
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Source of a table's rows."""

    bench: str
    """Name of the measurement and of its file in results/."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Fields that the rows must have."""
    required: tuple[str, ...] = ()
    """Arguments of the command that have no default."""


# Tables that do not show all rows of the measurement of the same name. Of several sources, the
# first with rows that are not superseded counts.
SOURCES = {
    "embedded": (
        Source(bench="sooner", only={"arm": SHIPPED}),
        Source(bench="embedded"),
        Source(bench="fewstep", only={"job": "few steps"}),
    ),
    "end-to-end": (
        Source(bench="end-to-end", only={"part": "whole"}, required=("--part", "whole")),
    ),
    "kd-loss-family": (Source(bench="kd-loss", only={"set": "family"}),),
    "kd-loss-linear": (Source(bench="kd-loss", only={"set": "linear"}),),
    "ladder": (Source(bench="end-to-end", only={"part": "ladder"}, required=("--part", "ladder")),),
    "finding-1": (Source(bench="finding-1", required=("--data", "DIR")),),
    "finding-1-long": (
        Source(bench="finding-1", required=("--data", "DIR", "--long-seeds", "14")),
    ),
    **dict.fromkeys(FAMILY_TABLES, (Source(bench="finding-3-family", required=("--data", "DIR")),)),
    **{
        name: (Source(bench=name, required=("--data", "DIR")),)
        for name in ("drawings", "levers", "nearest")
    },
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks render", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail where rows and tables disagree"
    )
    options = parser.parse_args(argv)
    stale = []
    shown: set[str] = set()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = render(before)
        shown.update(match[2] for match in MARKED.finditer(before))
        if before != after:
            stale.append(path.name)
            if not options.check:
                path.write_text(after, encoding="utf-8")
    if not options.check:
        draw(ROOT / "docs" / "images")
    faults = check(shown)
    if options.check and stale:
        faults.append(f"{', '.join(stale)}: differ from their rows; run it without --check")
    elif not options.check:
        print(f"{', '.join(stale) or 'nothing new'}: rendered", file=sys.stderr)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if options.check and faults else 0


def check(tables: Iterable[str]) -> list[str]:
    """Return one line for each unknown mark, and each table whose rows have other arguments."""
    faults = provenance.unknown_marks()
    for name in sorted(tables):
        rows, source = rows_of(name)
        faults += provenance.other_arguments(command_of(name, source), rows, source.required)
    return faults


def render(text: str) -> str:
    """Write every marked table of a text again."""

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        rows, source = rows_of(name)
        if not rows:
            return match[1] + "No rows yet.\n" + match[3]
        if name in STUDY_TABLES:
            bench, is_shown, write = STUDY_TABLES[name]
            every, cell = [row for row in read_rows(bench) if is_shown(row)], cell_of(bench)
            text, awaited = write(every), provenance.awaited(every, cell)
        else:
            text, awaited = TABLES[name](rows), provenance.awaited(rows)
        said = [
            provenance.remarks(awaited),
            provenance.made_by(command_of(name, source), rows, source.required),
        ]
        return match[1] + " ".join([text.rstrip("\n"), *filter(None, said)]) + "\n" + match[3]

    return MARKED.sub(replace, text)


def rows_of(name: str) -> tuple[list[Row], Source]:
    """Return the rows that a table shows, and their source."""
    if name in STUDY_TABLES:
        bench, is_shown, _ = STUDY_TABLES[name]
        (source,) = SOURCES.get(name, (Source(bench=bench),))
        rows = [row for row in read_rows(bench) if is_shown(row)]
        return provenance.counted(rows, cell_of(bench)), source
    return latest(name)


def latest(name: str) -> tuple[list[Row], Source]:
    """Return the rows recorded with the last one on a CPU or, for `NAME-gpu`, on a GPU.

    Superseded rows are shown only where there are no others.
    """
    on_gpu, bench = name.endswith("-gpu"), name.removesuffix("-gpu")
    for source in SOURCES.get(bench, (Source(bench=bench),)):
        rows = provenance.counted(
            row
            for row in read_rows(source.bench)
            if is_gpu(row) == on_gpu and all(row.get(k) == v for k, v in source.only.items())
        )
        rows = _of_one_run(rows)
        if rows and "superseded" not in rows[-1]:
            break
    return rows, source


def _of_one_run(rows: list[Row]) -> list[Row]:
    """Return the rows that were recorded with the last one, or in another part of the same run."""
    names = ("arguments", "configs") if rows and "configs" in rows[-1] else ("environment",)
    return [row for row in rows if all(row.get(n) == rows[-1].get(n) for n in names)]


def command_of(name: str, source: Source) -> str:
    """Return the name of the measurement of a table; some measurements have a variant for GPUs."""
    return name if name.endswith("-gpu") and name in NAMES else source.bench


TABLES: dict[str, Callable[[list[Row]], str]] = {
    **JOB_TABLES,
    **LOSS_TABLES,
    **PART_TABLES,
    "end-to-end": end_to_end_table,
    "nearest": nearest_table,
    "sooner": sooner_table,
}
