"""The embedded job against the paper's way of working, and the way from one to the other.

Baselines make all images with diffusers' eager loop, write them as PNG files and train from these
(`baseline.py`); the ladder adds one change at a time to the published one (`ladder.py`). Ours is
`dmkd distill`: with the baselines' solver, steps, guidance, views and number of images; with the
few-step denoiser; and as configs/fashion_mnist.yaml ships. Student and first teacher are the same
everywhere. All arms also share views, optimizer, batch, length and averaged weights, but for "ours,
default" and the baseline "our recipe", which have those of configs/fashion_mnist.yaml. On the CPU.

All arms run once for each seed before the next seed begins, so that drift of the machine meets all.
There are two parts: whole jobs at their own size, and the ladder at a smaller one.

Every arm and every set of images is made in a process of its own, with an empty compiler cache, and
leaves a file in --work: what is there is not run again. Arms whose images are made alike share a
set: its time was measured once and is part of each (`generation_carried_over` where it came from an
arm above). Imports do not count, but for those that `dmkd` makes on the way; loading, compiling
and evaluation do. For the baselines the fastest number of images per call and of DataLoader
workers is found first, which does not count. Time to target: to the first evaluation of the
averaged student on the real test images at the final accuracy of the fp32 baseline (no_grad) less
0.005, or above. Memory is that of the largest process, `commit` that of the arm's own run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, arguments, recorded
from benchmarks.job.arms import (
    ARMS,
    CHANNELS_LAST,
    COMPILED,
    DEFAULT,
    EQUAL,
    FEW_STEPS,
    IMAGES,
    OUR_RECIPE,
    TARGET,
    Study,
    part_file,
    run_part,
)
from benchmarks.job.fewstep import time_to

BELOW = 0.005  # Accuracy that the target may lie under the baseline's.


@dataclass(frozen=True, kw_only=True)
class Part:
    """A comparison: its arms and usual sizes."""

    arms: tuple[str, ...]
    images: int
    views: int
    points: int


_WHOLE = (TARGET, CHANNELS_LAST, COMPILED, OUR_RECIPE, EQUAL, FEW_STEPS, DEFAULT)
PARTS = {
    # The sizes of configs/many_steps.yaml.
    "whole": Part(arms=_WHOLE, images=10_240, views=200_000, points=20),
    "ladder": Part(
        arms=tuple(arm for arm in ARMS if arm not in {*_WHOLE} - {TARGET, CHANNELS_LAST}),
        images=1_024,
        views=20_480,
        points=2,
    ),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("end-to-end", __doc__ or "", selects=["part"])
    parser.add_argument("--part", choices=PARTS, required=True, help="whole jobs, or the ladder")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these, and what is there")
    parser.add_argument("--images", type=int, help="generated images")
    parser.add_argument("--views", type=int, help="views per student")
    parser.add_argument("--points", type=int, help="evaluations per student")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--work", type=Path, default=Path("runs/end-to-end"), help="kept results")
    parser.add_argument("--one", nargs=2, metavar=("SEED", "NAME"), help="only this part, in here")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    options = parser.parse_args(argv)
    part = PARTS[options.part]
    for name in ("images", "views", "points"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(part, name))
    return options


def main(argv: list[str]) -> None:
    options = parse(argv)
    part = PARTS[options.part]
    study = Study(
        num_images=options.images,
        num_views=options.views,
        num_points=options.points,
        overrides=tuple(options.overrides),
    )
    work = options.work / options.part
    if options.one is not None:
        seed, name = options.one
        run_part(replace(study, seed=int(seed)), name, work)
        return
    report = Report(bench="end-to-end", arguments=recorded(options))
    for seed in range(options.seeds):
        arms = options.arms or part.arms
        used = {ARMS[arm].images for arm in arms}
        for name in (*(i for i in IMAGES if i in used), *arms):
            _in_a_process(argv, work, seed, name)
        rows = rows_of(replace(study, seed=seed), work, part.arms)
        report.rows += [{"part": options.part, **row} for row in rows]
    for label, goal in (("fp32", 6.0), ("bf16", 2.5)):
        found = [r[f"times_faster_than_{label}"] for r in report.rows if r["arm"] == DEFAULT]
        gains = [gain for gain in found if gain is not None]
        if len(gains) < len(found):
            print(f"{DEFAULT} or {label}: never reached the target", file=sys.stderr)
        elif gains:
            mean = statistics.geometric_mean(gains)
            report.at_least(f"{DEFAULT}: time to target vs {label}", mean, goal)
    report.finish(record=options.record)


def rows_of(study: Study, work: Path, arms: Sequence[str]) -> list[dict[str, Any]]:
    """One row per arm of a seed that has been run, from the files of its parts.

    Raises:
        RuntimeError: A file is of another study.
    """
    rows: dict[str, dict[str, Any]] = {}
    used: set[str | None] = {None}
    for name in arms:
        if not part_file(work, study.seed, name).is_file():
            continue
        arm, found = ARMS[name], _read(study, work, name)
        if arm.images is None:
            row, offset = _own_row(found), 0.0
        else:
            uses_pngs = arm.recipe is not None and not arm.recipe.ring
            row = _row_on(found, _read(study, work, arm.images), uses_pngs=uses_pngs)
            offset = row.pop("before_s")
        curve = [(offset + wall, top1, spent) for wall, top1, spent in found["curve"]]
        rows[name] = {
            "arm": name,
            "after": arm.after,
            "seed": study.seed,
            "images_from": arm.images,
            "generation_carried_over": arm.images is not None and arm.images in used,
            "commit": found["commit"],
            **row,
            "top1": round(curve[-1][1], 4),
            "curve": curve,
        }
        used.add(arm.images)
    target = rows[TARGET]["top1"] - BELOW
    for row in rows.values():
        points = [(wall, top1) for wall, top1, _ in row["curve"]]
        bare = [(wall - spent, top1) for wall, top1, spent in row.pop("curve")]
        gaps = [b[0] - a[0] for a, b in itertools.pairwise(points)] or [points[0][0]]
        row |= {
            "target": round(target, 4),
            "s_to_target": time_to(points, target),
            "s_to_target_without_evaluations": time_to(bare, target),
            "resolution_s": round(statistics.mean(gaps), 1),
        }
    for row in rows.values():
        # The faster of the two bfloat16 baselines counts.
        for label, others in (
            ("fp32", (TARGET,)),
            ("bf16", (CHANNELS_LAST, COMPILED)),
            ("our_recipe", (OUR_RECIPE,)),
        ):
            times = [rows[other]["s_to_target"] for other in others if other in rows]
            mine, theirs = row["s_to_target"], min(filter(None, times), default=None)
            gain = None if mine is None or theirs is None else round(theirs / mine, 2)
            row[f"times_faster_than_{label}"] = gain
    return list(rows.values())


def _row_on(found: dict[str, Any], made: dict[str, Any], *, uses_pngs: bool) -> dict[str, Any]:
    """Figures of an arm on a set of images, both together."""
    parts = ["setup", "images", *(["pngs"] if uses_pngs else [])]
    spent, cpu = (sum(made[part][kind] for part in parts) for kind in ("wall_s", "cpu_s"))
    generation_s = spent - made["setup"]["wall_s"]
    peak = max(found["peak_memory_mib"], made["peak_memory_mib"])
    return {
        "before_s": spent,
        **_figures(
            found
            | {
                "wall_s": spent + found["wall_s"],
                "cpu_s": cpu + found["cpu_s"],
                "generation_s": generation_s,
                "num_images": made["num_images"],
                "disk_mib": made["disk_mib"] if uses_pngs else 0.0,
                "peak_memory_mib": peak,
            }
        ),
        "png_s": round(made["pngs"]["wall_s"] if uses_pngs else 0.0, 1),
        "proof": made["proof"] | found["proof"],
    }


def _own_row(found: dict[str, Any]) -> dict[str, Any]:
    """Figures of the job itself."""
    return {**_figures(found), "png_s": 0.0, "proof": found["proof"]}


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    parts = [found[f"{part}_s"] for part in ("generation", "training", "evaluation")]
    return {
        **{
            name: round(found[name], 1)
            for name in (
                "wall_s",
                "cpu_s",
                "generation_s",
                "training_s",
                "evaluation_s",
                "disk_mib",
            )
        },
        "other_s": round(found["wall_s"] - sum(parts), 1),
        "images": found["num_images"],
        "views": found["views"],
        "images_per_s": round(found["num_images"] / found["generation_s"], 1),
        "views_per_s": round(found["views"] / found["training_s"], 1),
        "peak_memory_mib": round(found["peak_memory_mib"]),
    }


def _in_a_process(argv: list[str], work: Path, seed: int, name: str) -> None:
    """Run a part unless it is there."""
    if part_file(work, seed, name).is_file():
        print(f"seed {seed}, {name}: there already", file=sys.stderr)
        return
    print(f"seed {seed}, {name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks", "end-to-end", *argv]
    with tempfile.TemporaryDirectory() as cache:
        environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        subprocess.run([*command, "--one", str(seed), name], check=True, env=environ)


def _read(study: Study, work: Path, name: str) -> dict[str, Any]:
    path = part_file(work, study.seed, name)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.pop("study") != study.facts():
        raise RuntimeError(f"{path}: of another study; remove it, or give another --work")
    return found
