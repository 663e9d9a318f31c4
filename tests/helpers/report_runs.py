"""Run directories made up for the tests of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.data.test_sets import ImageSet
from dmkd_fast.jobs.evaluate import Evaluation
from dmkd_fast.jobs.report.images import by_class, cells, evenly, sheet_uris
from dmkd_fast.jobs.report.scores import evaluation_facts
from dmkd_fast.training.scoring import Guesses, Scores

CONFIG = "name: {name}\nseed: {seed}\ndevice: cpu\ntrain:\n  num_views: 64000\n"


def row(number: int) -> dict[str, Any]:
    """Return a row of statistics; every fifth has an accuracy."""
    found: dict[str, Any] = {
        "views": 640 * (number + 1),
        "images": 64 * (number + 1),
        "wall_s": 1.5 * (number + 1),
        "loss": 2.0 / (number + 1),
        "lr": 1e-3,
        "ring_fill": 1.0,
        "ring_uses": 3.0 + number,
        "ring_age_blocks": 2.0,
    }
    return found | ({"top1": 1 - 1 / (number + 2)} if number % 5 == 4 else {})


def write_run(
    folder: Path,
    *,
    num_rows: int = 20,
    seed: int = 0,
    facts: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
) -> Path:
    """Write the files of a run, and return its folder."""
    folder.mkdir(parents=True)
    config = CONFIG.format(name="made_up", seed=seed)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    lines = "".join(f"{json.dumps(row(i))}\n" for i in range(num_rows))
    (folder / "stats.jsonl").write_text(lines, encoding="utf-8")
    if facts is not None:
        (folder / "report.json").write_text(json.dumps(facts), encoding="utf-8")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def many_class_facts(num_classes: int, *, side: int = 64, name: str = "class") -> dict[str, Any]:
    """Return the facts of a finished run on noise in color, the worst case for the page's size."""
    generator = torch.Generator().manual_seed(0)
    count = 4 * num_classes
    labels = torch.arange(count) % num_classes
    images = torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    names = tuple(f"{name} {i:04d} of a rather long name, " * 2 for i in range(num_classes))
    logits = torch.randn(count, num_classes, generator=generator)
    logits[torch.arange(count), labels] += 3
    teacher = logits + torch.randn(logits.shape, generator=generator)
    scores, guesses = Scores(num_classes), Guesses()
    scores.add(logits, labels, teacher)
    guesses.add(logits, labels, teacher)
    found = Evaluation(
        scores=scores.result(),
        classes=dict(zip(names, scores.by_class(), strict=True)),
        num_images=count,
        num_not_finite=0,
        run_dir=None,
        spec=ClassifierSpec(
            architecture="resnet18",
            num_classes=num_classes,
            in_chans=3,
            input_size=side,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ),
        guesses=guesses.result(),
    )
    classes = evenly(num_classes, 20)
    rows = cells(images, by_class(labels, classes, 10), most_side=48)
    pictures = sheet_uris(rows, most_bytes=150_000)
    samples = [{"class": names[i], **p} for i, p in zip(classes, pictures, strict=True)]
    test_set = ImageSet(images=images, labels=labels, class_names=names)
    return {
        "state": "finished",
        "command": "dmkd distill",
        "title": f"Student {name}.",
        "num_classes": num_classes,
        "samples": samples,
        "ring": {"slots": count, "uses": [0, 3, 9, 4], "ages": [5, 5, 6]},
        "seconds": {"generate": 10.0, "student": 30.5, "whole": 45.0},
        "licenses": {"teacher": name},
        "evaluation": evaluation_facts(found, test_set),
    }
