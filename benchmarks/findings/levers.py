"""Levers on the embedded job: what each change of one setting does at an equal number of views.

All students of a seed train on the same images of the few-step denoiser, read from disk, with the
settings of configs/fashion_mnist.yaml before Muon and a second teacher, but for one change. They
are scored on the 5,000 real images that neither the teachers nor the denoiser saw in training, so
that the test images decide nothing.
Times include loading, and the final evaluation of student and teacher.
"""

from __future__ import annotations

import argparse
import gzip
import math
import statistics
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from benchmarks.findings import study
from benchmarks.findings.stored_teacher import BLOCK, make_set
from benchmarks.findings.tables import Row, cell_of, spent, t_975
from benchmarks.harness import ROOT, arguments
from benchmarks.job.embedded import ADAMW
from benchmarks.markdown import table
from benchmarks.provenance import counted
from dmkd_fast.data.shards import PLAN
from dmkd_fast.data.test_sets import ImageSet
from dmkd_fast.jobs import distill

IMAGES = 10_240
SECOND_TEACHER = '[{path: "embedded:fashion_mnist/lenet5"}]'
BASE = "as shipped"
"""The settings then. Rows have this name."""
ARMS: dict[str, list[str]] = {
    BASE: [],
    "learning rate 1e-3": ["optim.lr=1e-3"],
    "learning rate 4e-3": ["optim.lr=4e-3"],
    "batch 32, learning rate 1.4e-3": ["train.batch_size=32", "optim.lr=1.4e-3"],
    "batch 128, learning rate 2.8e-3": ["train.batch_size=128", "optim.lr=2.8e-3"],
    "batch 256, learning rate 4e-3": ["train.batch_size=256", "optim.lr=4e-3"],
    "weight decay 0.005": ["optim.weight_decay=0.005"],
    "weight decay 0.2": ["optim.weight_decay=0.2"],
    "weight average 0.995": ["optim.ema_decay=0.995"],
    "warm-up 0.2": ["optim.warmup=0.2"],
    "SGD, learning rate 0.1": ["optim.name=sgd", "optim.lr=0.1", "optim.weight_decay=5e-4"],
    "Lion, learning rate 3e-4": ["optim.name=timm:lion", "optim.lr=3e-4"],
    "Muon, learning rate 2e-3": ["optim.name=timm:muon", "optim.lr=2e-3"],
    "Muon, learning rate 6e-3": ["optim.name=timm:muon", "optim.lr=6e-3"],
    "Muon, learning rate 2e-2": ["optim.name=timm:muon", "optim.lr=2e-2"],
    "temperature 2": ["loss.temperature=2"],
    "temperature 10": ["loss.temperature=10"],
    "standardized logits, temperature 2": ["loss.standardize_logits=true", "loss.temperature=2"],
    "DIST": ["loss.divergence=dist"],
    "KL 0.5, DIST 0.5": ["loss.divergence={forward_kl: 0.5, dist: 0.5}"],
    "reverse KL": ["loss.divergence=reverse_kl"],
    "mixup 0.2": ["mix.mixup_alpha=0.2"],
    "CutMix 1": ["mix.cutmix_alpha=1.0"],
    "flips": ["views.flip=0.5"],
    "no shifts": ["views.pad=0"],
    "shifts by up to 3": ["views.pad=3"],
    "two teachers": [f"more_teachers={SECOND_TEACHER}"],
}
"""Overrides of each arm. Learning rates follow the root of the batch."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("levers", __doc__ or "", selects=["seeds", "arms"])
    parser.add_argument("--data", type=Path, required=True, help="folder with the training set")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--views", type=int, default=60_000, help="per student")
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    cells = study.Cells("levers", options)
    images = study.CACHE / f"stored-teacher live {IMAGES}"
    if not (images / PLAN).exists():
        make_set(images, None, argparse.Namespace(images=IMAGES, threads=options.threads))
    held_out = study.CACHE / "held-out"
    write_idx(study.real(options.data)[1], held_out)
    for seed in study.student_seeds(options.seeds):
        for arm in options.arms:
            cell = {"arm": arm, "seed": seed, "views": options.views}
            if not cells.has(**cell):
                cells.add(cell, train(arm, seed, images, held_out, options))
    cells.finish()


def write_idx(images: ImageSet, folder: Path) -> None:
    """Write grey images as a test set in idx files."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "t10k-images-idx3-ubyte.gz", images.images[:, 0])
    _write(folder / "t10k-labels-idx1-ubyte.gz", images.labels)
    (folder / "classes.txt").write_text("\n".join(images.class_names) + "\n", encoding="utf-8")


def _write(path: Path, values: Tensor) -> None:
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head + bytes(values.flatten().byte().numpy()))


def train(arm: str, seed: int, images: Path, held_out: Path, options: argparse.Namespace) -> Row:
    """Train one student, and return its accuracy on the held-out images, and times."""
    with tempfile.TemporaryDirectory() as run_dir:
        overrides = [
            *ADAMW,
            f"source.path={images}",
            f"source.block_images={BLOCK}",
            f"ring.min_fill_images={IMAGES - BLOCK}",
            f"ring.samples_per_insert={options.views / IMAGES}",
            f"train.num_views={options.views}",
            f"seed={seed}",
            f"num_threads={options.threads}",
            f"eval.path={held_out}",
            "eval.num_points=1",
            *ARMS[arm],
            f"run_dir={run_dir}/run",
        ]
        found = distill.run(ROOT / "configs" / "from_disk.yaml", overrides, show=False)
    return {
        "held_out_top1": round(found["top1"], 4),
        "agreement": round(found["agreement"], 4),
        "wall_s": round(found["wall_s"], 1),
        "cpu_s": round(found["cpu_s"], 1),
    }


def levers_table(rows: list[Row]) -> str:
    """Write each arm's accuracy, its difference from the settings as shipped, and its time."""
    rows = counted(rows, cell_of("levers"))
    base = {r["seed"]: r for r in rows if r["arm"] == BASE}
    body = []
    for arm in dict.fromkeys(r["arm"] for r in rows):
        own = {r["seed"]: r for r in rows if r["arm"] == arm}
        gaps = [
            100 * (own[seed]["held_out_top1"] - base[seed]["held_out_top1"])
            for seed in own.keys() & base.keys()
        ]
        body.append(
            [
                arm,
                str(len(own)),
                f"{100 * statistics.mean(r['held_out_top1'] for r in own.values()):.2f}",
                "-" if arm == BASE else _interval(gaps),
                f"{statistics.median(r['cpu_s'] for r in own.values()):.0f}",
            ]
        )
    header = ["change", "seeds", "held-out top-1, %", "less as shipped, points", "CPU s"]
    note = (
        f"{rows[0]['views']:,} views a student. Differences are paired by seed, ± 95 % interval; "
        "those of one seed are observations."
    )
    return table(header, body, f"{note} {spent(rows)}")


def _interval(gaps: list[float]) -> str:
    mean = f"{statistics.mean(gaps):+.2f}"
    if len(gaps) < 2:
        return mean
    half = t_975(len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{mean} ± {half:.2f}"


LEVER_TABLES: dict[str, tuple[str, Callable[[Row], bool], Callable[[list[Row]], str]]] = {
    "levers": ("levers", lambda r: True, levers_table)
}
