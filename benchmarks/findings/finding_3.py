"""Finding 3: do weaker teachers teach better?

Three teachers, two students, three temperatures, at equal views of the same few-step images.
"""

from __future__ import annotations

import argparse

from benchmarks.findings import study
from benchmarks.harness import arguments
from dmkd_fast import Objective

COUNT = 10_240
STUDENTS = ("lenet5_half", "resnet")
TEACHERS, TEMPERATURES = study.EMBEDDED_TEACHERS, (1.0, 4.0, 10.0)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("finding-3", __doc__ or "", selects=["seeds", "students"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    cells = study.Cells("finding-3", options)
    images = study.generated(COUNT, [], file="fashion_mnist.yaml")
    for student in options.students:
        small = student == "lenet5_half"
        for seed in study.student_seeds(options.seeds):
            for teacher in TEACHERS:
                for temperature in TEMPERATURES:
                    cell = {
                        "student": student,
                        "teacher": teacher,
                        "temperature": temperature,
                        "seed": seed,
                    }
                    if not cells.has(**cell):
                        cells.add(
                            cell,
                            study.train_student(
                                images,
                                teacher=teacher,
                                student=student,
                                seed=seed,
                                objective=Objective(temperature=temperature),
                                num_views=128_000 if small else 38_400,
                            ),
                        )
    cells.finish()
