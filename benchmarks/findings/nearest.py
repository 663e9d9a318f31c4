"""Generated images beside their nearest real training images: how much was memorised.

Distance is the root mean square difference of pixels in [0, 1]. For scale, the same is measured
from real images that the denoiser never saw (the held-out ones) to the training images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import ROOT, Report, arguments, recorded
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.parts import prepare
from dmkd_fast.jobs.pretrain.real_data import load_real
from dmkd_fast.jobs.report.images import pairs

NUM_IMAGES = 1_000


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("nearest", __doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="folder with the training set")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    path = ROOT / "configs" / "fashion_mnist.yaml"
    job, parts = prepare(load_config(DistillConfig, path, ["sampler.compile=false"]))
    distiller = build(job, parts, show=False)
    real = load_real(options.data, distiller.device)

    ids, labels = distiller.images.next_block(NUM_IMAGES)
    made = distiller.ring.images.new_empty((NUM_IMAGES, *distiller.ring.images.shape[1:]))
    distiller.images.write(ids, labels, made, progress=0.0)
    made_distance, made_index = nearest(made, real.train.images)
    held_distance, _ = nearest(real.held_out.images[:NUM_IMAGES], real.train.images)

    report = Report(bench="nearest", arguments=recorded(options))
    for name, distance in (("generated", made_distance), ("held-out real", held_distance)):
        quantiles = distance.quantile(torch.tensor([0.0, 0.05, 0.5, 0.95])).tolist()
        names = ("min", "p5", "median", "p95")
        row = {key: round(value, 4) for key, value in zip(names, quantiles, strict=True)}
        report.rows.append({"images": name, "n": NUM_IMAGES, **row})
    classes = len(real.train.class_names)
    first = torch.cat([(labels == c).nonzero()[:5, 0] for c in range(classes)])
    pairs(
        made[first],
        real.train.images[made_index[first]],
        real.train.class_names,
        ROOT / "docs" / "images" / "nearest.png",
    )
    report.finish(record=options.record)


def nearest(images: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to and index of the nearest of `others` (M, ...) for each of `images` (N, ...)."""
    flat = others.flatten(1).float() / 255
    distances, indices = [], []
    for part in images.flatten(1).float().div(255).split(100):
        distance, index = torch.cdist(part, flat).min(dim=1)
        distances.append(distance / flat.shape[1] ** 0.5)
        indices.append(index)
    return torch.cat(distances), torch.cat(indices)
