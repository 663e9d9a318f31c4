"""The page that compares runs, and the list of runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dmkd_fast.jobs.report.data import PARTS, STATES, RunData
from dmkd_fast.jobs.report.html import (
    document,
    duration,
    number,
    percent,
    section,
    shorten,
    table,
    text,
)
from dmkd_fast.jobs.report.page import training_charts

MOST_SETTINGS, MOST_CLASSES = 60, 20
_ALWAYS_DIFFER = ("run_dir", "name")


def render(runs: Sequence[RunData], page: Path) -> str:
    """Return the page that compares runs as HTML.

    Args:
        runs: Runs to compare.
        page: File that the page will be written to, from which links to the runs lead.
    """
    key = "".join(
        f'<span><i style="border-color:var(--c{i % 8})"></i>{text(run.folder.name)}</span>'
        for i, run in enumerate(runs)
    )
    content = (
        f"<h1>Comparison of {len(runs)} runs</h1>",
        _results(runs, page),
        section("Accuracy and loss", f'<div class="key">{key}</div>', training_charts(runs)),
        section("Settings that differ", _settings(runs)),
        section("Classes", _classes(runs)),
        section("Where the time went", _times(runs)),
    )
    is_running = any(run.state == "running" for run in runs)
    note = (
        '<p class="soft">Some of these runs go on; run the same command again for newer figures.'
        "</p>"
        if is_running
        else ""
    )
    return document(f"Comparison of {len(runs)} runs", content[0] + note + "".join(content[1:]))


def differences(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """Return each setting that differs between runs, by its dotted name, with its values.

    A value is None where a run does not have the setting.
    """
    flat = [_flat(run.config) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    found = {name: [settings.get(name) for settings in flat] for name in names}
    return {
        name: values
        for name, values in found.items()
        if name not in _ALWAYS_DIFFER and any(value != values[0] for value in values)
    }


def short_differences(runs: Sequence[RunData]) -> list[str]:
    """Return for each run its settings that differ from those of most other runs, in one line."""
    found = differences(runs)
    lines = []
    for i in range(len(runs)):
        words = []
        for name, values in found.items():
            texts = [str(value) for value in values]
            common = max(texts, key=texts.count)
            if texts[i] != common or texts.count(common) == 1:
                words.append(f"{name}={'none' if values[i] is None else texts[i]}")
        lines.append(" ".join(words))
    return lines


def record(run: RunData, *, is_full: bool = False) -> dict[str, Any]:
    """Return a run for machines.

    Args:
        run: Run to describe.
        is_full: Whether to add the figures of the page; images are left out.
    """
    found: dict[str, Any] = {
        "run_dir": str(run.folder),
        "name": run.config.get("name"),
        "state": run.state,
        "top1": run.top1,
        "teacher_top1": run.teacher_top1,
        "images": run.images,
        "views": run.views,
        "wall_s": run.wall_s,
    }
    if not is_full:
        return found
    evaluation = run.facts.get("evaluation", {})
    pictures = ("right", "mistakes", "confusion")
    evaluation = {name: value for name, value in evaluation.items() if name not in pictures}
    left_out = ("samples", "evaluation", "state")
    facts = {name: value for name, value in run.facts.items() if name not in left_out}
    return {
        **found,
        "seconds_by_part": run.times(),
        "summary": run.summary,
        **facts,
        **evaluation,
        "settings": run.config,
    }


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[f"{before}{name}"] = value
    return flat


def _results(runs: Sequence[RunData], page: Path) -> str:
    best = max((run.top1 for run in runs if run.top1 is not None), default=None)
    rows = []
    for run in runs:
        link = os.path.relpath(run.folder.resolve() / "report.html", page.parent)
        link = quote(os.fsencode(link))
        top1 = percent(run.top1)
        rows.append(
            (
                f'<a href="{text(link)}">{shorten(run.folder.name, 60)}</a>',
                STATES[run.state],
                f"<b>{top1}</b>" if run.top1 is not None and run.top1 == best else top1,
                percent(run.teacher_top1),
                percent(run.summary.get("agreement")),
                number(run.images),
                number(run.views),
                duration(run.wall_s),
            )
        )
    head = ("run", "state", "top-1", "teacher", "agreement", "images", "views", "time")
    return table(head, rows, numbers="ttnnnnnn") + (
        '<p class="caption">Top-1 is the share of the real test images that the student gets '
        "right; for a run without a result, at its last evaluation. The highest value is bold.</p>"
    )


def _settings(runs: Sequence[RunData]) -> str:
    found = differences(runs)
    if not found:
        return "<p>None: the runs have the same settings.</p>"
    rows = [
        (f"<code>{text(name)}</code>", *(shorten("\u2013" if v is None else v, 40) for v in values))
        for name, values in list(found.items())[:MOST_SETTINGS]
    ]
    more = len(found) - len(rows)
    note = f'<p class="caption">{more} more settings differ.</p>' if more > 0 else ""
    return table(("setting", *(shorten(run.folder.name, 40) for run in runs)), rows) + note


def _classes(runs: Sequence[RunData]) -> str:
    """Return the classes whose accuracy differs most between runs on the same classes."""
    scored = [run for run in runs if run.facts.get("evaluation", {}).get("classes")]
    tables = [
        {row["name"]: row["top1"] for row in run.facts["evaluation"]["classes"]} for run in scored
    ]
    if len(scored) < 2:
        return ""
    shared = [name for name in tables[0] if all(found.get(name) is not None for found in tables)]
    if not shared:
        return ""
    spread = {name: max(t[name] for t in tables) - min(t[name] for t in tables) for name in shared}
    shown = sorted(shared, key=lambda name: -spread[name])[:MOST_CLASSES]
    rows = [
        (
            shorten(name, 40),
            *(percent(found[name], 1) for found in tables),
            percent(spread[name], 1),
        )
        for name in shown
    ]
    head = ("class", *(shorten(run.folder.name, 40) for run in scored), "difference")
    return table(head, rows, numbers="t" + "n" * (len(scored) + 1)) + (
        f'<p class="caption">Top-1 accuracy by class, of the {len(shown)} classes for which the '
        "runs differ most.</p>"
    )


def _times(runs: Sequence[RunData]) -> str:
    times = [run.times() for run in runs]
    rows = [
        (PARTS[name], *(f"{spent[name]:,.1f}" if name in spent else "\u2013" for spent in times))
        for name in PARTS
        if any(name in spent for spent in times)
    ]
    if not rows:
        return ""
    head = ("part", *(shorten(run.folder.name, 40) for run in runs))
    return table(head, rows, numbers="t" + "n" * len(runs)) + (
        '<p class="caption">Wall-clock seconds of each process by what it was doing.</p>'
    )
