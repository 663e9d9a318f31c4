"""From a folder of color drawings to a student, by the public commands alone.

The commands are those of the guide from a folder of images to a student: `init own-data`,
`pretrain teacher`, `pretrain denoiser`, `pretrain fewstep` and `distill`. The networks before the
student train two to twelve times as long as their configs say. The question is what a student of
generated images lacks beside one of the real training images, with the same teacher, settings and
number of views. `examples/clipart.py` makes the folder. The runs stay in runs/studies, where a
stopped command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.findings import study
from benchmarks.findings.tables import Grid, Row, cell_of, spent
from benchmarks.harness import ROOT, arguments
from benchmarks.job.tables import ratio_interval
from benchmarks.markdown import table
from benchmarks.provenance import counted

STUDY = "drawings"
LENGTHS = {"teacher": 40_000, "denoiser": 480_000, "fewstep": 32_768}
"""Views of the three trainings before the students. Their configs are made for minutes."""
FIGURES = {
    "teacher": ("test_top1", "held_out_top1"),
    "denoiser": ("held_out_loss",),
    "fewstep": ("rms_to_teacher",),
}
"""Figures of each training that its row keeps, beside views, parameters and processor time."""
ARMS = {"real": "real training drawings", "generated": "generated drawings"}
GOAL = 0.9
"""Least accuracy of the student of generated images, as a fraction of that of real ones."""


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
    cells, data = study.Cells(STUDY, options), options.data.resolve()
    folder = runs_of(data)
    if not folder.is_dir():
        begun = folder.with_name(f"{folder.name}.begun")
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir(parents=True)
        dmkd(begun, "init", "own-data", "--data", str(data))
        begun.rename(folder)
    for job, length in LENGTHS.items():
        if not cells.has(part=job, views=length):
            cells.add({"part": job}, pretrain(folder, job, data, options))
    for seed in study.student_seeds(options.seeds):
        for arm in ARMS:
            if not cells.has(part="student", arm=arm, seed=seed, views=options.views):
                figures = train_student(folder, arm, seed, data, options)
                cells.add({"part": "student", "arm": arm, "seed": seed}, figures)
    cells.finish()


def runs_of(data: Path) -> Path:
    """Return the folder of the runs on some data with the present lengths."""
    digest = hashlib.sha256(json.dumps([str(data), LENGTHS]).encode()).hexdigest()
    return study.CACHE / f"{STUDY}-{digest[:8]}"


def pretrain(folder: Path, job: str, data: Path, options: argparse.Namespace) -> Row:
    """Run a command of `dmkd pretrain`, or go on with it, and return its figures."""
    changes = [f"num_threads={options.threads}", f"train.num_views={LENGTHS[job]}"]
    command = begin_or_resume(folder, f"{job}.yaml", f"runs/{job}", changes)
    source = [] if job == "fewstep" else ["--data", str(data)]
    found = dmkd(folder, "pretrain", job, *command, *source)
    return chosen(found, *FIGURES[job], "views", "parameters", "cpu_s")


def train_student(
    folder: Path, arm: str, seed: int, data: Path, options: argparse.Namespace
) -> Row:
    """Run `dmkd distill` on generated or on real images, or go on with it."""
    changes = [f"seed={seed}", f"num_threads={options.threads}", "eval.num_points=1"]
    changes.append(f"train.num_views={options.views}")
    if arm == "real":
        denoiser = yaml.safe_load((folder / "denoiser.yaml").read_text(encoding="utf-8"))
        size = denoiser["data"]["image_size"]
        changes += ["denoiser=null", "sampler=null"]
        changes += [f"source.path={data / 'train'}", f"source.image_size={size}"]
    command = begin_or_resume(folder, "distill.yaml", f"runs/{arm}-{seed}", changes)
    found = dmkd(folder, "distill", *command)
    return chosen(found, "top1", "agreement", "generated_images", "views", "wall_s", "cpu_s")


def begin_or_resume(folder: Path, config: str, run_dir: str, changes: list[str]) -> list[str]:
    """Return the arguments that start a run, or go on with it if it was started before."""
    saved = f"{run_dir}/config.yaml"
    if (folder / saved).is_file():
        return [saved, "--resume"]
    return [config, f"run_dir={run_dir}", *changes]


def chosen(found: Row, *names: str) -> Row:
    """Return some of a command's figures, with four digits after the point."""
    return {k: round(found[k], 4) if isinstance(found[k], float) else found[k] for k in names}


def dmkd(folder: Path, *command: str) -> dict[str, Any]:
    """Run one command in a process of its own, and return the JSON of its last line."""
    study.say(f"dmkd {' '.join(command)}")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        [sys.executable, "-m", "dmkd_fast", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:
            process.wait()  # It saves a checkpoint first.
            raise
    if process.returncode:
        raise SystemExit(process.returncode)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def drawings_table(rows: list[Row]) -> str:
    """Write the students of real and of generated images, and their ratio."""
    rows = counted(rows, cell_of(STUDY))
    students = [r for r in rows if r["part"] == "student"]
    grid = Grid(students, lambda r: r["arm"])
    body = []
    for arm, name in ARMS.items():
        if found := grid.cells.get(arm):
            deviation = f"{statistics.stdev(found):.2f}" if len(found) > 1 else ""
            agreement = statistics.mean(100 * r["agreement"] for r in students if r["arm"] == arm)
            less = "" if arm == "real" else grid.difference([arm], ["real"])
            figures = [f"{grid.mean_of(arm):.2f}", deviation, str(len(found)), f"{agreement:.1f}"]
            body.append([name, *figures, less])
    header = ["student sees", "top-1, %", "std", "seeds", "agreement with teacher, %", "less real"]
    note = " ".join(f"Teacher: {100 * r['test_top1']:.2f} %." for r in rows if "test_top1" in r)
    generated, real = (grid.by_seed.get(arm, {}) for arm in ("generated", "real"))
    ratios = [generated[seed] / real[seed] for seed in sorted(generated.keys() & real.keys())]
    if len(ratios) > 1:
        low, mean, high = ratio_interval(ratios)
        note += (
            f" Accuracy of generated over real: {mean:.3f} ({low:.3f} to {high:.3f}; geometric "
            f"mean and 95 % interval, paired by seed), goal {GOAL}."
        )
    if students:
        note += f" {students[0]['views']:,} views a student; differences are paired by seed."
    return table(header, body, f"{note} {spent(rows)}")


DRAWING_TABLES: dict[str, tuple[str, Callable[[Row], bool], Callable[[list[Row]], str]]] = {
    STUDY: (STUDY, lambda r: True, drawings_table)
}
