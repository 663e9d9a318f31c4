"""What a page shows of a student on real test images: confusion, calibration, examples.

Shapes: N test images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.data.test_sets import EncodedSet, ImageSet
from dmkd_fast.jobs.evaluate import Evaluation
from dmkd_fast.jobs.report.images import cells, shade_uri, sheet_uris
from dmkd_fast.training.scoring import BINS

MOST_CELLS = 20
"""Number of classes up to which every cell of the confusion matrix is drawn."""
_PICTURE_SIDE, _PAIRS = 250, 20
NUM_RIGHT, NUM_WRONG = 12, 18
_EXAMPLE_BYTES = 90_000


def evaluation_facts(found: Evaluation, test_set: ImageSet | EncodedSet) -> dict[str, Any]:
    """Return the part of `report.json` that describes a student on its test set.

    Args:
        found: Result of `evaluate_run`, with guesses.
        test_set: The images that were evaluated.
    """
    guesses, names = found.guesses, tuple(found.classes)
    counts = confusion(guesses["label"], guesses["guess"], len(names))
    return {
        "scores": found.scores,
        "num_images": found.num_images,
        "num_not_finite": found.num_not_finite,
        "classes": _classes(found, counts),
        "confusion": _confusion_facts(counts, names),
        "calibration": {
            "student": calibration(guesses["probability"], guesses["guess"] == guesses["label"]),
            "teacher": calibration(
                guesses["teacher_probability"], guesses["teacher_guess"] == guesses["label"]
            ),
        },
        **_examples(found, test_set, names),
    }


def confusion(labels: Tensor, guesses: Tensor, num_classes: int) -> Tensor:
    """Return the confusion matrix (C, C) int64: rows are true classes, columns are guesses."""
    flat = torch.bincount(labels * num_classes + guesses, minlength=num_classes**2)
    return flat.view(num_classes, num_classes)


def calibration(probability: Tensor, is_right: Tensor) -> list[tuple[int, float, float]]:
    """Return number of images, mean confidence and accuracy for 15 bins of equal width."""
    place = (probability * BINS).long().clamp_max(BINS - 1)
    count, confidence, hits = (
        torch.bincount(place, weights=values.double(), minlength=BINS)
        for values in (torch.ones_like(probability), probability, is_right)
    )
    some = count.clamp(min=1)
    columns = (count.long().tolist(), (confidence / some).tolist(), (hits / some).tolist())
    return list(zip(*columns, strict=True))


def _classes(found: Evaluation, counts: Tensor) -> list[dict[str, Any]]:
    """Return one row per class: scores, and the class that it is most often taken for."""
    labels, names = found.guesses["label"], tuple(found.classes)
    right = (found.guesses["teacher_guess"] == labels).double()
    taught = torch.bincount(labels, weights=right, minlength=len(names)).tolist()
    most, taken_for = counts.clone().fill_diagonal_(0).max(dim=1)
    rows = []
    for i, (name, row) in enumerate(found.classes.items()):
        teacher = taught[i] / row["images"] if row["images"] else None
        mistake = {"mistaken_for": names[int(taken_for[i])], "mistakes": int(most[i])}
        rows.append({"name": name, **row, "teacher_top1": teacher, **mistake})
    return rows


def _confusion_facts(counts: Tensor, names: Sequence[str]) -> dict[str, Any]:
    if len(names) <= MOST_CELLS:
        return {"counts": counts.tolist()}
    off = counts.clone().fill_diagonal_(0).flatten()
    most, places = off.topk(min(_PAIRS, len(off)))
    pairs = [
        (names[place // len(names)], names[place % len(names)], count)
        for count, place in zip(most.tolist(), places.tolist(), strict=True)
        if count
    ]
    share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    # Several classes share a pixel if there are more classes than pixels.
    per_pixel = -(-len(names) // _PICTURE_SIDE)
    shade = torch.nn.functional.max_pool2d(share[None, None], per_pixel, ceil_mode=True)[0, 0]
    return {"picture": shade_uri(shade.sqrt()), "per_pixel": per_pixel, "pairs": pairs}


def _examples(
    found: Evaluation, test_set: ImageSet | EncodedSet, names: Sequence[str]
) -> dict[str, Any]:
    """Return test images with both guesses: right ones, and the most confident mistakes."""
    guesses = found.guesses
    is_right = guesses["guess"] == guesses["label"]
    wrong = guesses["probability"].where(~is_right, -1.0)
    worst = wrong.argsort(descending=True)[: min(NUM_WRONG, int((~is_right).sum()))]
    right = _spread(guesses["label"], is_right, NUM_RIGHT)
    chosen = torch.cat((right, worst))
    if not len(chosen):
        return {"right": [], "mistakes": []}
    pixels = _pixels(test_set, chosen.tolist(), found)
    rows = cells(pixels, torch.arange(len(chosen))[:, None], most_side=84)
    pictures = sheet_uris(rows, most_bytes=_EXAMPLE_BYTES)
    shown = []
    for picture, index in zip(pictures, chosen.tolist(), strict=True):
        row: dict[str, Any] = {name: column[index].item() for name, column in guesses.items()}
        shown.append(
            {
                **picture,
                "label": names[row["label"]],
                "guess": names[row["guess"]],
                "probability": row["probability"],
                "teacher_guess": names[row["teacher_guess"]],
                "teacher_probability": row["teacher_probability"],
            }
        )
    return {"right": shown[: len(right)], "mistakes": shown[len(right) :]}


def _spread(labels: Tensor, is_right: Tensor, count: int) -> Tensor:
    """Return indices of right guesses: the first one of each of `count` classes, evenly spaced."""
    present = labels[is_right].unique().tolist()
    firsts = [int(((labels == label) & is_right).nonzero()[0, 0]) for label in present]
    kept = min(count, len(firsts))
    return torch.tensor([firsts[i * len(firsts) // kept] for i in range(kept)], dtype=torch.int64)


def _pixels(test_set: ImageSet | EncodedSet, chosen: list[int], found: Evaluation) -> Tensor:
    """Return test images as the student sees them, (len(chosen), c, S, S) uint8 on the host."""
    few: ImageSet | EncodedSet
    if isinstance(test_set, ImageSet):
        rows = torch.tensor(chosen, device=test_set.labels.device)
        few = replace(test_set, images=test_set.images[rows], labels=test_set.labels[rows])
    else:
        few = replace(test_set, items=tuple(test_set.items[i] for i in chosen))
    spec = found.spec.input
    views = torch.cat([views[spec] for views, _ in few.batches([spec])])
    mean, std = (torch.tensor(v, device=views.device)[:, None, None] for v in (spec.mean, spec.std))
    return ((views * std + mean) * 255).round().clamp(0, 255).byte().cpu().contiguous()
