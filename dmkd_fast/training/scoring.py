"""Accuracy of a classifier on labeled images, counted batch by batch.

All counts are in one float64 vector on the device. The sum of the vectors of several ranks (one
all-reduce) gives the scores of the whole set, and no logits are kept.
Shapes: B images in a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.runtime.device import exact_float32
from dmkd_fast.runtime.errors import NotFiniteError
from dmkd_fast.runtime.output.progress import Progress
from dmkd_fast.views.spec import InputSpec, check_logits

Views = dict[InputSpec, Tensor]
BINS = 15
MOST_NOT_FINITE = 0.01


class Scores:
    """Count correct predictions per class, calibration gaps and agreement with a teacher.

    Args:
        num_classes: Number of classes C.
        device: Device of the logits.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        size = 3 * num_classes + BINS + 4
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)
        """Images, top-1 hits and top-5 hits per class (C each); calibration gaps (15); top-1 hits
        of the teacher, agreements, images with teacher logits; images whose logits have no
        softmax. () each where no size is given."""

    def add(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Count one batch, without waiting for the device.

        Logits without a softmax (with a NaN or +inf, or with -inf only) count as wrong and as no
        agreement. `num_not_finite` counts those of the model.

        Args:
            logits: Logits (B, C) of the model.
            labels: Class ids (B,) int64 in [0, C).
            teacher_logits: Logits (B, C) of the teacher, or None.

        Raises:
            UserError: The logits do not have the shape (B, C).
        """
        for name, given in (("model", logits), ("teacher", teacher_logits)):
            if given is not None:
                check_logits(name, given, len(labels), self.num_classes)
        count = self.num_classes
        images, top1, top5 = self.sums[: 3 * count].view(3, count)
        gaps, totals = self.sums[3 * count : 3 * count + BINS], self.sums[-4:]
        confidence = logits.double().softmax(dim=1).amax(dim=1)
        finite = confidence.isfinite()
        confidence = confidence.where(finite, 0)
        top = logits.topk(min(5, count), dim=1).indices  # (B, 5)
        hits = (top == labels[:, None]) & finite[:, None]
        first, any_of_five = hits[:, 0].double(), hits.any(dim=1).double()
        images.index_add_(0, labels, torch.ones_like(first))
        top1.index_add_(0, labels, first)
        top5.index_add_(0, labels, any_of_five)
        gaps.index_add_(0, (confidence * BINS).long().clamp_max(BINS - 1), first - confidence)
        if teacher_logits is not None:
            guess = teacher_logits.argmax(dim=1)
            has_teacher = teacher_logits.softmax(dim=1).amax(dim=1).isfinite()
            totals[0] += ((guess == labels) & has_teacher).sum()
            totals[1] += ((guess == top[:, 0]) & has_teacher & finite).sum()
            totals[2] += len(labels)
        totals[3] += finite.logical_not().sum()

    def result(self) -> dict[str, float]:
        """Return the scores over all counted images, as fractions in [0, 1].

        Returns:
            top1, top5, ece (expected calibration error over 15 equal-width bins, Guo et al. 2017)
            and, with a teacher, teacher_top1 and agreement.
        """
        sums, count = self.sums.cpu(), self.num_classes
        images, top1, top5 = sums[: 3 * count].view(3, count).sum(dim=1)
        gaps = sums[3 * count : 3 * count + BINS]
        hits, agreements, compared, _ = sums[-4:]
        scores = {"top1": top1 / images, "top5": top5 / images, "ece": gaps.abs().sum() / images}
        if compared > 0:
            scores |= {"teacher_top1": hits / compared, "agreement": agreements / compared}
        return {name: value.item() for name, value in scores.items()}

    @property
    def num_images(self) -> int:
        """Number of images counted."""
        return int(self.sums[: self.num_classes].sum())

    @property
    def num_not_finite(self) -> int:
        """Number of images whose logits have no softmax; they count as wrong."""
        return int(self.sums[-1])

    def by_class(self) -> list[dict[str, Any]]:
        """Return one row per class: images, top1, top5 (None for a class without images)."""
        rows = []
        for images, top1, top5 in self.sums[: 3 * self.num_classes].view(3, -1).T.tolist():
            rates = (top1 / images, top5 / images) if images else (None, None)
            rows.append({"images": int(images), "top1": rates[0], "top5": rates[1]})
        return rows


class Guesses:
    """Keep the guess for every image, of the model and of the teacher, with its probability."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> None:
        """Keep one batch, without waiting for the device; see `Scores.add`."""
        both = (logits, logits if teacher_logits is None else teacher_logits)
        best = [given.double().softmax(dim=1).max(dim=1) for given in both]
        columns = [labels.double(), *(column for pair in best for column in pair)]
        self._parts.append(torch.stack(columns))

    def result(self) -> dict[str, Tensor]:
        """Return a tensor (N,) on the host for each column, in the order of the images.

        Returns:
            label, guess, probability, teacher_guess, teacher_probability. A probability is 0
            where the logits have no softmax. Without a teacher, the guesses of the model are
            repeated.
        """
        label, p, guess, teacher_p, teacher_guess = torch.cat(self._parts, dim=1).cpu()
        return {
            "label": label.long(),
            "guess": guess.long(),
            "probability": p.nan_to_num(0.0),
            "teacher_guess": teacher_guess.long(),
            "teacher_probability": teacher_p.nan_to_num(0.0),
        }


@exact_float32()
@torch.inference_mode()
def measure(
    model: nn.Module,
    batches: Iterable[tuple[Views, Tensor]],
    *,
    input: InputSpec,
    num_classes: int,
    teacher: Callable[[Views], Tensor] | None = None,
    guesses: Guesses | None = None,
) -> Scores:
    """Count a classifier's correct predictions in eval mode, then restore the model's mode.

    Args:
        model: Classifier, (B, c, S, S) -> logits (B, C).
        batches: Pairs of views (by InputSpec) and labels, as from `ImageSet.batches`.
        input: Key of the views that the model takes.
        num_classes: Number of classes C.
        teacher: Function from the same views to logits (B, C), for teacher_top1 and agreement.
        guesses: Object that keeps the guess for every image.

    Raises:
        UserError: The logits do not have C classes.
    """
    was_training = model.training
    model.eval()
    scores: Scores | None = None
    try:
        for views, labels in batches:
            scores = scores or Scores(num_classes, labels.device)
            teacher_logits = None if teacher is None else teacher(views).float()
            logits = model(views[input])
            check_logits("model", logits, len(labels), num_classes)
            scores.add(logits.float(), labels, teacher_logits)
            if guesses is not None:
                guesses.add(logits.float(), labels, teacher_logits)
    finally:
        model.train(was_training)
    # A rank without images still takes part in the sum over ranks, on its device.
    return scores or Scores(num_classes, next((p.device for p in model.parameters()), "cpu"))


def tracked(
    batches: Iterable[tuple[Views, Tensor]], num_images: int, display: Progress
) -> Iterable[tuple[Views, Tensor]]:
    """Yield the batches of an evaluation, and show how many images they have had."""
    return display.track(
        batches, "evaluating", num_images, "images", size=lambda batch: len(batch[1])
    )


def check_trained(scores: Scores) -> None:
    """Refuse a trained network whose logits are not finite.

    Raises:
        NotFiniteError: The logits of more than 1 % of the images have no softmax.
    """
    broken, total = scores.num_not_finite, scores.num_images
    if broken > MOST_NOT_FINITE * total:
        raise NotFiniteError(
            f"the logits of {broken:,} of {total:,} test images are not finite, expected at most "
            f"{MOST_NOT_FINITE:.0%}: training has diverged; start a new run with a lower optim.lr, "
            "or with dtype=float32"
        )
