"""From a folder of color drawings to a student, by the public commands alone.

The commands are those of the guide from a folder of images to a student: `init own-data`,
`pretrain teacher`, `pretrain denoiser`, `pretrain fewstep` and `distill`, with longer trainings
than the configs have. The question is what a student of generated images lacks beside one of the
real training images, with the same teacher, settings and number of views. `examples/clipart.py`
makes the folder. The runs stay in runs/studies/drawings, where a stopped command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.findings import study
from benchmarks.findings.tables import Grid, Row, spent
from benchmarks.harness import ROOT, arguments
from benchmarks.job.tables import ratio_interval
from benchmarks.markdown import table

STUDY = "drawings"
LENGTHS = {"teacher": 40_000, "denoiser": 160_000, "fewstep": 32_768}
"""Views of the three trainings before the students. Their configs are made for minutes."""
ARMS = {"real": "real training drawings", "generated": "generated drawings"}
GOAL = 0.9
"""Of the accuracy of the student of real images."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments(STUDY, __doc__ or "", selects=["seeds"])
    parser.add_argument("--data", type=Path, required=True, help="folder with train and test")
    parser.add_argument("--seeds", type=int, default=3, help="students of an arm")
    parser.add_argument("--views", type=int, default=40_000, help="per student")
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    cells, folder = study.Cells(STUDY, options), study.CACHE / STUDY
    data = options.data.resolve()
    if not (folder / "distill.yaml").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        dmkd(folder, "init", "own-data", "--data", str(data))
    for job in LENGTHS:
        if not cells.has(part=job):
            cells.add({"part": job}, pretrain(folder, job, data, options))
    for seed in study.student_seeds(options.seeds):
        for arm in ARMS:
            if not cells.has(part="student", arm=arm, seed=seed):
                figures = train_student(folder, arm, seed, data, options)
                cells.add({"part": "student", "arm": arm, "seed": seed}, figures)
    cells.finish()


def pretrain(folder: Path, job: str, data: Path, options: argparse.Namespace) -> Row:
    """Run a command of `dmkd pretrain`, or go on with it, and return its figures."""
    saved = f"runs/{job}/config.yaml"
    if (folder / saved).is_file():
        command = [saved, "--resume"]
    else:
        command = [f"{job}.yaml", f"run_dir=runs/{job}", f"num_threads={options.threads}"]
        command.append(f"train.num_views={LENGTHS[job]}")
    source = [] if job == "fewstep" else ["--data", str(data)]
    found, cpu_s = dmkd(folder, "pretrain", job, *command, *source)
    kept = ("test_top1", "held_out_top1", "held_out_loss", "views", "parameters")
    return chosen(found, kept) | {"cpu_s": cpu_s}


def train_student(
    folder: Path, arm: str, seed: int, data: Path, options: argparse.Namespace
) -> Row:
    """Run `dmkd distill` on generated or on real images."""
    changes = [f"seed={seed}", f"num_threads={options.threads}", "eval.num_points=1"]
    changes += [f"train.num_views={options.views}", f"run_dir=runs/{arm}-{seed}-{time.time_ns()}"]
    if arm == "real":
        denoiser = yaml.safe_load((folder / "denoiser.yaml").read_text(encoding="utf-8"))
        size = denoiser["data"]["image_size"]
        changes += ["denoiser=null", "sampler=null"]
        changes += [f"source.path={data / 'train'}", f"source.image_size={size}"]
    found, cpu_s = dmkd(folder, "distill", "distill.yaml", *changes)
    kept = ("top1", "agreement", "images", "views", "wall_s")
    return chosen(found, kept) | {"cpu_s": cpu_s}


def chosen(found: Row, names: Sequence[str]) -> Row:
    """Return some of a command's figures, with four digits after the point."""
    figures = {name: found[name] for name in names if found.get(name) is not None}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}


def dmkd(folder: Path, *command: str) -> tuple[dict[str, Any], float]:
    """Run one command in a process of its own.

    Returns:
        The JSON of its last line, and its processor seconds.
    """
    study.say(f"dmkd {' '.join(command)}")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    before = _children_s()
    done = subprocess.run(
        [sys.executable, "-m", "dmkd_fast", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found, round(_children_s() - before, 1)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def drawings_table(rows: list[Row]) -> str:
    """Write the students of real and of generated images, and their ratio."""
    students = [r for r in rows if r["part"] == "student"]
    grid = Grid(students, lambda r: r["arm"])
    body = []
    for arm, name in ARMS.items():
        if arm in grid.cells:
            own = [r for r in students if r["arm"] == arm]
            agreement = 100 * sum(r["agreement"] for r in own) / len(own)
            less = "" if arm == "real" else grid.difference([arm], ["real"])
            body.append([name, grid.text(arm), str(len(own)), f"{agreement:.1f}", less])
    header = ["student sees", "top-1, %", "seeds", "agreement with teacher, %", "less real"]
    teacher = next(r for r in rows if r["part"] == "teacher")
    generated, real = (grid.by_seed[arm] for arm in ("generated", "real"))
    ratios = [generated[seed] / real[seed] for seed in sorted(generated.keys() & real.keys())]
    if len(ratios) > 1:
        low, mean, high = ratio_interval(ratios)
        over = f"{mean:.3f} ({low:.3f} to {high:.3f}; geometric mean and 95 % interval over seeds)"
    else:
        over = f"{ratios[0]:.3f} (1 seed)"
    note = (
        f"Teacher: {100 * teacher['test_top1']:.2f} %. Accuracy of generated over real: {over}, "
        f"goal {GOAL}. {students[0]['views']:,} views a student, ± 95 % interval "
        f"(deviation pooled; differences paired by seed). "
    )
    return table(header, body, note + spent(rows))


DRAWING_TABLES: dict[str, tuple[str, Callable[[Row], bool], Callable[[list[Row]], str]]] = {
    STUDY: (STUDY, lambda r: True, drawings_table)
}
