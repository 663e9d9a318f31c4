"""Reuse: how many different images are enough, and where does the ring pay?

Frozen sets of 1k to 30k images at equal views; and the same 30k images streamed through rings that
hold only part of them: equal compute, less memory. LeNet-5 teaches LeNet-5-half.
"""

from __future__ import annotations

import argparse

from benchmarks.findings import study
from benchmarks.harness import arguments

SIZES = (1_024, 3_072, 10_240, 30_720)
VIEWS = 256_000


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("reuse", __doc__ or "", selects=["seeds"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    cells = study.Cells("reuse", options)
    images = study.generated(SIZES[-1], [], file="fashion_mnist.yaml")
    for seed in study.student_seeds(options.seeds):
        for size in SIZES:
            for how in ("frozen", "ring") if size < SIZES[-1] else ("frozen",):
                cell = {"how": how, "held_images": size, "seed": seed}
                if not cells.has(**cell):
                    shown = images.first(size) if how == "frozen" else images
                    cells.add(
                        cell,
                        study.train_student(
                            shown,
                            teacher="lenet5",
                            student="lenet5_half",
                            num_views=VIEWS,
                            seed=seed,
                            capacity=size if how == "ring" else None,
                        ),
                    )
    cells.finish()
