"""The embedded job against the paper's way of working, and the way from one to the other.

Baselines make all images with diffusers' eager loop, write them as PNG files and train from these
(`baseline.py`); the ladder adds one change at a time to the published one (`ladder.py`). Ours is
`dmkd distill`: with the baselines' solver, steps, guidance, views and number of images; with the
few-step denoiser; and as configs/fashion_mnist.yaml ships. Student and first teacher are the same
everywhere. All arms also share views, optimizer, batch, length and averaged weights, but for "ours,
default" and the baseline "our recipe", which have those of configs/fashion_mnist.yaml. On the CPU.

All arms run once for each seed before the next seed begins, so that drift of the machine meets all.
With --record a seed is recorded when it is done, and not run again with the same arguments and
settings on a CPU of the same name. There are two parts: whole jobs at their own size, and the
ladder at a smaller one.

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

from benchmarks.harness import Report, arguments, environment, read_rows, recorded
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
from benchmarks.job.tables import Row, break_even, breakdown, by_arm, factor, reached, spread
from benchmarks.markdown import table, where
from dmkd_fast.runtime.device import cpu_has_bf16

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
YARDSTICKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fp32": ("vs fp32", (TARGET,)),
    "bf16": ("vs the faster bf16", (CHANNELS_LAST, COMPILED)),
    "our_recipe": ("vs bf16 with our recipe", (OUR_RECIPE,)),
}
"""Column of the table, and the baselines of which the fastest is divided by an arm."""
MEDIANS = {
    "images/s": ("images_per_s", ".0f"),
    "views/s": ("views_per_s", ",.0f"),
    "generate s": ("generation_s", ".0f"),
    "train s": ("training_s", ".0f"),
    "evaluate s": ("evaluation_s", ".0f"),
    "whole, s": ("wall_s", ".0f"),
    "CPU s": ("cpu_s", ".0f"),
    "disk MiB": ("disk_mib", ".0f"),
    "memory MiB": ("peak_memory_mib", ",.0f"),
}
CAUSES = (
    ("generation by our sampler", CHANNELS_LAST, EQUAL, "generation_s"),
    ("training at equal settings", CHANNELS_LAST, EQUAL, "training_s"),
    ("generation with fewer forwards", EQUAL, FEW_STEPS, "generation_s"),
    ("time to the target by our recipe", FEW_STEPS, DEFAULT, "s_to_target"),
)
"""What the gain over the eager bfloat16 baseline is made of: arms without and with it, figure."""


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
    same = {"part": options.part, "configs": study.configs(), "arguments": report.arguments}
    if options.record:
        valid = [row for row in read_rows(report.bench) if "superseded" not in row]
        # Times of two CPUs do not belong into one mean.
        here = environment()["device"]
        report.rows = [
            row
            for row in valid
            if same.items() <= row.items() and row["environment"]["device"] == here
        ]
        report.num_saved = len(report.rows)
    if not cpu_has_bf16():
        print(
            "this CPU has no bfloat16 instructions: its bfloat16 baselines take about nine times "
            "as long as float32, so compare with the float32 baseline alone",
            file=sys.stderr,
        )
    known = {row["seed"] for row in report.rows}
    for seed in range(options.seeds):
        if seed in known:
            print(f"seed {seed}: recorded already", file=sys.stderr)
            continue
        arms = options.arms or part.arms
        used = {ARMS[arm].images for arm in arms}
        for name in (*(i for i in IMAGES if i in used), *arms):
            _in_a_process(argv, work, seed, name)
        rows = rows_of(replace(study, seed=seed), work, part.arms)
        report.rows += [{"part": options.part, "configs": study.configs(), **row} for row in rows]
        if options.record:  # All seeds may take longer than a machine is there.
            report.save()
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
    facts = study.facts()
    for name in arms:
        path = part_file(work, study.seed, name)
        if not path.is_file():
            continue
        arm, found = ARMS[name], _read(path, facts)
        if arm.images is None:
            row, offset = _own_row(found), 0.0
        else:
            uses_pngs = arm.recipe is not None and not arm.recipe.ring
            made = _read(part_file(work, study.seed, arm.images), facts)
            row = _row_on(found, made, uses_pngs=uses_pngs)
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
        for label, (_, others) in YARDSTICKS.items():
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


def _read(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Figures of a part that was made for these facts."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.pop("study") != facts:
        raise RuntimeError(f"{path}: of another study; remove it, or give another --work")
    return found


def end_to_end_table(rows: list[Row]) -> str:
    """Whole jobs beside the baselines: ratios over all CPUs, then each CPU, the last one first."""
    found = dict.fromkeys(row["environment"]["device"] for row in reversed(rows))
    cpus = [[row for row in rows if row["environment"]["device"] == name] for name in found]
    tables = [_one_cpu(own) for own in cpus]
    return "\n".join([_ratios(rows, len(cpus)), *tables] if len(cpus) > 1 else tables)


def _ratios(rows: list[Row], num_cpus: int) -> str:
    """How many times sooner each arm reaches the target, over the runs of all CPUs."""
    arms, columns = _arms(rows), _columns(rows)
    body = [[arm, *(_sooner(own, label) for label in columns)] for arm, own in arms.items()]
    note = (
        f"{max(map(len, arms.values()))} runs on {num_cpus} CPUs together: how many times sooner "
        "the target is reached, geometric mean and 95 % interval, paired by seed and CPU."
    )
    return table(["way of working", *columns.values()], body, note)


def _arms(rows: list[Row]) -> dict[str, list[Row]]:
    return {
        arm: [r for r in rows if r["arm"] == arm] for arm in dict.fromkeys(r["arm"] for r in rows)
    }


def _columns(rows: list[Row]) -> dict[str, str]:
    """Yardstick and column of the baselines that there are."""
    arms = {r["arm"] for r in rows}
    return {
        label: column
        for label, (column, others) in YARDSTICKS.items()
        if not arms.isdisjoint(others)
    }


def _one_cpu(rows: list[Row]) -> str:
    """One line for each arm, over its seeds."""
    arms, columns = _arms(rows), _columns(rows)
    body = [
        [
            arm,
            spread(own, "top1", ".4f"),
            *(format(statistics.median(r[n] for r in own), form) for n, form in MEDIANS.values()),
            reached(own, "s_to_target"),
            *(_sooner(own, label) for label in columns),
        ]
        for arm, own in arms.items()
    ]
    few = {r["seed"]: r for r in arms.get(FEW_STEPS, arms.get(DEFAULT, []))}
    saved = [
        r["cpu_s"] - other["cpu_s"]
        for r in arms.get(EQUAL, [])
        if (other := few.get(r["seed"])) and other["views"] == r["views"]
    ]
    targets = ", ".join(f"{t:.4f}" for t in dict.fromkeys(r["target"] for r in rows))
    gaps = [r["resolution_s"] for r in rows]
    num_seeds = len({r["seed"] for r in rows})
    note = (
        f"{by_arm(rows, 'images')} images and {by_arm(rows, 'views')} views; "
        f"{num_seeds} {'seed' if num_seeds == 1 else 'seeds'}, all arms of a seed before the next "
        "seed. Top-1: mean ± std; times: medians; last columns: how many times sooner the target "
        f"is reached, geometric mean and 95 % interval, paired by seed. Targets {targets}; "
        f"evaluations are {min(gaps):.0f} to {max(gaps):.0f} s apart and count. Disk: PNG files; "
        f"of ours the run directory, checkpoints included. {_compiled(arms)}"
        f"{breakdown(rows, CAUSES)}{break_even(saved)} {where(rows)}."
    )
    header = ["way of working", "top-1", *MEDIANS, "s to target", *columns.values()]
    return table(header, body, note)


def _compiled(arms: dict[str, list[Row]]) -> str:
    """Say what compiling gains the bfloat16 baseline, paired by seed; empty if that is unknown."""
    eager = {r["seed"]: r["s_to_target"] for r in arms.get(CHANNELS_LAST, [])}
    pairs = [(eager.get(r["seed"]), r["s_to_target"]) for r in arms.get(COMPILED, [])]
    gains = [was / now for was, now in pairs if was and now]
    if not gains or len(gains) < len(pairs):
        return ""
    return f"Compiled, the bf16 baseline is there {factor(gains)} as soon as not compiled. "


def _sooner(rows: list[Row], label: str) -> str:
    """Write how many times sooner an arm reaches the target, with its interval."""
    _, others = YARDSTICKS[label]
    if len(others) > 1 and rows[0]["arm"] in others:
        return "-"  # At most 1 by construction, since the faster one counts.
    gains = [g for r in rows if (g := r.get(f"times_faster_than_{label}")) is not None]
    if 0 < len(gains) < len(rows):  # A mean of those that reach it would be one of survivors.
        return f"- ({len(gains)} of {len(rows)} reach it)"
    return factor(gains)
