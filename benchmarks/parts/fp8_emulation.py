"""What products in 8 bits (`sampler.experimental_fp8`) change, emulated on a CPU: no speed.

The embedded denoisers make the same images in float32, in bfloat16 and in bfloat16 with the
products of their blocks in 8 bits. Levels are the mean absolute difference to the bfloat16 images,
of 255; closeness is the Frechet distance to the 10,000 real test images in the features of the
strong teacher. With --students, the job of each denoiser runs with bfloat16 and with 8 bits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import CONFIGS, Report, arguments, recorded
from benchmarks.job.fidelity import features, frechet
from dmkd_fast import GeneratedImages, ImageSet
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs import resolve
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.distill import run
from dmkd_fast.jobs.parts import prepare
from dmkd_fast.training.distiller import Distiller

JOBS = {"many steps": "many_steps.yaml", "few steps": "fashion_mnist.yaml"}
ARMS = {
    "float32": ["dtype=float32"],
    "bf16": ["dtype=bfloat16"],
    "fp8": ["dtype=bfloat16", "sampler.experimental_fp8=true"],
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("fp8-emulation", __doc__ or "", selects=("students",))
    parser.add_argument("--images", type=int, default=1024, help="images per denoiser and arm")
    parser.add_argument("--views", type=int, default=60_000, help="views per student")
    parser.add_argument("--students", type=int, default=0, help="students per denoiser and arm")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    report = Report(bench="fp8-emulation", arguments=recorded(options))
    # The setting is for GPUs. On a CPU the same products are emulated.
    with mock.patch.object(resolve, "check_fp8", return_value=None):
        for name, file in JOBS.items():
            row = {"job": name, **compare(CONFIGS / file, options.images)}
            for arm in ("bf16", "fp8") if options.students else ():
                found = [
                    top1(CONFIGS / file, [*ARMS[arm], f"train.num_views={options.views}"], seed)
                    for seed in range(options.students)
                ]
                row[f"top1_{arm}"] = round(statistics.mean(found), 4)
                row[f"top1_{arm}_of_seeds"] = found
            report.rows.append(row)
            print(row, file=sys.stderr)
    report.finish(record=options.record)


def compare(path: Path, num_images: int) -> dict[str, Any]:
    """Differences between the arms' images, and their distances to real images."""
    made: dict[str, Tensor] = {}
    row: dict[str, Any] = {"images": num_images}
    for arm, overrides in ARMS.items():
        job, parts = prepare(load_config(DistillConfig, path, overrides))
        distiller = build(job, parts, show=False)
        made[arm] = generate(distiller, num_images)
        if arm == "float32":
            judge, test_set = distiller, parts.test_set
    assert isinstance(test_set, ImageSet)
    real = features(judge, test_set.images)
    for arm, images in made.items():
        row[f"frechet_{arm}"] = round(frechet(features(judge, images), real), 4)
    for arm in ("float32", "fp8"):
        levels = (made[arm].int() - made["bf16"].int()).abs().float()
        row[f"levels_{arm}"] = round(float(levels.mean()), 3)
        row[f"within_8_levels_{arm}"] = round(float((levels <= 8).float().mean()), 4)
    return row


def generate(distiller: Distiller, num_images: int) -> Tensor:
    """The first images of a job."""
    stream, ids = distiller.images, torch.arange(num_images)
    assert isinstance(stream, GeneratedImages)
    sampler = stream.samplers[0][1]
    out = torch.empty(num_images, *sampler.denoiser.image_shape, dtype=torch.uint8)
    return sampler.sample(ids, stream.labels.labels_of(ids), out=out)


def top1(path: Path, overrides: list[str], seed: int) -> float:
    """Accuracy of the student of a whole job."""
    with tempfile.TemporaryDirectory() as folder:
        place = [f"run_dir={folder}/run", f"seed={seed}"]
        return float(
            run(load_config(DistillConfig, path, [*overrides, *place]), show=False)["top1"]
        )
