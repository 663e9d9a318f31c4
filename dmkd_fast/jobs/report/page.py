"""The page of one run, from what its directory says."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from dmkd_fast.jobs.report import spent as report_spent
from dmkd_fast.jobs.report import svg
from dmkd_fast.jobs.report.data import NO_CLASS, STATES, RunData, go_on_command, repeat_command
from dmkd_fast.jobs.report.html import (
    document,
    duration,
    figure,
    number,
    percent,
    section,
    shorten,
    table,
    text,
)

MOST_CLASSES, SHOWN_EACH = 40, 20
_NAME = 48


def render(run: RunData) -> str:
    """Return the page of a run as HTML."""
    parts = [
        _head(run),
        _overview(run),
        section("Accuracy and loss", training_charts([run])),
        section("Training images", _samples(run)),
        section("Real test images", _examples(run)),
        section("Classes", _classes(run), _confusion(run)),
        section("Calibration", _calibration(run)),
        section("Ring of images", report_spent.ring(run)),
        section("Where the time went", report_spent.times(run)),
        section("Cost", report_spent.cost(run)),
        section("Commands", _commands(run)),
        section("Licenses and versions", _licenses(run)),
        section("Settings", f"<pre>{text(run.config_text)}</pre>"),
    ]
    title = f"{run.config.get('name', run.folder.name)}: {STATES[run.state]}"
    return document(title, "".join(parts), is_running=run.state == "running")


def training_charts(runs: Sequence[RunData]) -> str:
    """Return accuracy and loss of one or several runs against seconds, views and images."""
    charts = []
    for name, y_name in (("top1", "top-1 accuracy (%)"), ("loss", "loss")):
        for key, x_name in (("wall_s", "time"), ("views", "views"), ("images", "images")):
            scale = 100 if name == "top1" else 1
            lines = [
                svg.Curve(
                    points=run.points(key, name, scale), color=i % 8, has_marks=name == "top1"
                )
                for i, run in enumerate(runs)
            ]
            lines = [line for line in lines if line.points]
            if not lines:
                continue
            across = [x for line in lines for x, _ in line.points]
            x = (
                svg.time_axis(across)
                if key == "wall_s"
                else svg.axis(across, f"{x_name} (number)", start=0.0)
            )
            levels = _levels(runs) if name == "top1" else []
            up = [v for line in lines for _, v in line.points] + [value for value, _ in levels]
            y = svg.axis(up, y_name, log=name == "loss")
            head = f"{'Accuracy' if name == 'top1' else 'Loss'} against {x_name}"
            charts.append(figure(svg.curves(head, lines, x, y, levels=levels), ""))
    if not charts:
        return '<p class="soft">The first row of statistics has not been written yet.</p>'
    captions = [
        "Accuracy is the share of real test images that the student gets right; they decide "
        "nothing in the training.",
        "The loss is the distance between the student's and the teacher's probabilities, averaged "
        "since the point before.",
    ]
    if any(run.teacher_top1 is not None for run in runs):
        captions.insert(1, "The dashed line is the teacher.")
    if any(run.num_rows > len(run.rows) for run in runs):
        most = max(runs, key=lambda run: run.num_rows)
        captions.append(f"{len(most.rows):,} of {most.num_rows:,} points are drawn.")
    return f'<div class="charts">{"".join(charts)}</div><p class="caption">{" ".join(captions)}</p>'


def _levels(runs: Sequence[RunData]) -> list[tuple[float, int]]:
    found = {run.teacher_top1 for run in runs if run.teacher_top1 is not None}
    return [(100 * value, 1 if len(runs) == 1 else 7) for value in sorted(found)]


def _head(run: RunData) -> str:
    facts, name = run.facts, run.config.get("name", run.folder.name)
    what = f"<p>{text(facts['title'])}</p>" if "title" in facts else ""
    progress = f"{run.views:,} of {run.total_views:,} views" if run.total_views else ""
    command = f"<pre>{text(go_on_command(run))}</pre>"
    written = text(facts.get("written", ""))
    if run.state == "running":
        phase = progress if run.rows else "the first images are being made"
        left = _time_left(run)
        words = (
            f"<b>Running</b>: {phase}{left}. Written at {written}; this page loads itself again "
            "every few seconds. If that time stands still, the run was stopped, and "
            f"<code>dmkd report {text(run.folder)}</code> says how to go on."
        )
    elif run.state == "finished":
        words = f"<b>Finished</b> after {duration(run.wall_s)}, {written}."
    elif run.state == "interrupted":
        words = f"<b>Interrupted</b> at {progress or 'the start'}. To go on:{command}"
    elif run.state == "failed":
        reason = text(facts.get("message", ""))
        words = f"<b>Ended with an error</b> at {progress}: {reason} To go on:{command}"
    else:
        words = (
            f"<b>Killed or lost</b> at {progress or 'the start'}: no process works on this run any "
            f"more, and it has no result. To go on from the last checkpoint:{command}"
        )
    return (
        f"<h1>{text(name)}</h1>{what}<p class='soft'>{text(run.folder)}</p>"
        f'<div class="state {run.state}">{words}</div>'
    )


def _time_left(run: RunData) -> str:
    if len(run.rows) < 2 or not run.total_views:
        return ""
    first, last = run.rows[0], run.rows[-1]
    made = last["views"] - first["views"]
    if made <= 0 or last["views"] >= run.total_views:
        return ""
    spent = last["wall_s"] - first["wall_s"]
    left = spent * (run.total_views - last["views"]) / made
    return f", about {duration(left)} left"


def _overview(run: RunData) -> str:
    scores = run.facts.get("evaluation", {}).get("scores", {})
    agreement = run.summary.get("agreement", scores.get("agreement"))
    is_final = "top1" in run.summary
    facts = [
        (percent(run.top1), "student, top-1" if is_final else "student, top-1 so far"),
        (percent(run.teacher_top1), "teacher, top-1"),
        (percent(agreement), "agreement with the teacher"),
        (percent(run.summary.get("top5")), "student, top-5"),
        (number(run.images), "images"),
        (number(run.views), "views"),
        (duration(run.wall_s), "time"),
    ]
    cells = "".join(
        f"<div><b>{value}</b><span>{name}</span></div>"
        for value, name in facts
        if value != "\u2013"
    )
    if run.command != "dmkd distill":
        return f'<div class="facts">{cells}</div>'
    tested = run.facts.get("evaluation", {}).get("num_images")
    on = f"the {tested:,} real test images" if tested else "the real test images"
    return (
        f'<div class="facts">{cells}</div><p class="caption">Accuracy is measured on {on}, which '
        "the student never saw in training. Agreement is the share of them for which student and "
        "teacher make the same guess, right or wrong.</p>"
    )


def _samples(run: RunData) -> str:
    samples = run.facts.get("samples", [])
    if not samples:
        return ""
    rows = "".join(
        f"<span>{shorten(row['class'], _NAME)}</span>{_image(row, row['class'])}" for row in samples
    )
    count = run.facts.get("num_classes", len(samples))
    which = f"Images of {len(samples)} of {count:,} classes"
    if count <= len(samples):
        which = "Images of each class"
    elif [row["class"] for row in samples] == [NO_CLASS]:
        which = "Images, which have no class,"
    return figure(
        f'<div class="rows">{rows}</div>',
        f"{which} that were in the ring at the last look; the student learns from random "
        "views of such images, labeled by the teacher.",
    )


def _image(row: dict[str, Any], alt: str) -> str:
    wide, high = int(row["width"]), int(row["height"])
    small = ' class="small"' if high <= 40 else ""
    zoom = 2 if high <= 20 else 1
    return (
        f'<img{small} src="{text(row["src"])}" width="{zoom * wide}" height="{zoom * high}" '
        f'alt="{shorten(alt, _NAME)}">'
    )


def _examples(run: RunData) -> str:
    found = run.facts.get("evaluation", {})
    parts = []
    for key, head, caption in (
        (
            "right",
            "Right",
            "Real test images that the student gets right, each with the guesses of student and "
            "teacher and their confidence.",
        ),
        (
            "mistakes",
            "Most confident mistakes",
            "Real test images that the student gets wrong with the highest confidence; some of "
            "them have doubtful labels.",
        ),
    ):
        tiles = "".join(_tile(row) for row in found.get(key, []))
        if tiles:
            parts.append(f"<h3>{head}</h3>")
            parts.append(figure(f'<div class="tiles">{tiles}</div>', caption))
    return "".join(parts)


def _tile(row: dict[str, Any]) -> str:
    def guess(who: str, name: str, probability: float) -> str:
        kind = "good" if name == row["label"] else "bad"
        return (
            f'<br>{who}: <span class="{kind}">{shorten(name, _NAME)}</span> '
            f"{percent(probability, 0)}"
        )

    small = ' class="small"' if int(row["height"]) <= 40 else ""
    return (
        f'<figure><img{small} src="{text(row["src"])}" alt="{shorten(row["label"], _NAME)}">'
        f"<figcaption><b>{shorten(row['label'], _NAME)}</b>"
        f"{guess('student', row['guess'], row['probability'])}"
        f"{guess('teacher', row['teacher_guess'], row['teacher_probability'])}"
        "</figcaption></figure>"
    )


def _classes(run: RunData) -> str:
    rows = [row for row in run.facts.get("evaluation", {}).get("classes", []) if row["images"]]
    if not rows:
        return ""
    caption = (
        "For each class: the share of its test images that student and teacher get right, and the "
        "class that the student mistakes it for most often."
    )
    if len(rows) <= MOST_CLASSES:
        return _class_table(rows) + f'<p class="caption">{caption}</p>'
    ordered = sorted(rows, key=lambda row: (row["top1"], row["name"]))
    return (
        f"<h3>The {SHOWN_EACH} worst of {len(rows):,} classes</h3>"
        f"{_class_table(ordered[:SHOWN_EACH])}"
        f"<h3>The {SHOWN_EACH} best</h3>{_class_table(ordered[::-1][:SHOWN_EACH])}"
        f'<p class="caption">{caption} All classes: <code>dmkd report --json '
        f"{text(run.folder)}</code>.</p>"
    )


def _class_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        (
            shorten(row["name"], _NAME),
            f"{row['images']:,}",
            percent(row["top1"], 1),
            row["top1"],
            percent(row["teacher_top1"], 1),
            shorten(row["mistaken_for"], _NAME) + f" ({row['mistakes']:,})"
            if row["mistakes"]
            else "",
        )
        for row in rows
    ]
    head = ("class", "images", "student", "", "teacher", "mistaken for")
    return table(head, cells, numbers="tnnbnt")


def _confusion(run: RunData) -> str:
    evaluation = run.facts.get("evaluation", {})
    found = evaluation.get("confusion", {})
    if found.get("counts"):
        names = [row["name"] for row in evaluation["classes"]]
        return "<h3>Confusion</h3>" + figure(
            svg.heat_map(found["counts"], names),
            "Rows are the true classes, columns the student's guesses; a number is the percentage "
            "of the row, so a perfect student has 100 on the diagonal.",
        )
    if "picture" not in found:
        return ""
    pairs = [
        (shorten(true, _NAME), shorten(guess, _NAME), f"{count:,}")
        for true, guess, count in found.get("pairs", [])
    ]
    wide, each = found.get("per_pixel", 1), ""
    if wide > 1:
        each = f" A pixel stands for {wide} x {wide} classes and shows the largest share of them."
    picture = figure(
        f'<img class="confusion" src="{text(found["picture"])}" alt="Confusion matrix">',
        "Rows are the true classes from top to bottom, columns the student's guesses from left to "
        f"right; stronger color is a larger share of the row.{each}",
    )
    return f"<h3>Confusion</h3>{picture}<h3>Most frequent mistakes</h3>" + table(
        ("class", "taken for", "images"), pairs, numbers="ttn"
    )


def _calibration(run: RunData) -> str:
    evaluation = run.facts.get("evaluation", {})
    if "calibration" not in evaluation:
        return ""
    charts = "".join(
        figure(svg.reliability(who.capitalize(), bins, color), "")
        for color, (who, bins) in enumerate(evaluation["calibration"].items())
    )
    error = evaluation.get("scores", {}).get("ece")
    return (
        f'<div class="charts">{charts}</div><p class="caption">Test images in 15 groups by the '
        "confidence of the guess; a larger dot has more images. On the dashed line, a guess made "
        "with 80 % confidence is right 80 % of the time; below it, the network is too sure of "
        f"itself. The mean distance from the line (expected calibration error) of the student is "
        f"{percent(error)}.</p>"
    )


def _commands(run: RunData) -> str:
    lines: list[tuple[str, str]] = [("Repeat it in a directory of its own", repeat_command(run))]
    if run.state not in ("finished", "running"):
        lines.insert(0, ("Go on from the last checkpoint", go_on_command(run)))
    if run.state == "finished" and run.command == "dmkd distill":
        what = "Evaluate the student again, or on other images (--data DIR)"
        lines.append((what, f"dmkd evaluate {shlex.quote(str(run.folder))}"))
    lines.append(("Write this page again", f"dmkd report {shlex.quote(str(run.folder))}"))
    return "".join(f"<p>{text(what)}:</p><pre>{text(line)}</pre>" for what, line in lines)


def _licenses(run: RunData) -> str:
    licenses, versions = run.facts.get("licenses", {}), run.facts.get("versions", {})
    rows = [(text(f"license of the {what}"), text(name)) for what, name in licenses.items()]
    rows += [(text(what), text(version)) for what, version in versions.items()]
    return table(("what", "as stated by its files"), rows) if rows else ""
