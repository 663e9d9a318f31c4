"""Provenance of recorded rows: which command made them, and which of them still count.

No row in results/ is ever removed or changed. A row that must not be relied on any more gets an
entry `superseded` in results/notes.json, the name of one of `MARKS`. Tables leave it out as soon as
other rows stand in its place, and say so as long as they have to show it.
"""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import harness
from benchmarks.__main__ import module_of
from benchmarks.harness import read_rows, recorded

Row = dict[str, Any]
ENOUGH = 3
"""Rows of a cell that replace its superseded ones: with two the interval says nothing."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Why a row is superseded."""

    reason: str
    """Continues the sentence "Being measured again: "."""
    misleads: bool = False
    """Leave the row out of a mean even if fewer than `ENOUGH` rows remain."""


MARKS = {
    "starts as the teacher": Mark(
        reason="seed 0 gave the student the initial weights of the weak teacher (cells left out)",
        misleads=True,
    ),
    "starts with the teacher's first layer": Mark(
        reason=(
            "seed 0 gave LeNet-5-half the initial first layer of the LeNet-5 teacher, 75 of its "
            "15,738 weights"
        )
    ),
    "ring of N + 512": Mark(reason="rings held one block of 512 images more than they should"),
    "one after the other": Mark(
        reason=(
            "each arm ran once, one after the other, on a machine whose speed drifts, and without "
            "the bfloat16 baseline"
        )
    ),
    "two changes in a rung": Mark(
        reason=(
            "each rung ran once, one after the other; `fused views` also switched on channels-last"
        )
    ),
    "older kernel": Mark(reason="the loss kernel was changed after these rows (336504b)"),
    "older arithmetic": Mark(
        reason="the loss kernel holds a stricter bound on its error since (134281b)"
    ),
    "older paths": Mark(
        reason="jsd, alpha_beta and dist were made faster after these rows (3806b2a)"
    ),
    "float sums": Mark(
        reason="the columns of dist were added up in float then, which lost digits (e86ee05)"
    ),
    "compiled sampler": Mark(
        reason=(
            "samplers were compiled on a CPU then, 22 to 24 s a job, and the two jobs differ in "
            "first fill, reuse and number of images"
        )
    ),
    "one seed": Mark(reason="one seed says nothing of the spread"),
    "shifts by two pixels": Mark(
        reason=(
            "views were shifted by up to 2 pixels then, and LeNet-5-half trained with AdamW, which "
            "keeps it below the published accuracy"
        )
    ),
    "shorter denoiser": Mark(
        reason="the denoiser saw a third as many views as today", misleads=True
    ),
    "AdamW students": Mark(
        reason="the students trained with AdamW then, and with Muon today", misleads=True
    ),
    "Muon teacher": Mark(
        reason="the teacher trained with Muon then, as it does not today", misleads=True
    ),
    "beside other work": Mark(reason="the machine was busy with other work during these timings"),
}


def counted(rows: Iterable[Row], cell: Callable[[Row], Any] = lambda _: None) -> list[Row]:
    """Leave out superseded rows of every cell that other rows stand for.

    Args:
        rows: Rows of one table.
        cell: What a mean is taken over: rows of an equal cell stand for each other.
    """
    rows = list(rows)
    others = _others(rows, cell)

    def is_shown(row: Row) -> bool:
        mark = MARKS.get(row.get("superseded", ""))
        enough = 1 if mark is not None and mark.misleads else _enough(row)
        return "superseded" not in row or others[cell(row)] < enough

    return [row for row in rows if is_shown(row)]


def awaited(rows: Iterable[Row], cell: Callable[[Row], Any] = lambda _: None) -> list[Row]:
    """Find the superseded rows that too few other rows stand for."""
    rows = list(rows)
    others = _others(rows, cell)
    return [row for row in rows if "superseded" in row and others[cell(row)] < _enough(row)]


def _enough(row: Row) -> int:
    """Return how many rows replace one: figures of a cell itself are no mean over seeds."""
    once = row.get("seed") == "quality" or ("part" in row and "seed" not in row)
    return 1 if once else ENOUGH


def remarks(rows: Iterable[Row]) -> str:
    """Say why rows are being measured again; empty where none is superseded."""
    names = dict.fromkeys(row["superseded"] for row in rows if "superseded" in row)
    reasons = "; ".join(MARKS[name].reason for name in names)
    return f"Being measured again: {reasons}." if reasons else ""


def made_by(name: str, rows: Iterable[Row], required: Sequence[str] = ()) -> str:
    """Return a sentence with the commands and commits that made rows.

    Args:
        name: Name of the measurement.
        rows: Rows of one table.
        required: Arguments without a default.
    """
    commands: dict[str, dict[str, None]] = {}
    for row in rows:
        words = shlex.join(["python", "-m", "benchmarks", name, *required, *_words(row)])
        commands.setdefault(words, {})[row.get("commit", row["environment"]["commit"])] = None
    said = (f"`{words}` at {', '.join(commits)}" for words, commits in commands.items())
    return f"Made by {'; '.join(said)}."


def defaults(name: str, required: Sequence[str] = ()) -> Row:
    """Return the arguments that rows record if the command is called without options."""
    module = importlib.import_module(module_of(name))
    return recorded(module.parse(list(required)))


def unknown_marks() -> list[str]:
    """Return one line for each row whose mark has no meaning."""
    return [
        f"results/{bench}.jsonl:{number}: superseded: got {row['superseded']!r}, expected one of "
        f"{', '.join(map(repr, MARKS))}"
        for bench in sorted(path.stem for path in harness.RESULTS.glob("*.jsonl"))
        for number, row in enumerate(read_rows(bench), 1)
        if row.get("superseded", next(iter(MARKS))) not in MARKS
    ]


def other_arguments(name: str, rows: Iterable[Row], required: Sequence[str] = ()) -> list[str]:
    """Return one line for each set of arguments of rows that differs from the defaults."""
    expected = defaults(name, required)
    found = {
        json.dumps(row.get("arguments")): row.get("arguments")
        for row in rows
        if "superseded" not in row
    }
    return [
        f"{name}: arguments of rows: got {got}, expected the defaults {expected}; change the "
        "defaults, measure again or mark the rows as superseded"
        for got in found.values()
        if got != expected
    ]


def _others(rows: Iterable[Row], cell: Callable[[Row], Any]) -> dict[Any, int]:
    """Count the rows of each cell that are not superseded."""
    others: dict[Any, int] = {}
    for row in rows:
        others[cell(row)] = others.get(cell(row), 0) + ("superseded" not in row)
    return others


def _words(row: Row) -> list[str]:
    """Return the command-line words of a row's arguments, without switches that are off."""
    words: list[str] = []
    for name, value in row["arguments"].items():
        if value is None or value is False or value == []:
            continue
        flag = [] if name == "overrides" else [f"--{name.replace('_', '-')}"]
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [*flag, *(str(v) for v in values)]
    return words
