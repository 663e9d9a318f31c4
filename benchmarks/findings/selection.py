"""Selection by the learner: does a chosen third of the images teach as well as all of them?

A pilot student trains on a random third. Then a third is chosen in every class: the images on which
the pilot is furthest from the teacher (`learner`), or of which the teacher is least certain
(`teacher`), which needs no learner. New students see a random third, each chosen third, or all
images, and the same number of views. Each seed has images of its own. LeNet-5 teaches LeNet-5-half.

Ten seeds were chosen before: between seeds the paired differences of `reuse` deviate by 0.25
points, and then a t test of 5 % finds a difference of 0.3 points with a probability of 0.9. The
random third is the size at which fewer images cost accuracy, so that there is something to gain.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.findings import study
from benchmarks.findings.study import Fitted, FixedSet
from benchmarks.findings.tables import Grid, Row, cell_of, spent
from benchmarks.harness import arguments
from benchmarks.markdown import table
from benchmarks.provenance import counted
from dmkd_fast.data.test_sets import ImageSet

TIMES = 3
THIRD = 1_024
VIEWS, PILOT_VIEWS = 256_000, 64_000
RANDOM, LEARNER, TEACHER, ALL = "random third", "learner", "teacher", "all"
ARMS = {
    RANDOM: "a random third",
    LEARNER: "the third on which a pilot student is furthest from the teacher",
    TEACHER: "the third of which the teacher is least certain",
    ALL: "all",
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("selection", __doc__ or "", selects=["seeds"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    cells = study.Cells("selection", options)
    size = TIMES * THIRD
    pool = study.generated(options.seeds * size, [], file="fashion_mnist.yaml")
    for number, seed in enumerate(study.student_seeds(options.seeds)):
        if all(cells.has(arm=arm, seed=seed) for arm in ARMS):
            continue
        own = slice(number * size, (number + 1) * size)
        every = FixedSet(images=pool.images[own], labels=pool.labels[own])
        chosen = thirds(every, seed)
        for arm in ARMS:
            if not cells.has(arm=arm, seed=seed):
                images = every if arm == ALL else subset(every, chosen[arm])
                figures = study.train_student(
                    images, teacher="lenet5", student="lenet5_half", num_views=VIEWS, seed=seed
                )
                cells.add({"arm": arm, "seed": seed}, figures)
    cells.finish()


def thirds(every: FixedSet, seed: int) -> dict[str, Tensor]:
    """Return the indices of each arm's images, in the order of their ids."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(every.labels), generator=generator)
    random = top_of_each_class(drawn, every.labels, THIRD)
    pilot = study.fitted(
        subset(every, random),
        teacher="lenet5",
        student="lenet5_half",
        num_views=PILOT_VIEWS,
        seed=1_000 + seed,  # Not the weights of the students that follow.
    )
    return {
        RANDOM: random,
        LEARNER: top_of_each_class(scores(every, pilot, distance), every.labels, THIRD),
        TEACHER: top_of_each_class(scores(every, pilot, uncertainty), every.labels, THIRD),
    }


def top_of_each_class(scores: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the indices of the best scores, from every class its share of `count`."""
    classes = labels.unique()
    share, rest = divmod(count, len(classes))
    kept = []
    for number, label in enumerate(classes):
        (own,) = torch.where(labels == label)
        best = scores[own].argsort(descending=True, stable=True)
        kept.append(own[best[: share + (number < rest)]])
    found: Tensor = torch.cat(kept).sort().values
    return found


def subset(images: FixedSet, indices: Tensor) -> FixedSet:
    """Return some of the images."""
    return FixedSet(images=images.images[indices], labels=images.labels[indices])


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """KL between teacher and student (B,), at the temperature of the students' loss."""
    log_q, log_p = (logits.div(4).log_softmax(1) for logits in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(1)


def uncertainty(student: Tensor, teacher: Tensor) -> Tensor:
    """Entropy of the teacher (B,)."""
    del student
    log_p = teacher.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


@torch.no_grad()
def scores(images: FixedSet, pilot: Fitted, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Score all images (N,) by the logits of student and teacher."""
    names = tuple(map(str, range(10)))
    every = ImageSet(images=images.images, labels=images.labels, class_names=names)
    inputs = pilot.spec.input, pilot.teacher_spec.input
    pilot.student.eval()
    parts = [
        score(pilot.student(views[inputs[0]]).float(), pilot.teacher(views[inputs[1]]).float())
        for views, _ in every.batches(inputs)
    ]
    return torch.cat(parts)


def selection_table(rows: list[Row]) -> str:
    """Write each arm's accuracy, and its difference from a random third and from all images."""
    rows = counted(rows, cell_of("selection"))
    grid = Grid(rows, lambda r: r["arm"])
    body = []
    for arm, name in ARMS.items():
        if arm in grid.cells:
            images = next(r["images"] for r in rows if r["arm"] == arm)
            less = [
                "" if arm == other or other not in grid.cells else grid.difference([arm], [other])
                for other in (RANDOM, ALL)
            ]
            body.append([name, f"{images:,}", grid.text(arm), *less])
    header = ["student sees", "images", "top-1, %", "less a random third", "less all"]
    note = (
        f"{rows[0]['views']:,} views, {grid.seeds} seeds, each with images of its own, ± 95 % "
        "interval (deviation pooled; differences paired by seed). Both chosen thirds need all "
        "images to be generated. "
    )
    return table(header, body, note + spent(rows))


SELECTION_TABLES: dict[str, tuple[str, Callable[[Row], bool], Callable[[list[Row]], str]]] = {
    "selection": ("selection", lambda r: True, selection_table)
}
