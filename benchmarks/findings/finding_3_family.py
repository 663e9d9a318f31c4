"""Finding 3 within one family: does a weaker teacher of the same kind teach better?

Teachers and students are ResNets of one kind, trained by one recipe without label smoothing;
teachers differ in width, depth and length of training alone. Two teachers of each strength,
from different training seeds, teach two students of the family at three temperatures. At the
temperature of 4, two other losses ask whether the answer is one about plain KL: logits of unit
deviation (`standardize_logits`), and the correlation of rows and columns (`dist`).

A row of each teacher says its accuracy on the test images, and its accuracy and entropy on the
generated images that it labels: the paper explains its finding by strong teachers being wrong
there. All students see the same few-step images.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.findings import study
from benchmarks.findings.tables import Grid, Row, cell_of, spent
from benchmarks.harness import arguments
from benchmarks.markdown import table
from benchmarks.provenance import counted
from dmkd_fast import Objective
from dmkd_fast.config.jobs import TeacherConfig
from dmkd_fast.data.test_sets import prepare
from dmkd_fast.jobs.pretrain.classifier import pretrain_teacher

STUDY = "finding-3-family"
COUNT = 10_240
FIRST_TEACHER_SEED = 100
"""Apart from the seeds of all students, which would otherwise start as their teacher."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A strength of teacher."""

    channels: tuple[int, ...] = (16, 32, 64, 64)
    blocks: int = 1
    """Residual blocks of each of the four stages."""
    length: float = 1.0
    """Number of training views as a fraction of --teacher-views."""

    @property
    def model(self) -> Row:
        """Section `model` of the teacher's config."""
        model_args = {"layers": [self.blocks] * 4, "channels": list(self.channels)}
        return {"arch": "resnet18", "stem": "conv3_stride2", "model_args": model_args}


TEACHERS = {
    "short": Kind(length=0.1),
    "narrow": Kind(channels=(8, 16, 32, 32)),
    "base": Kind(),
    "deep": Kind(blocks=2),
    "wide": Kind(channels=(32, 64, 128, 128)),
}
STUDENTS = ("resnet_quarter", "resnet_half")
"""Students with the architecture of the teachers `narrow` and `base`."""
TEMPERATURES = (1.0, 4.0, 10.0)
LOSSES: dict[str, Row] = {
    "kl": {},
    "standardized": {"standardize_logits": True},
    "dist": {"divergence": "dist"},
}
"""Arguments of `Objective`."""
CONTRASTS = (("short", "base"), ("narrow", "wide"))
"""Pairs of teachers whose students are compared: equal networks, and the smallest and largest."""
FEWER = ("short", "base", "wide")
"""Teachers, of one seed, of the losses other than KL."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    selects = ["seeds", "teacher_seeds", "students", "losses"]
    parser = arguments(STUDY, __doc__ or "", selects=selects)
    parser.add_argument("--data", type=Path, required=True, help="folder with the training set")
    parser.add_argument("--seeds", type=int, default=3, help="students of a cell")
    parser.add_argument("--teacher-seeds", type=int, default=2, help="teachers of a strength")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--views", type=int, default=48_000, help="per student")
    parser.add_argument("--teacher-views", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    cells = study.Cells(STUDY, options)
    images = study.generated(COUNT, [], file="fashion_mnist.yaml")
    students = [cell for cell in grid(options) if not cells.has(**cell, views=options.views)]
    for number in range(options.teacher_seeds):
        for name in TEACHERS:
            of_teacher: Row = {"teacher": name, "teacher_seed": FIRST_TEACHER_SEED + number}
            is_needed = any(of_teacher.items() <= cell.items() for cell in students)
            if is_needed or not cells.has(part="teacher", **of_teacher):
                get_teacher(cells, of_teacher, images, options)
    for cell in students:
        found = study.train_student(
            images,
            teacher=teacher_path(cell["teacher"], cell["teacher_seed"], options.teacher_views),
            student=cell["student"],
            num_views=options.views,
            seed=cell["seed"],
            objective=Objective(temperature=cell["temperature"], **LOSSES[cell["loss"]]),
        )
        cells.add(cell, found)
    cells.finish()


def get_teacher(
    cells: study.Cells, of_teacher: Row, images: study.FixedSet, options: argparse.Namespace
) -> None:
    """Train a teacher unless it is there, and record it unless it has a row.

    Raises:
        SystemExit: It differs from that of the row, which has taught other students.
    """
    cell = {"part": "teacher", **of_teacher}
    name, seed = of_teacher["teacher"], of_teacher["teacher_seed"]
    facts = train_teacher(name, seed, options)
    path = teacher_path(name, seed, options.teacher_views)
    if not cells.has(**cell):
        cells.add(cell, facts | on_images(path, images))
    elif not cells.has(**cell, top1=facts["top1"]):
        raise SystemExit(
            f"{path}: got a top-1 of {facts['top1']}, expected that of its row, as students of "
            "both would be mixed; mark the rows as superseded"
        )


def grid(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the cells of students; all teachers of a seed come together."""
    for seed in study.student_seeds(options.seeds):
        for number in range(options.teacher_seeds):
            for student in options.students:
                for loss in options.losses:
                    is_kl = loss == "kl"
                    for temperature in TEMPERATURES if is_kl else (4.0,):
                        for teacher in TEACHERS if is_kl else FEWER:
                            if is_kl or number == 0:
                                yield {
                                    "part": "student",
                                    "student": student,
                                    "loss": loss,
                                    "temperature": temperature,
                                    "teacher": teacher,
                                    "teacher_seed": FIRST_TEACHER_SEED + number,
                                    "seed": seed,
                                }


def teacher_path(name: str, seed: int, num_views: int) -> str:
    """Return the folder of a finished teacher."""
    return str(study.CACHE / "teachers" / f"{name}-{seed}-{num_views}" / "model")


def train_teacher(name: str, seed: int, options: argparse.Namespace) -> Row:
    """Train a teacher unless it is there, and return its figures; a stopped training goes on."""
    folder = Path(teacher_path(name, seed, options.teacher_views)).parent
    optim = {**study.RECIPES[STUDENTS[0]]}
    batch, pad = optim.pop("batch_size"), optim.pop("pad")
    config = TeacherConfig.model_validate(
        {
            "name": name,
            "seed": seed,
            "run_dir": str(folder),
            "num_threads": options.threads,
            "mean": 0.2860,
            "std": 0.3530,
            "model": TEACHERS[name].model,
            "views": {"size": 28, "pad": pad, "flip": 0.0},
            "optim": {**optim, "weight_decay": 0.05, "ema_decay": 0.99},
            "train": {
                "batch_size": batch,
                "num_views": round(TEACHERS[name].length * options.teacher_views),
                "compile": False,
                "log_every_steps": 500,
            },
        }
    )
    study.say(f"teacher {name}, seed {seed}")
    found = pretrain_teacher(config, options.data, resume=(folder / "config.yaml").is_file())
    return {
        "top1": round(found["test_top1"], 4),
        "held_out_top1": round(found["held_out_top1"], 4),
        "views": found["views"],
        "parameters": found["parameters"],
        "cpu_s": round(found["cpu_s"], 1),
    }


@torch.inference_mode()
def on_images(teacher: str, images: study.FixedSet) -> Row:
    """Return accuracy and mean entropy (nats) of a teacher on labeled images."""
    model, spec = study.load_teacher(teacher)
    logits = torch.cat([model(prepare(part, spec.input)) for part in images.images.split(512)])
    logs = logits.double().log_softmax(dim=1)
    right = logs.argmax(dim=1) == images.labels
    return {
        "generated_top1": round(right.double().mean().item(), 4),
        "generated_entropy": round(-(logs.exp() * logs).sum(dim=1).mean().item(), 4),
    }


def teachers_table(rows: list[Row]) -> str:
    """Write what the teachers are, and what they make of generated images."""
    rows = counted(rows, cell_of(STUDY))
    body = []
    for name, kind in TEACHERS.items():
        own = [r for r in rows if r["teacher"] == name]
        if not own:
            continue

        def each(key: str, scale: float = 100.0, own: list[Row] = own) -> str:
            return ", ".join(f"{scale * r[key]:.2f}" for r in own)

        shape = f"{' '.join(map(str, kind.channels))} x {kind.blocks}"
        cells = [f"{own[0]['parameters']:,}", f"{own[0]['views']:,}"]
        figures = [each("top1"), each("generated_top1"), each("generated_entropy", 1.0)]
        body.append([name, shape, *cells, *figures])
    header = [
        "teacher",
        "channels x blocks",
        "weights",
        "training views",
        "top-1, %",
        "top-1 on generated images, %",
        "entropy there, nats",
    ]
    seeds = " and ".join(str(s) for s in sorted({r["teacher_seed"] for r in rows}))
    return table(header, body, f"A figure for each training seed ({seeds}). {spent(rows)}")


def students_table(rows: list[Row]) -> str:
    """Write accuracy by teacher, and its slope over the teachers' accuracy."""
    rows = counted(rows, cell_of(STUDY))
    teachers = {(r["teacher"], r["teacher_seed"]): r for r in rows if r["part"] == "teacher"}
    students = whole_seeds([r for r in rows if r["part"] == "student"])
    if not students:
        return "No student seed is complete yet.\n"
    names = [name for name in TEACHERS if any(r["teacher"] == name for r in students)]
    body = []
    for cell in dict.fromkeys((r["student"], r["loss"], r["temperature"]) for r in students):
        own = [r for r in students if (r["student"], r["loss"], r["temperature"]) == cell]
        means = []
        for name in names:
            found = [100 * r["top1"] for r in own if r["teacher"] == name]
            means.append(f"{statistics.mean(found):.2f}" if found else "")
        grid = Grid(over_teacher_seeds(own), lambda r: r["teacher"])
        gaps = [
            grid.difference([one], [other]) if {one, other} <= grid.cells.keys() else ""
            for one, other in CONTRASTS
        ]
        by_seed = slopes(own, teachers)
        every = interval([statistics.mean(found) for found in by_seed.values()])
        body.append([cell[0], cell[1], f"{cell[2]:g}", *means, *gaps, every])
    contrasts = [f"{one} less {other}" for one, other in CONTRASTS]
    header = ["student", "loss", "T", *names, *contrasts, "slope"]
    note = (
        "Student top-1 in %, means over teacher seeds (with losses other than KL there is one) and "
        "student seeds. Slope: points of student per point of teacher accuracy on the test images, "
        "a line through the strengths shown for each pair of seeds. Intervals (95 %) are over "
        "student seeds, after a mean over teacher seeds: they do not cover other teachers, images, "
        "families or lengths. "
        f"{students[0]['views']:,} views a student."
    )
    return table(header, body, f"{note} {spent(rows)}")


def whole_seeds(students: list[Row]) -> list[Row]:
    """Leave out the student seeds of which a stopped study lacks a row that another seed has."""
    cell = cell_of(STUDY)
    by_seed: dict[int, set[Any]] = {}
    for row in students:
        by_seed.setdefault(row["seed"], set()).add(cell(row))
    every = set().union(*by_seed.values()) if by_seed else set()
    return [row for row in students if by_seed[row["seed"]] == every]


def over_teacher_seeds(rows: Iterable[Row]) -> list[Row]:
    """Return one row for each teacher and student seed, with the mean over teacher seeds."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        found.setdefault((row["teacher"], row["seed"]), []).append(row["top1"])
    return [
        {"teacher": teacher, "seed": seed, "top1": statistics.mean(values)}
        for (teacher, seed), values in found.items()
    ]


def slopes(rows: Iterable[Row], teachers: dict[tuple[str, int], Row]) -> dict[int, list[float]]:
    """Return the slopes of student over teacher accuracy, by student seed; one a teacher seed."""
    points: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row in rows:
        teacher = teachers[row["teacher"], row["teacher_seed"]]
        pair = points.setdefault((row["seed"], row["teacher_seed"]), [])
        pair.append((teacher["top1"], row["top1"]))
    found: dict[int, list[float]] = {}
    for (seed, _), pairs in points.items():
        if len(pairs) > 1:
            found.setdefault(seed, []).append(slope(pairs))
    return found


def slope(points: Iterable[tuple[float, float]]) -> float:
    """Slope of the line with the least squares through some points."""
    xs, ys = zip(*points, strict=True)
    return statistics.linear_regression(xs, ys).slope


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of values of different seeds."""
    if len(values) < 2:
        return f"{values[0]:+.2f} (1 seed)" if values else ""
    return f"{statistics.mean(values):+.2f} ± {Grid.half_of(values):.2f} ({len(values)} seeds)"


FAMILY_TABLES: dict[str, Any] = {
    f"{STUDY}-teachers": (STUDY, lambda r: r["part"] == "teacher", teachers_table),
    STUDY: (STUDY, lambda r: True, students_table),
}
