"""Run the embedded job at every fidelity preset and with few steps: cost and accuracy.

Cost is images/s of the sampler alone; closeness the Frechet distance to the 10,000 real test images
in the features of the strong teacher (2,048 generated images; our own classifier, so comparable
only here); the student's accuracy that of the same job at the same number of views, one seed each
unless --seeds says otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import CONFIGS, Report, arguments, recorded
from benchmarks.job.embedded import ADAMW, run_job
from dmkd_fast import GeneratedImages, ImageSet
from dmkd_fast.config.generator import FIDELITY
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.parts import prepare

NUM_IMAGES = 2_048
SETTINGS = {name: ("many_steps.yaml", [f"sampler={{fidelity: {name}}}"]) for name in FIDELITY}
SETTINGS["few steps"] = ("fashion_mnist.yaml", [*ADAMW])


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("fidelity", __doc__ or "")
    parser.add_argument("--seeds", type=int, default=1, help="students per setting")
    parser.add_argument("--views", type=int, default=60_000, help="views per student")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    report = Report(bench="fidelity", arguments=recorded(options))
    for name, (file, overrides) in SETTINGS.items():
        row = {"fidelity": name, **quality(CONFIGS / file, overrides)}
        shared = [
            f"train.num_views={options.views}",
            "ring.min_fill_images=6144",
            "ring.capacity_images=10240",
            "ring.samples_per_insert=24",
        ]
        runs = [
            run_job(CONFIGS / file, [*overrides, *shared, f"seed={seed}"])[0]
            for seed in range(options.seeds)
        ]
        row["top1"] = round(statistics.mean(run["top1"] for run in runs), 4)
        row["wall_s"] = round(statistics.mean(run["wall_s"] for run in runs), 1)
        row |= {"views": options.views, "seeds": options.seeds}
        report.rows.append(row)
        print(row, file=sys.stderr)
    report.finish(record=options.record)


def quality(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Sampler settings, images/s and Frechet distance."""
    job, parts = prepare(load_config(DistillConfig, path, overrides))
    distiller = build(job, parts, show=False)
    stream, ids = distiller.images, torch.arange(NUM_IMAGES)
    assert isinstance(stream, GeneratedImages)
    labels, sampler = stream.labels.labels_of(ids), stream.samplers[0][1]
    images = torch.empty(NUM_IMAGES, *parts.origin.image_shape, dtype=torch.uint8)
    size = sampler.micro_batch_images
    sampler.sample(ids[:size], labels[:size], out=images[:size])  # compiles
    started = time.perf_counter()
    sampler.sample(ids, labels, out=images)
    spent = time.perf_counter() - started
    assert isinstance(parts.test_set, ImageSet)
    real = features(distiller, parts.test_set.images)
    return {
        "num_steps": job.config.sampler.num_steps,
        "solver": job.config.sampler.solver,
        "guidance_scale": job.config.sampler.guidance_scale,
        "forwards_per_image": sampler.forwards_per_image,
        "images_per_s": round(NUM_IMAGES / spent, 1),
        "frechet": round(frechet(features(distiller, images), real), 4),
    }


@torch.inference_mode()
def features(distiller: Any, images: Tensor) -> Tensor:
    """Pooled features of the teacher, (N, F) float64."""
    teacher, found = distiller.targets.teachers.networks[0], []
    for places in torch.arange(len(images)).split(500):
        maps = teacher.forward_features(distiller.targets.views.whole(images, places))
        found.append(teacher.forward_head(maps, pre_logits=True).double())
    return torch.cat(found)


def frechet(one: Tensor, other: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features."""
    means = (one.mean(0) - other.mean(0)).square().sum()
    a, b = torch.cov(one.T), torch.cov(other.T)
    root = _root(a)
    return float(means + torch.trace(a + b - 2 * _root(root @ b @ root)))


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    return root
