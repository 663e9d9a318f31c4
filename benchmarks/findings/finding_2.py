"""Finding 2: do low-fidelity images teach better?

One solver and one denoiser; guidance x steps at equal views of 2,048 images a cell, all seeds of a
cell on the same images; LeNet-5 teaches LeNet-5-half. Then four cells again at equal total compute
(denoiser forwards and views), and four corners with the strong pair. `samples` varies the images as
well: noise seeds x student seeds at guidance 2 and 4, for both pairs of networks.

`quality` rows say what a cell's images are like: Frechet distance, precision and recall
(Kynkaanniemi et al., arXiv 1904.06991, k = 3) to 2,048 real test images in the features of the
embedded strong classifier, which is not Inception; that classifier's confidence and agreement with
the wanted class; and the processor time of making them.

The grid's solver is deterministic, where fewer steps mean a coarser path to an image. The paper's
is ancestral, where they mean more noise that is left. `ancestral` has the grid's cells of guidance
2 with such a solver.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.findings import study
from benchmarks.harness import arguments
from benchmarks.job.fidelity import frechet
from dmkd_fast.data.test_sets import prepare

PARTS = ("grid", "compute", "corners", "ancestral", "samples")
GUIDANCE, STEPS = (1.0, 1.5, 2.0, 4.0), (4, 16, 50)
COUNT, VIEWS = 2_048, 128_000
FORWARDS = 102_400
"""Forward passes of the denoiser for all images of a student, equal in equal-compute cells."""
EQUAL_COMPUTE = ((1.0, 4), (1.0, 16), (2.0, 16), (4.0, 50))
CORNERS = ((1.0, 4), (1.0, 50), (4.0, 4), (4.0, 50))
SAMPLED, SAMPLED_STEPS = (2.0, 4.0), 16
ANCESTRAL = "ddpm"
"""Solver of the part of this name; the others have the config's."""
LENET: dict[str, Any] = {"teacher": "lenet5", "student": "lenet5_half"}
RESNET: dict[str, Any] = {"teacher": "strong", "student": "resnet"}
RESNET_VIEWS = 38_400


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments(
        "finding-2", __doc__ or "", selects=["seeds", "parts", "noise_seeds", "student_seeds"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--noise-seeds", type=int, default=4, help="of the part samples")
    parser.add_argument("--student-seeds", type=int, default=2, help="of the part samples")
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    cells = study.Cells("finding-2", options)
    parts = {
        "grid": ([(s, k, COUNT) for k in STEPS for s in GUIDANCE], VIEWS, LENET),
        "compute": ([(s, k, FORWARDS // forwards(s, k)) for s, k in EQUAL_COMPUTE], VIEWS, LENET),
        "corners": ([(s, k, COUNT) for s, k in CORNERS], RESNET_VIEWS, RESNET),
        "ancestral": ([(2.0, k, COUNT) for k in STEPS], VIEWS, LENET),
    }
    for part in [part for part in options.parts if part in parts]:
        wanted, num_views, settings = parts[part]
        for guidance, steps, count in wanted:
            cell: dict[str, Any] = {"part": part, "guidance_scale": guidance, "num_steps": steps}
            solver = ANCESTRAL if part == "ancestral" else None
            if part in ("grid", "ancestral") and not cells.has(**cell, seed="quality"):
                images = cell_images(guidance, steps, count, solver=solver)
                cells.add({**cell, "seed": "quality"}, quality(images))
            for seed in study.student_seeds(options.seeds):
                if not cells.has(**cell, seed=seed):
                    cells.add(
                        {**cell, "seed": seed},
                        study.train_student(
                            cell_images(guidance, steps, count, solver=solver),
                            num_views=num_views,
                            seed=seed,
                            **settings,
                        ),
                    )
    if "samples" in options.parts:
        samples(cells, options.noise_seeds, options.student_seeds)
    cells.finish()


def samples(cells: study.Cells, num_noise_seeds: int, num_student_seeds: int) -> None:
    """Measure guidance 2 and 4 on several samples of images, which are apart from the grid's."""
    for noise_seed in range(1, num_noise_seeds + 1):
        for guidance in SAMPLED:
            for seed in study.student_seeds(num_student_seeds):
                for pair, num_views in ((LENET, VIEWS), (RESNET, RESNET_VIEWS)):
                    cell: dict[str, Any] = {
                        "part": "samples",
                        "guidance_scale": guidance,
                        "num_steps": SAMPLED_STEPS,
                        "noise_seed": noise_seed,
                        "student": pair["student"],
                        "seed": seed,
                    }
                    if not cells.has(**cell):
                        images = cell_images(guidance, SAMPLED_STEPS, COUNT, noise_seed)
                        found = study.train_student(images, num_views=num_views, seed=seed, **pair)
                        cells.add(cell, found)


def forwards(guidance: float, steps: int) -> int:
    """Return the number of forward passes of the denoiser per image."""
    return steps * (1 if guidance == 1 else 2)


def cell_images(
    guidance: float, steps: int, count: int, noise_seed: int = 0, *, solver: str | None = None
) -> study.FixedSet:
    """The first images of a cell's stream."""
    overrides = [f"sampler.guidance_scale={guidance:g}", f"sampler.num_steps={steps}"]
    if noise_seed:
        overrides.append(f"seed={noise_seed}")
    if solver is not None:
        overrides.append(f"sampler.solver={solver}")
    return study.generated(count, overrides)


@torch.inference_mode()
def quality(images: study.FixedSet) -> dict[str, Any]:
    """Return the quality of a cell's images beside as many real test images."""
    count = len(images.images)
    made, logits = features(images.images)
    real, _ = features(study.test_images().images[:count])
    shares = logits.softmax(dim=1)
    return {
        "images": count,
        "cpu_s": round(images.cpu_s, 1),
        "frechet": round(frechet(made, real), 4),
        "precision": round(covered(made, real), 4),
        "recall": round(covered(real, made), 4),
        "confidence": round(shares.amax(dim=1).mean().item(), 4),
        "class_agreement": round((shares.argmax(dim=1) == images.labels).double().mean().item(), 4),
    }


def features(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features (N, F) float64 and logits (N, C) of the strong classifier."""
    model, spec = study.load_teacher("strong")
    network: Any = model
    found, logits = [], []
    for part in images.split(512):
        maps = network.forward_features(prepare(part, spec.input))
        found.append(network.forward_head(maps, pre_logits=True).double())
        logits.append(network.forward_head(maps).double())
    return torch.cat(found), torch.cat(logits)


def covered(images: Tensor, others: Tensor, *, k: int = 3) -> float:
    """Share of images (N, F) within the k-nearest-neighbour ball of one of `others` (M, F)."""
    radii = torch.cdist(others, others).kthvalue(k + 1, dim=1).values  # The nearest is itself.
    return (torch.cdist(images, others) <= radii).any(dim=1).double().mean().item()
