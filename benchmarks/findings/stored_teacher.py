"""Stored teacher logits: what eight fixed views an image cost a student, and what they save.

The embedded job reads its images from shards. One arm runs the teacher on every view. The others
read logits that `dmkd generate` stored, of all classes or of the three largest. All students of a
seed start from the same weights and see the same number of views. The crops of the stored arms are
those of the shards for every seed. A row of each set has its bytes and what making it took. The
times of students include loading and the final evaluation, for which all arms run the teacher.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.findings import study
from benchmarks.harness import ROOT, arguments
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.data.shards import PLAN
from dmkd_fast.jobs import distill, generate
from dmkd_fast.jobs.stored_logits import Wanted

BLOCK = 512
ARMS: dict[str, Wanted | None] = {"live": None, "full": Wanted(None, 8), "topk:3": Wanted(3, 8)}
"""What each arm's set holds beside the images."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("stored-teacher", __doc__ or "", selects=["seeds", "arms"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--images", type=int, default=10_240, help=f"a multiple of {BLOCK}")
    parser.add_argument("--views", type=int, default=120_000, help="per student")
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    cells = study.Cells("stored-teacher", options)
    for arm in options.arms:
        folder = study.CACHE / f"stored-teacher {arm} {options.images}"
        cell = {"arm": arm, "seed": "set", "images": options.images}
        if not cells.has(**cell) or not (folder / PLAN).exists():
            made = make_set(folder, ARMS[arm], options)
            if not cells.has(**cell):
                cells.add(cell, made)
    for seed in study.student_seeds(options.seeds):
        for arm in options.arms:
            cell = {"arm": arm, "seed": seed, "images": options.images, "views": options.views}
            if not cells.has(**cell):
                folder = study.CACHE / f"stored-teacher {arm} {options.images}"
                cells.add(cell, train(folder, arm, seed, options))
    cells.finish()


def make_set(folder: Path, wanted: Wanted | None, options: argparse.Namespace) -> dict[str, Any]:
    """Make the images of an arm, with its logits; return what that took."""
    overrides = [f"num_threads={options.threads}"]
    config = load_config(DistillConfig, ROOT / "configs" / "fashion_mnist.yaml", overrides)
    began, cpu = time.perf_counter(), time.process_time()
    generate.run(config, folder, options.images, logits=wanted, show=False)
    files = list(folder.glob("*.logits.parquet"))
    return {
        "bytes": sum(path.stat().st_size for path in files),
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
    }


def train(folder: Path, arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one student on an arm's set, and return its scores and times."""
    overrides = [
        f"source.path={folder}",
        f"source.block_images={BLOCK}",
        f"ring.capacity_images={options.images}",
        f"ring.min_fill_images={max(BLOCK, options.images - BLOCK)}",
        f"ring.samples_per_insert={options.views / options.images}",
        f"train.num_views={options.views}",
        f"seed={seed}",
        f"num_threads={options.threads}",
        "eval.num_points=1",
        f"teacher.stored={str(arm != 'live').lower()}",
    ]
    with tempfile.TemporaryDirectory() as run_dir:
        overrides.append(f"run_dir={run_dir}/run")
        found = distill.run(ROOT / "configs" / "from_disk.yaml", overrides, show=False)
    return {name: found[name] for name in ("top1", "agreement", "wall_s", "cpu_s")}
