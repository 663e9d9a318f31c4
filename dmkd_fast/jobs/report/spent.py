"""Sections of a page about the ring of images and about what a run has cost."""

from __future__ import annotations

from collections.abc import Sequence

from dmkd_fast.jobs.report import svg
from dmkd_fast.jobs.report.data import PARTS, RunData
from dmkd_fast.jobs.report.html import duration, figure, number, percent, table


def ring(run: RunData) -> str:
    """Return the charts of the ring of images."""
    charts: list[str] = []
    for key, head, label, scale in (
        ("ring_fill", "Filled slots", "slots (%)", 100),
        ("ring_uses", "Mean uses of an image", "views per image", 1),
        ("ring_age_blocks", "Mean age of an image", "age (blocks)", 1),
    ):
        points = run.points("wall_s", key, scale)
        if points:
            x = svg.time_axis([a for a, _ in points])
            y = svg.axis([b for _, b in points], label, start=0.0)
            charts.append(figure(svg.curves(head, [svg.Curve(points=points)], x, y), ""))
    found = run.facts.get("ring", {})
    for key, head, label in (
        ("uses", "Images by number of uses", "views drawn from the image"),
        ("ages", "Images by age", "age (blocks made since)"),
    ):
        counts, names = _bins(found.get(key, []), is_open=key == "uses")
        if counts:
            chart = svg.histogram(head, counts, names, label, "images (number)")
            charts.append(figure(chart, ""))
    if not charts:
        return ""
    fact = f" It has {found['slots']:,} slots." if "slots" in found else ""
    return (
        f'<div class="charts">{"".join(charts)}</div><p class="caption">The ring holds the images '
        f"that can be drawn now; new blocks of images overwrite the oldest.{fact} The bars show "
        "the images in the ring at the last look.</p>"
    )


def _bins(counts: Sequence[int], *, is_open: bool, most: int = 32) -> tuple[list[int], list[str]]:
    """Merge counts of 0, 1, 2 ... into at most `most` bins, and name the bins."""
    last = max((i for i, count in enumerate(counts) if count), default=-1)
    if last < 0:
        return [], []
    first = next(i for i, count in enumerate(counts) if count)
    first = 0 if first < last / 3 else first
    width = -(-(last + 1 - first) // most)
    starts = range(first, last + 1, width)
    merged = [sum(counts[start : start + width]) for start in starts]
    names = [str(s) if width == 1 else f"{s}\u2013{s + width - 1}" for s in starts]
    if is_open and last == len(counts) - 1:
        names[-1] = f"{starts[-1]}+"
    return merged, names


def times(run: RunData) -> str:
    """Return the table of seconds by part of the run."""
    spent = run.times()
    whole = sum(spent.values())
    if not whole:
        return ""
    rows = [
        (PARTS[name], f"{seconds:,.1f}", percent(seconds / whole, 1), seconds / whole)
        for name, seconds in spent.items()
        if seconds >= 0.05 or seconds / whole >= 0.001
    ]
    device = run.config.get("device")
    note = (
        " Work is queued on the GPU: a part shows how long the host queued work or waited for the "
        "GPU, and it waits mostly in the statistics. A profiler shows the GPU's own times."
        if device == "cuda"
        else ""
    )
    return table(("part", "seconds", "share", ""), rows, numbers="tnnb") + (
        '<p class="caption">Wall-clock seconds of the process when this page was written, by what '
        f"it was doing.{note}</p>"
    )


def cost(run: RunData) -> str:
    """Return the table of images, forwards and seconds."""
    facts, images = run.facts, run.images
    forwards = facts.get("forwards_per_image", [])
    teachers = facts.get("num_teachers", 1)
    seconds = run.wall_s
    rows: list[tuple[str, str]] = []
    if images:
        made = "images made" if forwards else "images read"
        rows.append((made, number(images)))
    if images and len(forwards) == 1:
        each = forwards[0][1]
        rows.append(("denoiser forwards", f"{images * each:,.0f} ({each} per image)"))
    elif forwards:
        each = "; ".join(f"{count} from {start:.0%} of the run" for start, count in forwards)
        rows.append(("denoiser forwards per image", each))
    if images and run.views:
        rows.append(("views per image", f"{run.views / images:.2f}"))
    rows.append(("student forwards and backwards", number(run.views)))
    if run.command == "dmkd distill":
        rows.append(("teacher forwards", number(run.views * teachers)))
    for name, key in (("student", "student_parameters"), ("teacher", "teacher_parameters")):
        if key in facts:
            rows.append((f"parameters of the {name}", f"{facts[key]:,}"))
    rows.append(("wall-clock time", duration(seconds)))
    cpu_s = run.summary.get("cpu_s", facts.get("cpu_s"))
    if cpu_s is not None:
        rows.append(("CPU time, all threads", duration(cpu_s)))
    if run.config.get("device") == "cuda" and seconds is not None:
        rows.append(("GPU time reserved", duration(seconds * facts.get("world_size", 1))))
    if run.views and seconds:
        rows.append(("views per second, whole run", number(run.views / seconds)))
    return table(("what", "amount"), rows, numbers="tn")
